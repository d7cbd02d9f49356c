"""What a case is: a frozen record of choices, drawn from a seed, that reads and writes JSON.

The default of every field is its simplest value, so a failing case is made small by putting fields
back to their defaults.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from typing import Any

MASKS = (
    *("none", "is_causal", "positions", "tril", "window", "padding", "documents"),
    *("learned_bias", "lowest", "slopes", "cross", "cross_causal", "keys"),
)
CORES = ("fused", "written", "einsum", "author_chunks")
PROJECTIONS = ("separate", "split", "unbind", "einsum", "transposed")
ROPES = ("none", "halves", "complex", "pairs")
FFNS = (
    *("none", "gelu", "tanh", "swiglu", "swiglu_fused", "relu2", "transposed"),
    *("chunked", "features", "experts", "experts_einsum"),
)
EXTRAS = (
    *("none", "gather", "masked_fill", "custom_op", "clip", "scale_gradient", "buffer", "cumsum"),
    *("shift", "center", "conv", "flip", "in_place", "sort", "scatter", "batch_mean"),
)
LOSSES = (
    *("ce", "ce_sum", "ce_items", "ce_weights", "ce_smooth", "ce_ignore", "ce_soft", "z", "gather"),
    *("entropy", "kl", "two_heads", "mse", "several", "bce", "focal", "preference", "perplexity"),
    *("per_sequence", "margin", "squares", "weighted_mean", "aux", "ce_smooth_weights"),
)
WAYS = (
    *("plain", "outside", "outside_compiled", "accumulate", "retain", "functional", "step"),
    *("inference", "twice", "grad", "logits_read", "two_lengths"),
)
NEEDS_FULL_PRECISION = ("experts", "experts_einsum")  # a near tie is decided otherwise in bfloat16


@dataclass(frozen=True)
class Layer:
    """One layer of the model."""

    core: str = "none"  # how attention is written, or "none"
    mask: str = "none"
    projection: str = "separate"
    rope: str = "none"
    qk_norm: bool = False
    score_cap: bool = False  # tanh on the scores, where attention is written out
    grouped: bool = False  # fewer heads of keys than of queries
    attention_dropout: float = 0.0
    ffn: str = "none"
    bias: bool = False
    ffn_dropout: float = 0.0
    residual_dropout: float = 0.0
    norm: str = "layer"  # or "rms", "rms_written"
    residual: str = "pre"  # or "post", "parallel"
    extra: str = "none"
    checkpoint: bool = False


@dataclass(frozen=True)
class Case:
    """A model, its data, its loss and how it is run."""

    seed: int = 0  # of weights and data
    layers: tuple[Layer, ...] = ()
    shared: bool = False  # the first layer is called once more at the end
    batch: int = 2
    length: int = 24
    heads: int = 2
    head_dim: int = 8
    vocab: int = 160
    tied: bool = False
    head_bias: bool = False
    positions: bool = False
    soft_cap: bool = False
    logit_scale: bool = False
    final_norm: bool = True
    source: str = "ids"  # or "floats", "expanded", "transposed": what goes in
    loss: str = "ce"
    shift: str = "none"  # or "slice", "flat_slice", "pad"
    loss_scale: float = 1.0
    float_loss: bool = False  # the logits are cast to float32 before the loss
    logits_out: bool = False  # logits are returned beside the loss
    way: str = "plain"
    frozen: str = "none"  # or "embedding", "matrices", "random"
    dynamic: str = "none"  # or "true", "false", "mark"
    dtype: str = "float64"  # or "float32", "bfloat16", "autocast"
    chunk_rows: int | None = 8
    min_region_bytes: int = 1024
    gradient_in_forward: bool = True
    defer_outputs: bool = True
    lowering: str = "eager"

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def is_random(self) -> bool:
        return any(
            layer.attention_dropout or layer.ffn_dropout or layer.residual_dropout
            for layer in self.layers
        )

    def to_json(self) -> str:
        """The fields that are not the default."""
        fields = _changed(self)
        if self.layers:
            fields["layers"] = [_changed(layer) for layer in self.layers]
        return json.dumps(fields)

    @staticmethod
    def from_json(text: str) -> Case:
        """What `to_json` wrote, parsed.

        Raises:
            TypeError: a field is unknown.
        """
        fields = json.loads(text)
        fields["layers"] = tuple(Layer(**layer) for layer in fields.get("layers", ()))
        return Case(**fields)


def _changed(record: Any) -> dict[str, Any]:
    return {
        f.name: value
        for f in dataclasses.fields(record)
        if (value := getattr(record, f.name)) != f.default
    }


def _often(rng: random.Random, usual: Any, others: tuple[Any, ...], share: float) -> Any:
    return rng.choice(others) if rng.random() < share else usual


def _draw_layer(rng: random.Random, dropout: bool, grouped: bool) -> Layer:
    core = rng.choice((*CORES, "fused", "none"))
    ffn = rng.choice(FFNS)

    def rate() -> float:
        return rng.choice((0.0, 0.1, 0.5)) if dropout else 0.0

    attends = core != "none"
    extra = _often(rng, "none", EXTRAS, 0.35)
    return Layer(
        core=core,
        mask=rng.choice(MASKS) if attends else "none",
        projection=rng.choice(PROJECTIONS) if attends else "separate",
        rope=_often(rng, "none", ROPES, 0.5) if attends else "none",
        qk_norm=attends and rng.random() < 0.2,
        score_cap=core in ("written", "einsum") and rng.random() < 0.2,
        grouped=attends and grouped and rng.random() < 0.5,
        attention_dropout=rate() if attends else 0.0,
        ffn=ffn,
        bias=rng.random() < 0.4,
        ffn_dropout=rate() if ffn != "none" else 0.0,
        residual_dropout=rate(),
        norm=rng.choice(("layer", "rms", "rms_written")),
        residual=rng.choice(("pre", "pre", "post", "parallel")),
        extra=extra,
        # what a layer writes to a buffer, its recomputation writes again
        checkpoint=rng.random() < 0.15 and extra != "buffer",
    )


def draw(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    dropout = rng.random() < 0.2
    heads = rng.choice((1, 2, 4))
    layers = tuple(
        _draw_layer(rng, dropout, heads > 1) for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2)))
    )
    way = rng.choice(WAYS)
    dtype = (
        "float64" if dropout else _often(rng, "float64", ("float32", "bfloat16", "autocast"), 0.4)
    )
    if any(layer.ffn in NEEDS_FULL_PRECISION or layer.extra == "sort" for layer in layers):
        dtype = "float64" if dtype != "float32" else dtype
    source = _often(rng, "ids", ("floats", "expanded", "transposed"), 0.25)
    return Case(
        seed=seed,
        layers=layers,
        shared=bool(layers) and rng.random() < 0.15,
        batch=rng.choice((1, 2, 2, 3, 4)),
        length=_often(rng, rng.choice((16, 17, 23, 24, 31, 37)), (0, 1, 2, 3, 5), 0.1),
        heads=heads,
        head_dim=rng.choice((4, 6, 8)),
        vocab=rng.choice((97, 128, 160, 251)),
        tied=source == "ids" and rng.random() < 0.25,
        head_bias=rng.random() < 0.3,
        positions=rng.random() < 0.3,
        soft_cap=rng.random() < 0.15,
        logit_scale=rng.random() < 0.15,
        final_norm=rng.random() < 0.8,
        source=source,
        loss=rng.choice((*LOSSES, "ce", "ce_ignore")),
        shift=rng.choice(("none", "slice", "flat_slice", "pad")),
        loss_scale=_often(rng, 1.0, (0.125, 3.0, 1024.0), 0.2),
        float_loss=rng.random() < 0.3,
        logits_out=rng.random() < 0.4,
        way=way,
        frozen=_often(rng, "none", ("embedding", "matrices", "random"), 0.2),
        dynamic=_often(rng, "none", ("true", "false", "mark"), 0.08),
        dtype=dtype,
        chunk_rows=rng.choice((3, 5, 8, 8, 13, 16, 29, None)),
        min_region_bytes=rng.choice((1, 256, 1024, 1024)),
        gradient_in_forward=rng.random() < 0.8,
        defer_outputs=rng.random() < 0.8,
    )
