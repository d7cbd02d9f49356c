"""Triton's interpreter, as far as Inductor's kernels need it: they run on a CPU's tensors.

The interpreter does one instance of a kernel after another with NumPy. Five things are amiss there,
in triton 3.6 and 3.7:
    libdevice  functions of NVIDIA's library of mathematics have no meaning.
    maxima     with a combining function of its own a reduction goes value by value; Inductor's
               largest and smallest value have one, for the sake of NaN.
    bfloat16   float32 is cut off, where a GPU rounds to the nearest.
    atomics    a mask that is broadcast (NumPy repeats it without memory) is read beyond its end.
    bounds     of a loop are arrays of one value, which NumPy 2.4 takes for no number (3.6 only).

Races, rounding by the GPU's instructions and its matrix products are not seen.

Source: `triton.runtime.interpreter`. `install` changes the process for good; ``TRITON_INTERPRET=1``
has to be set before Triton is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime import triton_helpers
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from mstc.runtime import loop

_CUDA = torch.device("cuda", 0)

_MEANINGS: dict[str, Callable[..., Any]] = {  # where NumPy has another name
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "llrint": np.rint,
    "nearbyint": np.rint,
    "pow": np.power,
    "div_rn": np.divide,
    "fast_dividef": np.divide,
    "fma": lambda a, b, c: a * b + c,
}


class _Libdevice:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        meaning = _MEANINGS.get(name) or getattr(np, name)
        return lambda *args: _applied(meaning, args)


def _applied(meaning: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    values = [a.handle.data if isinstance(a, tl.tensor) else a for a in args]
    like = next(a for a in args if isinstance(a, tl.tensor))
    with np.errstate(all="ignore"):  # as a GPU: masked values may be anything
        result = meaning(*values)
    if result.dtype != np.bool_:
        return tl.tensor(TensorHandle(result.astype(values[0].dtype), like.dtype), like.type)
    kind = tl.block_type(tl.int1, like.type.shape) if like.type.is_block() else tl.int1
    return tl.tensor(TensorHandle(result, tl.int1), kind)


_cut_off = interpreter._convert_float
_give_tensor_methods = interpreter._patch_lang_tensor
_add_atomically = interpreter.InterpreterBuilder.create_atomic_rmw


def _convert(values: Any, old: Any, new: Any, rounding: Any) -> Any:
    """Bits of floating-point numbers in another type."""
    if (old, new) == (tl.float32, tl.bfloat16):
        exact = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return _cut_off(values, old, new, rounding)


def _atomic(builder: Any, op: Any, *args: Any) -> Any:
    *handles, ordering, scope = args
    whole = (TensorHandle(np.ascontiguousarray(h.data), h.dtype) for h in handles)
    return _add_atomically(builder, op, *whole, ordering, scope)


def _with_bounds(tensor: Any, scope: Any) -> None:
    _give_tensor_methods(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def install() -> None:
    """Make up for what is missing, have bodies that were compiled for a GPU found for tensors of
    the CPU, and attention written out."""
    triton_helpers.libdevice = _Libdevice()
    triton_helpers.max2 = lambda a, dim: tl.max(a, dim)
    triton_helpers.min2 = lambda a, dim: tl.min(a, dim)
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_atomic_rmw = _atomic
    interpreter._patch_lang_tensor = _with_bounds
    form = loop._form

    def on_gpu(tensors: Any) -> tuple[Any, ...]:
        return tuple((strides, dtype, _CUDA) for strides, dtype, _ in form(tensors))

    loop._form = on_gpu
    torch.nn.functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` written out: a GPU's kernels for it are none of Triton's.

    For boolean masks only.
    """
    assert not dropout_p
    assert not is_causal
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf)
    return scores.softmax(-1) @ value


def on_cpu(module: ModuleType) -> None:
    """Have what Inductor wrote for a GPU allocate on the CPU."""
    scope = vars(module)
    scope["empty_strided_cuda"] = scope["empty_strided_cpu"]
