"""Ways of training a model, each with what is compiled and what stays eager.

A way gives named tensors: losses, gradients, outputs and buffers, to be compared between runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.func import functional_call

from mstc.inductor import compile_outer_eager
from tests.fuzz.blocks import Batch
from tests.fuzz.case import Case
from tests.fuzz.losses import loss_of
from tests.fuzz.model import Model, as_dtype, make_batch

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
Numbers = dict[str, Tensor]

DTYPES = {"autocast": torch.float32} | {
    str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16)
}
_RATE = 0.05  # of the compiled training step


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _unchunked(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
    return compile_outer_eager(gm, inputs, None)


def _is_dynamic(case: Case) -> bool | None:
    return {"true": True, "false": False}.get(case.dynamic)


def baseline(case: Case) -> Compiler:
    """The same lowering without a pass."""
    return lambda f: torch.compile(f, backend=_unchunked, dynamic=_is_dynamic(case))


def ours(case: Case) -> Compiler:
    options = {
        "lowering": case.lowering,
        "min_peak_bytes": 0,
        "min_region_bytes": case.min_region_bytes,
        "min_deferred_bytes": case.min_region_bytes,
        "gradient_in_forward": case.gradient_in_forward,
        "defer_outputs": case.defer_outputs,
    }
    options |= {"min_chunk_rows": 4} if case.chunk_rows is None else {"chunk_rows": case.chunk_rows}
    return lambda f: torch.compile(f, backend="mst", options=options, dynamic=_is_dynamic(case))


class Run:
    """One model under one compiler."""

    def __init__(
        self, case: Case, model: nn.Module, dtype: torch.dtype, compiler: Compiler
    ) -> None:
        self.case, self.dtype, self.compiler = case, dtype, compiler
        self.model: Model = copy.deepcopy(model).to(DTYPES[case.dtype]).to(dtype)  # type: ignore[assignment]
        self.autocast = case.dtype == "autocast" and dtype is not torch.float64
        self.numbers: Numbers = {}
        self.leaves: dict[str, Tensor] = {}

    def batch(self, *, length: int | None = None, step: int = 0) -> Batch:
        made = make_batch(self.case, length=length, step=step)
        low = DTYPES[self.case.dtype]  # the truth starts from the same rounded numbers
        made = {k: v.to(low) if v.is_floating_point() else v for k, v in made.items()}
        batch = as_dtype(self.case, made, self.dtype)
        for name in ("leaf", "memory"):
            if name in batch:
                self.leaves[f"{name} {step}"] = batch[name]
        batch.pop("leaf", None)
        if self.case.dynamic == "mark":
            for name in ("ids", "x", "labels", "keep", "docs", "order", "features"):
                if name in batch and batch[name].shape[1] > 1:
                    torch._dynamo.maybe_mark_dynamic(batch[name], 1)
        return batch

    @contextmanager
    def cast(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            yield

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        with self.cast():
            return function(*args)

    def record(self, **found: Any) -> None:
        for name, value in found.items():
            if isinstance(value, Tensor):
                self.numbers[name] = (value.detach() + 0).clone()

    def finish(self) -> Numbers:
        """Gradients, input gradients and buffers, beside what was recorded."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                self.numbers[f"grad {name}"] = (
                    torch.zeros_like(parameter) if grad is None else grad.detach().clone()
                )
        for name, leaf in self.leaves.items():
            self.numbers[f"grad {name}"] = (
                torch.zeros_like(leaf).detach() if leaf.grad is None else leaf.grad.clone()
            )
        # gradients of one storage would be clipped and accumulated twice
        grads = [p.grad for p in self.model.parameters() if p.grad is not None and p.numel() > 0]
        storages = {g.untyped_storage().data_ptr() for g in grads}
        self.numbers["gradients on one storage"] = torch.tensor(len(grads) - len(storages))
        for name, buffer in self.model.named_buffers():
            self.numbers[f"buffer {name}"] = buffer.clone()
        return self.numbers


def _plain(run: Run) -> None:
    call = run.compiler(run.model)
    out = run.call(call, run.batch())
    out["loss"].backward()
    run.record(loss=out["loss"])


def _logits_read(run: Run) -> None:
    """The logits are looked at before the backward."""
    call = run.compiler(run.model)
    out = run.call(call, run.batch())
    run.record(loss=out["loss"], logits=out.get("logits"))
    total = out["loss"]
    if "logits" in out:
        total = total + 0.1 * out["logits"].square().mean()
    total.backward()


