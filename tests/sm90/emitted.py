"""What Inductor writes for a step, module by module, and what it is made of.

Terms
    module   what Inductor makes of one graph: allocations, kernels, calls of libraries.
    role     which graph: the forward's, the backward's, or the body of a loop.
    library  a kernel that is not written by Inductor: a matrix product, fused attention, a fallback
             to PyTorch's own, `mst::loop`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.virtualized import V

from mstc.runtime import loop

_LIBRARY = re.compile(r"= (?:extern_kernels|torch\.ops)\.([\w.]+)\(|^\s*extern_kernels\.(\w+)\(")
_BUFFER = re.compile(r"empty_strided_\w+\(\(([^)]*)\), \([^)]*\), torch\.(\w+)\)")


class Stopped(Exception):
    """A graph was called that cannot run."""


@dataclass(frozen=True)
class Emitted:
    """A module that Inductor wrote."""

    role: str  # "forward", "backward" or "body"
    module: ModuleType
    text: str

    @property
    def kernels(self) -> dict[str, Any]:
        """Triton's, by name."""
        return {n: k for n, k in vars(self.module).items() if isinstance(k, CachingAutotuner)}

    @property
    def libraries(self) -> Counter[str]:
        """Calls of libraries, by name."""
        found = (_LIBRARY.search(line) for line in self.text.splitlines())
        return Counter(m[1] or m[2] for m in found if m)

    @property
    def buffers(self) -> list[int]:
        """Values of every buffer that it allocates, the largest first."""
        sizes = (
            [int(s) for s in m[1].split(",") if s.strip()] for m in _BUFFER.finditer(self.text)
        )
        return sorted(map(prod, sizes), reverse=True)


@contextmanager
def collected(prepare: Callable[[ModuleType], object]) -> Iterator[list[Emitted]]:
    """The modules that are compiled meanwhile, in their order.

    Args:
        prepare: is given each of them before it is used.
    """
    found: list[Emitted] = []
    bodies = 0  # that are being compiled
    load, compile_body = PyCodeCache.load_by_key_path, loop.compile_body

    def loaded(cls: type, key: str, path: str, *args: Any, **kwargs: Any) -> ModuleType:
        module = load(key, path, *args, **kwargs)
        if not hasattr(module, "call"):  # one kernel's
            return module
        prepare(module)
        outer = "backward" if V.graph.is_backward else "forward"
        found.append(Emitted("body" if bodies else outer, module, Path(path).read_text()))
        return module

    def compiling(*args: Any, **kwargs: Any) -> Any:
        nonlocal bodies
        bodies += 1
        try:
            return compile_body(*args, **kwargs)
        finally:
            bodies -= 1

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(PyCodeCache, "load_by_key_path", classmethod(loaded)))
        enter(patch.object(loop, "compile_body", compiling))
        enter(
            torch._inductor.config.patch(
                compile_threads=1, fx_graph_cache=False, use_static_triton_launcher=False
            )
        )
        enter(
            torch._functorch.config.patch(
                enable_autograd_cache=False, force_non_lazy_backward_lowering=True
            )
        )
        yield found


def stop(module: ModuleType) -> None:
    """Have a module raise `Stopped` when it is called."""

    def call(*args: Any) -> Sequence[Any]:
        raise Stopped

    module.call = call
