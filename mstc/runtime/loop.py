"""The loop: one opaque, functional op that runs a body over the chunks of an axis.

``mst::loop(Tensor[] inputs, SymInt[] sizes, int chunk, str spec, str lowering) -> Tensor[]``

    inputs    the body's boundary inputs, whole.
    sizes     the sizes of the body's axes at this call, the loop axis first.
    chunk     positions of the loop axis per step; the last chunk takes what is left.
    spec      the body as text, how inputs are sliced and outputs are put together (`passes.body`).
    lowering  how bodies are run, as JSON: ``{"kind": "inductor" | "eager" | "emit", "config":
              {...}}``; "emit" is for simulation (`mstc.simulate`).

All that a loop needs is in its arguments, so a graph with loops in it can be cached on disk and run
in another process.

Per chunk: narrow the split inputs (no copy where the slice is contiguous), run the compiled body,
multiply or copy split outputs into buffers allocated once (`mstc.runtime.output`), add sums and
products in place (very many in two steps: `passes.groups`). Bodies are compiled once per distinct
text and sizes, ahead of their first use where the sizes are known (`prepare_bodies`); when a second
size comes, the sizes that differ are left open, so that two compiles serve any lengths. Where
Inductor cannot leave them open, a few sizes are compiled one by one.

A body that Inductor cannot compile is run op by op: as exact, as small, slower. That is said once,
by a warning and in the report.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from mstc import history
from mstc.errors import BodyCompilationWarning
from mstc.inductor import CompiledBody, PendingKernels, compile_body, hide_autocast
from mstc.runtime.output import Output, Slicing
from mstc.runtime.sums import ChunkSum
from passes.groups import group_size
from passes.source import nbytes

log = logging.getLogger(__name__)

_MOST_CLOSED = 8  # sizes that a body is compiled for one by one, where none can be left open

_LIBRARY = torch.library.Library("mst", "FRAGMENT")
_LIBRARY.define(
    "loop(Tensor[] inputs, SymInt[] sizes, int chunk, str spec, str lowering) -> Tensor[]",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)


def _slicing(entry: list[Any] | None) -> Slicing | None:
    return None if entry is None else Slicing(entry[0], tuple(entry[1]), entry[2])


_Function = Callable[[Sequence[int], list[torch.Tensor]], Sequence[torch.Tensor]]
_Started = dict[tuple[int, tuple[Any, ...]], _Function]  # by program and key


@dataclass
class Program:
    """A spec, parsed, with what was compiled for it so far."""

    body: Callable[..., Sequence[torch.Tensor]]
    inputs: tuple[Slicing | None, ...]
    input_dims: tuple[tuple[tuple[int, ...], ...], ...]
    outputs: tuple[Output, ...]
    lowering: dict[str, Any]
    compiled: dict[tuple[Any, ...], _Function] = field(default_factory=dict)
    open_bodies: dict[tuple[Any, ...], list[CompiledBody]] = field(default_factory=dict)
    seen: dict[tuple[Any, ...], tuple[tuple[int, ...], set[int]]] = field(default_factory=dict)
    """Per form of the inputs: the first sizes, and which of them have varied since."""
    closed: dict[tuple[Any, ...], Exception] = field(default_factory=dict)
    """Forms that Inductor cannot compile with sizes left open, and why."""
    failure: BaseException | None = None

    def run(
        self,
        inputs: Sequence[torch.Tensor],
        sizes: Sequence[int],
        chunk: int,
        *,
        only: Callable[[list[Any]], list[Any]] = list,
    ) -> list[torch.Tensor]:
        """The outputs; `only` chooses among the chunks, and among the blocks of a product, for
        simulation."""
        device = _device(inputs)
        chunks = list(chunks_of(sizes[0], chunk))
        group = self._group_size(inputs, sizes, len(chunks))
        made = [
            o.empty(sizes, device)
            if o.kind == "split"
            else ChunkSum(o.dtype, o.order, in_groups=group > 0 and o.in_groups)
            for o in self.outputs
        ]
        numbers = only(list(range(len(chunks))))
        spans = [chunks[i] for i in numbers]
        pieces = self._pieces(inputs, sizes, spans)
        places = [o.places(m, sizes, spans) for o, m in zip(self.outputs, made, strict=True)]
        functions: dict[int, _Function] = {}  # slices of one size have one form
        for index, (number, (_, size)) in enumerate(zip(numbers, spans, strict=True)):
            own = (size, *sizes[1:])
            tensors = self._slices(pieces, index)
            if size not in functions:
                functions[size] = self.function(own, tensors)
            values = iter(functions[size](own, tensors))
            del tensors
            ends = group > 0 and (number % group == group - 1 or number == len(chunks) - 1)
            for output, own_places in zip(self.outputs, places, strict=True):
                output.put(own_places[index], values, own, ends, only)
            del values  # of a chunk, while the next body runs
        results = [m.whole if isinstance(m, ChunkSum) else m for m in made]
        return [
            o.empty(sizes, device).zero_() if r is None else r
            for r, o in zip(results, self.outputs, strict=True)
        ]

    def _group_size(
        self, inputs: Sequence[torch.Tensor], sizes: Sequence[int], num_chunks: int
    ) -> int:
        sums = sum(o.nbytes(sizes) for o in self.outputs if o.in_groups)
        split = sum(nbytes(t) for t, s in zip(inputs, self.inputs, strict=True) if s is not None)
        split += sum(o.nbytes(sizes) for o in self.outputs if o.kind == "split")
        return group_size(num_chunks, sums, split) if sums else 0

    def _pieces(
        self,
        inputs: Sequence[torch.Tensor],
        sizes: Sequence[int],
        spans: Sequence[tuple[int, int]],
    ) -> list[torch.Tensor | Sequence[torch.Tensor]]:
        """Of every input its slices, or itself where it is whole."""
        return [
            t if s is None else s.pieces(t, sizes, spans)
            for t, s in zip(inputs, self.inputs, strict=True)
        ]

    def _slices(
        self, pieces: Sequence[torch.Tensor | Sequence[torch.Tensor]], index: int
    ) -> list[torch.Tensor]:
        """What the body gets for one chunk."""
        return [
            p if isinstance(p, torch.Tensor) else cast("Slicing", s).merge(p[index])
            for p, s in zip(pieces, self.inputs, strict=True)
        ]

    def first_slices(
        self, inputs: Sequence[torch.Tensor], sizes: Sequence[int], size: int
    ) -> list[torch.Tensor]:
        """What the body gets for a chunk of `size` positions."""
        return self._slices(self._pieces(inputs, sizes, [(0, size)]), 0)

    # -- compiling

    def prepare(
        self,
        inputs: Sequence[torch.Tensor],
        sizes: Sequence[int],
        chunk: int,
        started: _Started,
    ) -> list[Callable[[], None]]:
        """Compile for a call that is to come.

        Args:
            inputs: fake tensors. Should the real ones have other strides, the body is compiled
                once more, on first use.
            sizes, chunk: as for `run`.
            started: the bodies that this round has begun to compile, for equal layers; added to.

        Returns:
            What is left to do, once other bodies have been prepared as well: calls that wait until
            kernels are built. Only then another thread may find the body.
        """
        waits: list[Callable[[], None]] = []
        for size in dict.fromkeys(size for _, size in chunks_of(sizes[0], chunk)):
            tensors = self.first_slices(inputs, sizes, size)
            key = (size, *sizes[1:]), _form(tensors)
            if key in self.compiled or self._serves(key, started):
                continue
            pending = PendingKernels()
            on_cpu = all(t.device.type == "cpu" for t in tensors)
            with pending.collected() if on_cpu else nullcontext():
                body = started[id(self), key] = self._compile(*key, tensors)
            waits.append(functools.partial(self._finish, key, body, pending))
        return waits

    def _serves(self, key: tuple[Any, ...], started: _Started) -> bool:
        """Whether something that is being compiled will do for a key."""
        sizes, form = key
        return (id(self), key) in started or any(
            owner == id(self) and own == form and isinstance(body, CompiledBody) and body.is_open
            and body.accepts(sizes)
            for (owner, (_, own)), body in started.items()
        )  # fmt: skip

    def _finish(
        self, key: tuple[Any, ...], body: Callable[..., Any], pending: PendingKernels
    ) -> None:
        try:
            pending.wait()
        except Exception as error:  # the C++ compiler's, say
            self._give_up(error)
            body = self._eagerly
        self._keep(key, body)

    def _keep(self, key: tuple[Any, ...], body: Callable[..., Any]) -> None:
        """Let calls find a body that can run: those of this key, and those that it accepts."""
        self.compiled[key] = body
        if isinstance(body, CompiledBody) and body.is_open:
            bodies = self.open_bodies.setdefault(key[1], [])
            if body not in bodies:
                bodies.append(body)

    def function(self, sizes: tuple[int, ...], tensors: list[torch.Tensor]) -> _Function:
        """The body for these sizes; compiled now if it is the first call of its kind."""
        key = sizes, _form(tensors)
        found = self.compiled.get(key)
        if found is None:
            found = self._compile(*key, tensors)
            self._keep(key, found)
        return found

    def _eagerly(self, sizes: Sequence[int], tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return self.body(*sizes, *tensors)

    def _compile(
        self, sizes: tuple[int, ...], form: tuple[Any, ...], tensors: list[torch.Tensor]
    ) -> _Function:
        if self.lowering["kind"] == "eager" or self.failure is not None:
            return self._eagerly
        first, varied = self.seen.setdefault(form, (sizes, set()))
        varied |= {i for i, (a, b) in enumerate(zip(first, sizes, strict=True)) if a != b}
        for body in self.open_bodies.get(form, ()):
            if body.accepts(sizes):
                return body
        dynamic = [i for i in sorted(varied) if sizes[i] > 1]
        strided = zip(form, self.input_dims, strict=True)
        if any(i in dynamic for f, dims in strided if f[0] is not None for d in dims for i in d):
            dynamic = []  # strides that depend on a size that varies
        if dynamic and form not in self.closed:
            try:
                return self._compiled(sizes, tensors, dynamic)
            except Exception as error:  # Inductor's errors have no common base
                log.info("a loop body is compiled for each of its sizes", exc_info=error)
                history.note(
                    f"Inductor cannot compile a loop body with open sizes ({type(error).__name__}: "
                    f"{error}); up to {_MOST_CLOSED} sizes are compiled one by one."
                )
                self.closed[form] = error
        if form in self.closed and sum(key[1] == form for key in self.compiled) >= _MOST_CLOSED:
            self._give_up(self.closed[form])
            return self._eagerly
        try:
            return self._compiled(sizes, tensors, [])
        except Exception as error:
            self._give_up(error)
            return self._eagerly

    def _compiled(
        self, sizes: tuple[int, ...], tensors: list[torch.Tensor], dynamic: list[int]
    ) -> CompiledBody:
        body = compile_body(
            self.body,
            sizes,
            tensors,
            self.input_dims,
            dynamic,
            self.lowering["config"],
            build=self.lowering["kind"] != "emit",
        )
        counters.bodies_compiled += 1
        return body

    def _give_up(self, error: Exception) -> None:
        self.failure = error
        log.warning("a loop body could not be compiled and runs op by op", exc_info=error)
        what = (
            f"Inductor could not compile a loop body ({type(error).__name__}: {error}); "
            "it runs op by op: the numbers and the memory are the same, the speed is not."
        )
        history.note(what)
        warnings.warn(what, BodyCompilationWarning, stacklevel=3)


def chunks_of(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Start and size of every chunk, in positions."""
    start = 0
    while start < length:
        size = min(chunk, length - start)
        if length - start - size == 1 and size > 2:
            size -= 1  # a last chunk of one would be compiled for itself
        yield start, size
        start += size


