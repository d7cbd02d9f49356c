"""What happens to the graphs of the forward and the backward behind AOTAutograd's partitioner.

Saved values leave for the host where a memory budget asks for it (`passes.offload`), and what equal
layers do between their loops is compiled once (`passes.shared`).
"""

from __future__ import annotations

import logging

import torch
from torch.fx import GraphModule

from mstc.inductor import AfterPartition, calls_subgraphs
from mstc.options import Options
from mstc.quantity import format_bytes
from mstc.report import Report, fall_back
from passes.offload import offload_saved_values
from passes.shared import share_equal_runs

_CHECKPOINTED = "ac_graph_id"  # in the meta of an op inside `torch.utils.checkpoint`
log = logging.getLogger(__name__)


def after_partition(
    graph: GraphModule, options: Options, report: Report
) -> tuple[AfterPartition, ...]:
    """What to do, in this order.

    Args:
        graph: the Dynamo graph.
        options: with the setting that is compiled.
        report: gets a line of what went to the host.
    """
    steps: list[AfterPartition] = []
    has_regions = _has_regions(graph)
    if options.setting.offload:
        if has_regions:
            report.notes.append(
                "what is saved for the backward stays on the device: what leaves a "
                "nested_compile_region has to be what that was traced with"
            )
        else:
            steps.append(_offload(report))
    if not has_regions and options.lowering != "eager" and calls_subgraphs(options.inductor):
        steps.append(_share(report))
    return tuple(steps)


def _has_regions(gm: GraphModule) -> bool:
    """Whether parts of a graph are compiled by themselves (`nested_compile_region`)."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, GraphModule))
    region = torch.ops.higher_order.invoke_subgraph
    return any(node.target is region for graph in graphs for node in graph.nodes)


def _offload(report: Report) -> AfterPartition:
    """Has what is saved for the backward wait in the host's memory, and says how much."""

    def rewrite(forward: GraphModule, backward: GraphModule, num_outputs: int) -> None:
        try:
            found = offload_saved_values(forward.graph, backward.graph, num_outputs)
        except Exception as error:  # a mistake of ours must not cost the user the run
            fall_back(error, report)
            return
        if found is None:
            report.notes.append("nothing that is saved for the backward can go to the host")
            return
        forward.graph, backward.graph = found.forward, found.backward
        stays = f"; {format_bytes(found.stays)} stay" if found.stays else ""
        moved = format_bytes(found.nbytes)
        report.notes.append(f"what is saved for the backward goes to the host: {moved}{stays}")

    return rewrite


def _computes_again(backward: GraphModule) -> bool:
    """Whether it has ops of layers that the user has checkpointed, as Dynamo has marked them."""
    return any(_CHECKPOINTED in node.meta for node in backward.graph.nodes)


def _share(report: Report) -> AfterPartition:
    """Has equal layers share compiled code.

    Not where checkpointed layers are computed again: a value that is made before a loop and read
    after it is then made where it is read, which what is compiled apart cannot do: values of
    tokens x hidden, at the peak.
    """

    def rewrite(forward: GraphModule, backward: GraphModule, num_outputs: int) -> None:
        for graph in (forward,) if _computes_again(backward) else (forward, backward):
            try:
                shared = share_equal_runs(graph)
            except Exception as error:  # a mistake of ours must not cost the user the run
                fall_back(error, report)
                return
            log.debug("%d parts between loops share compiled code", shared)

    return rewrite
