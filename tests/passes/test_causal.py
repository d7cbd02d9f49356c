"""A mask leaves attention only where the graph proves what it is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from mstc.runtime.memory import measure_peak
from passes.causal import drop_causal_masks
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)
from tests.passes.graphs import run_graph, trace

LENGTH = 24
INF = float("inf")


def positions() -> Tensor:
    return torch.arange(LENGTH)


def by_comparison(x: Tensor) -> Tensor:
    return (positions()[None, :] <= positions()[:, None])[None, None]


def strictly_before_next(x: Tensor) -> Tensor:
    return positions()[None, :] < positions()[:, None] + 1


def transposed(x: Tensor) -> Tensor:
    return (positions()[:, None] <= positions()[None, :]).transpose(0, 1)


def permuted(x: Tensor) -> Tensor:
    return (positions()[:, None, None] <= positions()[None, None, :]).permute(1, 2, 0)


def doubled(x: Tensor) -> Tensor:
    return 2 * positions()[None, :] - 1 < (positions() * 2)[:, None]


def from_triangle(x: Tensor) -> Tensor:
    return torch.triu(torch.full((LENGTH, LENGTH), -INF), 1)


def filled(x: Tensor) -> Tensor:
    later = positions()[None, :] > positions()[:, None]
    return torch.zeros(LENGTH, LENGTH).masked_fill(later, -INF)


def lowest(x: Tensor) -> Tensor:
    return torch.where(by_comparison(x), 0.0, torch.finfo(torch.float32).min)


def inverted(x: Tensor) -> Tensor:
    return ~(positions()[None, :] > positions()[:, None])


def wide_window(x: Tensor) -> Tensor:
    i, j = positions()[:, None], positions()[None, :]
    return (j <= i) & (i - j < LENGTH) & torch.ones((), dtype=torch.bool)


def padded_for_alignment(x: Tensor) -> Tensor:
    return F.pad(torch.where(by_comparison(x), 0.0, -INF), (0, 8))[..., :LENGTH]


def padded_before(x: Tensor) -> Tensor:
    return F.pad(torch.where(by_comparison(x), 0.0, -INF), (1, 7))[..., :LENGTH]


def one_document(x: Tensor) -> Tensor:
    """As Hugging Face looks for packed sequences, in positions that hold none."""
    at = positions()[None]
    starts = torch.cat([at[:, :1] - 1, at], -1).diff(dim=-1) != 1
    own = starts.cumsum(-1)
    batch = torch.arange(1)[:, None, None, None]
    i, j = positions()[:, None], positions()[None, :]
    return (own[batch, i] == own[batch, j]) & (j <= i)


def two_documents(x: Tensor) -> Tensor:
    at = torch.cat([positions()[:7], positions()[: LENGTH - 7]])[None]
    own = (torch.cat([at[:, :1] - 1, at], -1).diff(dim=-1) != 1).cumsum(-1)
    i, j = positions()[:, None], positions()[None, :]
    return (own[:, :, None] == own[:, None, :])[:, None] & (j <= i)


def pieced_together(x: Tensor) -> Tensor:
    at = torch.cat([positions()[:5], positions()[5:]])
    return at[None, :] <= at[:, None]


def pieced_with_a_gap(x: Tensor) -> Tensor:
    at = torch.cat([positions()[:5], positions()[5:] + 1])
    return positions()[None, :] <= at[:, None]


def both_cut(x: Tensor) -> Tensor:
    longer = torch.arange(LENGTH + 3)
    return longer[None, 2:-1] <= longer[2:-1, None]


def stretched(x: Tensor) -> Tensor:
    return by_comparison(x).expand(2, 3, LENGTH, LENGTH)


def one_late(x: Tensor) -> Tensor:
    return positions()[None, :] <= positions()[:, None] + 1


def one_early(x: Tensor) -> Tensor:
    return positions()[None, :] < positions()[:, None] + (positions()[:, None] < 1)


def window(x: Tensor) -> Tensor:
    i, j = positions()[:, None], positions()[None, :]
    return (j <= i) & (i - j < LENGTH - 1)


def reversed_time(x: Tensor) -> Tensor:
    return (positions()[None, :] >= positions()[:, None]) & (x.sum() < INF)


def anticausal(x: Tensor) -> Tensor:
    return positions()[None, :] >= positions()[:, None]


def from_data(x: Tensor) -> Tensor:
    return by_comparison(x) & (x[0, 0, :, 0] < INF)[None, None, None, :]


def small_numbers(x: Tensor) -> Tensor:
    return torch.where(by_comparison(x), 0.0, -1e4)


def biased(x: Tensor) -> Tensor:
    return torch.where(by_comparison(x), 1.0, -INF)


def cut(x: Tensor) -> Tensor:
    longer = torch.arange(LENGTH + 1)
    return longer[None, 1:] <= longer[1:, None]


def one_query_stretched(x: Tensor) -> Tensor:
    """Masks nothing: only position zero is compared with."""
    return (positions()[:, None] >= positions()[:1]).expand(LENGTH, LENGTH)


def one_key_stretched(x: Tensor) -> Tensor:
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return (positions()[:, None] >= torch.arange(1)) & everything


def first_query_stretched(x: Tensor) -> Tensor:
    return (positions()[None, :] <= positions()[:1, None]).expand(LENGTH, LENGTH)


def shifted_cut(x: Tensor) -> Tensor:
    longer = torch.arange(LENGTH + 1)
    return longer[None, :LENGTH] <= longer[1:, None]


CAUSAL = [
    by_comparison,
    strictly_before_next,
    transposed,
    permuted,
    doubled,
    from_triangle,
    filled,
    lowest,
    inverted,
    wide_window,
    stretched,
    padded_for_alignment,
    one_document,
    pieced_together,
    both_cut,
    cut,
]
NOT_PROVEN = [
    one_late,
    one_early,
    window,
    reversed_time,
    anticausal,
    from_data,
    small_numbers,
    biased,
    shifted_cut,
    padded_before,
    first_query_stretched,
    two_documents,
    pieced_with_a_gap,
]


def attention(mask: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor]]:
    """The op that `scaled_dot_product_attention` becomes, with its mask as that makes it."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        made = mask(q)
        if made.dtype is torch.bool:
            made = torch.where(made, 0.0, -INF)
        while made.dim() < 4:
            made = made.unsqueeze(0)
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return (op(q, k, v, attn_mask=made, scale=0.3)[0],)

    return run


