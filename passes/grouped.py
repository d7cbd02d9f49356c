"""Products of rows by groups, in any dtype: an op, and what is replaced by it.

``torch._grouped_mm`` can be traced in bfloat16 only. For other dtypes libraries bring an op of
their own, whose backward asks for the groups' sizes, as numbers, while it is being traced: the
compiler gives up, and the model falls apart into pieces that run op by op. `mst::grouped_mm` is the
same product with a backward that can be traced. It is calculated as these ops are: one ``mm`` per
group, after one look at where the groups end (on CUDA the host waits for it).

`replace_grouped` puts it in their place in a Dynamo graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.source import packet_of

__all__ = ["grouped_mm", "replace_grouped"]

_LIBRARY = torch.library.Library("mst", "FRAGMENT")
_LIBRARY.define(
    "grouped_mm(Tensor a, Tensor b, Tensor offs) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

EQUIVALENT = ("transformers::grouped_mm_fallback",)
"""Ops of others with the schema and the meaning of ours."""


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """Rows by groups times the group's own matrix, or one matrix per group.

    Args:
        a: ``[rows, k]`` with `b` ``[groups, k, n]``; or ``[m, rows]`` with `b` ``[rows, n]``.
        b: see `a`; of its dtype.
        offs: ``[groups]``, integers that do not fall: before which row each group ends.

    Returns:
        ``[rows, n]``, zero after the last group; or ``[groups, m, n]``, zero for an empty group.
    """
    out = a.new_zeros(_shape(a, b, offs))
    start = 0
    for group, end in enumerate(offs.tolist()):
        if end > start and b.dim() == 3:
            torch.mm(a[start:end], b[group], out=out[start:end])
        elif end > start:
            torch.mm(a[:, start:end], b[start:end], out=out[group])
        start = end
    return out


def _shape(a: Tensor, b: Tensor, offs: Tensor) -> tuple[Any, ...]:
    if a.dim() == 2 and b.dim() == 3:
        return (a.shape[0], b.shape[2])
    if a.dim() == 2 and b.dim() == 2:
        return (offs.shape[0], a.shape[0], b.shape[1])
    raise ValueError(f"grouped_mm of {a.dim()} and {b.dim()} dims: 2 and 3, or 2 and 2, are known")


def _fake(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(_shape(a, b, offs))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    a, b, offs = inputs
    of_a, of_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if of_b else None, b if of_a else None, offs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    if grad.dim() != 2:
        raise NotImplementedError("second derivatives of grouped products")
    a, b, offs = ctx.saved_tensors
    of_a, of_b = ctx.needs_input_grad[:2]
    return (
        grouped_mm(grad, b.transpose(1, 2), offs) if of_a else None,
        grouped_mm(a.t(), grad, offs) if of_b else None,
        None,
    )


_LIBRARY.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
torch.library.register_fake("mst::grouped_mm", _fake, lib=_LIBRARY)
torch.library.register_autograd("mst::grouped_mm", _backward, setup_context=_save, lib=_LIBRARY)
grouped_mm = torch.ops.mst.grouped_mm.default


def replace_grouped(gm: GraphModule) -> int:
    """Put `grouped_mm` in place of its equivalents in a Dynamo graph and in the graphs that it
    calls (checkpointed layers), in place.

    Returns:
        the number of calls that were replaced.
    """
    total = 0
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        calls = (n for n in module.graph.nodes if n.op == "call_function")
        found = [n for n in calls if str(packet_of(n) or n.target) in _NAMES]
        for node in found:
            node.target = grouped_mm
        if found:
            module.recompile()
        total += len(found)
    return total


_NAMES = {name.replace("::", ".") for name in EQUIVALENT}  # as str(OpOverloadPacket) has them
