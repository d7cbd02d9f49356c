"""Random models in float64: with loops and without, the same numbers to the last digits."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import passes
from tests.passes.graphs import Recorder, assert_close, compiled, gradients_of

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


def _linear(m: Program, i: int, vocabulary: int = 0) -> None:
    f = m.widths[i]
    g = vocabulary or m.draw(st.sampled_from(WIDE if f in NARROW else (*NARROW, *WIDE)))
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
    if m.widths[i] % 2:
        return
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
        _linear(m, len(m.steps) - 1, draw(st.sampled_from([0, 160])))
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
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_random_models():
    made: list[list[str]] = []

    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        made.append(hold(data.draw, mixing=False).modes)

    run()
    assert sum(map(bool, made)) > len(made) // 4, "many models should be chunked"


def test_random_models_that_mix_tokens():
    made: list[list[str]] = []

    @FUZZ
    @given(st.data())
    def run(data: st.DataObject) -> None:
        made.append(hold(data.draw, mixing=True).modes)

    run()
    assert sum(map(bool, made)) > len(made) // 4


# -- small models by hand ------------------------------------------------------------------------

Tensor = torch.Tensor


def real(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).mul_(0.5).requires_grad_(grad)


def compare(fn: Callable[..., Any], inputs: list[Tensor], **options: Any) -> Recorder:
    """The same numbers with loops as without."""
    recorder = Recorder(**{"chunk_rows": 3, **options})
    got = gradients_of(fn, inputs, recorder)
    assert_close(got, gradients_of(fn, inputs, None))
    return recorder


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.gelu(x @ up) @ down


def mlp_inputs(batch: int = 2, length: int = 11) -> list[Tensor]:
    torch.manual_seed(0)
    return [real(batch, length, 4), real(4, 32), real(32, 4)]


def head_inputs(rows: int = 11, vocabulary: int = 160) -> list[Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(vocabulary, (rows,))
    return [real(rows, 4), real(4, vocabulary), labels]


def entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight, labels)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 10, 11, 22, 100])
def test_recompute_with_any_number_of_chunks(rows: int):
    recorder = compare(lambda *p: mlp(*p).square().sum(), mlp_inputs(), chunk_rows=rows)
    # two sequences of eleven: along the batch where one is not much more than is asked for
    length, per_position = (2, 11) if rows >= 10 else (11, 2)
    chunks = -(-length // max(1, rows // per_position))
    # one chunk of everything is worth it, too: nothing inside is saved for the backward
    assert recorder.chunks == [chunks]
    assert recorder.modes == ["recompute"]


@pytest.mark.parametrize("rows", [1, 4, 10, 11])
@pytest.mark.parametrize("ignored", [0, 4, 11])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_in_forward(rows: int, ignored: int, reduction: str):
    hidden, weight, labels = head_inputs()
    labels[:ignored] = -100

    def fn(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(h @ w, y, reduction=reduction)

    recorder = compare(fn, [hidden, weight, labels], chunk_rows=rows)
    assert recorder.modes == ["gradient-in-forward"]


def test_gradient_in_forward_can_be_declined():
    recorder = compare(entropy, head_inputs(), gradient_in_forward=False)
    assert recorder.modes == ["recompute"]


def test_a_tangent_for_every_row_is_no_scalar():
    recorder = compare(lambda h, w, y: F.cross_entropy(h @ w, y, reduction="none"), head_inputs())
    assert recorder.modes == ["recompute"]


def test_forward_only():
    inputs = [t.detach() for t in mlp_inputs()]
    recorder = compare(mlp, inputs)
    assert recorder.modes == ["forward-only"]


def test_bias_and_label_smoothing():
    def fn(h: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w.t(), b), y, label_smoothing=0.2)

    assert compare(fn, [*head_inputs(), real(160)]).modes == ["gradient-in-forward"]


def test_z_loss():
    def fn(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = h @ w
        return F.cross_entropy(logits, y) + 0.1 * logits.logsumexp(-1).square().mean()

    assert compare(fn, head_inputs()).modes


def test_a_loss_that_predicts_the_next_token():
    torch.manual_seed(0)
    inputs = [real(2, 9, 4), real(4, 160), torch.randint(160, (2, 9))]

    def fn(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = (h @ w)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, 160), y[:, 1:].reshape(-1))

    assert compare(fn, inputs).modes


def test_tied_weights():
    """One weight looks tokens up and projects to the vocabulary: its gradients add up."""
    torch.manual_seed(0)
    ids, labels = torch.randint(160, (11,)), torch.randint(160, (11,))

    def fn(table: Tensor, up: Tensor, down: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(mlp(F.embedding(ids, table), up, down) @ table.t(), labels)

    recorder = compare(fn, [real(160, 4), real(4, 32), real(32, 4), ids, labels])
    assert "gradient-in-forward" in recorder.modes


def test_the_same_layer_twice():
    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x = x + mlp(x, up, down)
        x = x + mlp(x.tanh(), up, down)
        return x.square().sum()

    recorder = compare(fn, mlp_inputs())
    assert recorder.modes == ["recompute"] * 2


def test_layers_and_a_head():
    def fn(x: Tensor, w: Tensor, labels: Tensor, *layers: Tensor) -> Tensor:
        for up, down in zip(layers[::2], layers[1::2], strict=True):
            x = x + mlp(F.layer_norm(x, (4,), eps=1e-3), up, down)
        return F.cross_entropy((x @ w).view(-1, 160), labels)

    x, *layer = mlp_inputs()
    labels = torch.randint(160, (22,))
    recorder = compare(fn, [x, real(4, 160), labels, *layer, real(4, 32), real(32, 4)])
    assert sorted(recorder.modes) == ["gradient-in-forward", "recompute", "recompute"]


def test_a_norm_over_the_wide_features_stays_inside():
    """Its statistics come from an op of two outputs, which stay together."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.layer_norm(F.gelu(x @ up), (32,), eps=1e-3) @ down).square().sum()

    recorder = compare(fn, mlp_inputs())
    assert recorder.modes == ["recompute"]
    (planned,) = recorder.planned
    (plan,) = planned.plan.loops
    names = {str(n.target) for n in plan.region.nodes}
    assert "aten.var_mean.correction" in names


