"""Which outputs leave a Dynamo graph, what is left behind for them, and why others stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from passes.defer import MANY_ROWS, DeferResult, Source, defer_outputs

ROWS, WIDTH, VOCAB = 6, 8, 96


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def capture(
    function: Callable[..., Any], *args: Any, **compile_options: Any
) -> list[torch.fx.GraphModule]:
    """The Dynamo graphs of a function."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm

    torch.compile(function, backend=keep, **compile_options)(*args)
    return graphs


def defer(function: Callable[..., Any], *args: Any, **compile_options: Any) -> DeferResult:
    """What the pass does to the one graph of a function; the graph must not change."""
    results: list[DeferResult] = []

    def run(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        before = gm.code
        results.append(defer_outputs(gm, min_bytes=256))
        assert gm.code == before
        return gm

    torch.compile(function, backend=run, fullgraph=True, **compile_options)(*args)
    (result,) = results
    return result


def hidden() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def head() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, requires_grad=True)


def sources(result: DeferResult) -> list[tuple[str, str]]:
    (deferred,) = result.deferred
    return [(source.kind, source.name) for source in deferred.frontier]


def code(result: DeferResult) -> list[str]:
    """The closure's operations, one a line."""
    (deferred,) = result.deferred
    lines = deferred.closure.code.splitlines()
    return [line.split(";")[0].strip() for line in lines if " = " in line]


def reason(result: DeferResult) -> str:
    """Why the one candidate was refused."""
    assert not result.deferred
    (refusal,) = result.refusals
    return refusal.reason


# --- what leaves ----------------------------------------------------------------------------------


def test_logits_beside_the_loss() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x.sin()
        logits = F.linear(h, w)
        return logits.logsumexp(-1).mean(), logits

    result = defer(forward, hidden(), head())
    (deferred,) = result.deferred
    assert result.refusals == ()
    assert result.num_outputs == 2
    assert deferred.indices == (1,)
    assert deferred.frontier == (Source("input", 1, "L['w']"), Source("output", 1, "h"))
    assert (deferred.shape, deferred.stride) == ((ROWS, VOCAB), (VOCAB, 1))
    assert (deferred.dtype, deferred.device.type) == (torch.float32, "cpu")
    assert deferred.requires_grad
    assert deferred.nbytes == ROWS * VOCAB * 4
    assert deferred.frontier_nbytes == ROWS * WIDTH * 4
    assert "test_defer.py:" in deferred.source
    assert "logits = F.linear(h, w)" in deferred.source
    assert deferred.geometry(()) == ((ROWS, VOCAB), (VOCAB, 1), 0)
    outputs = result.graph_module.graph.output_node().args[0]
    assert [node.name for node in outputs] == ["mean", "h"]  # type: ignore[union-attr]
    x, w = hidden(), head()
    loss, h = result.graph_module(x, w)
    assert torch.equal(deferred.closure(w, h), forward(x, w)[1])
    assert torch.equal(loss, forward(x, w)[0])


def test_soft_cap_slice_and_cast_are_repeated_from_the_smallest_tensor() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.layer_norm(x, (WIDTH,))
        logits = F.linear(h[:, 0:], w)
        logits = torch.tanh(logits / 30.0) * 30.0
        return logits.to(torch.bfloat16), logits.float().logsumexp(-1).mean() + 0 * logits.sum()

    def wanted(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        capped, loss = forward(x, w)
        return capped, loss + capped.sum()

    result = defer(wanted, hidden(), head())
    assert sources(result) == [("input", "L['w']"), ("output", "h")]
    assert code(result) == [
        "getitem = h[(slice(None, None, None), slice(0, None, None))]",
        "logits = torch._C._nn.linear(getitem, l_w_)",
        "truediv = logits / 30.0",
        "tanh = torch.tanh(truediv)",
        "logits_1 = tanh * 30.0",
        "capped = logits_1.to(torch.bfloat16)",
    ]
    assert result.deferred[0].dtype == torch.bfloat16


def test_heads_of_other_forms() -> None:
    bias = torch.randn(VOCAB)
    heads: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        lambda h, w: h @ w.T + bias,
        lambda h, w: torch.matmul(h, w.transpose(0, 1)).float(),
        lambda h, w: torch.addmm(bias, h, w.t()),
        lambda h, w: torch.einsum("rd,vd->rv", h, w) * 0.5,
        lambda h, w: (h.unsqueeze(0) @ w.mT).squeeze(0).clamp(-5, 5),
        lambda h, w: F.linear(h.view(2, -1, WIDTH), w).reshape(-1, VOCAB).contiguous(),
        lambda h, w: F.linear(h, w)[1:, ::2].square(),
        lambda h, w: F.linear(h[:, [0, 1, 2]], w[:, :3]).permute(1, 0).neg(),
    ]
    for make in heads:

        def forward(x: torch.Tensor, w: torch.Tensor, make: Any = make) -> tuple[Any, Any]:
            logits = make(x.sin(), w)
            return logits, logits.mean()

        torch._dynamo.reset()
        x, w = hidden(), head()
        result = defer(forward, x, w)
        (deferred,) = result.deferred
        assert deferred.frontier_nbytes <= ROWS * WIDTH * 4
        args = [x, w, bias][: len(result.graph_module.graph.find_nodes(op="placeholder"))]
        outputs = result.graph_module(*args)
        values = [(args if s.kind == "input" else outputs)[s.index] for s in deferred.frontier]
        assert torch.equal(deferred.closure(*values), forward(x, w)[0])


