"""Checks between passes: a rewritten graph must say what the old one said.

Shapes, dtypes and devices of every output are recomputed on fake tensors (the loop op's fake
implementation included) and compared with the original's; a difference is our mistake and raises.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from passes.liveness import tangent_nodes


class VerificationError(AssertionError):
    """A pass broke an invariant; the graph is not used."""


def _signature(node: Node | None) -> object:
    value = None if node is None else node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return (tuple(str(s) for s in value.shape), value.dtype, value.device)


def verify_same_interface(old: Graph, new: Graph) -> None:
    """The same inputs in the same order, outputs of the same shapes, dtypes and devices, and no
    forward output that waits for a tangent.

    Raises:
        VerificationError: naming the first output that differs.
    """
    new.lint()
    before, after = ([n.target for n in g.find_nodes(op="placeholder")] for g in (old, new))
    if before != after:
        raise VerificationError(f"inputs changed: {before} became {after}")
    (old_out,), (new_out,) = old.find_nodes(op="output"), new.find_nodes(op="output")
    left, right = _leaves(old_out.args[0]), _leaves(new_out.args[0])
    if len(left) != len(right):
        raise VerificationError(f"{len(left)} outputs became {len(right)}")
    late, early = tangent_nodes(new), tangent_nodes(old)
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if _signature(a) != _signature(b):
            raise VerificationError(
                f"output {index} was {_signature(a)} ({a}) and became {_signature(b)} ({b})"
            )
        if b in late and a not in early:
            raise VerificationError(f"output {index} ({b}) came to depend on a tangent")


def _leaves(args: object) -> list[Node | None]:
    flat: list[Node | None] = []
    for item in args if isinstance(args, (list, tuple)) else [args]:
        flat.append(item if isinstance(item, Node) else None)
    return flat
