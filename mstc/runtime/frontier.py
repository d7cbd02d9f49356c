"""The tensors that a deferred output is made from, and whether they are still what they were."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mstc.runtime.streams import Place

__all__ = ["Stamped", "explain_change", "stamp_of", "stamped"]


@dataclass(frozen=True, eq=False)
class Stamped:
    """A tensor of a frontier, and what tells whether it is still the same."""

    tensor: torch.Tensor
    name: str  # for people
    stamp: tuple[int | None, ...]  # at the time of the call
    part: torch.Tensor  # an alias with the tensor's place in autograd, as it was at the call
    detached: torch.Tensor  # an alias without
    place: Place | None = None  # where it was made


def stamped(tensor: torch.Tensor, name: str, place: Place | None) -> Stamped:
    """Aliases are made once: `torch.compile` tells tensors apart by identity, and a caller may pass
    the tensor itself to the same graph."""
    part = _Alias.apply(tensor) if tensor.requires_grad else tensor.detach()
    return Stamped(tensor, name, stamp_of(tensor), part, tensor.detach(), place)


class _Alias(torch.autograd.Function):
    """The same values and gradient, in a tensor that is no view."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def stamp_of(tensor: torch.Tensor) -> tuple[int | None, ...]:
    """Version, address and bytes; None for what the tensor does not have."""
    version = None if tensor.is_inference() else tensor._version
    if is_traceable_wrapper_subclass(tensor) or isinstance(tensor, FakeTensor):
        return version, None, None
    return version, tensor.data_ptr(), tensor.untyped_storage().nbytes()


def explain_change(label: str, source: str) -> str:
    """Why an output made at `source` can no longer be computed: `label` has changed."""
    parts = re.findall(r"\['(\w+)'\]", label)
    name = ".".join(p for p in parts if p not in ("self", "_modules", "_parameters", "_buffers"))
    made = f" made at {source}" if source else ""
    return (
        f"The output{made} was deferred: mst computes it when it is first read. But what it is"
        f" computed from, {name or label}, has been changed in place since the forward pass,"
        " so its values are lost. Read the output (for example outputs.logits) before"
        " optimizer.step(), or compile with options={'defer_outputs': False}."
    )
