"""Nobody works while one times, and who waits to be alone is not starved."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from benchmarks import quiet


def test_alone_waits_for_workers_and_holds_back_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quiet, "FOLDER", tmp_path)
    order: list[str] = []
    may_end = threading.Event()

    def first() -> None:
        with quiet.working():
            order.append("first works")
            may_end.wait()
            order.append("first ends")

    def timed() -> None:
        with quiet.alone():
            order.append("alone")
            time.sleep(0.05)
            order.append("not alone")

    def second() -> None:
        with quiet.working():
            order.append("second works")

    threads = [threading.Thread(target=target) for target in (first, timed, second)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # so that they ask in this order
    may_end.set()
    for thread in threads:
        thread.join()
    assert order == ["first works", "first ends", "alone", "not alone", "second works"]


def test_many_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quiet, "FOLDER", tmp_path)
    both = threading.Barrier(2, timeout=5)

    def work() -> None:
        with quiet.working():
            both.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.broken
