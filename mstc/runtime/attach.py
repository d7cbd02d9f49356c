"""Outputs that a compiled graph returns detached, put back into the autograd graph.

`passes.detach` detaches outputs that nobody is likely to differentiate through (keys and values
beside a loss), so that the backward takes no gradient for them. Here they get a node that costs
nothing but a reference to the graph's inputs. If somebody does differentiate through one of them,
the graph is compiled with gradients for all outputs and run once more, from the same inputs, and
the gradient goes through that run; gradients are linear in what is differentiated, so the two
backward passes add up to the one that they replace. From then on that second compilation is the
one that is called: such a training loop pays once.

Inputs that have changed in place since the call, or a graph that turns out to draw random numbers
(`passes.detach` refuses those it can tell), are an error and never another gradient.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from mstc.errors import DeferredOutputError
from mstc.runtime.frontier import stamp_of
from mstc.runtime.recipe import read_autocast

__all__ = ["Attached"]

log = logging.getLogger(__name__)

_MOST_COMPILED = 8
"""Second compilations of one graph, each for fixed sizes; for further ones it runs op by op."""


class Attached:
    """A compiled graph some of whose outputs are detached, as a callable that attaches them."""

    def __init__(
        self,
        compiled: Callable[..., Sequence[Any]],
        graph: GraphModule,
        indices: Sequence[int],
        compile_again: Callable[[GraphModule, Sequence[Any]], Callable[..., Sequence[Any]]],
    ) -> None:
        """
        Args:
            compiled: what is called.
            graph: the same graph with no output detached. It is kept, and must not change.
            indices: of the outputs that are detached.
            compile_again: compiles `graph` for given inputs.
        """
        self._compiled = compiled
        self._graph = graph
        self._indices = tuple(indices)
        self._compile_again = compile_again
        self._whole: dict[Any, Callable[..., Sequence[Any]]] = {}  # by the inputs' metadata

    def __call__(self, *args: Any) -> list[Any]:
        if self._whole and (whole := self._whole.get(_signature(args))) is not None:
            return list(whole(*args))
        outputs = list(self._compiled(*args))
        if torch.is_grad_enabled():
            call = _Call(self, args)
            detached = [outputs[i] for i in self._indices]
            attached = _Attach.apply(call, detached, *call.leaves)
            for i, output in zip(self._indices, attached, strict=True):
                outputs[i] = output
        return outputs

    def run_whole(self, args: Sequence[Any]) -> list[Any]:
        """The detached outputs once more, with gradients."""
        key = _signature(args)
        if key not in self._whole:
            log.info("an output that was returned without a gradient is differentiated through")
            is_known = len(self._whole) < _MOST_COMPILED
            compile_again = self._compile_again if is_known else _op_by_op
            self._whole[key] = compile_again(self._graph, args)
        outputs = self._whole[key](*args)
        return [outputs[i] for i in self._indices]


def _op_by_op(graph: GraphModule, args: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    return graph.forward


def _signature(args: Sequence[Any]) -> tuple[Any, ...]:
    """What a compilation for fixed sizes depends on."""
    return tuple(
        (a.shape, a.stride(), a.dtype, a.device, a.requires_grad) if isinstance(a, Tensor) else a
        for a in args
    )


class _Call:
    """One call of a graph: its inputs, and what tells whether they are still the same."""

    def __init__(self, attached: Attached, args: Sequence[Any]) -> None:
        self.attached = attached
        self.args = args
        self.leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        self.stamps = [stamp_of(a) if isinstance(a, Tensor) else None for a in args]
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        self.autocast = read_autocast(device.type)
        self.was_stepped = False
        _CALLS.add(self)
        _watch_optimizers()

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of `leaves`, from those of the detached outputs (None: of no influence)."""
        now = [stamp_of(a) if isinstance(a, Tensor) else None for a in self.args]
        if self.was_stepped or now != self.stamps:
            raise DeferredOutputError(
                "The gradient of an output that was returned beside the loss (keys and values, "
                "hidden states) is asked for, but an input or a parameter of its graph has been "
                "changed in place since the forward pass. Differentiate before "
                "optimizer.step(), or compile with options={'defer_outputs': False}."
            )
        args = [
            a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in self.args
        ]
        leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        devices = {a.device for a in leaves}
        states = _random_states(devices)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for device_type, enabled, dtype in self.autocast:
                stack.enter_context(
                    torch.autocast(device_type, dtype, enabled, cache_enabled=False)
                )
            outputs = self.attached.run_whole(args)
        if not all(map(torch.equal, states, _random_states(devices))):
            raise DeferredOutputError(
                "The gradient of an output that was returned beside the loss is asked for, and "
                "mst would have to run its graph once more; but the graph draws random numbers. "
                "Compile with options={'defer_outputs': False}."
            )
        given = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        ends, tangents = [o for o, _ in given], [g for _, g in given]
        return list(torch.autograd.grad(ends, leaves, tangents, allow_unused=True))


class _Attach(torch.autograd.Function):
    """Gives tensors that have no history the place in the autograd graph that they would have."""

    @staticmethod
    def forward(ctx: Any, call: _Call, detached: list[Tensor], *leaves: Tensor) -> Any:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(detached)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if all(g is None for g in grads):  # the engine passes by on its way to somewhere else
            return None, None, *(None for _ in ctx.call.leaves)
        return None, None, *ctx.call.gradients(grads)


def _random_states(devices: set[torch.device]) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"]


_CALLS: weakref.WeakSet[_Call] = weakref.WeakSet()
"""Calls whose outputs are still held by somebody."""
_is_watching = False


def _watch_optimizers() -> None:
    """A fused optimizer's step does not show in the version of a parameter."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    calls = list(_CALLS)
    if not calls:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for call in calls:
        call.was_stepped |= not stepped.isdisjoint(map(id, call.leaves))
