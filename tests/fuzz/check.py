"""Whether a case's numbers are right.

float64     losses, gradients, outputs and buffers are those of the uncompiled model.
less        the error against float64 is at most that of the same lowering without a pass, or of the
            uncompiled model. One excess proves nothing (two roundings of one sum differ), so it is
            looked at again in float64 and with other data.
dropout     its numbers are not eager's. The same seed must give the same bits, and the gradient
            must be the derivative of the loss at a fixed seed: central differences in float64.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mstc.errors import FallbackWarning
from mstc.history import reports
from tests.fuzz.case import Case
from tests.fuzz.losses import loss_of
from tests.fuzz.model import make_model
from tests.fuzz.ways import DTYPES, Compiler, Numbers, Run, baseline, ours, run_case, uncompiled
from tests.models import counting_loops

TIGHT = 1e-9  # relative, in float64
_SLACK = {
    "float32": 2e-6,
    "bfloat16": 1.5e-2,
    "autocast": 1.5e-2,
}  # above 1.1 times the other error
# A gradient smaller than this share of the largest is measured by the largest. A true gradient of 0
# (the bias of keys under a softmax) is rounding alone, which differs between any two compilers; in
# float64 that is far below the largest.
_FLOOR = {"float64": 1e-6}
_FLOOR_OF_OTHERS = 1e-3
_GRADIENTS = ("grad ", "of ")  # how tests/fuzz/ways.py names them
_STEP = 1e-5  # of the central differences
_AGAIN = 5  # further seeds for what is only imprecise
_CHANCE = 1.25  # the median of so few ratios of rounding errors; one rounding more would be 1.4
# layers whose gradient is meant not to be the derivative of the loss
_NOT_A_DERIVATIVE = ("clip", "scale_gradient", "buffer")  # a buffer is made from detached values

WRONG = ("wrong", "imprecise", "crashed", "fell back")


@dataclass(frozen=True)
class Verdict:
    """What became of one case."""

    kind: str  # "right", "skipped", or one of `WRONG`
    detail: str = ""
    loops: int = 0  # that ran
    found: Counter[str] = field(default_factory=Counter)  # modes of loops, rewrites, deferrals


def _distance(left: Tensor, right: Tensor, least: float) -> float:
    """Relative; infinite where one is nan or infinite and the other is not."""
    left, right = left.double(), right.double()
    if left.shape != right.shape:
        return math.inf
    odd = ~torch.isfinite(right)
    if odd.any() or not torch.isfinite(left).all():
        same = torch.isnan(left) == torch.isnan(right)
        same &= ~torch.isinf(right) | (left == right)
        if not same.all() or bool((~torch.isfinite(left) & ~odd).any()):
            return math.inf
        left, right = left.masked_fill(odd, 0), right.masked_fill(odd, 0)
    return (left - right).norm().item() / max(right.norm().item(), least)


def errors(numbers: Numbers, truth: Numbers, dtype: str) -> dict[str, float]:
    """Relative distance per tensor of a case in `dtype`."""
    assert numbers.keys() == truth.keys(), numbers.keys() ^ truth.keys()
    gradients = [t for name, t in truth.items() if name.startswith(_GRADIENTS)]
    sizes = [t.double().nan_to_num().norm().item() for t in gradients]
    least = _FLOOR.get(dtype, _FLOOR_OF_OTHERS) * max(sizes, default=1.0) or 1e-12
    return {
        name: _distance(value, truth[name], least if name.startswith(_GRADIENTS) else 1e-12)
        for name, value in numbers.items()
    }


def _worst(found: dict[str, float], limit: dict[str, float]) -> str:
    bad = {n: e for n, e in found.items() if not e <= limit[n]}
    ordered = sorted(bad, key=lambda n: -bad[n])
    return ", ".join(f"{n}: {bad[n]:.1e} > {limit[n]:.1e}" for n in ordered[:4])


def _compare(case: Case) -> str:
    """Empty where the numbers are right."""
    model, dtype = make_model(case), DTYPES[case.dtype]
    truth = run_case(case, model, torch.float64, uncompiled)
    found = errors(run_case(case, model, dtype, ours(case)), truth, case.dtype)
    if case.dtype == "float64":
        bad = _worst(found, dict.fromkeys(found, TIGHT))
        if bad:  # PyTorch may be wrong by itself
            theirs = errors(run_case(case, model, dtype, baseline(case)), truth, case.dtype)
            bad = _worst(found, {n: TIGHT + 1.01 * e for n, e in theirs.items()})
        return bad
    limit = _limits(case, truth, baseline(case))
    if bad := _worst(found, limit):
        other = _limits(case, truth, uncompiled)
        limit = {n: max(limit[n], other[n]) for n in limit}
        bad = _worst(found, limit)
    return bad


def _limits(case: Case, truth: Numbers, compiler: Compiler) -> dict[str, float]:
    theirs = run_case(case, make_model(case), DTYPES[case.dtype], compiler)
    slack = _SLACK[case.dtype]
    return {n: 1.1 * e + slack for n, e in errors(theirs, truth, case.dtype).items()}


def _ratio(case: Case) -> float:
    """Our error over theirs, all gradients together."""
    model, dtype = make_model(case), DTYPES[case.dtype]
    truth = run_case(case, model, torch.float64, uncompiled)
    both = [run_case(case, model, dtype, compiler) for compiler in (ours(case), baseline(case))]
    ours_, theirs = (
        math.sqrt(sum(e * e for e in errors(numbers, truth, case.dtype).values()))
        for numbers in both
    )
    return ours_ / max(theirs, 1e-12)


def _value_at_seed(run: Run, call: Callable[..., Any]) -> Tensor:
    case = run.case
    torch.manual_seed(case.seed + 1)
    batch = run.batch()
    if not case.way.startswith("outside"):
        return run.call(call, batch)["loss"]
    out = run.call(call, {k: v for k, v in batch.items() if k != "labels"})
    return loss_of(case, out, batch) * case.loss_scale


def _check_random(case: Case) -> str:
    """Dropout: repeatable, and the gradient is the derivative."""
    run = Run(case, make_model(case), torch.float64, ours(case))
    torch._dynamo.reset()
    call = run.compiler(run.model)
    start = {n: b.clone() for n, b in run.model.named_buffers()}

    def value() -> Tensor:
        for name, buffer in run.model.named_buffers():
            buffer.copy_(start[name])
        return _value_at_seed(run, call)

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        run.model.zero_grad(set_to_none=True)
        loss = value()
        loss.backward()
        named = run.model.named_parameters()
        return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}

    loss, found = gradients()
    again, found_again = gradients()
    if not torch.equal(loss.nan_to_num(), again.nan_to_num()):
        return f"the same seed gave losses {loss.item()!r} and {again.item()!r}"
    for name, gradient in found.items():
        if not torch.equal(gradient.nan_to_num(), found_again[name].nan_to_num()):
            return f"the same seed gave other bits in the gradient of {name}"
    if not loss.isfinite() or case.loss == "weighted_mean":
        return ""
    if any(layer.extra in _NOT_A_DERIVATIVE for layer in case.layers):
        return ""
    return _check_derivative(run, found, value)


def _check_derivative(run: Run, gradients: dict[str, Tensor], value: Callable[[], Tensor]) -> str:
    parameters = {n: p for n, p in run.model.named_parameters() if n in gradients}
    generator = torch.Generator().manual_seed(run.case.seed)
    for _ in range(2):
        moves: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            move = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            moves[name] = move / move.norm().clamp(min=1e-12)
        ends = []
        for sign in (1.0, -2.0):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.add_(moves[name], alpha=sign * _STEP)
            ends.append(value().item())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(moves[name], alpha=_STEP)
        slope = (ends[0] - ends[1]) / (2 * _STEP)
        terms = [(gradients[n] * moves[n]).sum().item() for n in parameters]
        scale = max(math.sqrt(sum(t * t for t in terms)), 1e-3 * abs(ends[0]), 1e-6)
        if not abs(slope - sum(terms)) <= 1e-4 * scale:
            return f"the gradient says {sum(terms):.8g}, the loss {slope:.8g} along a direction"
    return ""


def _seen(before: int) -> tuple[Counter[str], list[str]]:
    found: Counter[str] = Counter()
    fallbacks: list[str] = []
    for report in reports()[before:]:
        found["deferred"] += len(report.deferred)
        fallbacks += [n for n in report.notes if "as it was" in n]
        for graph in report.graphs:
            for rewrite in graph.rewrites:
                found["one row" if "one row" in rewrite.reason else "causal masks dropped"] += 1
            for loop in graph.loops:
                found[loop.mode] += loop.count
                found["seed " + loop.seed] += loop.count
    return +found, fallbacks


def check(case: Case) -> Verdict:
    """Run a case, and its reference, and judge."""
    with counting_loops() as ran, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FallbackWarning)
        before = len(reports())
        try:
            bad = _check_random(case) if case.is_random else _compare(case)
        except Exception as error:
            return _crashed(case, error, len(ran))
        found, fallbacks = _seen(before)
        if fallbacks:
            return Verdict("fell back", fallbacks[0], len(ran), found)
        if not bad:
            return Verdict("right", "", len(ran), found)
        if case.is_random or case.dtype == "float64":
            return Verdict("wrong", bad, len(ran), found)
        return _imprecise(case, bad, len(ran), found)


def _imprecise(case: Case, bad: str, loops: int, found: Counter[str]) -> Verdict:
    exact = dataclasses.replace(case, dtype="float64")
    if wrong := _compare(exact):
        return Verdict("wrong", f"in float64 too: {wrong}", loops, found)
    seeds = [case.seed + 100_000 * (i + 1) for i in range(_AGAIN)]
    ratios = [_ratio(dataclasses.replace(case, seed=s)) for s in seeds]
    if statistics.median(ratios) <= _CHANCE:
        return Verdict("right", f"by chance: {bad}", loops, found)
    said = ", ".join(f"{r:.2f}" for r in ratios)
    return Verdict("imprecise", f"{bad}; with other data, {said} times their error", loops, found)


def _crashed(case: Case, error: Exception, loops: int) -> Verdict:
    said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    try:
        plain = dataclasses.replace(case, seed=case.seed)
        run_case(plain, make_model(plain), DTYPES[case.dtype], baseline(case))
    except Exception as other:
        return Verdict("skipped", f"without mstc too: {type(other).__name__}; {said}", loops)
    return Verdict("crashed", said, loops)
