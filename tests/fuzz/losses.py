"""From logits to a scalar: the losses that people train with, and some that nobody should."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.blocks import Batch
from tests.fuzz.case import Case

IGNORED = -100


def needs_second_head(case: Case) -> bool:
    return case.loss in ("kl", "two_heads", "several")


def aligned(case: Case, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the labels that they should predict, both flat over tokens."""
    if case.shift == "slice":
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif case.shift == "flat_slice":
        logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    elif case.shift == "pad":
        labels = F.pad(labels, (0, 1), value=0)[..., 1:].contiguous()
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def _log_chance(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def loss_of(case: Case, out: dict[str, Tensor], batch: Batch) -> Tensor:
    """The scalar to train on, before `Case.loss_scale`."""
    logits, second, hidden = out["logits"], out.get("second"), out["hidden"]
    if case.float_loss and logits.dtype is not torch.float64:
        logits = logits.float()
    flat, labels = aligned(case, logits, batch["labels"])
    kind = case.loss
    if kind == "ce":
        return F.cross_entropy(flat, labels)
    if kind == "ce_sum":
        return F.cross_entropy(flat, labels, reduction="sum")
    if kind == "ce_items":
        return F.cross_entropy(flat, labels, reduction="sum") / batch["items"]
    if kind == "ce_weights":
        return F.cross_entropy(flat, labels, weight=batch["weights"].to(flat.dtype))
    if kind == "ce_smooth_weights":
        weight = batch["weights"].to(flat.dtype)
        return F.cross_entropy(flat, labels, weight=weight, label_smoothing=0.2)
    if kind == "ce_smooth":
        return F.cross_entropy(flat, labels, label_smoothing=0.1)
    if kind == "ce_ignore":
        ignored = torch.where(labels % 3 == 0, IGNORED, labels)
        return F.cross_entropy(flat, ignored, ignore_index=IGNORED, label_smoothing=0.0)
    if kind == "ce_soft":
        target = F.one_hot(labels, flat.shape[-1]).to(flat.dtype) * 0.9 + 0.1 / flat.shape[-1]
        return F.cross_entropy(flat, target)
    if kind == "z":
        return F.cross_entropy(flat, labels) + 1e-2 * flat.logsumexp(-1).square().mean()
    if kind == "gather":
        return -_log_chance(flat, labels).mean()
    if kind == "entropy":
        chances = flat.softmax(-1)
        return _log_chance(flat, labels).mean() + (chances * flat.log_softmax(-1)).sum(-1).mean()
    if kind == "bce":
        target = F.one_hot(labels, flat.shape[-1]).to(flat.dtype)
        return F.binary_cross_entropy_with_logits(flat, target)
    if kind == "focal":
        chance = _log_chance(flat, labels)
        return -((1 - chance.exp()).square() * chance).mean()
    if kind == "preference":
        scores = _log_chance(logits, batch["labels"]).sum(-1)
        return -F.logsigmoid(0.1 * (scores - scores.mean())).sum()
    if kind == "perplexity":
        return (0.3 * F.cross_entropy(flat, labels)).exp()
    if kind == "per_sequence":
        each = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        keep = batch["keep"].to(each.dtype)
        return ((each * keep).sum(-1) / keep.sum(-1).clamp(min=1)).sum()
    if kind == "margin":
        right = flat.gather(-1, labels[:, None])
        return F.relu(1 + flat - right).sum(-1).mean()
    if kind == "squares":
        return F.cross_entropy(flat, labels) + 1e-3 * flat.square().mean() * flat.abs().mean()
    if kind == "weighted_mean":
        each = F.cross_entropy(flat, labels, reduction="none")
        share = each.detach().exp().clamp(max=100)
        return (each * share).sum() / share.sum()
    if kind == "aux":
        return F.cross_entropy(flat, labels) + 0.1 * hidden.square().mean()
    if kind == "mse":
        return F.mse_loss(hidden, batch["features"].to(hidden.dtype)) + 0 * flat.sum()
    assert second is not None
    other, _ = aligned(case, second, batch["labels"])
    if kind == "kl":
        return F.kl_div(
            flat.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="batchmean"
        )
    if kind == "two_heads":
        return F.cross_entropy(flat, labels) + F.cross_entropy(other, labels.flip(0))
    assert kind == "several"
    ce = F.cross_entropy(flat, labels)
    z = flat.logsumexp(-1).square().mean()
    features = F.mse_loss(hidden, batch["features"].to(hidden.dtype))
    return ce + 0.01 * z + 0.3 * features + 0.5 * F.cross_entropy(other, labels)
