"""Memory that an op takes while it runs, beside its operands and its results.

A simulated step computes nothing, so what kernels take for themselves has to be learned: the op is
run once, on zeros of the same shapes, strides and dtypes, while every allocation is heard. Which
ops take anything on a CPU, and what for (`_BLOCKED`, `_OTHERS`, `_is_mixed`):

    products      oneDNN's copies of blocks of the operands, below float32; copies of operands
                  that no library takes as they lie
    attention     per thread, the scores of a block and the sums over it
    convolutions  operands and results in oneDNN's own layout
    pointwise     of operands with several dtypes, each but the widest is widened as a whole

It depends on the number of threads, and on the processor: figures are this machine's, and kept for
the life of the process.

How nothing else is disturbed: the op runs in a thread of its own, which starts without autograd's
modes, autocast, fake tensors and dispatch modes. Allocations are heard by PyTorch's older profiler,
which is one thread's: an outer profiler goes on, and sees nothing of it. Ops that draw random
numbers, and ops that are not PyTorch's own, are not run.

What is too large to be tried is not run: of products and attention a smaller one is in its place.
Both work in blocks, so from there on what they take hardly grows with their size: of 24 products of
up to 2**36 multiplications, and of attention over 2,048 to 8,192 tokens, at most 3.2 MB were missed
(two threads), less than 5 % of the operands and the result, which are there as well. Convolutions
and pointwise ops of that size count as taking nothing.

Not handled: devices other than the CPU; grouped products, whose groups only a real run has; what
the C++ kernels that Inductor writes take, which is not from PyTorch's allocator.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig  # what the profiler wants to be given
from torch._ops import OpOverload  # an op as a dispatch mode is given it
from torch.autograd import ProfilerConfig, ProfilerState
from torch.utils._pytree import tree_leaves

_MOST_MULTIPLICATIONS = 2**30  # in an op that is tried: a fraction of a second
_MOST_BYTES = 2**27  # of its operands
_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
_BLOCKED = {  # products and attention: schema name -> positions of two operands
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::baddbmm_": (1, 2),
    _ATTENTION: (0, 1),
    f"{_ATTENTION}_backward": (1, 2),
}
_OTHERS = frozenset({"aten::convolution", "aten::convolution_backward"})


@dataclass(frozen=True)
class _Like:
    """What a kernel sees of a tensor, but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of its storage."""
        return self._extent * self.dtype.itemsize

    @property
    def _extent(self) -> int:
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def made(self) -> Tensor:
        return torch.zeros(self._extent, dtype=self.dtype).as_strided(self.shape, self.stride)

    def of_one_head(self) -> _Like:
        """Of attention's operands and results, whose first dims are batch and heads."""
        return _Like((1, 1, *self.shape[2:]), self.stride, self.dtype)

    def halved(self, size: int) -> _Like:
        """With half the size, wherever it stands; its dims as they follow each other in memory."""
        shape = tuple(n // 2 if n == size else n for n in self.shape)
        stride, extent = [0] * len(shape), 1
        for dim in sorted(range(len(shape)), key=lambda d: (self.stride[d], -d)):
            if self.stride[dim]:  # one that is expanded stays so
                stride[dim], extent = extent, extent * shape[dim]
        return _Like(shape, tuple(stride), self.dtype)


def scratch_nbytes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The most bytes that `func` holds while it runs, beyond what it is given and returns.

    Args:
        func: an op of PyTorch's dispatcher.
        args, kwargs: what it is called with; tensors may be fake.
    """
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors or not _may_take(func, tensors):
        return 0
    if any(t.device.type != "cpu" or t.layout is not torch.strided for t in tensors):
        return 0
    call = (_frozen(args), tuple((name, _frozen(value)) for name, value in kwargs.items()))
    return _learned(func, call, torch.get_num_threads())


def _may_take(func: Any, tensors: Sequence[Tensor]) -> bool:
    if not isinstance(func, OpOverload):  # an op on whole graphs
        return False
    name = func._schema.name
    return name in _BLOCKED or name in _OTHERS or _is_mixed(func, tensors)


def _is_mixed(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether operands have to be widened; single numbers are widened at no cost."""
    if func.namespace != "aten" or torch.Tag.pointwise not in func.tags:
        return False
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return len({t.dtype for t in tensors if t.dim()}) > 1


def _frozen(value: Any) -> Any:
    """An argument as part of a key."""
    if isinstance(value, Tensor):
        shape, stride = (tuple(map(int, sizes)) for sizes in (value.shape, value.stride()))
        return _Like(shape, stride, value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, cast("Sequence[Any]", value)))
    return int(value) if isinstance(value, torch.SymInt) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Like):
        return value.made()
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


