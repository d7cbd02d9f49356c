"""The parts of a random model: norms, attention, feed-forward parts, and odd steps between them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.case import Layer

EPS = 1e-5  # of every norm: `eps=None` would depend on the dtype
LONGEST = 80  # positions of learned tables
WINDOW = 5
MEMORY = 11  # positions that cross attention looks at
_EXPERTS = 3

Batch = dict[str, Tensor]


@torch.library.custom_op("mstc_fuzz::bend", mutates_args=())
def bend(x: Tensor) -> Tensor:
    """``x + sin(x)``, in an op that nobody has a rule for."""
    return x + torch.sin(x)


@bend.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _bend_backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return grad * (1 + torch.cos(x))


def _bend_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


bend.register_autograd(_bend_backward, setup_context=_bend_setup)


class ClipGradient(torch.autograd.Function):
    """Identity whose gradient is clipped: not linear in the tangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-1e-3, 1e-3)


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is halved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 0.5


class WrittenRMSNorm(nn.Module):
    """A root-mean-square norm as models write it out, in float32 at least."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype is torch.float64 else x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * (wide * scale).to(x.dtype)


def make_norm(kind: str, size: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(size, eps=EPS)
    return nn.RMSNorm(size, eps=EPS) if kind == "rms" else WrittenRMSNorm(size)


class Transposed(nn.Module):
    """A linear map with its weight stored as ``[in, out]``."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, out) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


def _angles(length: int, size: int, like: Tensor) -> Tensor:
    rates = 10.0 ** (-torch.arange(0, size, 2, device=like.device, dtype=torch.float32) / size)
    return torch.arange(length, device=like.device)[:, None] * rates


