"""Nobody works while one times, and who waits to be alone is not starved."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import quiet
from benchmarks.measure import ROOT

PROGRAM = """
import sys, time
from pathlib import Path
from benchmarks import quiet
from benchmarks.measure import ROOT
quiet.FOLDER = Path(sys.argv[1])
what, seconds = sys.argv[2], float(sys.argv[3])
def say(text):
    with open(quiet.FOLDER / "said", "a") as file:
        file.write(text + chr(10))
if what == "alone":
    with quiet.alone():
        say("alone")
        time.sleep(seconds)
        say("not alone")
else:
    quiet.work()
    say(what + " works")
    while not (quiet.FOLDER / what).exists():
        time.sleep(0.01)
    say(what + " rests")
    quiet.rest()
"""


def start(folder: Path, what: str, seconds: float = 0.1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(folder), what, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT)


def said(folder: Path) -> list[str]:
    path = folder / "said"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_alone_waits_for_workers_and_holds_back_new_ones(tmp_path: Path):
    first = start(tmp_path, "first")
    wait_for(lambda: "first works" in said(tmp_path))
    timing = start(tmp_path, "alone")
    wait_for(lambda: _is_taken(tmp_path / "mstc-turn"))
    second = start(tmp_path, "second")
    (tmp_path / "second").touch()
    time.sleep(0.3)  # long enough for it to begin, if it could
    assert said(tmp_path) == ["first works"]
    (tmp_path / "first").touch()
    assert [p.wait(timeout=30) for p in (first, timing, second)] == [0, 0, 0]
    expected = ["first works", "first rests", "alone", "not alone", "second works", "second rests"]
    assert said(tmp_path) == expected


def _is_taken(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_many_work_at_once(tmp_path: Path):
    both = [start(tmp_path, name) for name in ("first", "second")]
    wait_for(lambda: len(said(tmp_path)) == 2)
    for name in ("first", "second"):
        (tmp_path / name).touch()
    assert [p.wait(timeout=30) for p in both] == [0, 0]


def test_who_works_may_ask_again_and_be_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quiet, "FOLDER", tmp_path)
    quiet.work()
    quiet.work()
    assert _is_taken(tmp_path / "mstc-quiet")
    with quiet.alone():
        assert _is_taken(tmp_path / "mstc-quiet")
    assert not _is_taken(tmp_path / "mstc-quiet")