def _outside(run: Run, *, compiled: bool = False) -> None:
    call = run.compiler(run.model)
    batch = run.batch()

    def loss(out: dict[str, Tensor], batch: Batch) -> Tensor:
        return loss_of(run.case, out, batch) * run.case.loss_scale

    out = run.call(call, {k: v for k, v in batch.items() if k != "labels"})
    value = run.call(run.compiler(loss) if compiled else loss, out, batch)
    value.backward()
    run.record(loss=value)


def _accumulate(run: Run) -> None:
    call = run.compiler(run.model)
    for step in range(3):
        out = run.call(call, run.batch(step=step))
        (out["loss"] / 3).backward()
        run.record(**{f"loss {step}": out["loss"]})


def _two_lengths(run: Run) -> None:
    call = run.compiler(run.model)
    length = run.case.length
    for step, now in enumerate((length, max(length // 2, 2) + 1, length + 4, length)):
        out = run.call(call, run.batch(length=now, step=step))
        out["loss"].backward()
        run.record(**{f"loss {step}": out["loss"]})


def _retain(run: Run) -> None:
    with torch._functorch.config.patch(donated_buffer=False):  # or PyTorch refuses
        out = run.call(run.compiler(run.model), run.batch())
        out["loss"].backward(retain_graph=True)
        (2.0 * out["loss"]).backward()
    run.record(loss=out["loss"])


def _twice(run: Run) -> None:
    """Two calls, one backward."""
    call = run.compiler(run.model)
    first = run.call(call, run.batch(step=0))
    second = run.call(call, run.batch(step=1))
    (first["loss"] * 0.7 + second["loss"] ** 2 * 0.01).backward()
    run.record(loss=first["loss"], second=second["loss"])


def _functional(run: Run) -> None:
    parameters = dict(run.model.named_parameters())
    fixed = dict(run.model.named_buffers())

    def function(given: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return functional_call(run.model, (given, fixed), (batch,))

    out = run.call(run.compiler(function), parameters, run.batch())
    out["loss"].backward()
    run.record(loss=out["loss"])


def _step(run: Run) -> None:
    """Forward, backward and update in one compiled function; what it leaves are the weights."""
    parameters = [p for p in run.model.parameters() if p.requires_grad]

    def step(batch: Batch) -> Tensor:
        out = run.model(batch)
        out["loss"].backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad / parameter.grad.norm().clamp(min=1), alpha=_RATE)
        return out["loss"].detach()

    call = run.compiler(step)
    for index in range(2):
        run.model.zero_grad(set_to_none=True)
        run.record(**{f"loss {index}": run.call(call, run.batch(step=index))})
    for name, parameter in run.model.named_parameters():
        run.record(**{f"weight {name}": parameter})


def _inference(run: Run) -> None:
    call = run.compiler(run.model)
    with torch.no_grad():
        out = run.call(call, run.batch())
    run.record(**out)


def _grad(run: Run) -> None:
    """`torch.autograd.grad` for some of the parameters, with a tangent that is not one."""
    out = run.call(run.compiler(run.model), run.batch())
    wanted = [(n, p) for n, p in run.model.named_parameters() if p.requires_grad][::2]
    tangent = torch.full_like(out["loss"], -0.375)
    found = torch.autograd.grad(out["loss"], [p for _, p in wanted], tangent, allow_unused=True)
    for (name, parameter), gradient in zip(wanted, found):
        run.record(**{f"of {name}": torch.zeros_like(parameter) if gradient is None else gradient})
    run.record(loss=out["loss"])


WAY: dict[str, Callable[[Run], None]] = {
    "plain": _plain,
    "logits_read": _logits_read,
    "outside": _outside,
    "outside_compiled": lambda run: _outside(run, compiled=True),
    "accumulate": _accumulate,
    "two_lengths": _two_lengths,
    "retain": _retain,
    "twice": _twice,
    "functional": _functional,
    "step": _step,
    "inference": _inference,
    "grad": _grad,
}


def run_case(
    case: Case, model: nn.Module, dtype: torch.dtype, compiler: Compiler, *, seed: int = 0
) -> Numbers:
    """What the case's way gives under a compiler."""
    torch._dynamo.reset()
    run = Run(case, model, dtype, compiler)
    torch.manual_seed(seed)
    WAY[case.way](run)
    return run.finish()
