"""What an op takes while it runs is what the allocator counts, and asking leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from mstc import scratch
from mstc.runtime.memory import measure_peak
from mstc.scratch import scratch_nbytes

aten = torch.ops.aten
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    scratch._learned.cache_clear()


def _matrix(rows: int, columns: int, dtype: torch.dtype, way: str) -> Tensor:
    if way == "transposed":
        return torch.randn(columns, rows).to(dtype).t()
    if way == "every other":
        return torch.randn(rows, 2 * columns).to(dtype)[:, ::2]
    return torch.randn(rows, columns).to(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", ["plain", "transposed", "every other"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.usefixtures("own_threads")
def test_products(dtype: torch.dtype, way: str, threads: int) -> None:
    torch.set_num_threads(threads)
    left, right = _matrix(96, 200, dtype, way), _matrix(200, 64, dtype, "plain")
    bias, out = torch.randn(64).to(dtype), torch.empty(96, 64, dtype=dtype)
    batches = left.expand(3, 96, 200), right.expand(3, 200, 64)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.mm.out, (left, right), {"out": out}),
        (aten.addmm.out, (bias, left, right), {"out": out}),
        (aten.addmm_.default, (out, left, right), {}),
        (aten.bmm.default, batches, {}),
    ]
    for op, args, kwargs in calls:
        _compare(op, args, kwargs)
    if way == "every other":
        assert scratch_nbytes(*calls[0]) > 0, "no library takes it as it lies"


def test_attention() -> None:
    for dtype in (torch.float32, BF16):
        queries, keys = torch.randn(2, 4, 80, 16).to(dtype), torch.randn(2, 2, 80, 16).to(dtype)
        op = aten._scaled_dot_product_flash_attention_for_cpu
        args = (queries, keys, keys, 0.0, True)
        _compare(op.default, args, {})
        assert scratch_nbytes(op.default, args, {}) > 0
        out, sums = op(*args)
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        _compare(backward, (out, queries, keys, keys, out, sums, 0.0, True), {})


def test_convolutions_and_mixed_dtypes() -> None:
    pixels, kernel = torch.randn(2, 3, 16, 16), torch.randn(8, 3, 4, 4)
    args = (pixels, kernel, None, [4, 4], [0, 0], [1, 1], False, [0, 0], 1)
    _compare(aten.convolution.default, args, {})
    wide, narrow = torch.randn(64, 64), torch.randn(64, 64).to(BF16)
    for args in ((wide, narrow), (narrow, wide)):
        _compare(aten.add.Tensor, args, {})
        assert scratch_nbytes(aten.add.Tensor, args, {}) == wide.nbytes
    assert scratch_nbytes(aten.add_.Tensor, (wide, narrow), {}) == wide.nbytes
    assert scratch_nbytes(aten.add_.Tensor, (wide, wide), {}) == 0


def _compare(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    op(*args, **kwargs)
    measured = measure_peak(lambda: op(*args, **kwargs))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        named = {n: mode.from_tensor(a) for n, a in kwargs.items()}
        found = scratch_nbytes(op, fakes, named)
    assert found == measured.peak_nbytes - measured.end_nbytes, op


@pytest.fixture
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _asked() -> int:
    left = torch.ones(96, 400, dtype=BF16)[:, ::2]
    return scratch_nbytes(aten.mm.default, (left, torch.ones(200, 64, dtype=BF16)), {})


def test_a_profiler_sees_nothing_of_it() -> None:
    options: dict[str, Any] = {"acc_events": True}
    with profile(profile_memory=True, **options) as profiler:
        found = _asked()
        torch.ones(8)
    names = {event.name for event in profiler.events() or ()}
    assert "aten::ones" in names
    assert "aten::mm" not in names
    scratch._learned.cache_clear()
    assert found == _asked() > 0
    scratch._learned.cache_clear()
    operands = 2 * (96 * 400 + 200 * 64)
    assert measure_peak(_asked).peak_nbytes == operands


def test_what_is_set_around_it_makes_no_difference() -> None:
    before, found = torch.get_rng_state(), _asked()
    contexts: list[Callable[[], Any]] = [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", BF16),
        FakeTensorMode,
    ]
    for context in contexts:
        scratch._learned.cache_clear()
        with context():
            assert _asked() == found
            assert torch.is_autocast_enabled("cpu") == isinstance(context(), torch.autocast)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_learned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    original = scratch._taken
    monkeypatch.setattr(scratch, "_taken", lambda *call: runs.append(call) or original(*call))
    assert _asked() == _asked()
    assert len(runs) == 1


def test_what_is_large_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of a terabyte's operands stands for itself as a smaller one."""
    runs: list[Any] = []
    monkeypatch.setattr(scratch, "_taken", lambda func, args, kwargs: runs.append(args) or 1)
    with FakeTensorMode():
        tokens, weight = torch.empty(1 << 19, 4096, dtype=BF16), torch.empty(4096, 1 << 17)
        heads = torch.empty(4, 32, 1 << 19, 128, dtype=BF16)
        pixels, kernel = torch.empty(1 << 14, 3, 1024, 1024), torch.empty(8, 3, 4, 4)
        convolved = (pixels, kernel, None, [4, 4], [0, 0], [1, 1], False, [0, 0], 1)
        assert scratch_nbytes(aten.mm.default, (tokens, weight.to(BF16)), {}) == 1
        attention = aten._scaled_dot_product_flash_attention_for_cpu.default
        assert scratch_nbytes(attention, (heads, heads, heads), {}) == 1
        assert scratch_nbytes(aten.convolution.default, convolved, {}) == 0
    (left, right), (queries, *_) = runs
    assert left.shape[1] == right.shape[0]
    assert left.shape[0] * left.shape[1] * right.shape[1] <= scratch._MOST_MULTIPLICATIONS
    assert left.stride == (left.shape[1], 1)
    assert queries.shape[:2] == (1, 1)


def test_what_takes_nothing() -> None:
    """Other devices, and what the machine cannot do."""
    on_meta = torch.empty(8, 8, dtype=BF16, device="meta")
    assert scratch_nbytes(aten.mm.default, (on_meta, on_meta), {}) == 0
    wide, narrow = torch.ones(8, 8), torch.ones(8, 8, dtype=BF16)
    assert scratch_nbytes(aten.mm.default, (wide, narrow), {}) == 0
