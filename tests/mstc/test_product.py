"""Products that are added in float32, on whatever device there is."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mstc import watch
from mstc.runtime import product
from mstc.runtime.product import Only, Way, add_product, best_way
from mstc.watch import SimulatedTrace, Watch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOW = [torch.bfloat16, torch.float16]


def _is_exact(device: str, dtype: torch.dtype) -> None:
    """Forty products of which a bfloat16 accumulator would lose most: float32's error remains."""
    torch.manual_seed(0)
    total, buffer = torch.zeros(8, 24, dtype=torch.float64), None
    for _ in range(40):
        left, right = torch.randn(8, 16).to(dtype), torch.randn(16, 24).to(dtype)
        total += left.double() @ right.double()
        result = add_product(buffer, left.to(device), right.to(device), torch.float32)
        assert buffer is None or result is buffer
        buffer = result
    assert buffer is not None
    assert buffer.dtype == torch.float32
    torch.testing.assert_close(buffer.cpu().double(), total, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float16),
        ("cpu", torch.float32),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (*LOW, torch.float32)),
    ],
)
def test_no_product_is_rounded(device: str, dtype: torch.dtype) -> None:
    _is_exact(device, dtype)


@pytest.mark.parametrize("block", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", LOW)
def test_operands_are_widened_in_blocks(
    block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "best_way", lambda *_: "cast")
    monkeypatch.setattr(product, "_BLOCK_BYTES", block)
    _is_exact("cpu", dtype)


def _simulated(only: Only) -> SimulatedTrace:
    """Two products of 41 rows, the second added to the first."""
    with FakeTensorMode():
        left, right = (torch.empty(*s, dtype=torch.bfloat16) for s in ((41, 16), (16, 24)))
        heard = Watch([left, right])
        with heard:
            buffer = add_product(None, left, right, torch.float32, only=only)
            add_product(buffer, left, right, torch.float32, only=only)
        return heard.summary([])


@pytest.mark.parametrize("block", [1, 100, 400, 2**20])
@pytest.mark.parametrize("way", ["round", "cast"])
def test_three_blocks_hold_what_all_hold(
    way: Way, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a simulation runs no more."""
    monkeypatch.setattr(product, "best_way", lambda *_: way)
    monkeypatch.setattr(product, "_BLOCK_BYTES", block)
    some, every = _simulated(watch._first_and_last), _simulated(list)
    assert some.peak_nbytes == every.peak_nbytes
    assert len(some.changes) < len(every.changes) or block == 2**20


@pytest.mark.parametrize("block", [1, 100, 2**20])
@pytest.mark.parametrize(("chunks", "bound"), [("add up", 1), ("random", 1.1), ("cancel", 1.5)])
def test_rounding_chunks_is_no_worse_than_rounding_the_whole(
    chunks: str, bound: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one bfloat16 product of everything, both from operands that were rounded before."""
    monkeypatch.setattr(product, "best_way", lambda *_: "round")
    monkeypatch.setattr(product, "_BLOCK_BYTES", block)
    torch.manual_seed(0)
    count, rows = 32, 16
    left = torch.randn(40, count, rows, dtype=torch.float64)
    right = torch.randn(count, rows, 24, dtype=torch.float64)
    if chunks == "add up":
        left, right = left.abs(), right.abs()
    elif chunks == "cancel":
        left[:, 1::2] = 1e-2 * left[:, 1::2] - left[:, ::2]
        right[1::2] = right[::2]
    exact = left.flatten(1) @ right.flatten(0, 1)
    left, right = left.bfloat16(), right.bfloat16()
    buffer = None
    for i in range(count):
        buffer = add_product(buffer, left[:, i], right[i], torch.float32)
    assert buffer is not None
    assert buffer.dtype == torch.float32
    at_once = left.flatten(1) @ right.flatten(0, 1)
    ours, theirs = ((b.double() - exact).norm() / exact.norm() for b in (buffer, at_once))
    assert 0 < ours < bound * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["accumulate", "multiply", "cast"])
def test_every_way_on_a_gpu(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "best_way", lambda *_: way)
    _is_exact("cuda", torch.bfloat16)


def test_a_device_that_is_not_here_is_a_good_one() -> None:
    """As in a simulation for another machine."""
    assert best_way(torch.device("xpu"), torch.bfloat16, torch.float32) == "accumulate"


@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("refused", [0, 1, 2])
def test_the_best_way_that_works(
    refused: int, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that lacks an op is served by the next way."""
    ways: tuple[Way, ...] = ("accumulate", "multiply", "round" if instructions else "cast")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    tried: list[Way] = []

    def attempt(way: Way) -> object:
        def run(*_: object) -> None:
            tried.append(way)
            if ways.index(way) < refused:
                raise RuntimeError("not on this device")

        return run

    monkeypatch.setattr(product, "_WAYS", {way: attempt(way) for way in ways})
    best_way.cache_clear()
    try:
        assert best_way(torch.device("cpu"), torch.bfloat16, torch.float32) == ways[refused]
        best_way.cache_clear()
        never = "cast" if refused == 2 else ways[refused]  # float16's products are not rounded
        assert best_way(torch.device("cpu"), torch.float16, torch.float32) == never
    finally:
        best_way.cache_clear()
    assert tried == 2 * list(ways[: min(refused + 1, 2)])
