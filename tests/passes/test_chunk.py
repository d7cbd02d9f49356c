"""Random models in float64: with loops and without, the same numbers to the last digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.passes.graphs import Recorder, assert_close, gradients_of

Draw = Callable[[st.SearchStrategy[Any]], Any]
Step = Callable[[dict[str, torch.Tensor], list[torch.Tensor]], torch.Tensor]

NARROW, WIDE = (2, 4), (16, 24)


@dataclass
class Program:
    """A model as a list of steps over its inputs; step i's value is ``v[i]``."""

    draw: Draw
    batch: int
    length: int
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)  # features of each step's value
    text: list[str] = field(default_factory=list)

    def real(self, *shape: int) -> str:
        name = f"p{len(self.inputs)}"
        self.inputs[name] = torch.randn(shape, dtype=torch.float64).mul_(0.5).requires_grad_()
        return name

    def constant(self, value: torch.Tensor) -> str:
        name = f"p{len(self.inputs)}"
        self.inputs[name] = value
        return name

    def weight(self, *shape: int) -> str:
        """A new parameter, or one of this shape that is in use already (tied)."""
        same = [n for n, t in self.inputs.items() if t.shape == shape and t.requires_grad]
        if same and self.draw(st.booleans()):
            return same[0]
        return self.real(*shape)

    def step(self, text: str, width: int, fn: Step) -> int:
        self.text.append(f"v{len(self.steps)} [{width}] = {text}")
        self.steps.append(fn)
        self.widths.append(width)
        return len(self.steps) - 1

    def pick(self, width: int | None = None, *, recent: bool = True) -> int:
        fits = [i for i, w in enumerate(self.widths) if width in (None, w)]
        return fits[-1] if recent else self.draw(st.sampled_from(fits))

    def run(self, *values: torch.Tensor) -> list[torch.Tensor]:
        p = dict(zip(self.inputs, values, strict=True))
        v: list[torch.Tensor] = []
        for step in self.steps:
            v.append(step(p, v))
        return v


def _linear(m: Program, i: int) -> None:
    f = m.widths[i]
    g = m.draw(st.sampled_from(WIDE if f in NARROW else (*NARROW, *WIDE)))
    bias = m.real(g) if m.draw(st.booleans()) else None
    form = m.draw(st.sampled_from(["linear", "flat", "matmul", "transposed"]))
    b, s = m.batch, m.length
    w = m.weight(f, g) if form in ("matmul", "transposed") else m.weight(g, f)

    def fn(p: dict[str, torch.Tensor], v: list[torch.Tensor]) -> torch.Tensor:
        x, extra = v[i], (p[bias] if bias else None)
        if form == "linear":
            return F.linear(x, p[w], extra)
        if form == "flat":
            return F.linear(x.reshape(b * s, f), p[w], extra).view(b, s, g)
        if form == "matmul":
            y = x @ p[w]
        else:
            y = (x.transpose(0, 1).reshape(s * b, f) @ p[w]).view(s, b, g).transpose(0, 1)
        return y if extra is None else y + extra

    m.step(f"{form}(v{i}, {w}, {bias})", g, fn)


POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "detached": lambda x: x * x.detach().sigmoid(),
}
FEATURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-3),
    "rms": lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt(),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
    "max": lambda x: x - x.amax(-1, keepdim=True),
    "max_value": lambda x: x * x.max(-1, keepdim=True).values,
    "std": lambda x: x / (x.std(-1, keepdim=True) + 0.5),
    "cumsum": lambda x: x.cumsum(-1),
    "flip": lambda x: x + x.flip(-1),
    "sort": lambda x: x.sort(-1).values,
}
# Mix positions: no loop over tokens may contain them.
TOKENS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "centre": lambda x: x - x.mean(1, keepdim=True),
    "share": lambda x: x * x.sum((0, 1), keepdim=True).tanh(),
    "cumsum_tokens": lambda x: x.cumsum(1) * 0.3,
    "shift": lambda x: F.pad(x[:, :-1], (0, 0, 1, 0)),
    "roll": lambda x: x.roll(1, 1) * 0.5,
    "attention": lambda x: (x @ x.transpose(1, 2) * 0.1).softmax(-1) @ x,
    "softmax_tokens": lambda x: x.softmax(1),
    "batch_mean": lambda x: x + x.mean(0, keepdim=True),
    "total": lambda x: x * x.sum().tanh(),
    "total_view": lambda x: x * x.sum().view(1, 1).expand(1, x.shape[-1]).tanh(),
}