def operands(queries: int = LENGTH) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, 4) for n in (queries, LENGTH, LENGTH)]


@pytest.mark.parametrize("mask", CAUSAL, ids=lambda m: m.__name__)
def test_proven(mask: Callable[[Tensor], Tensor]) -> None:
    graph = trace(attention(mask), *operands())
    new, rewrites = drop_causal_masks(graph, min_bytes=1)
    assert len(rewrites) == 1
    (call,) = [n for n in new.nodes if "attention" in str(n.target)]
    assert call.kwargs["attn_mask"] is None
    assert call.args[3:5] == (0.0, True)
    assert not any(n.meta["val"].shape[-2:] == (LENGTH, LENGTH) for n in call.all_input_nodes)
    (before,), (after,) = run_graph(graph, operands()), run_graph(new, operands())
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize(("before", "proven"), [(-1, True), (-2, False)])
def test_one_document_of_any_length(before: int, proven: bool) -> None:
    """As `one_document`, with the length left open; what is put in front has to go on in it."""

    def mask(x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2])[None]
        own = (torch.cat([at[:, :1] + before, at], -1).diff(dim=-1) != 1).cumsum(-1)
        same = own[:, :, None] == own[:, None, :]
        return same[:, None] & (at <= torch.arange(x.shape[2])[:, None])

    graph = trace(attention(mask), *operands(), symbolic=True)
    _, rewrites = drop_causal_masks(graph, min_bytes=1)
    assert len(rewrites) == proven


@pytest.mark.parametrize("mask", NOT_PROVEN, ids=lambda m: m.__name__)
def test_not_proven(mask: Callable[[Tensor], Tensor]) -> None:
    graph = trace(attention(mask), *operands())
    assert drop_causal_masks(graph, min_bytes=1) == (graph, ())


def far_ahead(x: Tensor) -> Tensor:
    return positions()[None, :] <= positions()[:, None] + LENGTH


@pytest.mark.parametrize("mask", [far_ahead, one_query_stretched, one_key_stretched])
def test_a_mask_that_masks_nothing_leaves(mask: Callable[[Tensor], Tensor]) -> None:
    graph = trace(attention(mask), *operands())
    new, rewrites = drop_causal_masks(graph, min_bytes=1)
    assert "masks nothing" in rewrites[0].reason
    (before,), (after,) = run_graph(graph, operands()), run_graph(new, operands())
    torch.testing.assert_close(before, after)


def test_fewer_queries_than_keys_are_left_alone() -> None:
    """Where the triangle begins is then a convention that kernels do not share."""

    def mask(x: Tensor) -> Tensor:
        return positions()[None, :] <= positions()[: LENGTH - 4, None]

    graph = trace(attention(mask), *operands(LENGTH - 4))
    assert drop_causal_masks(graph, min_bytes=1) == (graph, ())


def test_small_masks_are_left_alone() -> None:
    graph = trace(attention(by_comparison), *operands())
    assert drop_causal_masks(graph, min_bytes=4 * LENGTH**2 + 1) == (graph, ())


class Block(nn.Module):
    """Attention behind a mask that is built from positions, as Hugging Face builds it."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1], device=x.device)
        mask = at[None, :] <= at[:, None]
        if self.window is not None:
            mask = mask & (at[:, None] - at[None, :] < self.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None]).sum()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("length", [449, 512])
def test_gradients_and_report(length: int, dynamic: bool) -> None:
    torch.manual_seed(0)
    block = Block().double()
    x = torch.randn(2, length, 16, dtype=torch.float64)
    block(x).backward()
    wanted = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    options = {"lowering": "eager", "min_peak_bytes": 0, "min_region_bytes": 1024}
    compiled = torch.compile(block, backend="mst", dynamic=dynamic, options=options)
    compiled(x).backward()
    for parameter, grad in zip(block.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    (graph,) = mstc.last_report().graphs
    (rewrite,) = graph.rewrites
    assert rewrite.nbytes == 8 * length**2
    assert "is causal" in rewrite.reason
    assert "gone" in str(mstc.last_report())
    assert not graph.untouched
    assert graph.peak_after < graph.peak_before


def test_no_mask_is_in_memory() -> None:
    block, x = Block(), torch.randn(1, 1024, 16)
    options = {"lowering": "eager", "min_peak_bytes": 0}
    compiled = torch.compile(block, backend="mst", options=options)
    compiled(x).backward()
    peak = measure_peak(lambda: compiled(x).backward()).peak_intermediate_nbytes
    assert peak < 4 * 1024**2, "the mask alone"