def test_a_head_fed_by_inputs_alone_keeps_nothing() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(x, w)
        return logits, logits.mean()

    result = defer(forward, hidden(), head())
    assert sources(result) == [("input", "L['x']"), ("input", "L['w']")]
    assert result.deferred[0].frontier_nbytes == 0
    assert len(result.graph_module.graph.output_node().args[0]) == 1  # type: ignore[arg-type]


def test_the_frontier_is_the_tensor_and_not_its_view() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        big = x.sin()
        logits = F.linear(big.view(2, -1, WIDTH)[:, :2], w)
        return logits.mean(), logits

    assert sources(defer(forward, hidden(), head())) == [("input", "L['w']"), ("output", "big")]


def test_a_frontier_that_is_an_output_already_is_not_returned_twice() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[Any, ...]:
        h = x.sin()
        first, second = F.linear(h, w), F.linear(h, v)
        return first, h, first.mean() + second.mean(), second

    result = defer(forward, hidden(), head(), head())
    assert result.num_outputs == 4
    assert [d.indices for d in result.deferred] == [(0,), (3,)]
    assert [d.frontier[-1] for d in result.deferred] == [Source("output", 0, "h")] * 2
    outputs = result.graph_module.graph.output_node().args[0]
    assert [node.name for node in outputs] == ["h", "add"]  # type: ignore[union-attr]


def test_one_tensor_at_two_places() -> None:
    (gm,) = capture(lambda x, w: ((y := F.linear(x.sin(), w)), y.mean()), hidden(), head())
    output = gm.graph.output_node()
    logits, loss = output.args[0]  # type: ignore[misc]
    output.args = ((logits, loss, logits),)
    result = defer_outputs(gm, min_bytes=256)
    (deferred,) = result.deferred
    assert deferred.indices == (0, 2)
    assert result.num_outputs == 3


def test_sizes_are_computed_from_inputs() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = x.shape
        h = x.sin()
        logits = F.linear(h.view(rows // 2, 2, width)[:, 1:], w).view(rows // 2, -1).tanh()
        return logits, logits.mean()

    result = defer(forward, hidden(), head(), dynamic=True)
    (deferred,) = result.deferred
    assert deferred.symbols
    placeholders = result.graph_module.graph.find_nodes(op="placeholder")
    for rows in (4, 6, 10):
        x, w = torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH)
        sizes = iter((rows, WIDTH, VOCAB))
        by_name = {"l_x_": x, "l_w_": w}
        numbers = {
            n.name: by_name[n.name] if n.name in by_name else next(sizes) for n in placeholders
        }
        args = list(numbers.values())
        expected = forward(x, w)[0]
        shape, stride, offset = deferred.geometry(args)
        assert (shape, stride, offset) == (expected.shape, expected.stride(), 0)
        outputs = result.graph_module(*args)
        values = [(args if s.kind == "input" else outputs)[s.index] for s in deferred.frontier]
        assert torch.equal(deferred.closure(*values), expected)


def test_a_module_float_that_dynamo_passes_as_a_tensor() -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, VOCAB, bias=False)
            self.cap = 30.0

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = torch.tanh(self.head(x.sin()) / self.cap) * self.cap
            return logits, logits.mean()

    result = defer(Capped(), hidden(), dynamic=True)
    assert ("input", "L['self'].cap") in sources(result)
    assert any("item()" in line for line in code(result))


