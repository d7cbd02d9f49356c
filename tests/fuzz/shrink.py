"""Makes a failing case small: fields go back to their defaults while it fails the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from tests.fuzz.case import Case, Layer


def _simpler(case: Case) -> Iterator[Case]:
    for index in range(len(case.layers)):
        rest = case.layers[:index] + case.layers[index + 1 :]
        yield dataclasses.replace(case, layers=rest, shared=case.shared and bool(rest))
    for field in dataclasses.fields(Case):
        if field.name not in ("layers", "seed") and getattr(case, field.name) != field.default:
            yield dataclasses.replace(case, **{field.name: field.default})
    for index, layer in enumerate(case.layers):
        for field in dataclasses.fields(Layer):
            if getattr(layer, field.name) != field.default:
                simple = dataclasses.replace(layer, **{field.name: field.default})
                layers = (*case.layers[:index], simple, *case.layers[index + 1 :])
                yield dataclasses.replace(case, layers=layers)


def shrink(case: Case, fails: Callable[[Case], bool], *, trials: int = 60) -> Case:
    """The smallest case found that still fails, after at most `trials` runs."""
    tried: set[Case] = set()
    left = trials
    progress = True
    while progress and left > 0:
        progress = False
        for smaller in _simpler(case):
            if smaller in tried or left <= 0:
                continue
            tried.add(smaller)
            left -= 1
            if fails(smaller):
                case, progress = smaller, True
                break
    return case
