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
        if func is torch._grouped_mm and args[0].dtype == torch.float64:
            return _grouped_mm(args[0], args[1], kwargs["offs"])
        return func(*map(self._widen, args), **kwargs)

    def _widen(self, value: Any) -> Any:
        if isinstance(value, torch.dtype) and value in self._FLOATS:
            return torch.float64
        return value


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`torch._grouped_mm`, which has no float64: rows of `a` [m, k] by groups, times their own
    matrix of `b` [groups, k, n]; group `i` ends before row `ends[i]`."""
    rows = [0, *ends.tolist()]
    groups = zip(rows[:-1], rows[1:], b, strict=True)
    products = [a[start:end] @ matrix for start, end, matrix in groups]
    return torch.cat([*products, a.new_zeros(a.shape[0] - rows[-1], b.shape[-1])])


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
    norms, differences = _distances(ours, truth)
    smallest = 1e-6 * max(norms.values())
    relative = {n: differences[n] / norms[n] for n in norms if norms[n] > smallest}
    worst = max(relative, key=lambda name: relative[name])
    return {
        "worst": relative[worst],
        "worst_parameter": worst,
        "all": _norm(differences.values()) / _norm(norms.values()),
        "left_out": sorted(norms.keys() - relative.keys()),
    }


def floored_error(
    ours: Mapping[str, Tensor], truth: Mapping[str, Tensor], floor: float = 1e-3
) -> dict[str, Any]:
    """Errors ||g - g64|| / max(||g64||, floor * ||all g64||): the worst, and that of all together.

    The floor is for gradients whose true value is 0 (a bias that shifts all scores of a softmax
    alike) or next to it: what they are wrong by is held against a small fraction of the gradient of
    the whole model, which is what an optimizer's step or a clipped norm would notice. No parameter
    is left out. A gradient that is None counts as zeros: a compiler may give either to a parameter
    that had no part.
    """
    norms, differences = _distances(ours, truth)
    whole = _norm(norms.values())
    least = floor * whole
    relative = {name: differences[name] / max(norms[name], least) for name in norms}
    worst = max(relative, key=lambda name: _nan_is_worst(relative[name]))
    return {
        "worst": relative[worst],
        "worst_parameter": worst,
        "all": _norm(differences.values()) / whole,
        "below_floor": sum(norm < least for norm in norms.values()),
    }


def _distances(
    ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """||g64|| and ||g - g64|| of every parameter that has either."""
    norms, differences = {}, {}
    for name in truth.keys() | ours.keys():
        true, own = truth.get(name), ours.get(name)
        norms[name] = 0.0 if true is None else float(true.norm())
        if true is None or own is None:
            present = own if true is None else true
            assert present is not None
            differences[name] = float(present.norm())
        else:
            differences[name] = float((own - true).norm())
    return norms, differences


def _nan_is_worst(value: float) -> float:
    return float("inf") if value != value else value


def _norm(parts: Iterable[float]) -> float:
    return sum(part * part for part in parts) ** 0.5
