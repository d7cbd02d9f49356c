"""Values that are known by the coordinates of their positions: integers that grow by a step along
each dim, and what is compared with them.

Terms
    linear form  an integer that is a sum of multiples of the coordinates of its position, and a
                 constant: ``arange`` and what is added to, subtracted from or multiplied with it.
    condition    a conjunction of inequalities ``linear form >= 0``: what comparing linear forms
                 gives.
    choice       one constant where a condition holds, another one elsewhere.

Every function returns None for what is none of the three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Linear:
    """``constant + sum of factor * coordinate``."""

    factors: frozenset[tuple[int, int]]  # (dim, factor), factors not zero
    constant: int

    @staticmethod
    def of(factors: Mapping[int, int], constant: int) -> Linear:
        return Linear(frozenset((d, f) for d, f in factors.items() if f), constant)

    def plus(self, other: Linear, times: int = 1) -> Linear:
        factors = dict(self.factors)
        for dim, factor in other.factors:
            factors[dim] = factors.get(dim, 0) + times * factor
        return Linear.of(factors, self.constant + times * other.constant)

    def scaled(self, by: int) -> Linear:
        return Linear.of({d: f * by for d, f in self.factors}, self.constant * by)


@dataclass(frozen=True)
class Condition:
    """All of these linear forms are at least zero."""

    forms: frozenset[Linear]


@dataclass(frozen=True)
class Choice:
    """`yes` where the condition holds, `no` elsewhere."""

    condition: Condition
    yes: float
    no: float


Value = Linear | Condition | Choice | float  # a float is a constant that is no integer
ALWAYS = Condition(frozenset())
_MOST_POSITIONS = 2**31


def compare(name: str, left: Value | None, right: Value | None) -> Condition | None:
    """``left <= right`` and its like, by the names of aten's ops: le, lt, ge, gt, eq, ne."""
    if not isinstance(left, Linear) or not isinstance(right, Linear):
        return None
    up, down = right.plus(left, -1), left.plus(right, -1)
    form = {
        "le": up,
        "lt": up.plus(Linear.of({}, -1)),
        "ge": down,
        "gt": down.plus(Linear.of({}, -1)),
        "eq": up,
        "ne": up,
    }[name]
    if name == "eq" and up.factors:
        return Condition(condition_of(up).forms | condition_of(down).forms)
    if name in ("eq", "ne"):
        if up.factors:
            return None  # not equal: above or below
        return ALWAYS if (up.constant == 0) == (name == "eq") else false()
    return condition_of(form)


def condition_of(form: Linear) -> Condition:
    """``form >= 0``, in lowest terms: coordinates are whole numbers."""
    divisor = math.gcd(*(f for _, f in form.factors))
    if divisor > 1:
        factors = {d: f // divisor for d, f in form.factors}
        form = Linear.of(factors, form.constant // divisor)
    return Condition(frozenset({form}))


def negated(value: Value | None) -> Condition | None:
    if not isinstance(value, Condition) or len(value.forms) != 1:
        return None  # the opposite of a conjunction is none
    (form,) = value.forms
    return condition_of(form.scaled(-1).plus(Linear.of({}, -1)))


def conjunction(left: Value | None, right: Value | None) -> Condition | None:
    if isinstance(left, Condition) and isinstance(right, Condition):
        return Condition(left.forms | right.forms)
    return None


def _constant(value: Value | None) -> float | None:
    """The number behind a constant."""
    if isinstance(value, float):
        return value
    if isinstance(value, Linear) and not value.factors:
        return float(value.constant)
    return None


def choose(condition: Value | None, yes: Value | None, no: Value | None) -> Value | None:
    """`yes` where the condition holds, `no` elsewhere."""
    if not isinstance(condition, Condition):
        return None
    if no == false() and isinstance(yes, Condition):
        return conjunction(condition, yes)
    if yes == false() and no == ALWAYS:
        return negated(condition)
    a, b = _constant(yes), _constant(no)
    return None if a is None or b is None else Choice(condition, a, b)


def false() -> Condition:
    return Condition(frozenset({Linear.of({}, -1)}))


def number_of(value: object) -> Value | None:
    if isinstance(value, bool):
        return ALWAYS if value else false()
    if isinstance(value, int):
        return Linear.of({}, value)
    return value if isinstance(value, float) else None


def add(left: Value | None, right: Value | None, times: int = 1) -> Value | None:
    if isinstance(left, Linear) and isinstance(right, Linear):
        return left.plus(right, times)
    return None


def multiply(left: Value | None, right: Value | None) -> Value | None:
    if isinstance(left, Condition) and isinstance(right, Condition):
        return conjunction(left, right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Linear) and isinstance(other, Linear) and not other.factors:
            return one.scaled(other.constant)
    return None


def _mapped(value: Value, change: Callable[[Linear], Linear]) -> Value:
    if isinstance(value, Linear):
        return change(value)
    if isinstance(value, Condition):
        return Condition(frozenset(map(change, value.forms)))
    if isinstance(value, Choice):
        condition = Condition(frozenset(map(change, value.condition.forms)))
        return Choice(condition, value.yes, value.no)
    return value


def shifted(value: Value, dim: int, by: int) -> Value:
    """The value as seen from `by` positions further along a dim."""

    def linear(form: Linear) -> Linear:
        factor = dict(form.factors).get(dim, 0)
        return form.plus(Linear.of({}, factor * by))

    return _mapped(value, linear)


def is_constant(value: Value | None) -> bool:
    """Whether a value is the same at all positions."""
    if isinstance(value, Linear):
        return not value.factors
    if isinstance(value, Condition):
        return not any(form.factors for form in value.forms)
    return isinstance(value, float)


def moved(value: Value, place: Callable[[int], int]) -> Value:
    """The same value with its dims at other places; a place below zero is a dim of size one, whose
    coordinate is zero."""

    def linear(form: Linear) -> Linear:
        factors = {place(d): f for d, f in form.factors}
        return Linear.of({d: f for d, f in factors.items() if d >= 0}, form.constant)

    return _mapped(value, linear)


def reads(value: Value, dim: int) -> bool:
    """Whether a value depends on a coordinate."""
    if isinstance(value, Choice):
        value = value.condition
    forms = value.forms if isinstance(value, Condition) else {value}
    return any(isinstance(f, Linear) and dim in dict(f.factors) for f in forms)


def holds_always(form: Linear, sizes: tuple[object, ...]) -> bool:
    """Whether an inequality holds at all coordinates of a tensor."""
    least = form.constant
    for dim, factor in form.factors:
        size = sizes[dim]
        if factor < 0:
            if not isinstance(size, int):
                return False
            least += factor * (size - 1)
    return least >= 0


def is_exact(form: Linear, dtype: torch.dtype, sizes: tuple[object, ...]) -> bool:
    """Whether a dtype holds all values at the coordinates of a tensor: integers wrap, and floats
    round. An open size is taken for any that the index of an int32 allows."""
    least = most = form.constant
    for dim, factor in form.factors:
        size = sizes[dim]
        far = factor * ((size if isinstance(size, int) else _MOST_POSITIONS) - 1)
        least, most = least + min(far, 0), most + max(far, 0)
    if form.factors:
        if dtype not in (torch.int64, torch.int32):
            return False
        bounds = torch.iinfo(dtype)
        return bounds.min <= least and most <= bounds.max
    try:
        return torch.tensor(form.constant, dtype=dtype).item() == form.constant
    except RuntimeError:  # does not fit
        return False
