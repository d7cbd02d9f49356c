"""Who measures time has the machine alone: a lock between processes that work and one that times.

    with quiet.working(): ...   # compile, compute, measure memory; many at once
    with quiet.alone(): ...     # time; nobody else who asked is working

A process that waits for `alone` holds back those who would begin to work, so it is not starved.
Nothing keeps other programs of the machine away.
"""

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(tempfile.gettempdir())


@contextlib.contextmanager
def _held(name: str, how: int) -> Iterator[None]:
    with (FOLDER / name).open("a") as file:
        fcntl.flock(file, how)
        yield  # closing the file releases it


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Share the machine with others who work."""
    with contextlib.ExitStack() as stack:
        with _held("mstc-turn", fcntl.LOCK_EX):  # not while somebody waits to be alone
            stack.enter_context(_held("mstc-quiet", fcntl.LOCK_SH))
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until nobody works, and let nobody begin."""
    with _held("mstc-turn", fcntl.LOCK_EX), _held("mstc-quiet", fcntl.LOCK_EX):
        yield
