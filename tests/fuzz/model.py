"""A random model and its data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fuzz.blocks import LONGEST, MEMORY, Attention, Batch, Extra, FeedForward, make_norm
from tests.fuzz.case import Case, Layer
from tests.fuzz.losses import loss_of, needs_second_head


class Block(nn.Module):
    """One layer: attention and feed-forward part with their residuals, then an odd step."""

    def __init__(self, layer: Layer, heads: int, size: int) -> None:
        super().__init__()
        hidden = heads * size
        self.layer = layer
        self.branches = nn.ModuleList()
        if layer.core != "none":
            self.branches.append(Attention(layer, heads, size))
        if layer.ffn != "none":
            self.branches.append(FeedForward(layer, hidden))
        self.norms = nn.ModuleList(make_norm(layer.norm, hidden) for _ in self.branches)
        self.extra = Extra(layer.extra, hidden)

    def branch(self, index: int, x: Tensor, batch: Batch) -> Tensor:
        part = self.branches[index]
        out = part(x, batch) if isinstance(part, Attention) else part(x)
        rate = self.layer.residual_dropout
        return F.dropout(out, rate, self.training) if rate else out

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        indices = range(len(self.branches))
        if self.layer.residual == "parallel" and len(self.branches) > 0:
            normed = self.norms[0](x)
            for index in indices:
                x = x + self.branch(index, normed, batch)
        elif self.layer.residual == "post":
            for index in indices:
                x = self.norms[index](x + self.branch(index, x, batch))
        else:
            for index in indices:
                x = x + self.branch(index, self.norms[index](x), batch)
        return self.extra(x, batch)


class Model(nn.Module):
    """Embedding, layers, one or two heads."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        if case.source == "ids":
            self.embed = nn.Embedding(case.vocab, case.hidden)
        if case.positions:
            self.positions = nn.Embedding(LONGEST, case.hidden)
        self.blocks = nn.ModuleList(Block(la, case.heads, case.head_dim) for la in case.layers)
        self.norm = make_norm("layer", case.hidden) if case.final_norm else nn.Identity()
        self.head = nn.Linear(case.hidden, case.vocab, bias=case.head_bias)
        if case.tied:
            self.head.weight = self.embed.weight
        if needs_second_head(case):
            self.second = nn.Linear(case.hidden, case.vocab)
        if case.logit_scale:
            self.scale = nn.Parameter(torch.tensor(1.5))

    def hidden(self, batch: Batch) -> Tensor:
        x = self.embed(batch["ids"]) if self.case.source == "ids" else batch["x"]
        if self.case.positions:
            x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        blocks = list(self.blocks) + list(self.blocks[:1]) * self.case.shared
        for block in blocks:
            if block.layer.checkpoint:
                x = checkpoint(block, x, batch, use_reentrant=False)
            else:
                x = block(x, batch)
        return self.norm(x)

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        hidden = self.hidden(batch)
        logits = self.head(hidden)
        if self.case.logit_scale:
            logits = logits * self.scale
        if self.case.soft_cap:
            logits = 5.0 * torch.tanh(logits / 5.0)
        out = {"logits": logits, "hidden": hidden}
        if needs_second_head(self.case):
            out["second"] = self.second(hidden)
        return out

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """With labels: the loss, and logits where the case returns them; without: what the loss
        is made from."""
        out = self.outputs(batch)
        if "labels" not in batch:
            return out
        found = {"loss": loss_of(self.case, out, batch) * self.case.loss_scale}
        if self.case.logits_out:
            found["logits"] = out["logits"]
        return found


def make_model(case: Case) -> Model:
    """In float32, the same for the same case."""
    torch.manual_seed(case.seed)
    model = Model(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.startswith("head") and parameter.dim() == 2:
                parameter.mul_(2.0)
    _freeze(model, case)
    return model.train()


def _freeze(model: Model, case: Case) -> None:
    if case.frozen == "none":
        return
    generator = torch.Generator().manual_seed(case.seed)
    for name, parameter in model.named_parameters():
        chance = torch.rand((), generator=generator).item()
        stays = {
            "embedding": "embed" in name,
            "matrices": parameter.dim() >= 2 and not name.startswith("embed"),
            "random": chance < 0.5,
        }[case.frozen]
        parameter.requires_grad_(not stays)
    if not any(p.requires_grad for p in model.parameters()):
        model.head.weight.requires_grad_(True)


def make_batch(case: Case, *, length: int | None = None, step: int = 0) -> Batch:
    """In float32; the leaf that needs a gradient, if there is one, is ``batch["leaf"]``."""
    generator = torch.Generator().manual_seed(1000 * case.seed + step + 1)
    rows, length = case.batch, case.length if length is None else length
    keep = torch.ones(rows, length, dtype=torch.bool)
    keep[-1:, (3 * length) // 4 :] = False
    batch = {
        "labels": torch.randint(case.vocab, (rows, length), generator=generator),
        "keep": keep,
        "docs": (torch.rand(rows, length, generator=generator) < 0.15).long().cumsum(1),
        "order": torch.rand(rows, length, generator=generator).argsort(1),
        "weights": torch.rand(case.vocab, generator=generator) + 0.5,
        "items": torch.tensor(7.0),
        "memory": torch.randn(rows, MEMORY, case.hidden, generator=generator),
        "features": torch.randn(rows, length, case.hidden, generator=generator),
    }
    if case.source == "ids":
        batch["ids"] = torch.randint(case.vocab, (length, rows), generator=generator).t()
    elif case.source == "expanded":
        batch["leaf"] = torch.randn(1, length, case.hidden, generator=generator)
    elif case.source == "transposed":
        batch["leaf"] = torch.randn(length, rows, case.hidden, generator=generator)
    else:
        batch["leaf"] = torch.randn(rows, length, case.hidden, generator=generator)
    return batch


def as_dtype(case: Case, batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch of one run: floats converted, the leaf fresh, ``x`` made from it."""
    out = {k: v.to(dtype) if v.is_floating_point() else v.clone() for k, v in batch.items()}
    out["memory"].requires_grad_(True)
    if "leaf" in out:
        leaf = out["leaf"] = out["leaf"].detach().clone().requires_grad_(True)
        out["x"] = {
            "floats": lambda: leaf * 1.0,
            "expanded": lambda: leaf.expand(case.batch, -1, -1),
            "transposed": lambda: leaf.transpose(0, 1),
        }[case.source]()
    return out
