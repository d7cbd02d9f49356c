"""A mask is read as one row only where it is the same for every query."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from mstc.runtime.memory import measure_peak
from passes.padding import keep_one_row
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)
from tests.passes.graphs import run_graph, trace

BATCH, HEADS, QUERIES, KEYS = 2, 3, 20, 24
INF = float("inf")
CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def square(keep: Tensor) -> Tensor:
    return keep[:, None, None, :].expand(BATCH, 1, QUERIES, KEYS)


def stretched(keep: Tensor) -> Tensor:
    return square(keep)


def stretched_twice(keep: Tensor) -> Tensor:
    return keep[:, None].expand(BATCH, QUERIES, KEYS)[:, None].expand(BATCH, HEADS, QUERIES, KEYS)


def in_floats(keep: Tensor) -> Tensor:
    return (1 - square(keep).float()) * -1e9


def filled(keep: Tensor) -> Tensor:
    return torch.zeros(BATCH, 1, QUERIES, KEYS).masked_fill(~square(keep), -INF)


def with_queries_that_all_hold(keep: Tensor) -> Tensor:
    """As Hugging Face does it: positions of queries are compared, and all of them hold."""
    return (torch.arange(QUERIES)[:, None] >= 0) & keep[:, None, None, :]


def looked_up(keep: Tensor) -> Tensor:
    """As Hugging Face looks padding up: by index, for every pair of query and key."""
    rows = torch.arange(BATCH)[:, None, None, None]
    found = keep[rows, torch.arange(KEYS)]
    return torch.ones(QUERIES, 1, dtype=torch.bool) & found


def permuted(keep: Tensor) -> Tensor:
    return keep[:, :, None].expand(BATCH, KEYS, QUERIES).permute(0, 2, 1)[:, None]


def flat(keep: Tensor) -> Tensor:
    """One mask for all sequences, of two dims."""
    return keep[0].expand(QUERIES, KEYS)


def from_a_whole_table(keep: Tensor) -> Tensor:
    """Dims that nothing is known of are cut, whole, before they are stretched."""
    table = (keep.float()[:, :, None] @ keep.float()[:, None, :])[:, :1]  # batch, 1, keys
    return (table > 0).expand(BATCH, QUERIES, KEYS)[:, None]


ONE_ROW = [
    stretched,
    stretched_twice,
    in_floats,
    filled,
    with_queries_that_all_hold,
    looked_up,
    permuted,
    flat,
    from_a_whole_table,
]


def and_causal(keep: Tensor) -> Tensor:
    return square(keep) & (torch.arange(KEYS) <= torch.arange(QUERIES)[:, None])


def and_one_query_differs(keep: Tensor) -> Tensor:
    return square(keep) & (torch.arange(QUERIES)[:, None] >= 1)


def of_queries(keep: Tensor) -> Tensor:
    return keep[:, None, :QUERIES, None].expand(BATCH, 1, QUERIES, KEYS)


def read_from_data(keep: Tensor) -> Tensor:
    return (keep.float()[:, :QUERIES, None] * keep[:, None, :])[:, None] > 0


def running(keep: Tensor) -> Tensor:
    """A sum over queries so far, of values that are the same for all."""
    return (square(keep).float().cumsum(2) < 9) & square(keep)


def random(keep: Tensor) -> Tensor:
    return torch.rand(BATCH, 1, QUERIES, KEYS) < square(keep).float()


def in_another_order(keep: Tensor) -> Tensor:
    """Reshaped across dims: what was a row is none any more."""
    return keep[:, :QUERIES, None].expand(BATCH, QUERIES, KEYS).reshape(BATCH, 1, KEYS, QUERIES).mT


def positions_that_wrap(keep: Tensor) -> Tensor:
    """Eight bits hold no 300: some queries are below zero."""
    return ((torch.arange(QUERIES) * 9).to(torch.int8)[:, None] >= 0) & square(keep)


def positions_of_eight_bits(keep: Tensor) -> Tensor:
    at = torch.arange(QUERIES, dtype=torch.int8) * torch.full((1,), 9, dtype=torch.int8)
    return (at[:, None] >= 0) & square(keep)


def positions_that_round(keep: Tensor) -> Tensor:
    at = torch.arange(500, 500 + QUERIES) + torch.zeros(QUERIES, dtype=torch.bfloat16)
    return (at[:, None] < 500 + QUERIES) & square(keep)


def bits_of_positions(keep: Tensor) -> Tensor:
    at = (torch.arange(QUERIES, dtype=torch.int32) - 5).view(torch.float32)
    return (at[:, None] >= -6) & square(keep)


DIFFERING = [
    positions_that_wrap,
    positions_of_eight_bits,
    positions_that_round,
    bits_of_positions,
    and_causal,
    and_one_query_differs,
    of_queries,
    read_from_data,
    running,
    random,
    in_another_order,
]


def attention(mask: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The ops that `scaled_dot_product_attention` becomes, forward and backward."""

    def run(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        made = mask(keep)
        if made.dtype is torch.bool:
            made = torch.where(made, 0.0, -INF)
        made = made.to(q.dtype)
        out, logsumexp = CPU_FLASH(q, k, v, attn_mask=made)
        return out, *CPU_FLASH_BACKWARD(
            torch.ones_like(out), q, k, v, out, logsumexp, 0.0, False, attn_mask=made
        )

    return run


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(BATCH, HEADS, n, 8) for n in (QUERIES, KEYS, KEYS)]
    keep = torch.rand(BATCH, KEYS) < 0.7
    keep[:, 0] = True
    return [*(torch.randn(s, dtype=dtype) for s in shapes), keep]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", ONE_ROW, ids=lambda m: m.__name__)
