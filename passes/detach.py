"""Return outputs whose gradient nobody asks for without one.

transformers returns the keys and values of every layer beside the loss, and hidden states if asked.
Training loops call ``loss.backward()`` and never differentiate through them; but AOTAutograd gives
the backward graph a tangent for each differentiable output, and autograd fills those that nobody
gave with zeros: as many bytes as the outputs, all alive when the backward begins. So such outputs
are returned detached. `mstc.runtime.attach` puts them back into the autograd graph by a node that
costs nothing until somebody differentiates through it; then the graph is run once more, with
gradients for all outputs.

Which outputs
-------------
Large floating tensors that require grad and that a loss of the same graph is computed from: one
that leads to no loss here was made to be used elsewhere, with its gradient.

Not handled, and so refused: a graph that draws random numbers or writes to memory, since it would
not compute the same when run once more; outputs that share memory with an input or another output;
tensor subclasses and sparse tensors, as outputs or inputs; parameters that are no inputs of the
graph.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.dynamo import (
    has_bare_symbols,
    is_floating,
    is_plain,
    label_of,
    loss_sources,
    overloads_of,
    share_memory,
    storage_nbytes,
    tensor_of,
    value_of,
    with_outputs,
    writes_inputs,
)
from passes.records import Refusal
from passes.source import op_name, source_of

__all__ = ["DetachResult", "detach_outputs"]

_RANDOM = frozenset(
    """
    bernoulli bernoulli_ rand rand_like randn randn_like randint randint_like randperm normal
    normal_ multinomial poisson binomial rrelu rrelu_ gumbel_softmax uniform_ random_ exponential_
    geometric_ cauchy_ log_normal_ fractional_max_pool2d fractional_max_pool3d
    fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices native_dropout
    multi_head_attention_forward rnn_tanh rnn_relu lstm gru
    """.split()  # noqa: SIM905
)
"""Functions of torch, and methods, that draw random numbers, or may."""


@dataclass(frozen=True)
class DetachResult:
    """What `detach_outputs` did."""

    graph_module: fx.GraphModule  # what to compile; the given graph when nothing is detached
    indices: tuple[int, ...]  # of the outputs that are detached now
    nbytes: int  # theirs, and so of the gradients that need not be made
    refusals: tuple[Refusal, ...]  # outputs that stay as they were


def detach_outputs(
    gm: fx.GraphModule, *, min_bytes: int, needed: Collection[int] = ()
) -> DetachResult:
    """Detach the large outputs that a loss is made from in `gm`, which is not changed.

    Args:
        gm: a Dynamo graph: a flat tuple of outputs, fake tensors in ``meta["example_value"]``.
        min_bytes: outputs smaller than this stay.
        needed: indices of outputs that must stay.
    """
    outputs: Any = gm.graph.output_node().args[0]
    assert isinstance(outputs, list | tuple), "a Dynamo graph returns a flat tuple"
    above = loss_sources(outputs)
    kept = [outputs[i] for i in needed]
    wanted = {
        i: node
        for i, node in enumerate(outputs)
        if node in above and node not in kept and _is_large(node, min_bytes)
    }
    again = _why_not_again(gm) if wanted else None
    reasons = {i: again or _why_not_apart(node, gm, outputs) for i, node in wanted.items()}
    detached = tuple(i for i, reason in reasons.items() if reason is None)

    def nbytes(indices: Collection[int]) -> int:
        return sum({wanted[i]: storage_nbytes(wanted[i]) or 0 for i in indices}.values())

    refusals: list[Refusal] = []
    for reason in dict.fromkeys(filter(None, reasons.values())):
        # one for all: each layer's keys are little, and a report shows what is much
        own = [i for i, one in reasons.items() if one == reason]
        subject = f"gradient of output {', '.join(map(str, own))}"
        refusals.append(Refusal(subject, reason, source_of(wanted[own[0]]), nbytes(own)))
    graph_module = _detached(gm, detached) if detached else gm
    return DetachResult(graph_module, detached, nbytes(detached), tuple(refusals))


def _is_large(node: fx.Node, min_bytes: int) -> bool:
    if node.op == "placeholder" or not is_floating(node) or not tensor_of(node).requires_grad:
        return False
    nbytes = storage_nbytes(node)
    return tensor_of(node).dim() > 0 and (nbytes is None or nbytes >= min_bytes)


def _why_not_apart(node: fx.Node, gm: fx.GraphModule, outputs: Any) -> str | None:
    if not is_plain(node):
        return f"it is a {type(tensor_of(node)).__name__}, not a plain tensor"
    for other in (*gm.graph.find_nodes(op="placeholder"), *outputs):
        if isinstance(other, fx.Node) and other is not node and share_memory(node, other):
            return f"it shares memory with {label_of(other)}, an input or output of the graph"
    return None


def _why_not_again(gm: fx.GraphModule) -> str | None:
    """Why the graph may compute something else when it is run once more."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(value_of(node), torch.Tensor) and not is_plain(node):
            return f"{label_of(node)}, an input, is no plain tensor: nothing tells if it changes"
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    for module in modules:  # those that higher-order operations run (checkpoints, say) among them
        for node in module.graph.nodes:
            if node.op == "call_module" or _may_be_random(node):
                return f"{op_name(node)} may draw random numbers, others if it is run once more"
            if has_bare_symbols(node) or _is_parameter(module, node):
                return f"{op_name(node)} has a size or a parameter that is no input of the graph"
    if any(map(writes_inputs, modules)):
        return "the graph writes to an input, and would do so twice if it is run once more"
    return None


def _may_be_random(node: fx.Node) -> bool:
    name = op_name(node)
    if not node.op.startswith("call_"):
        return False
    if "dropout" in name:
        return _share(node, "p", 1, 0.5) != 0 and _share(node, "training", 2, True) is not False
    if name == "scaled_dot_product_attention":
        return _share(node, "dropout_p", 4, 0.0) != 0
    tagged = any(torch.Tag.nondeterministic_seeded in one.tags for one in overloads_of(node))
    return tagged or name in _RANDOM


def _is_parameter(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    value = operator.attrgetter(str(node.target))(gm)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _share(node: fx.Node, name: str, position: int, default: float) -> object:
    """An argument of a function of torch."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def _detached(gm: fx.GraphModule, indices: Collection[int]) -> fx.GraphModule:
    """A copy whose outputs at `indices` are detached."""
    outputs: Any = gm.graph.output_node().args[0]
    copy = with_outputs(gm, list(outputs))
    output = copy.graph.output_node()
    results: Any = output.args[0]
    made: dict[fx.Node, fx.Node] = {}
    with copy.graph.inserting_before(output):
        for node in dict.fromkeys(results[i] for i in indices):
            assert isinstance(node, fx.Node)
            made[node] = copy.graph.call_method("detach", (node,))
            made[node].meta = dict(node.meta, example_value=tensor_of(node).detach())
    output.args = (tuple(made.get(node, node) for node in results),)
    copy.recompile()
    return copy
