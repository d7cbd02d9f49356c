"""The loop op by itself, and how often bodies are compiled."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mstc
from mstc import history
from mstc.errors import BodyCompilationWarning
from mstc.inductor import PendingKernels
from mstc.report import Report
from mstc.runtime import loop
from mstc.runtime.product import best_way
from tests.models import (
    INDUCTOR,
    MLP,
    TinyLM,
    assert_same,
    compile_mst,
    counting_loops,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
    train,
)

EAGER_LOWERING = json.dumps({"kind": "eager", "config": {}})
INDUCTOR_LOWERING = json.dumps({"kind": "inductor", "config": {}})

SQUARE = {
    # sizes: positions, features; inputs: x split along positions, w whole
    "body": (
        "def forward(self, a0, a1, t0, t1):\n"
        "    y = torch.ops.aten.mul.Tensor(t0, t1)\n"
        "    s = torch.ops.aten.sum.dim_IntList(y, [0])\n"
        "    return (y, s, torch.ops.aten.permute.default(t0, [1, 0]), y)\n"
    ),
    "inputs": [{"slice": [0, [0], 0], "dims": [[0], [1]]}, {"slice": None, "dims": [[1]]}],
    "outputs": [
        {
            "kind": "split",
            "dims": [[0], [1]],
            "dtype": "float32",
            "order": [0, 1],
            "slice": [0, [0], 0],
            "in_groups": False,
            "terms": [],
        },
        {
            "kind": "sum",
            "dims": [[1]],
            "dtype": "float32",
            "order": [0],
            "slice": None,
            "in_groups": True,
            "terms": [],
        },
        {
            "kind": "matmul",
            "dims": [[1], [1]],
            "dtype": "float32",
            "order": [0, 1],
            "slice": None,
            "in_groups": True,
            "terms": [2],
        },
    ],
}


def run(x: Tensor, w: Tensor, chunk: int, lowering: str = EAGER_LOWERING) -> list[Tensor]:
    return loop.loop_op([x, w], [x.shape[0], x.shape[1]], chunk, json.dumps(SQUARE), lowering)


def expected(x: Tensor, w: Tensor) -> list[Tensor]:
    y = x * w
    return [y, y.sum(0), x.t() @ y]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 100])
def test_chunks_make_the_whole(length: int, chunk: int) -> None:
    x, w = torch.randn(length, 5), torch.randn(5)
    for ours, whole in zip(run(x, w, chunk), expected(x, w), strict=True):
        torch.testing.assert_close(ours, whole)


def test_a_slice_is_copied_once_and_only_where_it_has_to_be() -> None:
    class Copies(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.number += func is torch.ops.aten.clone.default
            return func(*args, **(kwargs or {}))

    program = loop.program_of(json.dumps(SQUARE), EAGER_LOWERING)
    for x, copies in ((torch.randn(12, 5), 0), (torch.randn(5, 12).t(), 3)):
        with Copies() as mode:
            program.run([x, torch.randn(5)], [12, 5], 4)
        assert mode.number == copies


def test_a_last_chunk_of_one_is_avoided() -> None:
    """Inductor takes sizes of one for special, so it would be compiled for itself."""
    sizes: list[int] = []
    program = loop.program_of(json.dumps(SQUARE), EAGER_LOWERING)
    body = program.body

    def record(*args: Any) -> Sequence[Tensor]:
        sizes.append(args[0])
        return body(*args)

    program.body = record
    try:
        run(torch.randn(17, 5), torch.randn(5), 8)
        assert sizes == [8, 7, 2]
    finally:
        program.body = body


def test_the_op_by_the_rules_of_pytorch() -> None:
    """Schema (no input is written to, no output is an input), fake implementation, dispatch."""
    x, w = torch.randn(9, 5), torch.randn(5)
    torch.library.opcheck(
        torch.ops.mst.loop.default,
        ([x, w], [9, 5], 4, json.dumps(SQUARE), EAGER_LOWERING),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_inputs_in_any_layout() -> None:
    x, w = torch.randn(5, 9).t(), torch.randn(10)[::2]
    for ours, whole in zip(run(x, w, 4), expected(x, w), strict=True):
        torch.testing.assert_close(ours, whole)


def test_low_precision_sums_are_kept_in_float32() -> None:
    """Four thousand products of which a bfloat16 sum would lose most; as near as one rounding of
    the whole, and on devices with a wider product, as float32."""
    torch.manual_seed(0)
    x = torch.randn(4096, 5).bfloat16()
    x[1::2] = -x[::2]
    x[0] += 0.5
    w = torch.ones(5).bfloat16()
    ours = run(x, w, 1)[2]
    assert ours.dtype == torch.float32
    exact = x.double().t() @ x.double()
    at_once = (x.t() @ x).double()
    bound = (at_once - exact).norm() / exact.norm()
    if best_way(x.device, x.dtype, torch.float32) != "round":
        bound = torch.tensor(1e-5)
    assert (ours - exact).norm() / exact.norm() < bound


# -- equal layers -------------------------------------------------------------------------------


def test_equal_layers_share_a_body() -> None:
    model = TinyLM(layers=4)
    with counting_loops() as programs:
        train(model, compile_mst(model), lm_batch(2, 37))
    assert len(programs) == 9  # head, four layers forward and backward
    # the last layer's backward takes the head's gradient in, the others a sum of two
    assert len(set(programs)) <= 5


def test_equal_layers_are_one_line_of_the_report() -> None:
    model = TinyLM(layers=4)
    train(model, compile_mst(model), lm_batch(2, 37))
    (graph,) = mstc.last_report().graphs
    assert sorted(entry.count for entry in graph.loops) == [1, 4]
    assert "loop x4" in str(mstc.last_report())


@pytest.mark.parametrize("rows", [1, 7, 74, 75, 1000])
def test_any_chunk_size(rows: int) -> None:
    model, batch = TinyLM(), lm_batch(1, 75)
    assert_same(
        train(model, compile_mst(model, chunk_rows=rows), batch), train(model, model, batch)
    )


# -- how often bodies are compiled --------------------------------------------------------------


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], list[int]]]:
    """Stands in for Inductor: bodies run op by op, and what was asked for is recorded."""
    asked: list[tuple[tuple[int, ...], list[int]]] = []

    def compile_body(
        body: Callable[..., Sequence[Tensor]],
        sizes: tuple[int, ...],
        tensors: list[Tensor],
        shapes: object,
        dynamic: list[int],
        config: object,
        *,
        build: bool,
    ) -> Any:
        assert build
        asked.append((sizes, list(dynamic)))
        # as in compiled code: layouts and dtypes are what they were
        layouts = [(t.dtype, t.is_contiguous() or t.stride()) for t in tensors]

        def call(args: list[Any]) -> Sequence[Tensor]:
            given = args[len(dynamic) :]
            assert layouts == [(t.dtype, t.is_contiguous() or t.stride()) for t in given]
            own = list(sizes)
            for i, size in zip(dynamic, args, strict=False):
                own[i] = size
            assert given[0].shape[0] == own[0], "run with sizes that it was not compiled for"
            return body(*own, *given)

        return loop.CompiledBody(call, sizes, tuple(dynamic), (), tuple(range(len(dynamic))))  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "compile_body", compile_body)
    loop.program_of.cache_clear()
    return asked


def check(x: Tensor, w: Tensor, chunk: int) -> None:
    for ours, whole in zip(run(x, w, chunk, INDUCTOR_LOWERING), expected(x, w), strict=True):
        torch.testing.assert_close(ours, whole)


def test_sizes_that_cannot_be_left_open(
    compiles: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few are compiled one by one; after that, op by op, with a warning."""
    asked_for = loop.compile_body

    def only_fixed(*arguments: Any, **options: Any) -> Any:
        if arguments[4]:
            raise RuntimeError("no open sizes today")
        return asked_for(*arguments, **options)

    monkeypatch.setattr(loop, "compile_body", only_fixed)
    history.add(report := Report())
    w = torch.randn(5)
    for length in range(2, 2 + loop._MOST_CLOSED):
        check(torch.randn(length, 5), w, 100)
        check(torch.randn(length, 5), w, 100)
    assert compiles == [((length, 5), []) for length in range(2, 2 + loop._MOST_CLOSED)]
    (note,) = report.notes
    assert "no open sizes today); up to 8 sizes are compiled one by one" in note
    with pytest.warns(BodyCompilationWarning, match="no open sizes today"):
        check(torch.randn(50, 5), w, 100)
    check(torch.randn(51, 5), w, 100)
    check(torch.randn(3, 5), w, 100)
    assert len(compiles) == loop._MOST_CLOSED


