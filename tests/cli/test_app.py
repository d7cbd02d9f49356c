"""The command as its users call it: what it prints, and one line for each of their mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mstc import cli
from mstc.cli import checks
from mstc.cli.app import run
from mstc.cli.text import size
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

SCRIPT = """
import torch
from torch import nn
from torch.nn import functional as F

class Model(nn.Module):
    def __init__(self, vocab=4096, hidden=64):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids, labels):
        logits = self.head(self.embed(ids))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten()), logits

def build(seq_len, batch_size, dtype):
    ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    return Model().to(dtype), {"ids": ids, "labels": ids}

def as_tuple(seq_len):
    ids = torch.zeros(1, seq_len, dtype=torch.long)
    return Model(), (ids, ids)

def without_batch():
    return Model()

def fails(**wanted):
    raise ValueError("no weights\\nhere")

def without_loss():
    return nn.Linear(4, 4), torch.zeros(2, 4)

def peeks():
    class Peeks(nn.Linear):
        def forward(self, x):
            y = super().forward(x).sum()
            return y * 2 if y.item() > 0 else y
    return Peeks(4, 4), torch.zeros(2, 4)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(SCRIPT)
    return str(path)


def test_explain(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", f"{script}:build", "--seq-len", "2048", "--dtype", "fp32"]) == 0
    text = capsys.readouterr().out
    assert "inductor" in text
    assert "Loops" in text
    assert "gradient-in-forward" in text
    assert "self.head" in text, "the user's line"


def test_explain_as_json(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seq-len=1024", "--batch-size=2", "--dtype=bf16", "--json"]
    assert run(["explain", f"{script}:build", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    peaks = {name: entry["peak_intermediate_nbytes"] for name, entry in found["peaks"].items()}
    assert peaks["mst"] < peaks["inductor"] / 2
    assert found["peaks"]["mst"]["grad_nbytes"] == 2 * 2 * 4096 * 64
    assert found["report"]["graphs"][0]["loops"]
    for entry in found["peaks"].values():
        assert sum(h["nbytes"] for h in entry["at_peak"]) == entry["peak_intermediate_nbytes"]


def test_explain_within_a_budget(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seq-len=2048", "--dtype=fp32", "--memory-budget=24MiB", "--json"]
    assert run(["explain", f"{script}:build", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["peaks"]["mst"]["peak_nbytes"] <= 24 << 20 < found["peaks"]["inductor"]["peak_nbytes"]
    )
    assert any(note.startswith("memory budget 24 MiB") for note in found["report"]["notes"])


def test_plans(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved, compared with itself and with another; where it cannot be written, one line."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    explain = ["explain", f"{script}:as_tuple", "--seq-len=1024", "--save-plan"]
    assert run([*explain, str(one)]) == 0
    entry = json.loads(one.read_text())
    assert len(entry["loops"]) == 1
    assert run(["diff", str(one), str(one)]) == 0
    assert "the same" in capsys.readouterr().out
    entry["loops"][0]["chunk"] += 1
    two.write_text(json.dumps(entry))
    assert run(["diff", str(one), str(two), "--json"]) == 1
    (change,) = json.loads(capsys.readouterr().out)
    assert change["before"] != change["after"]
    assert run(["diff", str(one), str(two)]) == 1
    assert run(["diff", str(one), str(tmp_path / "no.json")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert run([*explain, str(tmp_path / "no" / "plan.json")]) == 2
    assert "--save-plan" in capsys.readouterr().err


def test_plot(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.svg"
    assert run(["plot", f"{script}:as_tuple", "--seq-len", "1024", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out.with_suffix(".png")), str(out)]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    drawn = out.read_text()
    assert "<svg" in drawn
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def _config(tmp_path: Path, **changes: Any) -> str:
    entry: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1}
    entry |= {"vocab_size": 64, "n_positions": 16, "architectures": ["GPT2LMHeadModel"]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(entry | changes))
    return str(path)


def test_configuration(tmp_path: Path) -> None:
    """A file or its folder; positions are as many as the batch has tokens."""
    from mstc.cli.subject import Wanted, load_subject

    for name in (_config(tmp_path), str(tmp_path)):
        subject = load_subject(name, Wanted(seq_len=64, batch_size=3, dtype="bf16"))
        assert subject.batch[1]["labels"].shape == (3, 64)
        assert {p.dtype for p in subject.model.parameters()} == {torch.bfloat16}
        assert all(p.is_meta for p in subject.model.parameters())
        assert subject.notes == ("max_position_embeddings raised from 16 to 64",)
        assert subject.model.training
    assert load_subject(name, Wanted(8, checkpoint=True)).model.is_gradient_checkpointing


def test_kinds_of_batches(tmp_path: Path) -> None:
    from mstc.cli.subject import Wanted, load_subject

    name = _config(tmp_path, architectures=["GPT2ForSequenceClassification"])
    assert load_subject(name, Wanted(8, 2)).batch[1]["labels"].shape == (2,)
    vit = {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "image_size": 8}
    vit |= {"patch_size": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    entry = vit | {"architectures": ["ViTForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    assert load_subject(name, Wanted(8, 2)).batch[1]["pixel_values"].shape == (2, 3, 8, 8)


MISTAKES = {
    "no file": (["nothing.json"], "nothing.json: there is no such file"),
    "no script": (["nothing.py:build"], "nothing.py: there is no such file"),
    "no function": (["{script}:missing"], "has no function 'missing' (it has: build, as_tuple, "),
    "which function": (["{script}"], "Say {script}:NAME"),
    "no batch": (["{script}:without_batch"], "returned Model; it must return (model, batch)"),
    "fails": (["{script}:fails"], "fails failed: ValueError: no weights here"),
    "no loss": (["{script}:without_loss"], "the model returned no loss (FakeTensor): pass labels"),
    "value": (["{script}:peeks"], "the model reads a value"),
    "length": (["{script}:build", "--seq-len", "0"], "--seq-len 0: it must be at least 1"),
    "batch": (["{script}:build", "--batch-size=-2"], "--batch-size -2: it must be at least 1"),
    "dtype": (["{script}:build", "--dtype", "int4"], "one of fp32, bf16, fp16"),
    "checkpoint": (["{script}:build", "--checkpoint"], "let your function return a model that"),
    "no budget": (["{script}:build", "--memory-budget=0GiB"], 'options["memory_budget"] is'),
    "too much": (["{script}:build", "--memory-budget=900TiB"], "is 921,600 GiB, and cpu has"),
    "too little": (["{script}:build", "--memory-budget=1KiB"], "a step of this graph takes"),
    "no folder": (["{folder}"], "there is no config.json in this folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_for_a_mistake(
    name: str, script: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[name]
    places = {"script": script, "folder": str(tmp_path)}
    assert run(["explain", *(a.format(**places) for a in arguments)]) == 2
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mstc: ")]
    assert len(lines) == 1
    assert message.format(**places) in lines[0]
    assert not captured.out
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", 'has no "model_type"'),
        ('{"model_type": "quantum"}', "does not know the model_type 'quantum'"),
        ('{"model_type": "detr"}', "pass script.py:build instead"),
    ],
)
def test_one_line_for_a_bad_configuration(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    assert run(["explain", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_script_that_cannot_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_like_it\n")
    assert run(["explain", f"{path}:build"]) == 2
    message = f"{path} cannot be imported: ModuleNotFoundError: No module named"
    assert message in capsys.readouterr().err


def test_where_a_picture_cannot_go(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plot", f"{script}:build", "--out", "memory.gif"]) == 2
    assert "it must end in .png or .svg" in capsys.readouterr().err
    assert run(["plot", f"{script}:build", "--out", str(tmp_path / "no" / "a.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "a.png").mkdir()
    arguments = ["plot", f"{script}:build", "--seq-len", "64", "--out", str(tmp_path / "a.png")]
    assert run(arguments) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".svg"] == [], "nothing half-done"


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["doctor", "--json"]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["torch"]["found"] == torch.__version__
    assert found["backend"]["verdict"] == "ok"
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.setenv("COLUMNS", "40")
    assert run(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("missing" in line and "2.9.1" in line for line in lines)
    assert max(map(len, lines)) <= 40


def test_caches_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(checks, "cache_folder", lambda: tmp_path / "file" / "cache")
    (found,) = [check for check in checks.run_all() if check.name == "compile caches"]
    assert found.verdict == "missing"
    assert "TORCHINDUCTOR_CACHE_DIR" in found.found


def test_output_that_nobody_reads() -> None:
    command = f"{sys.executable} -m mstc doctor | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "mstc.cli.app", raising=False)
    with pytest.raises(SystemExit, match="pip install 'mstc\\[cli\\]'"):
        cli.main()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(12, "12 B"), (2048, "2 KiB"), (1.5 * 2**20, "1.5 MiB"), (1234 * 2**30, "1,234 GiB")],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text