def test_one_row_is_read(mask: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    graph = trace(attention(mask), *operands(dtype))
    new, rewrites = keep_one_row(graph, min_bytes=1)
    assert len(rewrites) == 1
    assert "one row" in rewrites[0].reason
    calls = [n for n in new.nodes if "attention" in str(n.target)]
    assert len(calls) == 2
    for call in calls:
        assert call.kwargs["attn_mask"].meta["val"].shape[-2:] == (1, KEYS)
    for node in new.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op == "call_function":
            assert value.shape[-2:] != (QUERIES, KEYS), node
    for before, after in zip(run_graph(graph, operands(dtype)), run_graph(new, operands(dtype))):
        assert torch.equal(before, after)


@pytest.mark.parametrize("mask", DIFFERING, ids=lambda m: m.__name__)
def test_masks_that_differ_are_left_alone(mask: Callable[[Tensor], Tensor]) -> None:
    graph = trace(attention(mask), *operands())
    assert keep_one_row(graph, min_bytes=1) == (graph, ())


def test_small_masks_are_left_alone() -> None:
    graph = trace(attention(stretched), *operands())
    nbytes = 4 * BATCH * QUERIES * KEYS
    assert keep_one_row(graph, min_bytes=nbytes)[1]
    assert keep_one_row(graph, min_bytes=nbytes + 1) == (graph, ())


class Block(nn.Module):
    """Attention behind a padding mask, as encoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        length = x.shape[1]
        seen = torch.arange(length, device=x.device)[:, None] >= 0
        mask = (seen & keep[:, None, None, :]).expand(-1, 1, length, length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).square().sum()


def batch(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    keep = torch.arange(length)[None] < torch.tensor([length, length // 3])[:, None]
    return torch.randn(2, length, 16, dtype=dtype), keep


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("length", [449, 512])
def test_gradients_and_report(length: int, dynamic: bool) -> None:
    torch.manual_seed(0)
    block, given = Block().double(), batch(length)
    block(*given).backward()
    wanted = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    options = {"lowering": "eager", "min_peak_bytes": 0, "min_region_bytes": 1024}
    compiled = torch.compile(block, backend="mst", dynamic=dynamic, options=options)
    compiled(*given).backward()
    for parameter, grad in zip(block.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    (graph,) = mstc.last_report().graphs
    (rewrite,) = graph.rewrites
    assert rewrite.nbytes == 8 * 2 * length**2
    assert "one row is read" in str(mstc.last_report())
    assert not graph.untouched


def test_no_mask_is_in_memory() -> None:
    block, given = Block(), batch(1024, torch.float32)
    options = {"lowering": "eager", "min_peak_bytes": 0}
    compiled = torch.compile(block, backend="mst", options=options)
    compiled(*given).backward()
    peak = measure_peak(lambda: compiled(*given).backward()).peak_intermediate_nbytes
    assert peak < 4 * 2 * 1024**2, "the mask alone"
    assert not mstc.last_report().graphs[0].loops
