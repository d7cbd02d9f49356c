"""Where a node comes from, in the user's words, and how large its value is."""

from __future__ import annotations

import math
import re

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')


def source_of(node: Node) -> str:
    """``file:line  code`` of the innermost user frame, or "" where tracing left none."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    return place(*frames[-1])


def place(file: str, line: str | int, code: str) -> str:
    """A line of the user's code, as every report shows it."""
    return f"{'/'.join(file.split('/')[-2:])}:{line}  {code.strip()[:80]}"


def op_name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def packet_of(node: Node) -> object:
    """The op that a node calls, whatever the overload; None for what is no op of PyTorch's."""
    return getattr(node.target, "overloadpacket", None)


def hint(size: object) -> int | None:
    """An int, or a SymInt's hint; None for a size that only run time knows."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt):
        try:
            value = size.node.hint
        except Exception:  # the hint of a data-dependent size raises a private error type
            return None
        return None if value is None else int(value)
    return None


def elements(value: torch.Tensor) -> int:
    """How many elements a fake tensor has, by hints where sizes are symbolic (asking the tensor
    itself would make the graph hold for these sizes only)."""
    return math.prod(hint(size) or 1 for size in value.shape)


def nbytes(value: object) -> int:
    """Bytes of a fake tensor's elements (its own, not its storage's), by hints where sizes are
    symbolic."""
    if not isinstance(value, torch.Tensor):
        return 0
    total = value.element_size()
    for size, stride in zip(value.shape, value.stride(), strict=True):
        if isinstance(stride, int) and stride == 0:
            continue  # stretched: no memory behind it
        total *= hint(size) or 1
    return total
