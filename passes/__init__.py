"""The passes, in order: graph -> facts -> plan -> graph.

    copies    ops read a tensor itself, no `detach` of it                         `passes.copies`
    causal    masks that are proven causal leave attention                        `passes.causal`
    padding   masks that are the same for every query are read as one row         `passes.padding`
    onehot    sums over one-hot rows (in a cross entropy's gradient) are read off `passes.onehot`
    counted   random numbers become functions of a seed and their positions       `passes.counted`
    shift     cuts of wide values move to what these are made from                `passes.shift`
    generated large values made from small ones are made by each of their readers `passes.generated`
    axes      which dims are the same axis, and what every op does to them        `passes.axes`,
              `passes.rules`
        roles     queries and keys are two axes                                   `passes.roles`
    regions   convex sets of nodes with a large inside and a small boundary       `passes.regions`
    plan      which regions, in which mode, how many chunks                       `passes.plan`
        liveness  who is alive when, where the peak is                            `passes.liveness`
        modes     recompute, or gradients in the forward                          `passes.modes`,
                  `passes.linear`
        body      one chunk's work as a graph of its own                          `passes.body`
        chunk     a new graph, with loops in place of regions                     `passes.chunk`
    aliases   fake values tell which tensors share memory                         `passes.aliases`
    layout    outputs keep their strides                                          `passes.layout`
    verify    the new graph says what the old one said                            `passes.verify`

Before these, on the graph as Dynamo made it: `passes.defer` takes outputs out that the caller
probably drops, `passes.detach` makes no gradients for those that nobody differentiates through
(`passes.dynamo` reads such graphs). After the partitioner, where a budget asks for it,
`passes.offload` has saved values wait in the host's memory, and `passes.shared` has equal layers
share what is between their loops. Everything here is a pure function of its arguments; nothing here
imports `mstc`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Graph

from passes.aliases import refresh_views, separate_twins
from passes.causal import drop_causal_masks
from passes.copies import drop_other_names
from passes.counted import count_random_numbers
from passes.generated import remake_generated
from passes.layout import LayoutError, keep_strides
from passes.onehot import read_off_sums
from passes.padding import keep_one_row
from passes.plan import Facts, Planned, PlanOptions, left_alone, make_plan, predict_times
from passes.regions import find_regions
from passes.roles import join, separate
from passes.shift import move_slices
from passes.verify import verify_same_interface

__all__ = ["relative_times", "run_passes"]


def run_passes(
    graph: Graph,
    options: PlanOptions,
    *,
    min_region_bytes: int,
    all_axes: bool = False,
    count_random: bool = True,
    loop_op: Callable[..., object],
    lowering: str,
    observe: Callable[[str, object], None] = lambda name, value: None,
) -> Planned:
    """Plan and rewrite one joint or inference graph; the input graph is left as it is.

    Args:
        graph: a functional aten graph with fake values in ``meta["val"]``.
        options: what the planner is asked for.
        min_region_bytes: smallest value that may seed a region.
        all_axes: as for `find_regions`.
        count_random: False to leave random numbers to their generator.
        loop_op: the runtime's loop op, called in the new graph.
        lowering: passed on to the loop op.
        observe: called after each pass with its name and its result.
    """
    facts = _facts(graph, options, min_region_bytes, all_axes, count_random, observe)
    planned = make_plan(facts, options, loop_op=loop_op, lowering=lowering)
    observe("plan", planned.plan)
    if planned.chunked is not None:
        join(planned.chunked.graph)
        refresh_views(planned.chunked.graph)
        separate_twins(planned.chunked.graph, loop_op)
        try:
            keep_strides(graph, planned.chunked.graph)
        except LayoutError as error:
            return left_alone(planned, str(error))
        verify_same_interface(graph, planned.chunked.graph)
        observe("chunk", planned.chunked)
    return planned


def relative_times(
    graph: Graph,
    options: Sequence[PlanOptions],
    *,
    min_region_bytes: int,
    count_random: bool = True,
    loop_op: Callable[..., object],
    lowering: str,
) -> list[float | None]:
    """The predicted times of plans that differ in how tight they are, of that without loops.

    Args:
        as for `run_passes`; `options` differ in `tightness` alone.
    """
    facts = _facts(graph, options[0], min_region_bytes, False, count_random, _unobserved)
    return predict_times(facts, options, loop_op=loop_op, lowering=lowering)


def _unobserved(name: str, value: object) -> None:
    pass


def _facts(
    graph: Graph,
    options: PlanOptions,
    min_region_bytes: int,
    all_axes: bool,
    count_random: bool,
    observe: Callable[[str, object], None],
) -> Facts:
    """Everything before the plan; arguments as for `run_passes`."""
    original = graph
    graph = drop_other_names(graph)
    graph, rewrites = drop_causal_masks(graph, min_bytes=min_region_bytes)
    observe("causal", rewrites)
    graph, shortened = keep_one_row(graph, min_bytes=min_region_bytes)
    rewrites += shortened
    observe("padding", shortened)
    graph = read_off_sums(graph)
    observe("onehot", graph)
    if count_random:
        graph = count_random_numbers(graph, min_bytes=min_region_bytes)
    observe("counted", graph)
    graph = move_slices(graph, min_bytes=min_region_bytes)
    observe("shift", graph)
    graph = remake_generated(graph, min_bytes=min_region_bytes)
    observe("generated", graph)
    graph, axes = separate(graph, min_bytes=min_region_bytes)
    observe("axes", axes)
    regions, refusals = find_regions(
        graph,
        axes,
        min_bytes=min_region_bytes,
        min_rows=options.chunk_rows or options.min_rows,
        all_axes=all_axes,
        loop_axes=options.loop_axes,
    )
    observe("regions", (regions, refusals))
    return Facts(original, graph, rewrites, axes, regions, refusals)
