"""Another process, which takes half of a command's work."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def second_process() -> Iterator[Executor]:
    """It does what is submitted, one after the other; if this process fails, it ends."""
    before = set(multiprocessing.active_children())
    # no fork: PyTorch has threads, and Dynamo's state belongs to one process
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as second:
        try:
            yield second
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()  # what it was given cannot be taken back
            raise
