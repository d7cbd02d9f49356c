"""Whether dropout inside loops drops what it should: as often as asked for, every place, and no two
places, layers or calls alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.case import Case
from tests.fuzz.ways import ours
from tests.models import counting_loops

ROWS, COLUMNS = 60, 64
_SIGMAS = 5.0


@dataclass(frozen=True)
class Rates:
    """Shares of all places, from one call."""

    loops: int  # that ran
    dropped: float  # by the first dropout
    dropped_again: float  # by the second
    both: float  # by both: the product, if they know nothing of each other
    next_row: float  # a place and the one a row below
    next_column: float  # a place and the one to its right
    next_call: float  # a place, in this call and the next


def measure(rate: float, *, chunk_rows: int, seed: int) -> Rates:
    """Two dropouts of equal shape between two matrix products, chunked along the rows."""

    def function(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = x @ up
        first = F.dropout(inner, rate)
        second = F.dropout(inner.sin(), rate)
        return ((first + second) @ down).square().sum(), first == 0, second == 0

    generator = torch.Generator().manual_seed(seed)
    x, up, down = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((ROWS, 8), (8, COLUMNS), (COLUMNS, 8))
    )
    torch._dynamo.reset()
    with counting_loops() as ran:
        call = ours(Case(chunk_rows=chunk_rows, min_region_bytes=64))(function)
        torch.manual_seed(seed)
        first, again = call(x, up, down), call(x, up, down)
    one, two = first[1].double(), first[2].double()
    return Rates(
        loops=len(ran),
        dropped=one.mean().item(),
        dropped_again=two.mean().item(),
        both=(one * two).mean().item(),
        next_row=(one[1:] * one[:-1]).mean().item(),
        next_column=(one[:, 1:] * one[:, :-1]).mean().item(),
        next_call=(one * again[1].double()).mean().item(),
    )


def surprises(rates: Rates, rate: float) -> list[str]:
    """The shares that chance does not explain."""
    places = ROWS * COLUMNS

    def odd(share: float, expected: float) -> bool:
        # neighbouring pairs overlap, which at most doubles the variance
        return abs(share - expected) > _SIGMAS * math.sqrt(3 * expected * (1 - expected) / places)

    singles = {"dropped": rates.dropped, "dropped_again": rates.dropped_again}
    pairs = {
        "both": rates.both,
        "next_row": rates.next_row,
        "next_column": rates.next_column,
        "next_call": rates.next_call,
    }
    found = [f"{n}: {s}" for n, s in singles.items() if odd(s, rate)]
    return found + [f"{n}: {s}" for n, s in pairs.items() if odd(s, rate * rate)]