def _form(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What a body is compiled for, beside the sizes."""
    return tuple((None if t.is_contiguous() else t.stride(), t.dtype, t.device) for t in tensors)


@dataclass(frozen=True)
class Call:
    """A call of the loop op that is to come."""

    inputs: tuple[torch.Tensor, ...]  # fake
    sizes: tuple[int, ...]
    chunk: int
    spec: str
    lowering: str


def prepare_bodies(calls: Sequence[Call]) -> None:
    """Compile the bodies of loops before they run, so that their kernels are built in parallel.

    What fails here for any other reason than Inductor is left to be compiled on first use.
    """
    waits: list[Callable[[], None]] = []
    started: _Started = {}
    try:
        for call in calls:
            program = program_of(call.spec, call.lowering)
            with call.inputs[0].fake_mode:  # type: ignore[attr-defined]
                waits += program.prepare(call.inputs, call.sizes, call.chunk, started)
    except Exception:
        log.debug("bodies are compiled on first use", exc_info=True)
    finally:
        for wait in waits:
            wait()


@dataclass
class Counters:
    """Deterministic counts, for tests."""

    bodies_compiled: int = 0


counters = Counters()


def _device(inputs: Sequence[torch.Tensor]) -> torch.device:
    """Where the loop runs: a scalar may live on the host beside tensors on a GPU."""
    return next((t.device for t in inputs if t.dim()), inputs[0].device)


@functools.cache
def program_of(spec: str, lowering: str) -> Program:
    """The parsed program of a spec; one per distinct text, so equal layers share what is
    compiled."""
    entry = json.loads(spec)
    scope: dict[str, Any] = {
        "torch": torch,
        "device": torch.device,
        "inf": float("inf"),
        "nan": float("nan"),
        "NoneType": type(None),
    }
    exec(compile(entry["body"], "<mst body>", "exec"), scope)  # text that passes.body wrote
    body = functools.partial(scope["forward"], None)
    return Program(
        body=body,
        inputs=tuple(_slicing(i["slice"]) for i in entry["inputs"]),
        input_dims=tuple(tuple(tuple(d) for d in i["dims"]) for i in entry["inputs"]),
        outputs=tuple(
            Output(
                kind=o["kind"],
                dims=tuple(tuple(d) for d in o["dims"]),
                dtype=getattr(torch, o["dtype"]),
                order=tuple(o["order"]),
                slicing=_slicing(o["slice"]),
                in_groups=o["in_groups"],
                terms=tuple(o["terms"]),
            )
            for o in entry["outputs"]
        ),
        lowering=json.loads(lowering),
    )


def _loop(
    inputs: Sequence[torch.Tensor], sizes: Sequence[int], chunk: int, spec: str, lowering: str
) -> list[torch.Tensor]:
    with torch.no_grad(), hide_autocast():
        return program_of(spec, lowering).run(inputs, sizes, chunk)


def _loop_fake(
    inputs: Sequence[torch.Tensor], sizes: Sequence[Any], chunk: int, spec: str, lowering: str
) -> list[torch.Tensor]:
    program = program_of(spec, lowering)
    return [o.empty(sizes, _device(inputs)) for o in program.outputs]


_LIBRARY.impl("loop", _loop, "CompositeExplicitAutograd")
torch.library.register_fake("mst::loop", _loop_fake, lib=_LIBRARY)
loop_op = torch.ops.mst.loop.default
