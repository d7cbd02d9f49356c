"""Products that are added in float32, on whatever device there is."""

from __future__ import annotations

import pytest
import torch

from mstc.runtime import product
from mstc.runtime.product import Way, add_product, best_way

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_no_product_is_rounded(device: str, dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_operands_are_widened_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "best_way", lambda *_: "cast")
    monkeypatch.setattr(product, "_BLOCK_BYTES", block)
    test_no_product_is_rounded("cpu", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["accumulate", "multiply", "cast"])
def test_every_way_on_a_gpu(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "best_way", lambda *_: way)
    test_no_product_is_rounded("cuda", torch.bfloat16)


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_the_best_way_that_works(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that lacks an op is served by the next way."""
    ways: tuple[Way, ...] = ("accumulate", "multiply", "cast")
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
    finally:
        best_way.cache_clear()
    assert tried == list(ways[: min(refused + 1, 2)])
