"""Reading and copying Dynamo graphs: values, memory, what is written to.

A Dynamo graph calls torch functions and methods; its nodes keep fake tensors in
``meta["example_value"]``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate, map_arg

from passes.source import hint, op_name

__all__ = [
    "copy_extras",
    "has_bare_symbols",
    "is_floating",
    "is_loss",
    "is_plain",
    "label_of",
    "loss_sources",
    "overloads_of",
    "share_memory",
    "storage_nbytes",
    "storage_of",
    "tensor_of",
    "value_of",
    "with_outputs",
    "without_facts",
    "writes_inputs",
    "written_storages",
]


def value_of(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def tensor_of(node: fx.Node) -> torch.Tensor:
    value = value_of(node)
    assert isinstance(value, torch.Tensor), f"{node} is not a tensor"
    return value


def is_floating(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor) and tensor_of(node).is_floating_point()


def is_loss(value: object) -> bool:
    return isinstance(value, fx.Node) and is_floating(value) and tensor_of(value).dim() == 0


def is_plain(node: fx.Node) -> bool:
    return type(value_of(node)) is FakeTensor and tensor_of(node).layout is torch.strided


def storage_of(node: fx.Node) -> int:
    """An identity of the memory behind a tensor; a view has its base's."""
    tensor = tensor_of(node)
    storage: Any = tensor.untyped_storage() if tensor.layout is torch.strided else None
    return id(tensor) if storage is None else storage._cdata


def share_memory(node: fx.Node, other: fx.Node) -> bool:
    return isinstance(value_of(other), torch.Tensor) and storage_of(node) == storage_of(other)


def storage_nbytes(node: fx.Node) -> int | None:
    """Bytes of the whole storage that a tensor keeps alive; None when a size has no hint."""
    return hint(tensor_of(node).untyped_storage().nbytes())


def label_of(node: fx.Node) -> str:
    """A node for people: where an input comes from, or the variable it was assigned to."""
    grapharg = node.meta.get("grapharg")
    if grapharg is None:
        return node.name
    name = grapharg.source.name
    return str(name() if callable(name) else name)  # a method up to torch 2.11


def has_bare_symbols(node: fx.Node) -> bool:
    """Whether a symbolic number is written into the arguments, where no node passes it."""
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), found.append)
    return any(isinstance(arg, torch.SymInt | torch.SymFloat) for arg in found)


def written_storages(gm: fx.GraphModule) -> set[int]:
    """Storages that the graph writes to; most writes show in a fake tensor's version."""
    written: set[int] = set()
    for node in gm.graph.nodes:
        value = value_of(node)
        if isinstance(value, torch.Tensor) and (value.is_inference() or value._version > 0):
            written.add(storage_of(node))
        if _writes_unseen(gm, node):
            tensors = (n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor))
            written.update(map(storage_of, tensors))
    return written


def writes_inputs(body: Any) -> bool:
    """Whether a graph writes to what it is given, or to constants of its own."""
    if not isinstance(body, fx.GraphModule):
        return False
    written = written_storages(body)
    given = (n for n in body.graph.nodes if n.op in ("placeholder", "get_attr"))
    return any(isinstance(value_of(n), torch.Tensor) and storage_of(n) in written for n in given)


def _writes_unseen(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` may write to its arguments without a trace in their versions."""
    if isinstance(node.target, HigherOrderOperator):
        names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        bodies = [operator.attrgetter(name)(gm) for name in names]
        return "mutation" in op_name(node) or any(map(writes_inputs, bodies))
    if any(overload._schema.is_mutable for overload in overloads_of(node)):
        return True
    return op_name(node) in ("batch_norm", "instance_norm")  # their running statistics


def overloads_of(node: fx.Node) -> list[Any]:
    """The overloads of an op of PyTorch's dispatcher that `node` may call; none for a function."""
    if isinstance(node.target, OpOverload):
        return [node.target]
    if isinstance(node.target, OpOverloadPacket):
        return [getattr(node.target, name) for name in node.target.overloads()]
    return []


def loss_sources(outputs: Iterable[Any]) -> set[fx.Node]:
    """All nodes that a loss among the outputs is computed from."""
    above: set[fx.Node] = set()
    stack = [source for n in outputs if is_loss(n) for source in n.all_input_nodes]
    while stack:
        if (node := stack.pop()) not in above:
            above.add(node)
            stack.extend(node.all_input_nodes)
    return above


def with_outputs(gm: fx.GraphModule, outputs: list[Any]) -> fx.GraphModule:
    """A copy of `gm` that returns `outputs`."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            new[node] = graph.output(map_arg(tuple(outputs), new.__getitem__))
            new[node].meta = dict(node.meta)
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
        copy_extras(node, new[node])
    graph.lint()
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    copy_extras(gm, copy)
    return copy


def without_facts(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that outlives the compilation: the user's lines stay, fake tensors do not."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
        new[node].meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
    return fx.GraphModule(gm, graph)


def copy_extras(old: object, new: object) -> None:
    """What Dynamo leaves on graph modules and nodes for AOTAutograd, such as `_dynamo_source`."""
    for key, value in vars(old).items():
        vars(new).setdefault(key, value)