def test_gradients_off_elsewhere_is_no_obstacle() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            scale = x.cos().mean()
        logits = F.linear(x.sin() * scale, w)
        return logits.mean(), logits

    assert len(defer(forward, hidden(), head()).deferred) == 1


def test_gradients_off_everywhere_is_no_obstacle() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            h = x.sin()
        logits = F.linear(h.detach(), w.detach())
        return logits.mean(), logits

    with torch.no_grad():
        (deferred,) = defer(forward, hidden(), head()).deferred
    assert not deferred.requires_grad


def test_autocast_inside_the_graph_is_repeated() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(x, w)
            with torch.autocast("cpu", enabled=False):
                logits = logits.float() * 2
            logits = F.linear(logits, v)
        logits = logits + 1
        return logits, logits.mean()

    v = torch.randn(VOCAB, VOCAB)
    result = defer(forward, x := hidden(), w := head())
    (deferred,) = result.deferred
    lines = [line for line in deferred.closure.code.splitlines() if "autocast" in line]
    regions = ["_exit" if "_exit" in line else "_enter" for line in lines]
    assert regions == ["_enter", "_enter", "_exit", "_exit"]
    args = {"L['x']": x, "L['w']": w}
    values = [args.get(source.name, v) for source in deferred.frontier]
    assert torch.equal(deferred.closure(*values), forward(x, w)[0])
    assert not torch.is_autocast_enabled("cpu")


def test_small_outputs_and_outputs_beside_no_loss_stay_without_a_word() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[Any, ...]:
        logits = F.linear(x.sin(), w)
        aside = F.linear(x.cos(), w)
        return logits[0, :2].mean(), logits.sum(-1), aside, logits.argmax(-1)

    result = defer(forward, hidden(), head())
    assert (result.deferred, result.refusals) == ((), ())
    assert result.num_outputs == 4


@pytest.mark.parametrize(("rows", "deferred"), [(MANY_ROWS - 1, 0), (MANY_ROWS, 1)])
def test_without_gradients_outputs_of_many_rows_are_deferred(rows: int, deferred: int) -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x.sin(), w)

    with torch.no_grad():
        result = defer(forward, torch.randn(1, rows, WIDTH), head())
    assert len(result.deferred) == deferred
    assert all(not spec.requires_grad for spec in result.deferred)


def test_nothing_deferred_gives_the_same_graph_back() -> None:
    (gm,) = capture(lambda x: x.sin(), hidden())
    assert defer_outputs(gm).graph_module is gm


def test_what_dynamo_leaves_on_the_graph_is_kept() -> None:
    (gm,) = capture(lambda x, w: ((y := F.linear(x.sin(), w)), y.mean()), hidden(), head())
    new = defer_outputs(gm, min_bytes=256).graph_module
    assert new is not gm
    assert new.meta == gm.meta
    assert vars(gm).keys() <= vars(new).keys()
    pairs = zip(
        gm.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True
    )
    for old, copied in pairs:
        assert copied.meta == old.meta
        assert copied._dynamo_source is old._dynamo_source


# --- what stays, and why --------------------------------------------------------------------------


def refused(make: Callable[[torch.Tensor, torch.Tensor], Any], *args: Any, **options: Any) -> str:
    """The reason against an output that `make` computes from a hidden state and a head."""

    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = make(x.sin(), w)
        return logits.float().mean(), logits

    result = defer(forward, hidden(), head(), **options)
    (refusal,) = result.refusals
    assert refusal.subject.startswith("output 1 (")
    assert refusal.source
    assert refusal.nbytes >= 256
    return reason(result)


def test_dropout() -> None:
    assert (
        refused(lambda h, w: F.dropout(F.linear(h, w), 0.5)) == "dropout cannot be repeated later"
    )


def test_an_operation_that_is_not_in_the_table() -> None:
    why = refused(lambda h, w: F.linear(h, w).cumsum(-1) * 2)
    assert why == (
        "its 2,304 bytes can only be made again from the 2,304 of cumsum: "
        "cumsum cannot be repeated later"
    )


def test_a_frontier_that_is_not_small() -> None:
    why = refused(lambda h, w: torch.cat([h] * 3, -1) + 1)
    assert "from the 576 of cat: cat cannot be repeated later" in why