def test_two_compiles_serve_all_lengths(compiles: list[Any]) -> None:
    w = torch.randn(5)
    for length in (16, 19, 8, 5, 2, 17, 40, 101, 97, 0):
        check(torch.randn(length, 5), w, 8)
    assert compiles == [((8, 5), []), ((3, 5), [0])]


def test_a_single_row_is_compiled_for_itself(compiles: list[Any]) -> None:
    w = torch.randn(5)
    for length in (16, 19, 1, 1, 40):
        check(torch.randn(length, 5), w, 8)
    assert compiles == [((8, 5), []), ((3, 5), [0]), ((1, 5), [])]


def test_a_second_size_that_varies(compiles: list[Any]) -> None:
    """And a whole input that has it: contiguous, so its layout follows from its sizes."""
    for length, features in ((16, 5), (19, 5), (16, 6), (19, 6), (24, 7), (9, 8), (3, 9), (2, 5)):
        check(torch.randn(length, features), torch.randn(features), 8)
    assert compiles == [((8, 5), []), ((3, 5), [0]), ((8, 6), [0, 1])]


def test_a_size_of_one_does_not_run_what_was_compiled_for_another(compiles: list[Any]) -> None:
    for length, features in ((16, 5), (16, 6), (1, 7), (3, 1), (1, 1)):
        check(torch.randn(length, features), torch.randn(features), 8)


