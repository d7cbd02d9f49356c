"""Kernels write over operands that nobody reads afterwards, and over no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.compiler.config as compiler_config
from torch import Tensor

from mstc import inductor
from mstc.inductor import compile_body
from mstc.inplace import in_place
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

aten = torch.ops.aten
ROWS, HIDDEN, WIDE = 16, 8, 32
_BUFFER = re.compile(rf"empty_strided_(?:cpu|cuda)\(\((?:1, )?{ROWS}, {WIDE}\)")

Values = tuple[Tensor, ...]
Body = Callable[..., Values]


def product(x: Tensor, weight: Tensor) -> Tensor:
    return aten.mm.default(x, weight)


def transposed(value: Tensor) -> Tensor:
    return aten.permute.default(value, [1, 0])


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, dtype=dtype)
    return [x, *(torch.randn(HIDDEN, WIDE, dtype=dtype) for _ in range(3))]


def compiled(body: Body, tensors: Sequence[Tensor], *, build: bool) -> Any:
    sizes = [s for t in tensors for s in t.shape]
    starts = [sum(t.dim() for t in tensors[:i]) for i in range(len(tensors))]
    shapes = [[[s + d] for d in range(t.dim())] for s, t in zip(starts, tensors, strict=True)]
    call = compile_body(
        lambda *args: body(*args[len(sizes) :]), sizes, list(tensors), shapes, [], {}, build=build
    )
    return call if not build else (lambda: call(sizes, list(tensors)))


def buffers(body: Body, tensors: Sequence[Tensor] | None = None) -> int:
    """How many buffers of a chunk's wide values the code that Inductor writes has."""
    emitted: Any = compiled(body, tensors or inputs(), build=False)
    return len(_BUFFER.findall(Path(emitted._call._module.__file__).read_text()))


def gated(x: Tensor, gate: Tensor, up: Tensor, grad: Tensor) -> Values:
    """Backward of a gated MLP up to its products: three values read, three written."""
    shape = [1, ROWS, WIDE]  # as of one sequence
    a, b, g = (aten.reshape.default(product(x, w), shape) for w in (gate, up, grad))
    sigmoid = aten.sigmoid.default(a)
    silu = aten.div.Tensor(a, aten.exp.default(-a) + 1)
    return silu * b, g * silu, g * b * sigmoid * (a * (-sigmoid + 1) + 1)


def is_read_later(x: Tensor, gate: Tensor, up: Tensor, grad: Tensor) -> Values:
    """One of two operands is a product's as well."""
    a, b = product(x, gate), product(x, up)
    return a * b, a - b, product(transposed(a), x)


def is_returned(x: Tensor, gate: Tensor, up: Tensor, grad: Tensor) -> Values:
    a, b = product(x, gate), product(x, up)
    return a * b, a - b, a


def one_operand(x: Tensor, gate: Tensor, up: Tensor, grad: Tensor) -> Values:
    """Two results, one place."""
    a = product(x, gate)
    return aten.sigmoid.default(a), aten.tanh.default(a)


def is_read_by_rows(x: Tensor, gate: Tensor, up: Tensor, grad: Tensor) -> Values:
    """Every row reads the first one of an operand that it also reads at its own place."""
    a, b = product(x, gate), product(x, up)
    first = aten.select.int(a, 0, 0)
    return a * b + first, a - first


def of_another_type(x: Tensor, gate: Tensor, up: Tensor, grad: Tensor) -> Values:
    a, b = product(x, gate), product(x, up)
    low = torch.ops.prims.convert_element_type.default(a * b, torch.float32)
    return low, torch.ops.prims.convert_element_type.default(a - b, torch.float32)


def sums_rows(x: Tensor, gate: Tensor, up: Tensor, grad: Tensor) -> Values:
    """A kernel with a reduction: Inductor decides."""
    a, b = product(x, gate), product(x, up)
    return a - aten.sum.dim_IntList(a, [1], True), a * b, b - aten.sum.dim_IntList(b, [1], True)


def chained(x: Tensor, gate: Tensor, up: Tensor, grad: Tensor) -> Values:
    """A result is read by another result of the same kernel, and by the graph's caller."""
    a, b = product(x, gate), product(x, up)
    first = a * b
    return first, aten.tanh.default(first) + a, product(transposed(first), x)


BODIES: dict[Body, int] = {  # -> buffers of wide values
    gated: 3,
    is_read_later: 3,
    is_returned: 3,
    one_operand: 2,
    chained: 2,
}
WRITTEN_BESIDE: dict[Body, int] = {is_read_by_rows: 3, of_another_type: 4}


@pytest.mark.parametrize("body", BODIES, ids=lambda b: b.__name__)
def test_buffers(body: Body) -> None:
    assert buffers(body) == BODIES[body]


@pytest.mark.parametrize("body", WRITTEN_BESIDE, ids=lambda b: b.__name__)
def test_what_is_read_elsewhere_stays(body: Body) -> None:
    """Buffers as Inductor has them, or one less: an operand at its own place still gives it."""
    assert buffers(body) == WRITTEN_BESIDE[body]


def together(*tensors: Tensor) -> Values:
    """All bodies as one graph: one compilation."""
    bodies = [*BODIES, *WRITTEN_BESIDE, sums_rows]
    # values of their own for each, or equal computations would be one
    own = [[tensors[0], *(t * (i + 1) for t in tensors[1:])] for i in range(len(bodies))]
    return tuple(v for body, given in zip(bodies, own, strict=True) for v in body(*given))


def test_results_are_right() -> None:
    tensors = inputs()
    before = [t.clone() for t in tensors]
    ours, truth = compiled(together, tensors, build=True)(), together(*tensors)
    for one, other in zip(ours, truth, strict=True):
        tolerance = 1e-12 if one.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert all(map(torch.equal, tensors, before))


def test_no_bit_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(torch.bfloat16)
    ours = compiled(together, tensors, build=True)()
    monkeypatch.setattr(inductor, "in_place", nullcontext)
    beside = compiled(together, tensors, build=True)()
    assert all(map(torch.equal, ours, beside))


def test_others_are_compiled_as_ever() -> None:
    """Only what is compiled within `in_place`, which PyTorch's caches are told."""
    with in_place():
        within = compiler_config.cache_key_tag
        with in_place():
            assert compiler_config.cache_key_tag == within
    assert compiler_config.cache_key_tag != within
    _, (code,) = torch._inductor.utils.run_and_get_code(
        torch.compile(gated, backend="inductor", dynamic=False), *inputs()
    )
    assert len(_BUFFER.findall(code)) == 6