def _mapped(value: Any, change: Callable[[_Like], _Like]) -> Any:
    if isinstance(value, _Like):
        return change(value)
    return tuple(_mapped(v, change) for v in value) if isinstance(value, tuple) else value


@functools.lru_cache(maxsize=1 << 14)
def _learned(func: Any, call: tuple[Any, ...], threads: int) -> int:
    """Run it, or a smaller one; `threads` is part of the key."""
    if not _is_small(func, call) and func._schema.name.startswith(_ATTENTION):
        call = _mapped(call, _Like.of_one_head)
    while not _is_small(func, call):
        if func._schema.name not in _BLOCKED:
            return 0
        longest = max(size for like in _likes(call) for size in like.shape)
        call = _mapped(call, functools.partial(_Like.halved, size=longest))
    return _taken(func, *call)


def _is_small(func: Any, call: tuple[Any, ...]) -> bool:
    if sum(like.nbytes for like in _likes(call)) > _MOST_BYTES:
        return False
    positions = _BLOCKED.get(func._schema.name)
    if positions is None:
        return True
    # A product's multiplications: every entry of the left meets a row of the right. Queries meet
    # keys, of which the second last dim counts them.
    left, right = (call[0][position] for position in positions)
    met = right.shape[-2 if func._schema.name.startswith(_ATTENTION) else -1]
    return math.prod(left.shape) * met <= _MOST_MULTIPLICATIONS


def _likes(call: Any) -> Iterator[_Like]:
    return (leaf for leaf in tree_leaves(call) if isinstance(leaf, _Like))


def _taken(func: Any, args: Any, kwargs: Any) -> int:
    """Run an op on zeros, in a thread of its own."""
    found: list[int] = []

    def run() -> None:
        torch.get_num_threads()  # or oneDNN would take this thread's number of threads for OpenMP's
        given = _thawed(args), {name: _thawed(value) for name, value in kwargs}
        with torch.no_grad(), _Heard() as heard:
            result = func(*given[0], **given[1])
        found.append(heard.peak_nbytes - heard.end_nbytes)
        del result  # alive until here, so that its release was not heard

    def attempt() -> None:
        try:
            run()
        except (RuntimeError, TypeError):  # a form that this machine does not have takes nothing
            found.append(0)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0]


class _Heard:
    """The allocations of this thread while the context is entered."""

    peak_nbytes = 0
    end_nbytes = 0

    def __enter__(self) -> _Heard:
        config = ProfilerConfig(
            ProfilerState.CPU,
            False,  # report_input_shapes
            True,  # profile_memory
            False,  # with_stack
            False,  # with_flops
            False,  # with_modules
            _ExperimentalConfig(),
        )
        torch.autograd._enable_profiler_legacy(config)
        return self

    def __exit__(self, *error: object) -> None:
        threads: Any = torch.autograd._disable_profiler_legacy()
        for event in (event for events in threads for event in events):
            if event.kind() == "memory_alloc":
                self.end_nbytes += event.cpu_memory_usage()
                self.peak_nbytes = max(self.peak_nbytes, self.end_nbytes)
