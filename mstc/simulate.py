"""The memory of a training step, exactly, without running it.

    trace = mstc.simulate_step(model, input_ids=ids, labels=ids)
    print(trace.peak_nbytes / 2**30, "GiB")

Terms
    fake tensor      shape, strides, dtype and device, and no data (`FakeTensorMode` of PyTorch).
    emitted code     what Inductor makes of a graph, without its kernels (`mstc.emission`).

Algorithm
    1. The model's parameters and the batch become fake tensors.
    2. The step is compiled as `torch.compile` does: Dynamo, AOTAutograd, our passes, partitioner,
       Inductor; the kernels alone are not built.
    3. It runs once more, on fake tensors: AOTAutograd's wrappers, the emitted code, loops, deferred
       outputs and autograd's engine are what a real step has. A dispatch mode sees every storage
       that is made, and hears when it dies (`mstc.watch`).
    4. What an op takes while it runs (copies inside a product, workspaces of attention) counts at
       that instant: the few ops that do are run once on this machine (`mstc.scratch`).
    5. The sum over these events is the timeline, summed up as a measured one is
       (`mstc.runtime.memory`), with the times at which loops run and the backward begins.

What it cannot see: what kernels take while they run on anything but the CPU of this machine
(workspaces of cuBLAS); rounding by an allocator; fragmentation. Where the model reads a value
(``.item()``, a mixture of experts in float32), there is none: an error.

Source: the idea of running emitted code on fake tensors is that of
`torch._subclasses.fake_utils` and `torch.distributed._tools.mem_tracker`, which do it for eager
code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from mstc.driver import compile_graph
from mstc.errors import SimulationError
from mstc.explain import as_fake, on_fakes, plain
from mstc.inductor import compile_outer, forgotten_frames
from mstc.options import parse_options
from mstc.runtime.loop import counters
from mstc.watch import SimulatedTrace, Watch

Backend = Literal["mst", "inductor", "eager"]


def simulate_step(
    model: nn.Module,
    *args: Any,
    loss: Callable[[Any], Tensor] | None = None,
    backend: Backend = "mst",
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> SimulatedTrace:
    """Trace the memory of ``loss(model(*args, **kwargs)).backward()``, compiled, on fake tensors.

    Autocast, and what else is set around the call, counts. A model made on the "meta" device counts
    as one on the CPU.

    Args:
        model: a module, compiled or not; whether it trains, and checkpoints, is its own setting.
        args, kwargs: a batch; real tensors, or fake ones.
        loss: of the model's output; by default ``output.loss``, the output itself if it is one
            number, or its first element if that is.
        backend: who compiles; "eager" compiles nothing.
        options: as for ``torch.compile``.

    Returns:
        as `mstc.measure_peak` of a real step, and what stood at the peak.

    Raises:
        SimulationError: the model reads a value, which only a real run has; or it has no loss.
    """
    model = cast("nn.Module", plain(model))
    with Simulation(model, (args, kwargs)) as simulation:
        compiled = simulation.compile(model, backend, options)
        fake_args, fake_kwargs = simulation.batch

        def step() -> None:
            (loss or loss_of)(compiled(*fake_args, **fake_kwargs)).backward()

        return simulation.trace(step)


def loss_of(output: Any) -> Tensor:
    """The loss that a model returned.

    Raises:
        SimulationError: there is none.
    """
    found: Any = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if found is None:
        found = output
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise SimulationError(
            f"the model returned no loss ({type(output).__name__}): pass labels with the batch, or "
            "loss=, a function of the model's output."
        )
    return found


class Simulation:
    """A model and a batch as fake tensors, for steps of any form; a context manager.

    Simulations that are entered at the same time need one mode, `FakeTensorMode`, in common.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        mode: FakeTensorMode | None = None,
        *,
        scratch: bool = True,
    ) -> None:
        """Args:
        scratch: whether what ops take while they run counts: this machine's CPU is meant.
        """
        self.model = model
        self._scratch = scratch
        self._mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.batch: Any = tree_map_only(Tensor, lambda t: as_fake(t, self._mode), batch)
        self._context = self._entered()

    def __enter__(self) -> Simulation:
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        apart = torch._dynamo.config.patch(recompile_limit=1 << 16)
        with forgotten_frames(), apart, on_fakes(self.model, self._mode), self._mode:
            yield

    def fake(self, make_batch: Callable[[], Any]) -> Any:
        """Another batch in the place of the first, made of tensors on any device, as fake ones."""
        with _disable_current_modes():
            batch = make_batch()
        self.batch = tree_map_only(Tensor, lambda t: as_fake(t, self._mode), batch)
        return self.batch

    def compile(
        self,
        model: Callable[..., Any],
        backend: Backend,
        options: dict[str, Any] | None = None,
        *,
        dynamic: bool | None = False,
    ) -> Callable[..., Any]:
        """`model`, or a part of it, as the backend would compile it, for fake tensors.

        Args:
            model, backend, options: as for `simulate_step`.
            dynamic: as for ``torch.compile``.

        Raises:
            OptionError: as for ``torch.compile``.
            SimulationError: the options ask Inductor for C++ in the place of Python.
        """
        if backend == "eager":
            return model
        parsed = dataclasses.replace(parse_options(options, None), lowering="emit")
        if parsed.inductor.get("cpp_wrapper"):
            raise SimulationError('options["cpp_wrapper"]: there is no Python to be simulated.')

        def compiler(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            if backend == "mst":
                return compile_graph(gm, inputs, parsed)
            return compile_outer(gm, inputs, None, parsed.inductor, build=False)

        return torch.compile(model, backend=compiler, dynamic=dynamic)

    def trace(self, step: Callable[[], object]) -> SimulatedTrace:
        """Watch a step that leaves gradients, again and again until nothing is compiled meanwhile:
        graphs in the first run, bodies of loops whose sizes are left open with other sizes.

        Raises:
            SimulationError: as for `simulate_step`.
        """
        try:
            watch = self._watched(step)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise SimulationError(
                f"the model reads a value ({error.func}), which only a real run has."
            ) from error
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return watch.summary(gradients)

    def _watched(self, step: Callable[[], object]) -> Watch:
        while True:
            self._without_gradients()
            before = _compilations()
            watch = Watch(self._own(), scratch=self._scratch)
            with watch:
                step()
            if _compilations() == before:
                return watch

    def _without_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _own(self) -> list[Tensor]:
        tensors = [*self.model.parameters(), *self.model.buffers(), *tree_leaves(self.batch)]
        return [t for t in tensors if isinstance(t, Tensor)]


def _compilations() -> tuple[int, int]:
    """How many graphs and bodies were compiled so far."""
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return graphs, counters.bodies_compiled
