"""Attention masks that the graph proves to be causal become attention's own `is_causal`.

Models build a mask of tokens x tokens from comparisons of positions, and attention then reads it: a
value that grows with the square of the length, that all layers keep alive, and that keeps attention
off the kernel which skips what is masked.

Algorithm
    1. For every attention call with a mask, and for its backward, walk from the mask to what it is
       made from, and say what it is at coordinates (.., i, j) (`passes.positions`).
    2. Inequalities that hold for all coordinates (a window wider than the sequence) are dropped.
    3. If what is left is ``i - j >= 0``, queries and keys are equally many, and the mask is 0 where
       it holds and minus infinity (or the dtype's lowest number) elsewhere, the call gets
       `is_causal` and no mask. If nothing is left, it gets no mask.

Not handled: masks that depend on data (padding: `passes.padding`; packed documents), windows
shorter than the sequence, attention written out as matrix products.

Source: the meaning of `is_causal` is the documented one of
    `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from passes.axes import as_size
from passes.copies import copy_graph
from passes.forms import Choice, Condition, Linear, Value, holds_always, negated
from passes.positions import Prover
from passes.records import Rewrite
from passes.rules.arguments import argument
from passes.source import nbytes, op_name, packet_of, source_of

aten = torch.ops.aten

# Attention ops that take a mask and can be told that it is causal: the mask's argument.
_ATTENTION: dict[object, str] = {
    aten._scaled_dot_product_flash_attention_for_cpu: "attn_mask",
    aten._scaled_dot_product_flash_attention_for_cpu_backward: "attn_mask",
    aten._scaled_dot_product_efficient_attention: "attn_bias",
    aten._scaled_dot_product_efficient_attention_backward: "attn_bias",
    aten._scaled_dot_product_cudnn_attention: "attn_bias",
    aten._scaled_dot_product_cudnn_attention_backward: "attn_bias",
}


def _lowest(value: float, dtype: torch.dtype) -> bool:
    return value == -torch.inf or value == torch.finfo(dtype).min


def _is_causal(mask: Node, prover: Prover) -> bool | None:
    """True for a causal mask, False for one that masks nothing, None for what is neither."""
    value, found = mask.meta["val"], prover.value(mask)
    if isinstance(found, Choice) and value.is_floating_point():
        condition: Value | None = None
        if found.yes == 0 and _lowest(found.no, value.dtype):
            condition = found.condition
        elif found.no == 0 and _lowest(found.yes, value.dtype):
            condition = negated(found.condition)
    else:
        condition = found if value.dtype is torch.bool else None
    if not isinstance(condition, Condition) or value.dim() < 2:
        return None
    sizes = tuple(as_size(s) for s in value.shape)
    forms = {f for f in condition.forms if not holds_always(f, sizes)}
    queries, keys = value.dim() - 2, value.dim() - 1
    if not forms:
        return False
    return True if forms == {Linear.of({queries: 1, keys: -1}, 0)} else None


def _as_many_queries_as_keys(node: Node) -> bool:
    queries, keys = (argument(node, name) for name in ("query", "key"))
    assert isinstance(queries, Node)
    assert isinstance(keys, Node)
    return as_size(queries.meta["val"].shape[-2]) == as_size(keys.meta["val"].shape[-2])


def attention_mask(node: Node) -> Node | None:
    """The mask that an attention call reads and may do without."""
    name = _ATTENTION.get(packet_of(node))
    if name is None or node.op != "call_function":
        return None
    mask = argument(node, name)
    if not isinstance(mask, Node) or argument(node, "is_causal"):
        return None
    wanted = argument(node, "grad_input_mask")
    if isinstance(wanted, (list, tuple)) and wanted[-1]:
        return None  # the mask's own gradient
    return mask


def set_mask(call: Node, mask: Node | None) -> None:
    """Give an attention call another mask."""
    _set_argument(call, _ATTENTION[packet_of(call)], mask)


def _set_argument(node: Node, name: str, value: bool | Node | None) -> None:
    """Give an argument of a call another value, by position or by name as the schema has it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    described = node.target._schema.arguments
    position = next(i for i, a in enumerate(described) if a.name == name)
    if position < len(node.args):
        node.update_arg(position, value)
    elif described[position].kwarg_only or name in node.kwargs:
        node.update_kwarg(name, value)
    else:
        given = [*node.args, *(a.default_value for a in described[len(node.args) : position])]
        node.args = (*given, value)


def drop_causal_masks(graph: Graph, *, min_bytes: int) -> tuple[Graph, tuple[Rewrite, ...]]:
    """A graph whose attention does without masks that it can do without, and what was done; `graph`
    itself if there are none.

    Args:
        graph: a functional aten graph; left as it is.
        min_bytes: smallest mask that is worth it.
    """
    prover = Prover()
    found: dict[str, bool] = {}
    rewrites: dict[Node, Rewrite] = {}
    for node in graph.nodes:
        mask = attention_mask(node)
        if mask is None or nbytes(mask.meta["val"]) < min_bytes:
            continue
        causal = _is_causal(mask, prover)
        if causal is not None and _as_many_queries_as_keys(node):
            found[node.name] = causal
            what = "is causal: attention skips what it masks" if causal else "masks nothing"
            rewrites[mask] = Rewrite(
                op_name(mask),
                f"this attention mask {what}",
                source_of(mask),
                nbytes(mask.meta["val"]),
            )
    if not found:
        return graph, ()
    new, copied = copy_graph(graph)
    for node, copy in copied.items():
        if node.name in found:
            set_mask(copy, None)
            _set_argument(copy, "is_causal", found[node.name])
    new.eliminate_dead_code()
    new.lint()
    return new, tuple(rewrites.values())
