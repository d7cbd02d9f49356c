"""Random attention masks from comparisons of positions and from data, for the passes that know
causal ones and those that are the same for every query.

python -m tests.fuzz.masks --cases 2000 --seed 0
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from passes.causal import drop_causal_masks
from passes.padding import keep_one_row

LENGTH = 7


@dataclass(frozen=True)
class Mask:
    """A recipe: what `make` gives, and how it reads."""

    make: Callable[[], Tensor]
    text: str


def _positions(rng: random.Random) -> Mask:
    shift, times = rng.choice((0,) * 8 + (1, -1, 3)), rng.choice((1,) * 8 + (2, -1))
    kind = rng.choice(("range", "range", "range", "from", "first", "single", "tail", "step"))
    makers: dict[str, Callable[[], Tensor]] = {
        "range": lambda: torch.arange(LENGTH),
        "from": lambda: torch.arange(2, LENGTH + 2),
        "first": lambda: torch.arange(LENGTH)[:1],
        "single": lambda: torch.arange(1),
        "tail": lambda: torch.arange(LENGTH + 2)[2:],
        "step": lambda: torch.arange(0, 2 * LENGTH, 2),
    }
    make, small = makers[kind], rng.random() < 0.2

    def made() -> Tensor:
        at = make() * times + shift
        return at.to(torch.int32) if small else at

    return Mask(made, f"{kind}*{times}{shift:+d}")


def _square(make: Callable[[], Tensor]) -> Tensor:
    """Stretched to queries x keys."""
    return make().expand(LENGTH, LENGTH)


def _comparison(rng: random.Random) -> Mask:
    name = rng.choice(("le", "lt", "ge", "gt"))
    rows, columns = _positions(rng), _positions(rng)
    turned, bare = rng.random() < 0.3, rng.random() < 0.5

    def made() -> Tensor:
        a, b = rows.make()[:, None], columns.make()
        b = b if bare else b[None, :]
        if turned:
            return getattr(torch, name)(b, a)
        return getattr(torch, name)(a, b)

    order = f"{columns.text}, {rows.text}" if turned else f"{rows.text}, {columns.text}"
    return Mask(made, f"{name}({order}{', bare' * bare})")


def _against_number(rng: random.Random) -> Mask:
    name, number = rng.choice(("le", "lt", "ge", "gt")), rng.choice((-1, 0, 3, LENGTH))
    one, across = _positions(rng), rng.random() < 0.5

    def made() -> Tensor:
        at = one.make()
        return getattr(torch, name)(at[None, :] if across else at[:, None], number)

    return Mask(made, f"{name}({one.text}, {number}, {'keys' if across else 'queries'})")


def _data(rng: random.Random) -> Mask:
    """Padding, mostly by key: numbers of which no pass knows how they come about."""
    along, times = rng.choice(("keys", "keys", "keys", "queries", "both")), rng.randrange(1, 1000)
    shape = {"keys": (LENGTH,), "queries": (LENGTH, 1), "both": (LENGTH, LENGTH)}[along]

    def made() -> Tensor:
        numbers = (torch.arange(math.prod(shape)) + 1) * times
        return (numbers.remainder(11) < 8).reshape(shape)

    return Mask(made, f"data({along}, {times})")


def _triangle(rng: random.Random) -> Mask:
    name, diagonal = rng.choice(("tril", "triu")), rng.choice((0, 0, 1, -1, 3))
    inverted = rng.random() < 0.4

    def made() -> Tensor:
        ones = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        kept = getattr(torch, name)(ones, diagonal=diagonal)
        return ~kept if inverted else kept

    return Mask(made, f"{'~' * inverted}{name}({diagonal})")


def _bool_mask(rng: random.Random, depth: int = 2) -> Mask:
    kinds = ["compare", "compare", "compare", "number", "triangle", "data", "data"]
    kind = rng.choice(
        [*kinds, "and", "or", "not", "where", "transpose", "fill"] if depth else kinds
    )
    if kind == "compare":
        return _comparison(rng)
    if kind == "number":
        return _against_number(rng)
    if kind == "triangle":
        return _triangle(rng)
    if kind == "data":
        return _data(rng)
    a = _bool_mask(rng, depth - 1)
    if kind == "not":
        return Mask(lambda: ~a.make(), f"~{a.text}")
    if kind == "transpose":
        return Mask(lambda: _square(a.make).transpose(0, 1), f"transposed({a.text})")
    b = _bool_mask(rng, depth - 1)
    if kind == "and":
        return Mask(lambda: a.make() & b.make(), f"({a.text} & {b.text})")
    if kind == "or":
        return Mask(lambda: a.make() | b.make(), f"({a.text} | {b.text})")
    value = rng.random() < 0.5
    if kind == "fill":
        return Mask(
            lambda: _square(a.make).masked_fill(b.make(), value),
            f"fill({a.text}, {b.text}, {value})",
        )
    c = _bool_mask(rng, 0)
    return Mask(
        lambda: torch.where(a.make(), b.make(), c.make()), f"where({a.text}, {b.text}, {c.text})"
    )


def draw_mask(rng: random.Random) -> Mask:
    """A mask for queries x keys: bool, or floats that are added."""
    seen = _bool_mask(rng, rng.choice((0, 0, 1, 2)))
    shape = rng.choice(((LENGTH, LENGTH), (1, 1, LENGTH, LENGTH), (2, 3, LENGTH, LENGTH)))
    kind = rng.choice(("bool", "bool", "bool", "where", "fill", "upside_down"))
    low = rng.choice((float("-inf"), float("-inf"), torch.finfo(torch.float32).min, -1e4))

    def made() -> Tensor:
        mask = _square(seen.make)
        if kind == "where":
            mask = torch.where(mask, 0.0, low)
        elif kind == "upside_down":
            mask = torch.where(mask, low, 0.0)
        elif kind == "fill":
            mask = torch.zeros(LENGTH, LENGTH).masked_fill(~mask, low)
        return mask.expand(shape)

    return Mask(made, f"{kind} {low} {shape}: {seen.text}")


def rewritten(mask: Mask) -> tuple[str, bool]:
    """What the passes say of an attention call with this mask, nothing if they left it, and whether
    they were right to change it."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.make())

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, LENGTH, 4, generator=generator) for _ in range(3)]
    traced = make_fx(attend, select_decomp_table(), tracing_mode="fake")(*inputs)
    graph, rewrites = drop_causal_masks(traced.graph, min_bytes=0)
    if not rewrites:
        graph, rewrites = keep_one_row(graph, min_bytes=0)
    if not rewrites:
        return "", True
    ours = torch.fx.GraphModule(traced, graph)(*inputs)
    right = torch.allclose(ours, attend(*inputs), atol=1e-5, equal_nan=True)
    return rewrites[0].reason, right


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.masks")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    changed: Counter[str] = Counter()
    wrong = 0
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        mask = draw_mask(random.Random(seed))
        did, right = rewritten(mask)
        changed[did or "left"] += 1
        if not right:
            wrong += 1
            print(f"wrong seed {seed}: {mask.text}", flush=True)
    for what, count in changed.most_common():
        print(f"{count:6} {what}")
    print(f"{wrong:6} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