def test_a_function_of_the_users_own() -> None:
    @torch._dynamo.allow_in_graph
    def linear(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return h @ w.T

    assert "linear cannot be repeated later" in refused(linear)


def test_too_many_operations() -> None:
    def long(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(h, w)
        for _ in range(30):
            y = y + 1
        return y

    assert "more than 24 operations away" in refused(long)


def test_an_output_changed_in_place() -> None:
    for change in (
        lambda y: y.add_(1),
        lambda y: F.relu(y, inplace=True),
        lambda y: torch.relu_(y),
        lambda y: y.__setitem__(0, 0.0),
        lambda y: y[1:].mul_(2),
    ):

        def changed(h: torch.Tensor, w: torch.Tensor, change: Any = change) -> torch.Tensor:
            y = F.linear(h, w)
            change(y)
            return y

        torch._dynamo.reset()
        assert "is changed in place in the graph" in refused(changed)


def test_a_hidden_state_changed_in_place() -> None:
    def changed(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(h, w)
        h.detach().zero_()
        return y

    assert "is changed in place in the graph" in refused(changed)


def test_an_input_changed_in_place() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(x.sin(), w)
        w.mul_(0.5)
        return logits.mean(), logits

    result = defer(forward, hidden(), torch.randn(VOCAB, WIDTH))
    assert reason(result) == "L['w'] is changed in place in the graph"


def test_an_input_changed_through_another_or_inside_a_body() -> None:
    def by_a_view(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(x.sin(), w)
        w.view(-1)[3:5].fill_(0)
        return logits.mean(), logits

    def by_a_norm(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = x.mean(0).detach()
        x = F.batch_norm(x, mean, torch.ones(WIDTH), training=True)
        logits = F.linear(x, w) + mean[0]
        return logits.mean(), logits

    assert "L['w'] is changed in place" in reason(defer(by_a_view, hidden(), head().detach()))
    torch._dynamo.reset()
    assert "is changed in place" in reason(defer(by_a_norm, hidden(), head()))


def test_a_mutating_custom_operator() -> None:
    @torch.library.custom_op("mst_tests::halve", mutates_args={"x"})
    def halve(x: torch.Tensor) -> None:
        x.mul_(0.5)

    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(x.sin(), w)
        halve(w)
        return logits.mean(), logits

    result = defer(forward, hidden(), torch.randn(VOCAB, WIDTH))
    assert reason(result) == "L['w'] is changed in place in the graph"


def test_an_output_that_shares_memory() -> None:
    def with_an_output(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = F.linear(x.sin(), w)
        return logits.mean(), logits, logits.view(-1)

    assert "it shares memory with view" in reason(defer(with_an_output, hidden(), head()))

    def with_an_input(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = w.view(-1)
        return flat.mean() + x.sum(), flat

    torch._dynamo.reset()
    assert "it shares memory with L['w']" in reason(defer(with_an_input, hidden(), head()))


def test_an_input_that_is_an_output() -> None:
    (gm,) = capture(lambda x, w: (F.linear(x, w).mean(), F.linear(x, w)), hidden(), head())
    output = gm.graph.output_node()
    loss, _ = output.args[0]  # type: ignore[misc]
    output.args = ((loss, gm.graph.find_nodes(op="placeholder")[1]),)
    (refusal,) = defer_outputs(gm, min_bytes=256).refusals
    assert refusal.reason == "it is an input of the graph"


def test_an_operation_run_with_gradients_off() -> None:
    def partly(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = F.linear(h, w)
        return F.linear(h, w) * scale

    assert "scale is computed with gradients off" in refused(partly)


def test_a_transform() -> None:
    why = refused(lambda h, w: torch.vmap(lambda row: F.linear(row, w) * 2)(h))
    assert why == "_remove_batch_dim cannot be repeated later"


def test_a_head_in_inference_mode() -> None:
    def inside(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return F.linear(h, w)

    assert "computed under torch.func or in inference mode" in refused(inside)


def test_a_checkpointed_head() -> None:
    why = refused(lambda h, w: checkpoint(lambda a: F.linear(a, w), h, use_reentrant=False))
    assert why == "tag_activation_checkpoint cannot be repeated later"


def test_a_checkpointed_body_is_no_obstacle() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = checkpoint(lambda a: a.sin() * 2, x, use_reentrant=False)
        logits = F.linear(h, w)
        return logits.mean(), logits

    assert len(defer(forward, hidden(), head()).deferred) == 1


def test_a_size_that_depends_on_data() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(x[x[:, 0] > 0], w)
        return logits.mean(), logits

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = defer(forward, hidden(), head())
    assert "its size depends on data (u0)" in reason(result)