def test_another_layout_or_dtype_is_compiled_for_itself(compiles: list[Any]) -> None:
    for length in (16, 19):
        check(torch.randn(length, 5), torch.randn(5), 8)
    for length in (16, 19, 20):
        check(torch.randn(length, 5), torch.randn(10)[::2], 8)
    assert len(compiles) == 4
    for length in (16, 19, 20):
        check(torch.randn(length, 5), torch.randint(9, (5,)), 8)
    assert len(compiles) == 6


def test_with_inductor_two_compiles_serve_all_lengths() -> None:
    """The same through the public interface: one region with one body, lengths of any kind."""
    model = MLP(16, 64)
    call = torch.compile(model, backend="mst", options=INDUCTOR, dynamic=True)
    before = loop.counters.bodies_compiled
    with counting_loops() as programs, torch.no_grad():
        for length in (24, 29, 31, 64, 7, 2, 100, 17):
            x = torch.randn(length, 16)
            torch.testing.assert_close(call(x), model(x))
    assert len(set(programs)) == 1
    assert loop.counters.bodies_compiled - before <= 2


def test_memory_of_the_sum_is_not_that_of_all_chunks() -> None:
    """Buffers are added to in place: one of each, whatever the number of chunks."""

    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.t(), labels)

    x = torch.randn(512, 32, requires_grad=True)
    w = nn.Parameter(torch.randn(4096, 32) / 6)
    labels = torch.randint(4096, (512,))
    call = compile_mst(loss, chunk_rows=16)
    call(x, w, labels).backward()
    w.grad = x.grad = None
    trace = mstc.measure_peak(lambda: call(x, w, labels).backward(), parameters=[w, x])
    logits, gradient = 512 * 4096 * 4, w.nbytes
    assert trace.peak_intermediate_nbytes < 0.3 * logits + 2 * gradient


# -- bodies compiled ahead of their first use ---------------------------------------------------


def _call_of(x: Tensor, w: Tensor, chunk: int) -> loop.Call:
    mode = FakeTensorMode()
    inputs = (mode.from_tensor(x), mode.from_tensor(w))
    return loop.Call(inputs, tuple(x.shape), chunk, json.dumps(SQUARE), INDUCTOR_LOWERING)