def _mapped(m: Program, i: int) -> None:
    table = m.draw(st.sampled_from([POINTWISE, POINTWISE, FEATURES]))
    name = m.draw(st.sampled_from(list(table)))
    fn = table[name]
    m.step(f"{name}(v{i})", m.widths[i], lambda p, v: fn(v[i]))


def _mixed(m: Program, i: int) -> None:
    name = m.draw(st.sampled_from(list(TOKENS)))
    m.step(f"{name}(v{i})", m.widths[i], lambda p, v: TOKENS[name](v[i]))


def _combined(m: Program, i: int) -> None:
    j = m.pick(m.widths[i], recent=False)
    name = m.draw(st.sampled_from(["add", "mul", "sub"]))
    m.step(f"{name}(v{i}, v{j})", m.widths[i], lambda p, v: getattr(torch, name)(v[i], v[j]))


def _broadcast(m: Program, i: int) -> None:
    b, s, f = m.batch, m.length, m.widths[i]
    shape = m.draw(st.sampled_from([(f,), (s, f), (s, 1), (b, 1, f), (1, s, 1), (b, s, 1), (1,)]))
    w = m.real(*shape)
    m.step(f"mul(v{i}, {w}{shape})", f, lambda p, v: v[i] * p[w])


def _gated(m: Program, i: int) -> None:
    half = m.widths[i] // 2
    m.step(f"gate(v{i})", half, lambda p, v: F.silu(v[i].chunk(2, -1)[0]) * v[i].chunk(2, -1)[1])


def _joined(m: Program, i: int) -> None:
    j = m.pick(recent=False)
    m.step(f"cat(v{i}, v{j})", m.widths[i] + m.widths[j], lambda p, v: torch.cat((v[i], v[j]), -1))


def _masked(m: Program, i: int) -> None:
    mask = m.constant(torch.rand(m.batch, m.length, 1) > 0.5)
    m.step(f"masked(v{i}, {mask})", m.widths[i], lambda p, v: v[i].masked_fill(p[mask], 0.3))


def _heads(m: Program, i: int) -> None:
    f, heads = m.widths[i], 2
    if f % heads:
        return
    d = f // heads
    w = m.real(heads, d, 8)

    def fn(p: dict[str, torch.Tensor], v: list[torch.Tensor]) -> torch.Tensor:
        x = v[i].view(m.batch, m.length, heads, d)
        return torch.einsum("bshd,hde->bshe", x, p[w]).reshape(m.batch, m.length, heads * 8)

    m.step(f"heads(v{i})", heads * 8, fn)


def _looked_up(m: Program, i: int) -> None:
    f = m.widths[i]
    ids = m.constant(torch.randint(5, (m.batch, m.length)))
    table = m.weight(5, f)
    m.step(f"v{i} + embedding", f, lambda p, v: v[i] + F.embedding(p[ids], p[table]))


COMMON = [_linear, _linear, _mapped, _mapped, _combined, _broadcast]
RARE = [_gated, _joined, _masked, _heads, _looked_up, _mixed]