@pytest.mark.parametrize("cut", ["chunk", "sort", "max"])
def test_ops_of_several_outputs(cut: str):
    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        wide = x @ up
        if cut == "chunk":
            gate, value = wide.chunk(2, -1)
            return ((F.silu(gate) * value) @ down[:16]).square().sum()
        if cut == "sort":
            return (wide.sort(-1).values @ down).square().sum()
        return ((wide * wide.max(-1, keepdim=True).values) @ down).square().sum()

    assert compare(fn, mlp_inputs()).modes == ["recompute"]


def test_a_region_reads_a_view_of_another_region():
    """The view of a value that lives only inside another loop is read as that loop makes it."""

    def fn(x: Tensor, w: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        gate, value = F.linear(x, w).chunk(2, -1)
        gated = F.silu(gate) * value
        doubled = torch.cat((gated, gated), -1)
        narrow = (doubled.transpose(0, 1).reshape(24, 16) @ v).view(12, 2, 4).transpose(0, 1)
        return F.cross_entropy(narrow.reshape(-1, 4), labels)

    torch.manual_seed(0)
    inputs = [real(2, 12, 2), real(16, 2), real(16, 4), torch.randint(4, (24,))]
    assert compare(fn, inputs, chunk_rows=9).modes


def test_a_wide_output_leaves():
    """Nothing is gained where the wide value has to exist anyhow; the report says so."""

    def fn(x: Tensor, up: Tensor) -> Tensor:
        return F.gelu(x @ up)

    recorder = compare(fn, mlp_inputs()[:2])
    assert recorder.modes == []
    assert "is an output of the graph" in recorder.reasons


def test_a_narrow_output_beside_the_loss():
    def fn(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        y = mlp(x, up, down)
        return y.square().sum(), y

    assert compare(fn, mlp_inputs()).modes == ["recompute"]


def test_a_sum_over_tokens_beside_the_loss():
    def fn(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        wide = F.gelu(x @ up)
        return (wide @ down).square().sum(), wide.sum((0, 1))

    assert compare(fn, mlp_inputs()).modes == ["recompute"]


# -- not handled, and so refused -----------------------------------------------------------------

OBSTACLES: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda h: h - h.mean((0, 1), keepdim=True),
    "standardised": lambda h: h / (h.std((0, 1), keepdim=True) + 1.0),
    "shared": lambda h: h * h.sum((0, 1)).tanh(),
    "softmax": lambda h: h.flatten(0, 1).softmax(0).view_as(h),
    "sorted": lambda h: h.flatten(0, 1).sort(0).values.view_as(h),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_normalisation_over_tokens_cuts(name: str):
    """A value that all positions make together is no chunk's: no loop reads it inside."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (OBSTACLES[name]((x @ up).softmax(-1)) @ down).square().sum()

    recorder = compare(fn, mlp_inputs())
    assert "what leaves" in recorder.reasons or "mixes positions" in recorder.reasons


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_loop_along_the_features_instead(name: str):
    """What mixes tokens may still be split along the features."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (OBSTACLES[name](F.gelu(x @ up)) @ down).square().sum()

    recorder = compare(fn, mlp_inputs())
    mixing = {"aten.mean.dim", "aten.sort.default", "aten.var.correction"}
    for planned in recorder.planned:
        for loop in planned.plan.loops:
            if {str(n.target) for n in loop.region.nodes} & mixing:
                assert loop.region.length == 32


class _SavedSum(torch.autograd.Function):
    """A backward that reads, through a view, a sum that the forward made over all positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sum((0, 1)).view(1, 1, -1))
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (total,) = ctx.saved_tensors
        return gradient * total


@pytest.mark.parametrize("loss", ["square", "entropy"])
def test_a_sum_is_never_a_chunks_part_of_it(loss: str):
    def fn(x: Tensor, up: Tensor, down: Tensor, *labels: Tensor) -> Tensor:
        if loss == "entropy":
            return F.cross_entropy(_SavedSum.apply(x @ down).view(-1, 160), labels[0])
        return (F.gelu(_SavedSum.apply(x @ up)) @ down).square().sum()

    inputs = mlp_inputs()
    if loss == "entropy":
        inputs[2:] = [real(4, 160), torch.randint(160, (22,))]
    assert compare(fn, inputs).modes == ["recompute"]


@pytest.mark.parametrize("part", [slice(None), slice(32)])
def test_an_input_that_the_graph_writes_to_is_refused(part: slice):
    """The backward loop would read the new value, through a view or not."""

    def fn(x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        wide = F.gelu(x @ up + bias[part])
        bias.mul_(2.0)
        return (wide @ down).square().sum()

    recorder = Recorder(chunk_rows=3)
    compiled(fn, [*mlp_inputs(), real(32 if part.stop is None else 40, grad=False)], recorder)
    assert recorder.modes == []
    assert "is changed in place by the model" in recorder.reasons


def test_a_write_of_a_wide_value_is_not_lost():
    def fn(x: Tensor, up: Tensor, down: Tensor, memory: Tensor) -> Tensor:
        wide = F.gelu(x @ up)
        memory.copy_(wide.detach())
        return (wide @ down).square().sum()

    inputs = mlp_inputs()
    results: list[list[Tensor]] = []
    for recorder in (Recorder(chunk_rows=3), None):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        memory = torch.zeros(2, 11, 32, dtype=torch.float64)
        inputs_now = [*leaves, memory]
        run = compiled(fn, inputs_now, recorder) if recorder else lambda *a: [fn(*a)]
        (loss,) = run(*inputs_now)
        results.append([loss.detach(), memory, *torch.autograd.grad(loss, leaves)])
    assert_close(*results)


def test_the_input_graph_is_left_alone():
    recorder = Recorder(chunk_rows=3)
    seen: list[str] = []
    plan = passes.run_passes

    def watched(graph: Any, *args: Any, **kwargs: Any) -> Any:
        before = str(graph)
        planned = plan(graph, *args, **kwargs)
        assert planned.chunked is not None
        assert planned.chunked.graph is not graph
        seen.extend([before, str(graph)])
        return planned

    with unittest.mock.patch("tests.passes.graphs.run_passes", watched):
        compiled(lambda *p: mlp(*p).square().sum(), mlp_inputs(), recorder)
    assert seen[0] == seen[1]
