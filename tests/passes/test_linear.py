"""Linearity in a scalar: what is called linear is, what is not linear is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from passes import linear
from passes.linear import is_linear_in
from tests.passes.graphs import Recorder, Sketch, assert_close, compiled, gradients_of

aten = torch.ops.aten
prims = torch.ops.prims


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


X = (4, 6)
INDEX = torch.tensor([[0, 5], [1, 1], [2, 0], [3, 3]])

# Everything but the first argument, which is scalar * x.
FIRST: dict[object, tuple[Any, ...]] = {
    aten.view.default: ([24],),
    aten._unsafe_view.default: ([24],),
    aten.reshape.default: ([2, 12],),
    aten.squeeze.dim: (0,),
    aten.unsqueeze.default: (0,),
    aten.permute.default: ([1, 0],),
    aten.transpose.int: (0, 1),
    aten.t.default: (),
    aten.expand.default: ([3, 4, 6],),
    aten.slice.Tensor: (0, 1, 3),
    aten.select.int: (0, 1),
    aten.alias.default: (),
    aten.detach.default: (),
    aten.clone.default: (),
    aten.neg.default: (),
    aten.sum.dim_IntList: ([0],),
    aten.div.Tensor: (real(*X),),
    aten.gather.default: (1, INDEX),
    aten.index_select.default: (1, torch.tensor([0, 5, 5])),
    aten.constant_pad_nd.default: ([1, 2],),
    aten.tanh_backward.default: (real(*X).tanh(),),
    aten.sigmoid_backward.default: (real(*X).sigmoid(),),
    aten.gelu_backward.default: (real(*X),),
    aten.silu_backward.default: (real(*X),),
    aten.threshold_backward.default: (real(*X), 0),
    aten._softmax_backward_data.default: (real(*X).softmax(1), 1, torch.float64),
    aten._log_softmax_backward_data.default: (real(*X).log_softmax(1), 1, torch.float64),
}


def test_every_listed_op_is_tested():
    assert {op.overloadpacket for op in FIRST} == linear._FIRST  # type: ignore[attr-defined]


def proven(op: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether the proof holds for ``op(scalar * x, ...)``, or wherever "t" stands among `args`; and
    whether numbers bear it out."""
    sketch = Sketch()
    t = sketch.input(torch.tensor(1.0, dtype=torch.float64), "tangents_1")
    scaled = sketch.call(aten.mul.Tensor, real(*X), t)
    node = sketch.call(op, *(scaled if isinstance(a, str) else a for a in args), **kwargs)
    outputs = sketch.outputs_of(node)
    (one,) = sketch.finish(outputs[:1])
    if not is_linear_in(t, [n for n in sketch.graph.nodes if n.op == "call_function"]):
        return False
    interpreter = torch.fx.Interpreter(torch.fx.GraphModule({}, sketch.graph))
    for factor in (-3.0, 0.0, 1e4):
        values = [v if n is not t else v * factor for n, v in sketch.values.items()]
        (many,) = interpreter.run(*values)
        torch.testing.assert_close(many, one * factor, rtol=1e-9, atol=1e-9)
    return True


def shape_of_call(value: object) -> str:
    """A test's name, without the numbers of its tensors."""
    if isinstance(value, tuple):
        return "-".join(map(shape_of_call, value))
    return "x".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else str(value)


@pytest.mark.parametrize("op", FIRST, ids=str)
def test_linear_in_the_first_operand(op: Any):
    assert proven(op, "t", *FIRST[op])


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.mul.Tensor, ("t", real(*X))),
        (aten.mul.Tensor, (real(*X), "t")),
        (aten.mul.Tensor, ("t", 3.0)),
        (aten.mm.default, ("t", real(6, 2))),
        (aten.mm.default, (real(3, 4), "t")),
        (aten.add.Tensor, ("t", "t")),
        (aten.sub.Tensor, ("t", "t")),
        (aten.where.self, (real(*X) > 0, "t", "t")),
        (prims.convert_element_type.default, ("t", torch.float64)),
    ],
    ids=shape_of_call,
)
def test_linear(op: Any, args: tuple[Any, ...]):
    assert proven(op, *args)


def test_bmm_is_bilinear():
    sketch = Sketch()
    t = sketch.input(torch.tensor(1.0, dtype=torch.float64))
    left = sketch.call(aten.mul.Tensor, real(2, 3, 4), t)
    once = sketch.call(aten.bmm.default, left, real(2, 4, 3))
    twice = sketch.call(aten.bmm.default, once, left)
    assert is_linear_in(t, [left, once])
    assert not is_linear_in(t, [left, once, twice])


