"""Kernels of a body write their results over operands that nobody reads afterwards.

Inductor lets a result take an operand's place where the operand has one reader left. In a kernel
that several pointwise ops were fused into, each op is a reader of its own, so an operand that two
of them read is never written over: the backward of a gated MLP reads three values of a chunk (gate,
up, the gradient of their product) and writes three more beside them. Here a fused kernel counts as
one reader.

When it is right
    Every op of the kernel is pointwise, so that the code for an element loads all that it needs
    before it stores anything (both C++ and Triton are written as loads, computation, stores). Every
    access of the kernel to the operand, and the one store to the result, are at the same index over
    the same ranges, so that no other element's operand is written over. Nobody outside of the
    kernel reads the operand later.

Not handled
    Kernels with reductions, templates or atomic additions, and foreach kernels: Inductor decides
    there as always.

Only for what is compiled within `in_place`; a tag tells PyTorch's caches such graphs from others.

Source: `torch._inductor.scheduler.SchedulerNode.decide_inplace_update`. Works with torch 2.11 to
2.13.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch._inductor.config as inductor_config
import torch.compiler.config as compiler_config
from torch._inductor import ir
from torch._inductor.codegen.common import BackendFeature
from torch._inductor.codegen.simd import SIMDKernel
from torch._inductor.codegen.wrapper import can_match_buffer_size
from torch._inductor.dependencies import MemoryDep
from torch._inductor.scheduler import FusedSchedulerNode, NopKernelSchedulerNode, SchedulerNode
from torch._inductor.virtualized import V

_OTHER_MEMORY = (ir.NoneLayout, ir.MultiOutputLayout, ir.MutationLayoutSHOULDREMOVE)
_TAG = " mst: in place"  # to keys of caches, beside the user's own tag
_here = threading.local()


@contextmanager
def in_place() -> Iterator[None]:
    """What this thread compiles meanwhile writes over operands wherever that is right."""
    _install()
    before = getattr(_here, "active", False)
    _here.active = True
    config: Any = compiler_config
    own = config.cache_key_tag.removesuffix(_TAG)
    try:
        with config.patch(cache_key_tag=own + _TAG):
            yield
    finally:
        _here.active = before


@functools.cache
def _install() -> None:
    """Ask us first, once per process; outside `in_place` the answer is Inductor's own."""
    node_class: Any = SchedulerNode
    decide = node_class.decide_inplace_update

    def decide_for_kernel(self: Any) -> None:
        group = _group(self) if getattr(_here, "active", False) and _is_written(self) else None
        if group is None:
            decide(self)
        else:
            _decide(self, group)

    node_class.decide_inplace_update = decide_for_kernel


def _is_written(node: Any) -> bool:
    """Whether a kernel that can write in place is being written (Inductor's own conditions)."""
    kernel: Any = V.kernel
    return (
        inductor_config.inplace_buffers
        and V.graph.has_feature(node.get_device(), BackendFeature.INPLACE_BUFFERS)
        and hasattr(kernel, "args")
        and (not isinstance(kernel, SIMDKernel) or getattr(kernel, "mutations", None) is not None)
    )


def _group(node: Any) -> Sequence[Any] | None:
    """The pointwise ops that a node is fused with, if that is all that the kernel does."""
    fused = node.scheduler.name_to_fused_node.get(node.get_name())
    if type(fused) is not FusedSchedulerNode:
        return None
    members = fused.get_nodes()
    return members if all(map(_is_plain, members)) else None


def _is_plain(node: Any) -> bool:
    """One pointwise op with one store."""
    return (
        type(node) is SchedulerNode
        and not node.is_reduction()
        and not node.is_template()
        and len(node.get_outputs()) == 1
        and len(node.read_writes.writes) == 1
        and _store(node) is not None
        and not node.get_outputs()[0].get_mutations()
        and not node.get_outputs()[0].get_aliases()
    )


def _store(node: Any) -> MemoryDep | None:
    """What the op writes, if every element is written once and nothing is added to."""
    (written,) = node.read_writes.writes
    plain = isinstance(written, MemoryDep) and written.mode is None
    return written if plain else None


def _decide(node: Any, group: Sequence[Any]) -> None:
    """Give a node's result the place of a value that the kernel reads for the last time."""
    (result,) = node.get_outputs()
    name = result.get_name()
    kernel: Any = V.kernel
    arguments, names = kernel.args, {n.get_name() for n in group}
    local = all(user.get_name() in names for user in result.users)  # such a result has no memory
    if local or not result.node.should_allocate() or name in V.graph.removed_buffers:
        return
    if isinstance(result.node.get_output_spec(), _other_memory()):
        return
    if name in arguments.inplace_buffers or name in V.graph.wrapper_code.allocated:
        return  # decided when the kernel was written for the first time
    reads = [dep.name for member in (node, *group) for dep in member.read_writes.reads]
    own = {member.get_outputs()[0].get_name() for member in group}
    for read in dict.fromkeys(reads):
        taken = read in own or read in arguments.inplace_buffers
        if not taken and _may_replace(result, read, node, group):
            arguments.make_inplace(read, name)
            if isinstance(kernel, SIMDKernel):
                kernel.mutations.update((read, name))
            kernel.inplace_update_buffers[name] = read
            return


def _other_memory() -> tuple[type, ...]:
    own = getattr(ir, "CommBufferLayout", None)
    return _OTHER_MEMORY if own is None else (*_OTHER_MEMORY, own)


def _may_replace(result: Any, read: str, node: Any, group: Sequence[Any]) -> bool:
    scheduler = node.scheduler
    operand = scheduler.name_to_buf.get(read)
    if operand is None or not V.graph.wrapper_code.can_reuse(operand, node):
        return False
    if isinstance(operand.defining_op, NopKernelSchedulerNode) or operand.node is None:
        return False
    if read in scheduler.mutation_renames or read in scheduler.mutation_real_name:
        return False
    if getattr(scheduler, "has_cross_stream_hazard", lambda *_: False)(read, node):
        return False
    return (
        _has_memory_of_its_own(operand)
        and can_match_buffer_size(operand.node, result.node)
        and _dies_here(operand, node, group)
        and _is_read_where_written(operand, node, group)
    )


def _has_memory_of_its_own(operand: Any) -> bool:
    if isinstance(operand.node.get_output_spec(), _other_memory()):
        return False
    made_by = operand.defining_op.node if operand.defining_op else None
    is_foreign = isinstance(made_by, (ir.FallbackKernel, ir.MultiOutput))
    return not (is_foreign and operand.node.get_inputs_that_alias_output())


def _dies_here(operand: Any, node: Any, group: Sequence[Any]) -> bool:
    """Whether nobody reads it after this kernel; the graph's output is a reader, too."""
    done = node.ancestors | V.graph.removed_operations | node.scheduler.completed_operations
    done = done | {n.get_name() for n in group}
    return all(user.node.get_name() in done and not user.is_weak for user in operand.users)


def _is_read_where_written(operand: Any, node: Any, group: Sequence[Any]) -> bool:
    """Whether the kernel reads it at the one index at which the node writes its result."""
    write = _store(node)
    assert write is not None
    name = operand.get_name()
    deps = [d for member in group for d in member.read_writes.reads if d.name == name]
    return bool(deps) and all(
        isinstance(d, MemoryDep) and (d.index, d.size) == (write.index, write.size) for d in deps
    )
