"""Mixtures of experts whose routers do not waver.

With random weights some tokens stand between two experts (2 to 16 of 2,048 decisions, measured), so
a router in bfloat16 chooses others than the float64 reference does, and the gradients of both
differ by whole experts, whoever compiled them. Such a comparison says nothing. `decisive_routers`
changes weights before the comparison starts: token embeddings get a strong common part per group
of tokens, and the routers know these parts, so that every decision is taken by a wide margin.
`Routing` records decisions, so that those that differ all the same can be counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_STRENGTH = 4.0  # a group's common part over what is the token's own, in the Euclidean norm
_SPAN = 8.0  # the largest score of a router


def decisive_routers(model: nn.Module, experts: int) -> None:
    """Make routing insensitive to rounding, in place.

    Tokens fall into as many groups as there are experts. A router is a parameter of shape
    [experts, hidden]; group `g` scores expert `e` by a power of two, another one for each, so that
    no two experts and no two groups of experts tie.

    Raises:
        ValueError: no parameter has a router's shape.
    """
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding)).weight
    vocab, hidden = embedding.shape
    routers = [p for p in model.parameters() if p.shape == (experts, hidden)]
    if not routers:
        raise ValueError(f"no parameter of shape {(experts, hidden)}: where are the routers?")
    parts = torch.linalg.qr(torch.randn(hidden, experts)).Q.T  # orthonormal rows
    expert = torch.arange(experts)
    scores = 2.0 ** -((expert[:, None] + expert) % experts)  # [expert, group]
    with torch.no_grad():
        own = embedding.norm(dim=1).mean()
        embedding += _STRENGTH * own * parts[torch.arange(vocab) % experts]
        for router in routers:
            router.copy_(_SPAN / hidden**0.5 * scores @ parts)


class Routing(TorchFunctionMode):
    """Records what `torch.topk` chose, as sets."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            self.chosen.append(result[1].sort(dim=-1).values)
        return result

    def differing(self, other: "Routing") -> int:
        """Decisions that are not the same in both."""
        pairs = zip(self.chosen, other.chosen, strict=True)
        return sum(int((a != b).any(dim=-1).sum()) for a, b in pairs)

    @property
    def decisions(self) -> int:
        return sum(c.shape[:-1].numel() for c in self.chosen)