NOT_LINEAR: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.mul.Tensor, ("t", "t"), {}),
    (aten.div.Tensor, (real(*X), "t"), {}),
    (aten.div.Tensor_mode, ("t", real(*X)), {"rounding_mode": "floor"}),
    (aten.add.Tensor, ("t", real(*X)), {}),
    (aten.add.Tensor, ("t", 1.0), {}),
    (aten.sub.Tensor, (1.0, "t"), {}),
    (aten.where.self, (real(*X) > 0, "t", real(*X)), {}),
    (aten.clamp.default, ("t", -1.0, 1.0), {}),
    (aten.abs.default, ("t",), {}),
    (aten.exp.default, ("t",), {}),
    (aten.relu.default, ("t",), {}),
    (aten.sign.default, ("t",), {}),
    (aten.round.default, ("t",), {}),
    (aten.pow.Tensor_Scalar, ("t", 2), {}),
    (aten.amax.default, ("t", [1]), {}),
    (aten.constant_pad_nd.default, ("t", [1, 1], 0.5), {}),
    (aten.sum.dim_IntList, ("t", [0]), {"dtype": torch.int64}),
    (aten.view.dtype, ("t", torch.int64), {}),
    (aten.tanh_backward.default, (real(*X), "t"), {}),
    (aten.threshold_backward.default, (real(*X), "t", 0), {}),
    (aten.addmm.default, (real(2), "t", real(6, 2)), {}),
    (prims.convert_element_type.default, ("t", torch.int32), {}),
    (aten.gt.Scalar, ("t", 0), {}),
]


@pytest.mark.parametrize(
    ("op", "args", "kwargs"), NOT_LINEAR, ids=[f"{i}-{c[0]}" for i, c in enumerate(NOT_LINEAR)]
)
def test_not_linear_is_refused(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
    assert not proven(op, *args, **kwargs)


@pytest.mark.parametrize("zero", ["scalar", "full", "zeros", "view", "named"])
def test_zero_may_be_added_or_chosen(zero: str):
    sketch = Sketch()
    t = sketch.input(torch.tensor(1.0, dtype=torch.float64))
    x = sketch.call(aten.mul.Tensor, real(*X), t)
    kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    if zero == "scalar":
        other = sketch.call(aten.scalar_tensor.default, 0, **kind)
    elif zero == "full":
        other = sketch.call(aten.full.default, [4, 6], 0.0, **kind)
    elif zero == "named":
        other = sketch.call(aten.full.default, [4, 6], fill_value=0.0, **kind)
    elif zero == "zeros":
        other = sketch.call(aten.zeros.default, [4, 6], **kind)
    else:
        other = sketch.call(
            aten.view.default, sketch.call(aten.zeros.default, [24], **kind), [4, 6]
        )
    chosen = sketch.call(aten.where.self, real(*X) > 0, x, other)
    added = sketch.call(aten.add.Tensor, chosen, other)
    assert is_linear_in(t, [x, chosen, added])
    one = sketch.call(aten.full.default, [4, 6], 1.0, **kind)
    assert not is_linear_in(t, [x, sketch.call(aten.add.Tensor, x, one)])


def test_what_does_not_depend_on_the_scalar_may_be_anything():
    sketch = Sketch()
    t = sketch.input(torch.tensor(1.0, dtype=torch.float64))
    free = sketch.call(aten.exp.default, real(*X))
    assert is_linear_in(t, [free, sketch.call(aten.mul.Tensor, free, t)])


# -- in a model: gradient-in-forward only with proof ---------------------------------------------


class _Edited(torch.autograd.Function):
    """The identity, with a backward of its own."""

    edit: Callable[[torch.Tensor], torch.Tensor]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return _Edited.edit(gradient)


def head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = _Edited.apply(hidden @ weight)
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("name", "edit", "mode"),
    [
        ("same", lambda g: g * 2.0, "gradient-in-forward"),
        ("clipped", lambda g: g.clamp(-0.01, 0.01), "recompute"),
        ("signed", lambda g: g.sign(), "recompute"),
        ("shifted", lambda g: g + 1.0, "recompute"),
        ("rounded", lambda g: (g * 100).round() / 100, "recompute"),
        ("squared", lambda g: g * g, "recompute"),
    ],
)
def test_backwards_of_users(name: str, edit: Callable[..., torch.Tensor], mode: str):
    torch.manual_seed(0)
    inputs = [
        real(11, 4).requires_grad_(),
        real(4, 160).requires_grad_(),
        torch.randint(160, (11,)),
    ]
    _Edited.edit = staticmethod(edit)  # type: ignore[assignment]
    recorder = Recorder(chunk_rows=3)
    scaled = lambda *a: head(*a) * 7.0  # noqa: E731  (a tangent that is not one)
    got = gradients_of(scaled, inputs, recorder)
    assert_close(got, gradients_of(scaled, inputs, None))
    assert recorder.modes == [mode]


def test_float16_keeps_its_loss_scale():
    """With a tangent of one, gradients that a loss scale would keep vanish below 6e-8."""
    torch.manual_seed(0)
    inputs = [
        (torch.randn(64, 8) * 0.1).half().requires_grad_(),
        (torch.randn(8, 160) * 0.1).half().requires_grad_(),
        torch.randint(160, (64,)),
    ]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ weight).float()
        return torch.nn.functional.cross_entropy(logits, labels) * 2.0**-12

    recorder = Recorder(chunk_rows=16)
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    (made,) = compiled(loss, leaves, recorder)(*leaves)
    (got,) = torch.autograd.grad(made, leaves[:1], torch.tensor(2.0**16))
    exact, weight = (t.detach().double().requires_grad_() for t in inputs[:2])
    truth = loss(exact, weight, inputs[2]) * 2.0**16
    (wanted,) = torch.autograd.grad(truth, [exact])
    assert recorder.modes == ["recompute"]
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < 0.01
