"""The measuring of memory is exact to the byte, for functions whose memory is known by hand."""

import pytest
import torch

from mstc.runtime.memory import MemoryTrace, measure_peak, measure_step

MIB = 2**20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def mib(n: int, device: str) -> torch.Tensor:
    return torch.empty(n * MIB, dtype=torch.uint8, device=device)


def test_peak_end_and_timeline(device: str):
    def fn() -> torch.Tensor:
        a = mib(3, device)
        b = mib(5, device)
        del a
        c = mib(1, device)
        del b
        return c

    trace = measure_peak(fn, device=device)
    assert [n // MIB for _, n in trace.timeline] == [0, 3, 8, 5, 6, 1]
    assert trace.peak_nbytes == 8 * MIB
    assert trace.end_nbytes == 1 * MIB, "what is returned is alive at the end"
    assert trace.peak_intermediate_nbytes == trace.peak_nbytes, "no parameters, no gradients"
    times = [t for t, _ in trace.timeline]
    assert times == sorted(times)
    assert times[0] == 0


def give_back_seven_and_take_two(device: str) -> MemoryTrace:
    before = [mib(7, device)]

    def fn() -> None:
        before.clear()
        mib(2, device)

    return measure_peak(fn, device=device)


def test_release_of_older_memory_is_not_seen_on_cpu():
    """A documented limit, on the safe side: the peak is too large, never too small."""
    trace = give_back_seven_and_take_two("cpu")
    assert trace.peak_nbytes == 2 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_release_of_older_memory_counts_on_cuda():
    trace = give_back_seven_and_take_two("cuda")
    assert trace.peak_nbytes == 0
    assert trace.end_nbytes == -7 * MIB


def test_gradients_are_no_intermediates(device: str):
    weight = torch.zeros(MIB // 4, device=device, requires_grad=True)  # 1 MiB

    def step() -> None:
        (weight * 2.0).sum().backward()

    step()  # warm up
    trace = measure_step(step, [weight], device)
    assert trace.grad_nbytes == MIB
    assert trace.end_nbytes == MIB, "the gradient alone is left"
    # At the forward peak the product is alive and the gradient is not: subtracting the gradient
    # there would hide the product.
    assert MIB <= trace.peak_intermediate_nbytes < MIB + 4096
    assert (
        trace.peak_nbytes - trace.grad_nbytes <= trace.peak_intermediate_nbytes <= trace.peak_nbytes
    )


def test_step_starts_without_gradients():
    weight = torch.ones(8, requires_grad=True)
    weight.grad = torch.full((8,), 5.0)
    measure_step(lambda: weight.sum().backward(), [weight])
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(8))


def test_same_step_same_figures_on_cpu():
    layer = torch.nn.Linear(64, 256)
    x = torch.randn(32, 64)

    def step() -> None:
        layer(x).relu().sum().backward()

    step()
    first, second = (measure_step(step, layer.parameters()) for _ in range(2))
    assert first.peak_nbytes == second.peak_nbytes > 32 * 256 * 4
    assert [n for _, n in first.timeline] == [n for _, n in second.timeline]


def test_nothing_allocated():
    assert measure_peak(lambda: None) == MemoryTrace(0, 0, 0, 0, ((0.0, 0),))


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="meta"):
        measure_peak(lambda: None, device="meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_allocator():
    layer = torch.nn.Linear(1024, 4096, device="cuda")
    x = torch.randn(512, 1024, device="cuda")

    def step() -> None:
        layer(x).relu().sum().backward()

    step()
    for parameter in layer.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trace = measure_step(step, layer.parameters(), "cuda")
    assert trace.peak_nbytes == pytest.approx(torch.cuda.max_memory_allocated() - start, rel=0.02)
