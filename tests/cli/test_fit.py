"""The longest sequence that fits: the search, the layers that are not simulated, the answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mstc.cli import fit, layers
from mstc.cli.app import run
from mstc.cli.lengths import GRAIN
from mstc.cli.subject import Wanted, load_subject
from mstc.simulate import Simulation, loss_of
from passes.records import FixedLoop
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1 << 20,
}

WEIGHTS = 656_512  # bytes, in bfloat16

SCRIPT = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu
from torch.utils.checkpoint import checkpoint


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(512, 32), nn.Linear(32, 512)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.checkpointed = False

    def gradient_checkpointing_enable(self, how):
        self.checkpointed = True

    def mlp(self, x):
        return x + self.down(gelu(self.up(x)))

    def forward(self, ids):
        x = self.embed(ids)
        x = checkpoint(self.mlp, x, use_reentrant=False) if self.checkpointed else self.mlp(x)
        return cross_entropy(self.head(x).flatten(0, 1).float(), ids.flatten())


def build(seq_len, batch_size, dtype):
    return Model().to(dtype), (torch.zeros(batch_size, seq_len, dtype=torch.long),)
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def _plan(number: int) -> fit._Plan:
    loop = FixedLoop("aten.mm", f"model.py:{number}", "recompute", 1, 1)
    return fit._Plan(frozenset({loop}), frozenset({loop}), {"plan": number})


@pytest.mark.parametrize(
    ("plans", "longest", "found"),
    [
        ({2048: 1}, {1: 2048}, 2048),
        ({4096: 2, 6144: 2}, {1: 4096, 2: 6144}, 6144),
        ({4096: 2, 6144: 3, 2048: 2}, {1: 4096, 2: 6144, 3: 2048}, 2048),
        ({1024: 1}, {1: None}, None),
    ],
    ids=["at once", "another plan", "none agrees", "nothing fits"],
)
def test_a_length_and_its_plan(
    plans: dict[int, int], longest: dict[int, int | None], found: int | None
) -> None:
    """The plan that is made for a length is the one that the length was found with."""
    chosen = fit._consistent(
        lambda plan: longest[plan.options["plan"]],
        lambda seq_len: _plan(plans[seq_len]),
        _plan(1),
    )
    assert chosen == found


@pytest.mark.parametrize("way", [fit.WAYS[1], fit.WAYS[3]], ids=lambda way: way.name)
def test_few_layers_stand_for_all(config: str, way: fit.Way) -> None:
    """Four layers, of which two and three were simulated; the length that fits does fit."""
    wanted = Wanted(1, dtype="bf16")
    memory = 600 * 2**20
    found = fit.fit(config, memory, wanted, way, "adamw")
    assert found.seq_len is not None
    subject = load_subject(config, Wanted(found.seq_len, dtype="bf16", checkpoint=way.checkpoint))
    weights = sum(p.nbytes for p in subject.model.parameters())
    assert found.state_nbytes == 3 * weights
    with Simulation(subject.model, subject.batch[1], scratch=False) as simulation:
        compiled = simulation.compile(subject.model, way.backend, way.options)
        whole = simulation.trace(lambda: loss_of(compiled(**simulation.batch)).backward())
    # no tolerance: the step is linear in the layers if it is compared where the same layer is at
    # work
    assert found.step_nbytes == whole.peak_nbytes
    grain = (fit.CHUNK_ROWS if way.backend == "mst" else GRAIN) / found.seq_len
    assert (1 - 2 * grain) * memory < found.step_nbytes + found.state_nbytes <= memory


def test_kinds_of_layers(tmp_path: Path) -> None:
    """Layers of two kinds are simulated by whole periods."""
    kinds = ["sliding_attention", "full_attention"] * 3
    entry = CONFIG | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    entry |= {"num_hidden_layers": 6, "layer_types": kinds, "use_sliding_window": True}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(entry))
    subject = load_subject(str(path), Wanted(8))
    assert (subject.num_layers, subject.period) == (6, 2)
    assert layers.depths(subject) == (2, 4)
    few = load_subject(str(path), Wanted(8, num_layers=2))
    assert few.num_layers == 6, "of the whole"
    assert few.model.config.layer_types == kinds[:2]
    assert len(few.model.model.layers) == 2


def test_command(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", config, "--memory", "600KB", "--optimizer", "sgd"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["seq_len"] for one in found] == [None] * len(fit.WAYS), "not even the weights"
    assert {one["state_nbytes"] for one in found} == {WEIGHTS}
    assert run(arguments) == 0
    assert capsys.readouterr().out.count("none") == len(fit.WAYS)


def test_four_ways_in_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the table, whoever found them; what one process finds the other would."""
    path = tmp_path / "four_ways.py"  # a name of its own: Dynamo remembers modules by theirs
    path.write_text(SCRIPT)
    model = f"{path}:build"
    assert run(["fit", model, "--memory", "40MiB", "--json", "--optimizer", "sgd"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["way"]["name"] for one in found] == [way.name for way in fit.WAYS]
    second = fit.fit(model, 40 * 2**20, Wanted(1), fit.WAYS[1], "sgd")
    assert found[1] == dataclasses.asdict(second)
    lengths = [one["seq_len"] for one in found]
    assert lengths[0] >= 1024
    assert lengths[2] > lengths[0], "mst reaches further than inductor"


MISTAKES = {
    "memory": (["--memory", "much"], "say for example 80GiB"),
    "optimizer": (["--memory", "1GiB", "--optimizer", "lion"], "one of none, sgd, momentum, adamw"),
    "dtype": (["--memory", "1GiB", "--dtype", "fp8"], "one of fp32, bf16, fp16"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_for_a_mistake(name: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[name]
    assert run(["fit", config, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_batch_of_one_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(4, 4), torch.zeros(2, 4)\n"
    )
    assert run(["fit", f"{path}:build", "--memory", "1GiB"]) == 2
    assert "the batch does not depend on seq_len" in capsys.readouterr().err
