"""docs/axes.md, from the results of `benchmarks.axes`."""

from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks import measure
from benchmarks.table import table

PAGE = measure.ROOT / "docs" / "axes.md"
_BASE = "inductor"
_OURS = ("tokens", "weights", "weights, small")
_TITLES = {
    "gated": "gated MLP",
    "plain": "plain MLP",
    "attention": "attention written out",
    "fused attention": "attention, fused",
    "vocabulary": "vocabulary head",
    "llama": "Llama, whole, head included",
    "experts": "Qwen3-MoE's experts",
    "split experts": "experts, three products apart",
}


def write(results: dict[str, Any]) -> None:
    PAGE.write_text(page(results))


def page(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    threads = results["threads"]
    where = (
        f"{results['device']}, {threads} thread{'' if threads == 1 else 's'}; {versions}; "
        f"{results['date']}"
    )
    records = results["records"].values()
    note = f"; {results['note']}" if "note" in results else ""
    return _PAGE.format(where=where + note, costs=_costs(records), errors=_errors(records))


def _size(case: dict[str, Any]) -> list[str]:
    sizes = f"{case['tokens']:,} x {case['hidden']:,} x {case['wide']:,}"
    return [
        _TITLES[case["kind"]],
        sizes,
        case["dtype"].replace("bfloat", "bf").replace("float", "fp"),
    ]


def _costs(records: Iterable[dict[str, Any]]) -> str:
    lines: list[list[str]] = []
    for record in records:
        found = record["contenders"]
        base = found[_BASE]
        cells = [
            f"{base['peak_intermediate_nbytes'] / 2**20:,.0f} / {base['peak_nbytes'] / 2**20:,.0f}"
        ]
        cells += [_cell(found[name], base) for name in _OURS]
        cells += [_chosen(record)]
        lines.append([*_size(record["case"]), *cells])
    header = ("what", "size", "", "Inductor MiB", "tokens", "weights")
    return table((*header, "weights, smallest chunks", "by itself"), lines)


def _cell(one: dict[str, Any], base: dict[str, Any]) -> str:
    """Loops, and intermediate peak, peak and time relative to Inductor's."""
    if not one["loops"]:
        return "no loop"
    peaks = (one[k] / base[k] for k in ("peak_intermediate_nbytes", "peak_nbytes"))
    time = median(one["rounds_s"]) / median(base["rounds_s"])
    return f"{', '.join(_axes(one['loops']))}: {' / '.join(f'{x:.2f}' for x in (*peaks, time))}"


def _errors(records: Iterable[dict[str, Any]]) -> str:
    lines: list[list[str]] = []
    for record in records:
        found = record["contenders"]
        if any(found[name]["loops"] for name in _OURS):
            cells = [f"{found[name]['worst']:.1e}" for name in (_BASE, *_OURS)]
            lines.append([*_size(record["case"]), *cells])
    header = ("what", "size", "", "Inductor", "tokens", "weights")
    return table((*header, "weights, smallest chunks"), lines)


def _chosen(record: dict[str, Any]) -> str:
    """Which of the axes mst takes by itself."""
    planned = _axes(record["planned"])
    if not planned:
        return "no loop"
    taken = [name for name in _OURS[:2] if _axes(record["contenders"][name]["loops"]) == planned]
    return taken[0] if taken else ", ".join(planned)


def _axes(loops: list[dict[str, Any]]) -> list[str]:
    return sorted({f"{n['axis_length']:,} by {n['chunk']:,}" for n in loops})


_PAGE = """\
# Which axis a loop runs along

The same step with loops along tokens, and with loops along an axis of the weights: hidden features
of an MLP or of experts, heads of attention. Along features every chunk reads all tokens and some
rows of the weights: the output is a sum over the chunks (in float32 for low precision), and so is
the gradient of the input, while each chunk writes its own rows of the weights' gradients. Along
tokens it is the other way round.

Two blocks on a residual stream, and a loss; `python -m benchmarks.axes`. {where}.

{costs}

A cell: length of the loop axis by positions of a chunk; then peak without gradients, peak with
gradients, and time, all relative to Inductor's. Sizes of MLPs and experts are tokens x hidden
features x intermediate features, of attention tokens x hidden features x heads, of the vocabulary
head tokens x hidden features x vocabulary. *By itself*: what mst takes without being told.

## What follows

* **Hidden features** take less memory than tokens where a chunk of tokens is a large part of all
  tokens (512 and 1,024 tokens in chunks of 256), or where the weights' gradients would be summed in
  float32 beside their own bfloat16; it costs up to 7 % of the time. With many tokens, tokens take
  less. The planner tries both and asks its estimate of memory (`passes/plan.py`, step 6); it
  changes the axis if the peak without gradients falls by an eighth, as much as the estimate may be
  off by. `tests/mstc/test_chunk_memory.py` holds it against what chunks allocate; what oneDNN takes
  inside a product in bfloat16 is not in it.
* No loop is made along features where none would be made along tokens. With few tokens the
  gradients of the weights are the peak, and Inductor's peak with gradients is the lowest there is;
  a loop pays its recomputation for values that hardly count.
* Only on CPUs: on GPUs nothing of this has been measured.
* **Heads** of attention written out take more memory than chunks of queries: one head is the
  smallest chunk. Fused attention makes nothing wide: there is no loop along either.
* **The vocabulary** is refused: "aten.amax mixes positions of the loop axis". A softmax needs the
  sum over all of it; an online softmax is another formula, not another order of the same one. What
  is left is tokens.
* A bias in one op with the second product (`addmm`) closes the features: it would be added once per
  chunk. The forward then makes the wide value whole, for a moment; the backward loop remains.
* Experts want chunks of many tokens: every chunk adds to the gradients of all of them. So rows are
  counted for each expert.
* **Features of experts** can be split where gate and up are products of their own. Where they are
  one product that is cut in halves (transformers), the halves' features are no axis of the weight:
  a rule is missing by which a slice refines an axis.
* **Experts** themselves cannot be split: the rows of a group lie where only run time knows ("aten.
  _grouped_mm mixes positions of the loop axis"). Missing are an axis of groups of unknown lengths,
  and a loop whose slices depend on values. By bytes it could win: of 4,096 tokens with 8 experts of
  256 x 512 a chunk of one expert has 1,024 rows if the router is even, against 512 of a chunk of
  256 tokens: 1 MiB against 0.5 for every wide value in bfloat16, about six of which are alive. But
  along tokens the gradients of all experts are summed in float32, 12 MiB a layer beside their own
  6, and along experts each is written once. If all tokens go to one expert, nothing is saved.

## Errors

The worst parameter's gradient, relative to float64 (`floored_error` in benchmarks/accuracy.py).

{errors}
"""