def rotate(kind: str, x: Tensor) -> Tensor:
    """Rotary positions on ``[batch, heads, length, size]``."""
    if kind == "none":
        return x
    wide = x if x.dtype is torch.float64 else x.float()
    angles = _angles(x.shape[-2], x.shape[-1], x).to(wide.dtype)
    if kind == "complex":
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
    if kind == "pairs":
        even, odd = wide[..., ::2], wide[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
        return turned.flatten(-2).to(x.dtype)
    half = x.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    cos, sin = (torch.cat((a, a), -1) for a in (angles.cos(), angles.sin()))
    return (wide * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, layer: Layer, heads: int, size: int) -> None:
        super().__init__()
        self.layer, self.heads, self.size = layer, heads, size
        self.groups = 1 if layer.grouped else heads
        hidden, keys = heads * size, self.groups * size
        self.widths = [hidden, keys, keys]
        self.cross = layer.mask.startswith("cross")
        self.projection = layer.projection
        if self.cross or (self.projection == "unbind" and layer.grouped):
            self.projection = "separate"
        if self.projection == "separate":
            self.parts = nn.ModuleList(nn.Linear(hidden, w, bias=layer.bias) for w in self.widths)
        elif self.projection == "einsum":
            self.weights = nn.ParameterList(
                torch.randn(w // size, hidden, size) / math.sqrt(hidden) for w in self.widths
            )
        else:
            kind = Transposed if self.projection == "transposed" else nn.Linear
            self.packed = kind(hidden, sum(self.widths))
        self.out = nn.Linear(hidden, hidden, bias=layer.bias)
        if layer.qk_norm:
            self.query_norm, self.key_norm = (nn.RMSNorm(size, eps=1e-6) for _ in range(2))
        if layer.mask == "learned_bias":
            self.table = nn.Parameter(torch.randn(heads, 2 * LONGEST) * 0.5)

    def projected(self, x: Tensor, memory: Tensor) -> list[Tensor]:
        """Query, key and value as ``[batch, heads, length, size]``."""
        if self.projection == "einsum":
            return [torch.einsum("bsh,nhd->bnsd", x, w) for w in self.weights]
        if self.projection == "unbind":
            packed = self.packed(x).view(*x.shape[:2], 3, self.heads, self.size)
            return [p.transpose(1, 2) for p in packed.unbind(2)]
        if self.projection == "separate":
            sources = (x, memory, memory) if self.cross else (x, x, x)
            flat = [part(s) for part, s in zip(self.parts, sources)]
        else:
            flat = list(self.packed(x).split(self.widths, -1))
        return [
            f.view(f.shape[0], f.shape[1], w // self.size, self.size).transpose(1, 2)
            for f, w in zip(flat, self.widths)
        ]

    def bias(self, query: Tensor, keys: int, batch: Batch) -> Tensor | None:
        """What is masked: bool (True is seen) or added to the scores; None for nothing."""
        kind, rows = self.layer.mask, query.shape[-2]
        at = torch.arange(rows, device=query.device)[:, None]
        to = torch.arange(keys, device=query.device)[None, :]
        causal = to <= at
        if kind == "positions":
            return causal[None, None]
        if kind == "tril":
            return torch.tril(torch.ones(rows, keys, dtype=torch.bool, device=query.device))
        if kind == "window":
            return causal & (at - to < WINDOW)
        if kind == "padding":
            return (batch["keep"][:, None, None, :] & causal) | (at == to)
        if kind == "keys":  # the same for every query; the first key is seen by all
            seen = batch["keep"][:, None, None, :] | (to == 0)
            return seen & (at >= 0) if self.layer.bias else seen.expand(-1, 1, rows, -1)
        if kind == "documents":
            docs = batch["docs"]
            return (causal & (docs[:, :, None] == docs[:, None, :]))[:, None]
        if kind == "learned_bias":
            return self.table[:, at - to + LONGEST].to(query.dtype)
        if kind == "lowest":
            lowest = torch.finfo(query.dtype).min
            full = torch.full((rows, keys), lowest, dtype=query.dtype, device=query.device)
            return torch.triu(full, diagonal=1)[None, None].expand(query.shape[0], 1, -1, -1)
        if kind == "slopes":
            slopes = 0.5 ** torch.arange(1, self.heads + 1, device=query.device)
            far = -slopes[:, None, None] * (at - to).abs()
            return far.masked_fill(~causal, float("-inf")).to(query.dtype)
        return None

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        layer = self.layer
        query, key, value = self.projected(x, batch["memory"])
        if layer.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(layer.rope, query), rotate(layer.rope, key)
        bias = self.bias(query, key.shape[-2], batch)
        causal = layer.mask in ("is_causal", "cross_causal")
        if layer.core == "fused":
            mixed = self.fused(query, key, value, bias, causal)
        elif layer.core == "author_chunks":
            mixed = self.in_blocks(query, key, value, bias, causal)
        else:
            mixed = self.written(query, key, value, _with_causal(bias, causal, query, key))
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def rate(self) -> float:
        return self.layer.attention_dropout if self.training else 0.0

    def fused(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool
    ) -> Tensor:
        if self.layer.grouped and self.layer.bias:  # grouped by the caller, or by the op
            key, value = (t.repeat_interleave(self.heads, 1) for t in (key, value))
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            dropout_p=self.rate(),
            is_causal=causal,
            enable_gqa=grouped,
        )

    def in_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool
    ) -> Tensor:
        """Queries in two blocks, as authors do to save memory."""
        bias = _with_causal(bias, causal, query, key)
        half = query.shape[-2] // 2
        blocks = []
        for rows in (slice(0, half), slice(half, None)):
            part = None if bias is None else bias[..., rows, :]
            blocks.append(self.written(query[:, :, rows], key, value, part))
        return torch.cat(blocks, 2)

    def written(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        scale = self.size**-0.5
        if key.shape[1] != query.shape[1]:
            key, value = (t.expand(-1, self.heads, -1, -1) for t in (key, value))
        if self.layer.core == "einsum":
            scores = torch.einsum("bnqd,bnkd->bnqk", query, key) * scale
        else:
            scores = query @ key.transpose(-1, -2) * scale
        if self.layer.score_cap:
            scores = 3.0 * torch.tanh(scores / 3.0)
        if bias is not None:
            masked = bias.dtype is torch.bool
            scores = scores.masked_fill(~bias, float("-inf")) if masked else scores + bias
        weights = scores.softmax(-1)
        if self.layer.attention_dropout:
            weights = F.dropout(weights, self.layer.attention_dropout, self.training)
        if self.layer.core == "einsum":
            return torch.einsum("bnqk,bnkd->bnqd", weights, value)
        return weights @ value


def _with_causal(bias: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    if not causal:
        return bias
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


class FeedForward(nn.Module):
    def __init__(self, layer: Layer, hidden: int) -> None:
        super().__init__()
        self.layer = layer
        kind, bias, wide = layer.ffn, layer.bias, 4 * hidden
        if kind in ("experts", "experts_einsum"):
            self.router = nn.Linear(hidden, _EXPERTS, bias=False)
            self.ups = nn.Parameter(torch.randn(_EXPERTS, hidden, wide) / math.sqrt(hidden))
            self.downs = nn.Parameter(torch.randn(_EXPERTS, wide, hidden) / math.sqrt(wide))
        elif kind == "transposed":
            self.up, self.down = Transposed(hidden, wide), Transposed(wide, hidden)
        else:
            doubled = 2 * wide if kind == "swiglu_fused" else wide
            self.up = nn.Linear(hidden, doubled, bias=bias)
            self.down = nn.Linear(wide, hidden, bias=bias)
            if kind == "swiglu":
                self.gate = nn.Linear(hidden, wide, bias=bias)

    def inner(self, x: Tensor) -> Tensor:
        kind = self.layer.ffn
        if kind == "swiglu":
            return F.silu(self.gate(x)) * self.up(x)
        if kind == "swiglu_fused":
            gate, up = self.up(x).chunk(2, -1)
            return F.silu(gate) * up
        if kind == "relu2":
            return F.relu(self.up(x)).square()
        return F.gelu(self.up(x), approximate="tanh" if kind == "tanh" else "none")

    def dropped(self, x: Tensor) -> Tensor:
        rate = self.layer.ffn_dropout
        return F.dropout(x, rate, self.training) if rate else x

    def experts(self, x: Tensor) -> Tensor:
        chances = self.router(x).softmax(-1)
        best, which = chances.topk(2, -1)
        best = best / best.sum(-1, keepdim=True)
        weights = torch.zeros_like(chances).scatter(-1, which, best)
        if self.layer.ffn == "experts_einsum":
            inner = self.dropped(F.silu(torch.einsum("bsh,ehw->bsew", x, self.ups)))
            return torch.einsum("bsew,ewh,bse->bsh", inner, self.downs, weights)
        total = torch.zeros_like(x)
        for index in range(_EXPERTS):
            inner = self.dropped(F.silu(x @ self.ups[index]))
            total = total + weights[..., index, None] * (inner @ self.downs[index])
        return total

    def forward(self, x: Tensor) -> Tensor:
        kind = self.layer.ffn
        if kind in ("experts", "experts_einsum"):
            return self.experts(x)
        if kind == "chunked":
            return torch.cat([self.down(self.dropped(self.inner(c))) for c in x.chunk(3, 1)], 1)
        if kind == "features":  # a sum over slices of the wide dim
            total = torch.zeros_like(x)
            for up, down in zip(self.up.weight.chunk(2, 0), self.down.weight.chunk(2, 1)):
                total = total + self.dropped(F.gelu(x @ up.T)) @ down.T
            return total
        return self.down(self.dropped(self.inner(x)))


class Extra(nn.Module):
    """A step between layers that a loop over tokens has to respect: ``[batch, length, size]``."""

    def __init__(self, kind: str, hidden: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "conv":
            self.depthwise = nn.Conv1d(hidden, hidden, 3, groups=hidden)
        if kind == "buffer":
            self.register_buffer("seen", torch.zeros(hidden))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return getattr(self, self.kind)(x, batch)

    def none(self, x: Tensor, batch: Batch) -> Tensor:
        return x

    def gather(self, x: Tensor, batch: Batch) -> Tensor:
        return torch.gather(x, 1, batch["order"][..., None].expand_as(x))

    def scatter(self, x: Tensor, batch: Batch) -> Tensor:
        index = (batch["order"] // 2)[..., None].expand_as(x)
        return x + torch.zeros_like(x).scatter_add(1, index, x)

    def masked_fill(self, x: Tensor, batch: Batch) -> Tensor:
        return x.masked_fill(~batch["keep"][..., None], 0.0)

    def custom_op(self, x: Tensor, batch: Batch) -> Tensor:
        return bend(x)

    def clip(self, x: Tensor, batch: Batch) -> Tensor:
        return ClipGradient.apply(x)

    def scale_gradient(self, x: Tensor, batch: Batch) -> Tensor:
        return ScaleGradient.apply(x)

    def buffer(self, x: Tensor, batch: Batch) -> Tensor:
        # read only after it was written: otherwise PyTorch 2.13's own backends compute `x + seen`
        # again in the backward, from what the buffer has become
        self.seen.mul_(0.9).add_(x.detach().sum((0, 1)), alpha=0.01)
        self.calls += 1
        return x + self.seen

    def cumsum(self, x: Tensor, batch: Batch) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + x.cumsum(1) / counts.to(x.dtype)

    def shift(self, x: Tensor, batch: Batch) -> Tensor:
        return x + 0.5 * torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)

    def center(self, x: Tensor, batch: Batch) -> Tensor:
        return x - x.mean(1, keepdim=True)

    def batch_mean(self, x: Tensor, batch: Batch) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)

    def conv(self, x: Tensor, batch: Batch) -> Tensor:
        padded = F.pad(x.transpose(1, 2), (2, 0))
        return x + self.depthwise(padded).transpose(1, 2)

    def flip(self, x: Tensor, batch: Batch) -> Tensor:
        return x + 0.5 * x.flip(1)

    def in_place(self, x: Tensor, batch: Batch) -> Tensor:
        y = x.clone()
        y[:, :1] = 0.5
        y[:, 1:].mul_(1.5)
        return y

    def sort(self, x: Tensor, batch: Batch) -> Tensor:
        return x + 0.5 * x.sort(1).values
