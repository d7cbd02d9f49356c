"""What AOTAutograd gets of a Dynamo graph, and the way back to what the caller gets.

Deferred inputs are opened (`passes.open`), outputs that the caller probably drops are deferred
(`passes.defer`), those that nobody differentiates through are detached (`passes.detach`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from mstc.inductor import attribute_source, detect_fake_mode
from mstc.options import Options
from mstc.quantity import format_bytes
from mstc.report import Report, fall_back
from mstc.runtime.attach import Attached
from mstc.runtime.deferred import DeferredTensor, opening_of, plain_example, wrap_outputs
from passes.defer import DeferResult, defer_outputs
from passes.detach import DetachResult, detach_outputs
from passes.dynamo import without_facts
from passes.grouped import replace_grouped
from passes.open import Opening, open_inputs

__all__ = ["Prepared", "prepare"]


class RecordCompiler(Protocol):
    """What compiles at run time; `mstc.driver` has it."""

    def __call__(self, graph: GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """What eager code does to deferred outputs."""
        ...

    def with_all_gradients(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A graph whose detached outputs somebody differentiates through."""
        ...


def _deferred(gm: GraphModule, options: Options, report: Report) -> DeferResult | None:
    """Step one; None when no output leaves the graph."""
    if not options.defer_outputs:
        return None
    try:
        result = defer_outputs(gm, min_bytes=options.min_deferred_bytes)
    except Exception as error:  # a mistake of ours must not cost the user the run
        fall_back(error, report)
        return None
    report.refusals += result.refusals
    for output in result.deferred:
        shape = "x".join(map(str, output.shape))
        report.deferred.append(
            f"output {', '.join(map(str, output.indices))} "
            f"({shape}, {output.nbytes / 2**20:.1f} MiB) at {output.source}"
        )
    if not result.deferred:
        return None
    return result


def _detached(
    gm: GraphModule, result: DeferResult | None, options: Options, report: Report
) -> DetachResult | None:
    """Step two; None when no output is detached. What deferred outputs are made from stays."""
    if not options.defer_outputs or not torch.is_grad_enabled():
        return None
    sources = (one for output in result.deferred for one in output.frontier) if result else ()
    needed = [one.index for one in sources if one.kind == "output"]
    try:
        found = detach_outputs(gm, min_bytes=options.min_deferred_bytes, needed=needed)
    except Exception as error:  # as above
        fall_back(error, report)
        return None
    report.refusals += found.refusals
    if not found.indices:
        return None
    report.notes.append(
        f"{len(found.indices)} outputs ({format_bytes(found.nbytes)}) that lead to the loss get no "
        "gradient unless somebody differentiates through them"
    )
    return found


@dataclass(frozen=True)
class _Opened:
    """A Dynamo graph that takes no deferred tensor any more."""

    graph: GraphModule
    inputs: list[Any]  # example inputs
    parts: frozenset[int]  # positions of inputs that are computed inside, from their parts
    values: frozenset[int]  # positions of inputs that are passed as plain tensors

    def arguments(self, args: Sequence[Any]) -> list[Any]:
        """What the graph is to be called with."""
        flat: list[Any] = []
        for index, arg in enumerate(args):
            if index in self.parts:
                flat += arg.pass_on()
            else:
                flat.append(arg.materialize() if index in self.values else arg)
        return flat


def _open(gm: GraphModule, example_inputs: Sequence[Any], report: Report) -> _Opened:
    """Have deferred inputs computed in the graph; one that it writes to is passed as values."""
    openings: dict[int, Opening] = {}
    inputs: list[Any] = []
    plain: dict[int, torch.Tensor] = {}
    returned = gm.graph.output_node().all_input_nodes
    results = [n.meta.get("example_value") for n in returned]
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        example = node.meta.get("example_value")
        opening = opening_of(example, attribute_source(node), results)
        if opening is not None:
            openings[index] = opening
            inputs += opening.parts
            report.notes.append(f"input {index} is a deferred output: it is computed in the graph")
        elif isinstance(example, DeferredTensor) and example.has_parts:
            mode = detect_fake_mode(example_inputs)
            assert mode is not None, "Dynamo traces with fake tensors"
            with mode:
                plain[index] = plain_example(example)
            inputs.append(plain[index])
            report.notes.append(
                f"input {index} is a deferred output, but the graph writes to it or returns a view "
                "of it: it is computed before. Pass a copy (logits.clone()), or return no view"
            )
        else:
            if isinstance(example, DeferredTensor):
                report.notes.append(
                    f"input {index} was a deferred output, but it has been looked at, written to "
                    "or hooked onto: its values are there already. Call the function before that"
                )
            inputs.append(example_inputs[index])
    if not openings and not plain:
        return _Opened(gm, list(example_inputs), frozenset(), frozenset())
    graph = open_inputs(gm, openings, plain)
    return _Opened(graph, inputs, frozenset(openings), frozenset(plain))


@dataclass(frozen=True)
class Prepared:
    """What AOTAutograd gets of a Dynamo graph, and the way back from it."""

    opened: _Opened
    result: DeferResult | None  # None when no output leaves the graph
    detached: DetachResult | None  # None when no output is detached
    whole: GraphModule  # without deferred outputs, before any was detached; without fake tensors
    compile_record: RecordCompiler

    @property
    def graph(self) -> GraphModule:
        if self.detached is not None:
            return self.detached.graph_module
        return self.opened.graph if self.result is None else self.result.graph_module

    @property
    def inputs(self) -> list[Any]:
        return self.opened.inputs

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """A callable with the Dynamo graph's inputs and outputs."""
        opened, result = self.opened, self.result
        if self.detached is not None:
            indices, again = self.detached.indices, self.compile_record.with_all_gradients
            compiled = Attached(compiled, self.whole, indices, again)
        if not opened.parts and not opened.values and result is None:
            return compiled

        def call(*args: Any) -> Any:
            args = tuple(opened.arguments(args))
            outputs = compiled(*args)
            if result is None:
                return outputs
            return wrap_outputs(
                result.deferred,
                outputs,
                args,
                num_outputs=result.num_outputs,
                compile_record=self.compile_record,
            )

        return call


def prepare(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    report: Report,
    compile_record: RecordCompiler,
) -> Prepared:
    """Open, defer and detach.

    Args:
        gm, example_inputs: as Dynamo made them.
        options: what the user asked for.
        report: told of what was done, and why not more.
        compile_record: compiles what comes up at run time.
    """
    replace_grouped(gm)
    opened = _open(gm, example_inputs, report)
    result = _deferred(opened.graph, options, report)
    whole = opened.graph if result is None else result.graph_module
    detached = _detached(whole, result, options, report)
    if detached is not None:
        whole = without_facts(whole)
    return Prepared(opened, result, detached, whole, compile_record)
