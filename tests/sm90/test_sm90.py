"""A Llama's step is compiled for sm_90, simulated there and interpreted, with no GPU.

The programs of this package say what is done. Each changes its process for good, so it has one of
its own; and each takes a while, so one test asks one of them, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CHUNK_ROWS = 2048  # the default on a GPU
# units in the last place: two; a quarter (32 values of a norm are rounded with luck or without)
SLACK = {"float32": 2.5e-7, "bfloat16": 2e-3}

pytest.importorskip("transformers")
pytest.importorskip("triton", reason="triton is not installed: pip install -c constraints.txt")

from tests.mstc.test_inplace import BODIES as IN_PLACE  # noqa: E402
from tests.sm90.device import SKIP  # noqa: E402
from tests.sm90.encoder import HIDDEN, TOKENS  # noqa: E402
from tests.sm90.graphs import SIZES as GRAPHS  # noqa: E402
from tests.sm90.llama import LARGE  # noqa: E402
from tests.sm90.offload import BUDGET, SIZES  # noqa: E402


def found_by(program: str, *args: str, **environment: str) -> dict[str, Any]:
    """What one of the package's programs says."""
    path = os.pathsep.join((str(ROOT), *filter(None, (os.environ.get("PYTHONPATH"),))))
    done = subprocess.run(
        [sys.executable, "-m", f"tests.sm90.{program}", *args],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if done.returncode == SKIP:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_lowered() -> None:
    found = found_by("lower")
    by_role: dict[str, list[dict[str, Any]]] = {"forward": [], "backward": [], "body": []}
    for module in found["modules"]:
        by_role[module["role"]].append(module)
    (forward,), (backward,) = by_role["forward"], by_role["backward"]
    _is_chunked(found, forward, backward)
    _counts_are_as_ever(found, forward, backward, by_role["body"])
    for module in found["modules"]:
        _is_tritons(module)
    _writes_in_place(found)


def _writes_in_place(found: dict[str, Any]) -> None:
    """A chunk's logits are one buffer, whose place their gradient takes; a gated MLP has one for
    each of its products. Nothing is of tokens x vocabulary, or tokens x tokens."""
    buffers = sorted((n for module in found["modules"] for n in module["buffers"]), reverse=True)
    logits, wide = CHUNK_ROWS * LARGE.vocabulary, CHUNK_ROWS * LARGE.wide
    assert buffers[0] == logits > buffers[1]
    bodies = [module["buffers"] for module in found["modules"] if module["role"] == "body"]
    assert sorted(body.count(wide) for body in bodies) == [0, 2, 3]
    assert found["in_place"] == {body.__name__: n for body, n in IN_PLACE.items()}


def _is_chunked(found: dict[str, Any], forward: dict[str, Any], backward: dict[str, Any]) -> None:
    """As on a CPU: a loop for the head, and one for the MLPs."""
    loops = [(x["mode"], x["chunk"], x["num_chunks"], x["count"]) for x in found["loops"]]
    chunks = LARGE.tokens // CHUNK_ROWS
    assert loops == [
        ("gradient-in-forward", CHUNK_ROWS, chunks, 1),
        ("recompute", CHUNK_ROWS, chunks, LARGE.layers),
    ]
    assert "lm_head" in found["deferred"][0]
    assert forward["libraries"]["mst.loop.default"] == 1 + LARGE.layers
    assert backward["libraries"]["mst.loop.default"] == LARGE.layers


def _counts_are_as_ever(
    found: dict[str, Any],
    forward: dict[str, Any],
    backward: dict[str, Any],
    bodies: list[dict[str, Any]],
) -> None:
    """Bodies are compiled once for all layers; each is two kernels and its matrix products.

    The head: logits. An MLP: two products, and in the backward three; those that make outputs,
    inputs' gradients and weights' gradients are the loop's. The softmax, its gradient and the loss
    read a chunk's logits twice and write them once, as a kernel written by hand does (Liger
    Kernel's ``liger_cross_entropy_kernel``).
    """
    assert found["bodies"] == 3
    assert sorted((b["kernels"], b["libraries"]["mm"]) for b in bodies) == [(2, 1), (2, 2), (2, 3)]
    assert sorted(b["logits"] for b in bodies) == [[], [], ["load", "load", "store"]]
    assert backward["libraries"]["mm"] == 8 * LARGE.layers  # attention's projections
    if torch.__version__.startswith("2.13."):  # others fuse otherwise
        assert (forward["kernels"], backward["kernels"]) == (8, 16)
        assert forward["libraries"]["mm"] == 4 * LARGE.layers


def _is_tritons(module: dict[str, Any]) -> None:
    """Every kernel became machine code, and whatever is no kernel of Inductor's is a matrix
    product, fused attention or a loop; in a body, a matrix product, or the labels' entries."""
    assert module["targets"] == [90]
    assert module["built"] == module["kernels"] > 0
    for name in module["libraries"]:
        of_body = name in ("mm", "mst.gather.default")
        known = of_body or name == "mst.loop.default" or "efficient_attention" in name
        assert known, name
        assert module["role"] != "body" or of_body, name


def test_padding_is_read_as_one_row() -> None:
    """Attention of an encoder, forward and backward, reads a mask without rows of its own."""
    modules = found_by("encoder")["modules"]
    read = {m["role"]: m["strides"] for m in modules if m["role"] != "body"}
    one_row = [[f"({TOKENS}, 0, 0, 1)"]]
    assert read == {"forward": one_row, "backward": one_row}
    assert max(m["buffers"][0] for m in modules if m["buffers"]) == TOKENS * HIDDEN


def test_simulated() -> None:
    found = found_by("simulate")
    ours, theirs = found["mst"], found["inductor"]
    logits = 2 * LARGE.tokens * LARGE.vocabulary  # bytes, in bfloat16
    assert ours["loops"] == 1 + 2 * LARGE.layers
    assert ours["largest"] == logits * CHUNK_ROWS // LARGE.tokens
    assert theirs["largest"] == logits
    assert ours["peak"] < 0.45 * logits
    assert theirs["peak"] > 4.6 * logits
    assert ours["gradients"] == theirs["gradients"] == found["weights"]
    # Weights' gradients are added by the matrix product itself, in place and in float32: those of
    # the head and of every MLP, in three of the chunks, in two runs.
    how = "accumulate: torch.bfloat16 in torch.float32 on cuda:0"
    assert found["products"] == {how: 2 * 3 * (1 + 3 * LARGE.layers)}


def test_cuda_graphs() -> None:
    """A forward with its loops is one CUDA graph, a backward another; both can be recorded, and
    weights are read where they are, as Inductor's are."""
    found = found_by("graphs")
    ours, theirs = found["mst"], found["inductor"]
    assert ours["loops"] == 1 + 2 * GRAPHS.layers
    assert ours["skipped"] == theirs["skipped"] == 0
    assert [graph["backward"] for graph in ours["graphs"]] == [False, True]
    for graph in ours["graphs"]:
        assert graph["runs"] == 2
        assert graph["ops"] > 100, "of the recorded run"
        assert graph["bodies"] == 0, "compiled while it is recorded"
        assert graph["mutated"] == 0
    forward, backward = zip(ours["graphs"], theirs["graphs"], strict=True)
    assert forward[0]["static"] == forward[1]["static"] > found["weights"]
    assert forward[0]["copied"] == forward[1]["copied"]
    assert backward[0]["copied"] <= backward[1]["copied"]


def test_offloaded() -> None:
    """A budget below what chunks and recomputation reach is met, and Inductor's code has the
    copies: those back are where they are needed, not all at the backward's start."""
    found = found_by("offload")
    *before, last, first = found["peaks"].items()
    assert [("to the host" in setting) for setting, _ in before] == [False, False]
    assert "to the host" in last[0]
    assert "to the host" in first[0]
    assert all(peak > BUDGET for _, peak in before)
    assert max(last[1], found["peak"]) <= BUDGET
    assert found["peak"] < 0.75 * min(peak for _, peak in before)
    assert found["gradients"] == found["weights"]
    assert found["moved"] > 100 * found["stays"]
    assert found["outward"] == found["back"] > 5 * SIZES.layers
    assert found["back_before_a_loop"] <= 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted(dtype: str) -> None:
    """No further from float64 than eager code; every body is one that was compiled ahead."""
    found = found_by("train", dtype, TRITON_INTERPRET="1")
    assert found["bodies"] == 8, "four bodies, two sizes of chunks"
    assert found["bodies_compiled_later"] == 0
    limits = {name: 1.1 * e + SLACK[dtype] for name, e in found["eager"].items()}
    bad = {name: (e, limits[name]) for name, e in found["ours"].items() if not e <= limits[name]}
    assert not bad, f"error, and the most that it may be: {bad}"
    assert len(found["ours"]) == 13
