"""How far gradients are from the truth, which is the same model in float64, eager."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Turns casts to a smaller float into casts to float64.

    Models cast to float32 inside norms, rotary embeddings and losses, so `.double()` alone gives
    a reference that is only good to float32.
    """

    _FLOATS = (torch.float32, torch.bfloat16, torch.float16)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        kwargs = {name: self._widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._widen, args), **kwargs)

    def _widen(self, value: Any) -> Any:
        if isinstance(value, torch.dtype) and value in self._FLOATS:
            return torch.float64
        return value


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, as float64; tied parameters once."""
    named = model.named_parameters()
    return {name: p.grad.double() for name, p in named if p.grad is not None}


def gradient_error(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Any]:
    """Relative errors ||g - g64|| / ||g64||: the worst parameter's, and that of all taken together.

    A gradient that is nothing but rounding has no relative error (say of a bias that shifts all
    scores of a softmax alike: its true gradient is 0). Those whose norm is below 1e-6 of the
    largest are left out, and named.
    """
    if ours.keys() != truth.keys():
        raise ValueError(f"gradients of different parameters: {ours.keys() ^ truth.keys()}")
    norms = {name: float(g.norm()) for name, g in truth.items()}
    differences = {name: float((ours[name] - g).norm()) for name, g in truth.items()}
    smallest = 1e-6 * max(norms.values())
    relative = {n: differences[n] / norms[n] for n in norms if norms[n] > smallest}
    worst = max(relative, key=lambda name: relative[name])
    return {
        "worst": relative[worst],
        "worst_parameter": worst,
        "all": _norm(differences.values()) / _norm(norms.values()),
        "left_out": sorted(norms.keys() - relative.keys()),
    }


def _norm(parts: Iterable[float]) -> float:
    return sum(part * part for part in parts) ** 0.5
