"""Values that one stream of a GPU makes and another reads.

A deferred output is computed when somebody reads it, on his stream. The caller has ordered his
streams as if it had been computed at the call: who has waited for that point reads what has been
kept since without waiting again. So whatever is kept for later has a `Place`, and a reader on
another stream waits for it. The allocator is told of that reader, too, since it gives memory back
to the stream that it was made for.

Within one stream, and on a CPU, nothing is waited for. What is made while a CUDA graph is captured
has no place: the graph has an order of its own.

Not handled: tensors of an own kind (DTensor) that a closure starts from; other accelerators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Place", "follow", "place_of"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Place:
    """The stream that a tensor is made on, and an event behind that."""

    stream: Any
    event: Any


def _tensors(value: object) -> list[torch.Tensor]:
    """A plain tensor, or those of an op with several results."""
    several: Sequence[object] = value if isinstance(value, (tuple, list)) else (value,)
    return [t for t in several if isinstance(t, torch.Tensor) and type(t) in _PLAIN]


def place_of(value: object) -> Place | None:
    """Where something is made that the current stream has just been given; None where no order is
    to be kept.

    Args:
        value: a tensor, or several on one device.
    """
    for tensor in _tensors(value):
        stream = _current_stream(tensor.device)
        return None if stream is None else Place(stream, stream.record_event())
    return None


def follow(place: Place | None, value: object) -> None:
    """Let the current stream read what has a place: it waits, if another one has made it."""
    if place is None:
        return
    for tensor in _tensors(value):
        stream = _current_stream(tensor.device)
        if stream is not None and stream != place.stream:
            stream.wait_event(place.event)
            _keep_for(tensor, stream)


def _current_stream(device: torch.device) -> Any:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device)


def _keep_for(tensor: torch.Tensor, stream: Any) -> None:
    tensor.record_stream(stream)
