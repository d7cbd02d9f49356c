"""Steps of other lengths, computed: equal to simulated ones. The search for the longest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mstc.cli import fit
from mstc.cli.lengths import (
    GRAIN,
    MOST,
    at_length,
    grown,
    longest_computed,
    longest_tried,
    probe_of,
)
from mstc.cli.subject import Wanted, load_subject
from tests.cli.test_fit import CONFIG
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

sizes = st.fixed_dictionaries(
    {
        "base": st.integers(0, 10**9),
        "per_token": st.integers(1, 10**6),
        "per_square": st.integers(0, 10),
        "room": st.integers(0, 10**13),
    }
)


class _Steps:
    """Steps of a size, and which were asked for."""

    def __init__(self, base: int, per_token: int, per_square: int, room: int) -> None:
        self.base, self.per_token, self.per_square, self.room = base, per_token, per_square, room
        self.asked: set[int] = set()

    def __call__(self, tokens: int) -> int:
        self.asked.add(tokens)
        return self.base + self.per_token * tokens + self.per_square * tokens * tokens


def _is_longest(found: int | None, step: _Steps) -> None:
    if not found:
        assert step(GRAIN) > step.room
        return
    assert step(found) <= step.room
    assert found % GRAIN == 0
    assert found >= MOST // 2 or step(found + GRAIN) > step.room


@given(sizes, st.integers(0, 10**9), st.sampled_from([GRAIN, 16 * GRAIN, 300 * GRAIN]))
@settings(max_examples=300, deadline=None)
def test_tried(entry: dict[str, int], least: int, first: int) -> None:
    """What it finds fits, and no more does; in few steps, wherever it begins."""
    step = _Steps(**entry)
    found = longest_tried(step, step.room, least, first)
    assert len(step.asked) < 45
    _is_longest(found, step)


@given(sizes)
@settings(max_examples=300, deadline=None)
def test_computed(entry: dict[str, int]) -> None:
    step = _Steps(**entry)
    _is_longest(longest_computed(step, step.room, lambda n: n), step)
    coarse = longest_computed(step, step.room, lambda n: n // 4096 * 4096)
    assert coarse % 4096 == 0
    assert coarse == 0 or step(coarse) <= step.room


def test_how_buffers_grow() -> None:
    own, other = 13 * 64, 1000
    assert grown(2 * 4096 * own, own, other) == 2 * 4096 * other
    assert grown(3 * own * own, own, other) == 3 * other * other, "a mask"
    assert grown(512 * (own - 1), own, other) == 512 * (other - 1), "sliced logits"
    assert grown(8 * (own + 1), own, other) == 8 * (other + 1), "padded labels"
    assert grown(4096 * 14336, own, other) == 4096 * 14336, "a weight"
    assert grown(0, own, other) == 0


def test_a_probe_is_no_dim_of_the_model() -> None:
    assert probe_of(nn.Linear(4096, 64), 2048) == 13 * 2048
    assert probe_of(nn.Linear(4096, 26), 2048) == 11 * 2048
    assert probe_of(nn.Linear(4096, 64), 2048, (13, 22)) == 17 * 2048
    taken = [13, 11, 17, 19, 23, 29, 31, 37, 41, 43]
    assert probe_of(nn.Linear(4096, 64), 2048, taken) is None


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    return str(path)


def _steps(config: str, way: fit.Way) -> fit._Steps:
    wanted = Wanted(GRAIN, checkpoint=way.checkpoint)
    return fit._Steps(config, wanted, way, load_subject(config, wanted))


@pytest.mark.parametrize("way", [fit.WAYS[0], fit.WAYS[3]], ids=lambda way: way.name)
def test_is_what_is_simulated(way: fit.Way, config: str) -> None:
    """To the byte, where the length decides nothing else."""
    tokens = 40960
    steps = _steps(config, way)
    assert steps.probe is not None
    probe = steps._trace(None, steps.probe, None)
    computed, simulated = at_length(probe, steps.probe, tokens), steps._trace(None, tokens, None)
    assert simulated.peak_nbytes != probe.peak_nbytes
    for name in ("peak_nbytes", "peak_intermediate_nbytes", "grad_nbytes", "end_nbytes"):
        assert getattr(computed, name) == getattr(simulated, name), name
    assert computed.forward_changes == probe.forward_changes


def test_where_the_length_decides(tmp_path: Path) -> None:
    """Of a model that does something else with more tokens, lengths are tried one by one."""
    path = tmp_path / "model.py"
    path.write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up = torch.nn.Linear(8, 64)\n"
        "    def forward(self, x):\n"
        "        wide = self.up(x).relu()\n"
        "        if x.shape[0] > 5000:\n"
        "            wide = torch.nn.functional.dropout(wide, 0.5).exp().sin()\n"
        "        return wide.square().sum()\n"
        "def build(seq_len):\n"
        "    return Model(), (torch.zeros(seq_len, 8),)\n"
    )
    inductor = fit.WAYS[0]
    small, large = (fit.fit(f"{path}:build", n, Wanted(1), inductor) for n in (2**20, 64 * 2**20))
    assert small.seq_len is not None
    assert large.seq_len is not None
    assert small.seq_len < 5000 < large.seq_len
    for found, memory in ((small, 2**20), (large, 64 * 2**20)):
        longer = load_subject(f"{path}:build", Wanted(found.seq_len + GRAIN))
        steps = fit._Steps(f"{path}:build", Wanted(GRAIN), inductor, longer)
        assert found.step_nbytes + found.state_nbytes <= memory
        assert steps.peak(found.seq_len) == found.step_nbytes
        assert steps.peak(found.seq_len + GRAIN) + found.state_nbytes > memory