def test_what_was_prepared_serves_every_chunk(compiles: list[Any]) -> None:
    """The full chunks and the last one; nothing is compiled when the loop runs."""
    x, w = torch.randn(11, 3), torch.randn(3)
    loop.prepare_bodies([_call_of(x, w, 4), _call_of(x, w, 4)])
    assert [sizes for sizes, _ in compiles] == [(4, 3), (3, 3)]
    check(x, w, 4)
    assert len(compiles) == 2


def test_nobody_finds_a_body_whose_kernels_are_being_built(compiles: list[Any]) -> None:
    """Another thread with the same body would run it."""
    call = _call_of(torch.randn(11, 3), torch.randn(3), 4)
    program = loop.program_of(call.spec, call.lowering)
    waits = program.prepare(call.inputs, call.sizes, call.chunk, {})
    assert len(waits) == len(compiles) == 2
    assert not program.compiled
    assert not any(program.open_bodies.values())
    for wait in waits:
        wait()
    assert len(program.compiled) == 2


def test_other_strides_than_prepared_for(compiles: list[Any]) -> None:
    """The real tensor decides: compiled once more, and right."""
    x, w = torch.randn(8, 6), torch.randn(6)
    loop.prepare_bodies([_call_of(x, w, 4)])
    check(x, torch.randn(12)[::2], 4)
    assert len(compiles) == 2


def test_a_prepared_body_through_inductor() -> None:
    loop.program_of.cache_clear()
    x, w = torch.randn(11, 3), torch.randn(3)
    before = loop.counters.bodies_compiled
    loop.prepare_bodies([_call_of(x, w, 4)])
    assert loop.counters.bodies_compiled - before == 2
    for got, want in zip(run(x, w, 4, INDUCTOR_LOWERING), expected(x, w), strict=True):
        torch.testing.assert_close(got, want)
    assert loop.counters.bodies_compiled - before == 2


def test_kernels_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A C++ compiler that fails shows when its result is waited for: the body runs op by op."""

    def fail(self: PendingKernels) -> None:
        raise RuntimeError("no C++ compiler today")

    monkeypatch.setattr(PendingKernels, "wait", fail)
    loop.program_of.cache_clear()
    x, w = torch.randn(8, 3), torch.randn(3)
    with pytest.warns(BodyCompilationWarning, match="no C\\+\\+ compiler today"):
        loop.prepare_bodies([_call_of(x, w, 4)])
    for got, want in zip(run(x, w, 4, INDUCTOR_LOWERING), expected(x, w), strict=True):
        torch.testing.assert_close(got, want)
    loop.program_of.cache_clear()


def test_waits_of_other_threads_are_not_collected() -> None:
    """Another thread may be about to run what it compiles."""
    waited: list[str] = []

    class Compiler(AsyncCompile):
        def _wait_futures(self, scope: dict[str, Any]) -> None:
            waited.append(scope["name"])

    def wait(name: str) -> None:
        AsyncCompile.wait(Compiler(), {"name": name})

    pending = PendingKernels()
    with torch._inductor.config.patch(compile_threads=2), pending.collected():
        wait("own")
        other = threading.Thread(target=wait, args=("another",))
        other.start()
        other.join()
        assert waited == ["another"]
    with torch._inductor.config.patch(compile_threads=2):
        pending.wait()
        wait("later")
    assert waited == ["another", "own", "later"]


def test_layers_with_normed_branches_share_their_bodies() -> None:
    """The stream is a sum of normed branches (as in Gemma-2): no layer computes it all again."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.mlp = nn.Linear(16, 16, bias=False), MLP(16, 64)
            self.norms = nn.ModuleList(nn.RMSNorm(16, eps=1e-5) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.norms[1](self.mix(self.norms[0](x)))
            return x + self.norms[3](self.mlp(self.norms[2](x)))

    model = nn.Sequential(*(Layer() for _ in range(4)))

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()

    batch = (torch.randn(64, 16, requires_grad=True),)
    eager = train(model, loss, batch)
    with counting_loops() as programs:
        assert_same(train(model, compile_mst(loss), batch), eager)
    assert len(programs) == 8
    assert len(set(programs)) == 2
