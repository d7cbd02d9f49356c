"""Which outputs are returned without a gradient, and why others keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from passes.detach import DetachResult, detach_outputs

WIDTH = 16


def detach(function: Callable[..., Any], *args: Any, **kwargs: Any) -> DetachResult:
    """What the pass does to the one graph of a function; the graph must not change."""
    torch._dynamo.reset()  # or a number that changes is left open
    results: list[DetachResult] = []

    def run(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        before = gm.code
        results.append(detach_outputs(gm, min_bytes=256, **kwargs))
        assert gm.code == before
        return gm

    torch.compile(function, backend=run, fullgraph=True)(*args)
    (result,) = results
    return result


def reason(result: DetachResult) -> str:
    assert not result.indices
    (refusal,) = result.refusals
    return refusal.reason


def inputs() -> tuple[Tensor, Tensor]:
    return (
        torch.randn(8, WIDTH, requires_grad=True),
        torch.randn(WIDTH, WIDTH, requires_grad=True),
    )


def test_what_a_loss_is_made_from() -> None:
    def step(x: Tensor, w: Tensor) -> Any:
        keys = x @ w
        return keys.square().sum(), keys, keys.sum(0)[:2]  # the last one is small

    result = detach(step, *inputs())
    assert (result.indices, result.nbytes) == ((1,), 8 * WIDTH * 4)
    x, w = inputs()
    loss, keys, small = result.graph_module(x, w)
    assert [t.requires_grad for t in (loss, keys, small)] == [True, False, True]
    assert torch.equal(keys, x @ w)


def test_what_leads_to_no_loss() -> None:
    """It was made to be used elsewhere, with its gradient."""

    def step(x: Tensor, w: Tensor) -> Any:
        return x.sum(), x @ w

    assert not detach(step, *inputs()).indices
    assert not detach(lambda x, w: x @ w, *inputs()).indices
    assert not detach(lambda x, w: (x @ w, (x @ w).sum(-1)), *inputs()).indices


def test_what_needs_no_gradient() -> None:
    def step(x: Tensor, w: Tensor) -> Any:
        table = w.detach() @ w.detach()
        return (x @ table).sum(), table, w

    result = detach(step, *inputs())
    assert (result.indices, result.refusals) == ((), ())


def test_outputs_that_must_stay() -> None:
    def step(x: Tensor, w: Tensor) -> Any:
        keys, values = x @ w, x @ w.T
        return (keys * values).sum(), keys, values

    assert detach(step, *inputs(), needed=(2,)).indices == (1,)


def test_random_numbers() -> None:
    def step(x: Tensor, w: Tensor, p: float, training: bool) -> Any:
        keys = F.dropout(x @ w, p, training)
        return keys.sum(), keys

    assert "dropout may draw random numbers" in reason(detach(step, *inputs(), 0.1, True))
    assert detach(step, *inputs(), 0.0, True).indices
    assert detach(step, *inputs(), 0.1, False).indices


def test_dropout_in_attention() -> None:
    def step(x: Tensor, w: Tensor, p: float) -> Any:
        keys = (x @ w).view(1, 1, 8, WIDTH)
        return F.scaled_dot_product_attention(keys, keys, keys, dropout_p=p).sum(), keys

    assert "random" in reason(detach(step, *inputs(), 0.1))
    assert detach(step, *inputs(), 0.0).indices


@pytest.mark.parametrize(
    "draw",
    [
        lambda t: t + torch.rand_like(t),
        lambda t: torch.ops.aten.bernoulli.p(t, 0.5) * t,
        lambda t: torch.randn(t.shape) * t,
        lambda t: F.rrelu(t, training=True),
        lambda t: F.alpha_dropout(t, 0.5, True),
        lambda t: F.gumbel_softmax(t),
    ],
)
def test_other_random_numbers(draw: Callable[[Tensor], Tensor]) -> None:
    def step(x: Tensor, w: Tensor) -> Any:
        keys = x @ w
        return draw(keys).sum(), keys

    assert "random" in reason(detach(step, *inputs()))


def test_random_numbers_in_a_checkpoint() -> None:
    def step(x: Tensor, w: Tensor) -> Any:
        keys = torch.utils.checkpoint.checkpoint(
            lambda a: F.dropout(a @ w, 0.5), x, use_reentrant=False
        )
        assert keys is not None
        return keys.sum(), keys

    assert "random" in reason(detach(step, *inputs()))


def test_a_graph_that_writes() -> None:
    def step(x: Tensor, w: Tensor, count: Tensor) -> Any:
        keys = x @ w
        count.add_(1)
        return keys.sum(), keys

    assert "writes to an input" in reason(detach(step, *inputs(), torch.zeros(())))


def test_writes_to_its_own_values() -> None:
    def step(x: Tensor, w: Tensor) -> Any:
        keys = x @ w
        keys += 1
        return keys.sum(), keys

    assert detach(step, *inputs()).indices == (1,)


def test_running_statistics() -> None:
    def step(x: Tensor, w: Tensor, mean: Tensor, var: Tensor) -> Any:
        keys = F.batch_norm(x @ w, mean, var, training=True)
        return keys.sum(), keys

    statistics = torch.zeros(WIDTH), torch.ones(WIDTH)
    assert "writes to an input" in reason(detach(step, *inputs(), *statistics))


def test_shared_memory() -> None:
    def step(x: Tensor, w: Tensor) -> Any:
        keys = x @ w
        return keys.sum(), keys, keys.T

    result = detach(step, *inputs())
    assert not result.indices
    assert all("shares memory" in refusal.reason for refusal in result.refusals)


def test_inputs_that_are_not_plain() -> None:
    """Nothing says whether a sparse tensor is what it was at the call."""

    def step(x: Tensor, w: Tensor) -> Any:
        keys = x @ w
        return keys.sum(), keys

    gm = detach(step, *inputs()).graph_module
    value = gm.graph.find_nodes(op="placeholder")[0].meta["example_value"]
    gm.graph.find_nodes(op="placeholder")[0].meta["example_value"] = value.to_sparse()
    gm.graph.output_node().args = (
        tuple(
            n.args[0] if n.name.startswith("detach") else n for n in gm.graph.output_node().args[0]
        ),
    )
    result = detach_outputs(gm, min_bytes=256)
    assert "is no plain tensor" in reason(result)


def test_one_refusal_for_all() -> None:
    """Each layer's keys are little, and together they are not."""

    def step(x: Tensor, w: Tensor) -> Any:
        keys, values = F.dropout(x @ w, 0.5), x @ w.T
        return (keys * values).sum(), keys, values

    result = detach(step, *inputs())
    (refusal,) = result.refusals
    assert refusal.nbytes == 2 * 8 * WIDTH * 4
    assert refusal.subject == "gradient of output 1, 2"
