"""What a user may ask for: one frozen dataclass, built from ``torch.compile(options=...,
mode=...)``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mstc.errors import OptionError
from mstc.inductor import inductor_option_type, known_inductor_options, mode_options
from mstc.plans import loops_of, read_plan
from mstc.quantity import parse_bytes
from passes.records import FixedLoop, LoopAxes

_OVER_BUDGET = ("raise", "warn")
_LOWERINGS = ("inductor", "eager")


def _wrong_lowering(value: object) -> str:
    return f'options["lowering"] is {value!r}; it must be "inductor" or "eager".'


@dataclass(frozen=True)
class Setting:
    """How much memory is given for time; chosen by `mstc.budget`."""

    tightness: float | None = None
    """0: no loops, 1: the smallest chunks; None: as the planner thinks best (`passes.plan`)."""

    least_divisor: int = 1
    """Of the rows of the smallest chunks."""

    activation_budget: float = 1.0
    """AOTAutograd's `activation_memory_budget`."""

    offload: bool = False
    """What is saved for the backward waits in the host's memory (`passes.offload`)."""

    loop_axes: LoopAxes | None = None
    """Axes that loops run along, for comparisons (`benchmarks.axes`); None: as was measured to be
    best on the device."""

    def __str__(self) -> str:
        if self.tightness is None:
            return "planned without it"
        parts = ["chunks as large as may be" if self.tightness < 1 else "the smallest chunks"]
        if not self.tightness:
            parts = ["no loops needed"]
        if self.least_divisor > 1:
            parts = [f"chunks {self.least_divisor} times smaller than is fast"]
        if self.activation_budget < 1:
            parts.append(f"activation_memory_budget={self.activation_budget}")
        if self.offload:
            parts.append("what is saved goes to the host")
        return ", ".join(parts)


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="mst", options={...})``; Inductor's own options may
    stand beside them."""

    lowering: str = "inductor"
    """"inductor" compiles the graph and the loop bodies (Triton on a GPU, C++ on a CPU); "eager"
    runs them op by op, for debugging and fast tests. ("emit" is what `mstc.simulate` sets:
    Inductor's code without its kernels, which computes nothing.)"""

    chunk_rows: int | None = None
    """Rows (tokens of all sequences) per chunk; None lets the planner choose."""

    min_chunk_rows: int | None = None
    """Rows per chunk below which the planner does not go, because matrix units would idle; None
    takes the device's default (256 on a CPU, 2048 on a GPU), and on a CPU in float32 goes down to
    128 where a chunk would be most of the memory."""

    min_peak_bytes: int = 16 * 2**20
    """Predicted peak, in bytes, below which a graph is left untouched."""

    min_region_bytes: int = 2**20
    """Bytes of the smallest value that may seed a region."""

    gradient_in_forward: bool = True
    """Make a loss head's gradients in the forward loop where that is proven right; False recomputes
    always."""

    defer_outputs: bool = True
    """Take outputs that only a curious caller reads (logits beside the loss) out of the graph; they
    are computed when somebody looks. Make no gradients for outputs that hardly anybody
    differentiates through (keys and values beside the loss) until somebody does."""

    min_deferred_bytes: int = 2**20
    """Bytes of the smallest output that is deferred, or returned without a gradient."""

    memory_budget: int | float | None = None
    """The most that a step of a graph may take above weights, optimizer state and batch, gradients
    included: bytes (an int, or text as "24GiB"), a share of the device's memory (0.5 or "50%");
    None ("auto") lets the planner weigh memory against time. See `mstc.budget`."""

    over_budget: str = "raise"
    """What to do where that is impossible: "raise" a `BudgetError`, or "warn" and go on."""

    plan: str | None = None
    """A file that `Report.save_plan` wrote: its loops are made, and none is planned. Here, what is
    in it, as text: a plan is part of what names a compiled graph."""

    setting: Setting = Setting()
    """Not for users: what `mstc.budget` chose."""

    inductor: Mapping[str, object] = field(default_factory=dict)
    """Options that were Inductor's; filled from ``options=`` and ``mode=``."""

    @property
    def fixed_loops(self) -> tuple[FixedLoop, ...] | None:
        """The loops of the plan, if there is one."""
        return None if self.plan is None else loops_of(json.loads(self.plan), "")

    def body_config(self) -> dict[str, object]:
        """Inductor's options for loop bodies: not the user's graph passes, which are for the whole
        graph, and no CUDA graph of a body's own, since a body may run while one of the whole graph
        is recorded."""
        plain: dict[str, object] = {
            k: v for k, v in self.inductor.items() if isinstance(v, (bool, int, float, str))
        }
        return plain | ({"triton.cudagraphs": False} if "triton.cudagraphs" in plain else {})

    def __post_init__(self) -> None:
        if self.lowering not in (*_LOWERINGS, "emit"):
            raise OptionError(_wrong_lowering(self.lowering))
        if self.over_budget not in _OVER_BUDGET:
            raise OptionError(
                f'options["over_budget"] is {self.over_budget!r}; it must be "raise" or "warn".'
            )
        if self.memory_budget is not None and self.plan is not None:
            raise OptionError(
                'options: "memory_budget" plans, and "plan" is one; give one of them.'
            )
        for name in ("chunk_rows", "min_chunk_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f'options["{name}"] is {value}; it must be at least 1.')
        for name in ("min_peak_bytes", "min_region_bytes", "min_deferred_bytes"):
            if getattr(self, name) < 0:
                raise OptionError(
                    f'options["{name}"] is {getattr(self, name)}; it must not be negative.'
                )


_TYPES: dict[str, tuple[type, ...]] = {
    "lowering": (str,),
    "chunk_rows": (int, type(None)),
    "min_chunk_rows": (int, type(None)),
    "min_peak_bytes": (int,),
    "min_region_bytes": (int,),
    "gradient_in_forward": (bool,),
    "defer_outputs": (bool,),
    "min_deferred_bytes": (int,),
    "memory_budget": (int, float, str, type(None)),
    "over_budget": (str,),
    "plan": (str, os.PathLike, type(None)),
}


_TAKEN = {
    "joint_custom_pre_pass": "use joint_custom_post_pass, or call your pass in your own backend."
}


def _budget(value: float | str | None) -> int | float | None:
    """Bytes (int), a share of the device (float), or None for "auto".

    Raises:
        OptionError: not one of these.
    """
    wrong = OptionError(
        f'options["memory_budget"] is {value!r}; say "auto", bytes (an int, or "24GiB"), or a '
        'share of the device\'s memory (0.5 or "50%").'
    )
    if value is None or value == "auto":
        return None
    if isinstance(value, str):
        number = value.strip()
        try:
            if not number.endswith("%"):
                return parse_bytes(number)
            value = float(number[:-1]) / 100
        except ValueError:
            raise wrong from None
    if not (0 < value <= 1 if isinstance(value, float) else value > 0):
        raise wrong
    return value


def parse_options(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Validate what the user gave.

    Args:
        options: the ``options=`` dict; our keys, or Inductor's.
        mode: the ``mode=`` string, Inductor's meaning.

    Raises:
        OptionError: an unknown key, a wrong type, an impossible value, an unknown mode (the message
            names the known ones), or a plan that cannot be read.
    """
    own: dict[str, Any] = {}
    inductor: dict[str, object] = {}
    if mode is not None and mode != "default":
        try:
            inductor.update(mode_options(mode))
        except RuntimeError as error:
            raise OptionError(f"mode={mode!r}: {error}") from None
    known_inductor = known_inductor_options()
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options is {options!r}; it must be a dict.")
    for key, value in (options or {}).items():
        if key in _TYPES:
            allowed = _TYPES[key]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
                raise OptionError(f'options["{key}"] is {value!r}; it must be of type {names}.')
            if key == "lowering" and value not in _LOWERINGS:
                raise OptionError(_wrong_lowering(value))
            if key == "plan" and value is not None:
                value = json.dumps([dataclasses.asdict(f) for f in read_plan(str(value))])
            if key == "memory_budget":
                value = _budget(value)
            own[key] = value
        elif (name := str(key).replace("-", "_")) in known_inductor:
            wanted = inductor_option_type(name)
            if not isinstance(value, wanted):
                raise OptionError(
                    f'options["{key}"] is {value!r}; '
                    f"Inductor wants it to be of type {wanted.__name__}."
                )
            if name in _TAKEN:
                raise OptionError(
                    f'options["{key}"] is what backend="mst" itself uses; {_TAKEN[name]}'
                )
            inductor[name] = value
        else:
            near = difflib.get_close_matches(str(key), [*_TYPES, *known_inductor], n=3)
            guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise OptionError(
                f'unknown option {key!r} of backend="mst".{guess} '
                f"Known options: {', '.join(_TYPES)}; "
                "and every option of Inductor (torch._inductor.list_options())."
            )
    return Options(**own, inductor=inductor)


assert set(_TYPES) == {f.name for f in dataclasses.fields(Options)} - {"inductor", "setting"}