def _loss(m: Program, i: int) -> None:
    b, s, f = m.batch, m.length, m.widths[i]
    labels = torch.randint(f, (b, s))
    ignored = m.draw(st.sampled_from(["none", "some", "all"]))
    labels[torch.rand(b, s) < {"none": 0.0, "some": 0.4, "all": 1.1}[ignored]] = -100
    reduction = m.draw(st.sampled_from(["sum", "mean", "none"]))
    smooth = m.draw(st.sampled_from([0.0, 0.1]))
    form = m.draw(
        st.sampled_from(["entropy", "entropy", "shifted", "z", "square", "mean", "count"])
    )
    ids = m.constant(labels)

    def entropy(logits: torch.Tensor, target: torch.Tensor, how: str) -> torch.Tensor:
        return F.cross_entropy(
            logits.reshape(-1, f), target.reshape(-1), reduction=how, label_smoothing=smooth
        )

    def fn(p: dict[str, torch.Tensor], v: list[torch.Tensor]) -> torch.Tensor:
        x, y = v[i], p[ids]
        if form == "shifted":
            return entropy(x[:, :-1], y[:, 1:], reduction).sum()
        if form == "z":
            return entropy(x, y, "sum") + 0.1 * x.logsumexp(-1).square().mean()
        if form == "square":
            return x.square().sum()
        if form == "mean":
            return (x * v[0].sum(-1, keepdim=True)).mean()
        if form == "count":
            return entropy(x, y, "sum") / (y != -100).sum().clamp(min=1)
        return entropy(x, y, reduction).sum()

    m.step(f"{form}(v{i}, {reduction}, ignored={ignored}, smooth={smooth})", 0, fn)


def program(draw: Draw, *, mixing: bool) -> Program:
    m = Program(draw, draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([5, 7, 8, 12])))
    f = draw(st.sampled_from(NARROW))
    x = m.real(m.batch, m.length, f)
    m.step(x, f, lambda p, v: p[x] * 1.0)
    _linear(m, 0)
    pool = COMMON + (RARE if mixing else RARE[:-1])
    for _ in range(draw(st.integers(1, 8))):
        i = m.pick(recent=draw(st.integers(0, 3)) > 0)
        draw(st.sampled_from(pool))(m, i)
    if draw(st.booleans()):
        _linear(m, len(m.steps) - 1)
    last = len(m.steps) - 1
    _loss(m, last)
    return m


def hold(draw: Draw, *, mixing: bool) -> Recorder:
    torch.manual_seed(draw(st.integers(0, 999)))
    m = program(draw, mixing=mixing)
    outputs = [len(m.steps) - 1]
    extra = draw(st.sampled_from(["", "", "a value", "a sum"]))
    kept = draw(st.integers(0, len(m.steps) - 2))

    def fn(*values: torch.Tensor) -> list[torch.Tensor]:
        v = m.run(*values)
        made = [v[o] for o in outputs]
        if extra:
            made.append(v[kept] if extra == "a value" else v[kept].sum(1))
        return made

    recorder = Recorder(
        chunk_rows=draw(st.integers(1, 2 * m.length)),
        gradient_in_forward=draw(st.integers(0, 3)) > 0,
    )
    inputs = list(m.inputs.values())
    text = "\n".join([f"b={m.batch} s={m.length}", *m.text, f"extra: {extra} v{kept}"])
    expected = gradients_of(fn, inputs, None)
    try:
        assert_close(gradients_of(fn, inputs, recorder), expected)
    except Exception as error:
        raise AssertionError(f"{text}\nmodes: {recorder.modes}\n{recorder.options}") from error
    return recorder


FUZZ = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_random_models():
    made: list[list[str]] = []

    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        made.append(hold(data.draw, mixing=False).modes)

    run()
    assert sum(map(bool, made)) > 0.6 * len(made), "most models should be chunked"
    assert {m for modes in made for m in modes} >= {"recompute", "gradient-in-forward"}


def test_random_models_that_mix_tokens():
    made: list[list[str]] = []

    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        made.append(hold(data.draw, mixing=True).modes)

    run()
    assert any(made)
