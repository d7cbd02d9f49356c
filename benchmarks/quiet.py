"""Who measures time has the machine alone: a lock between processes that work and one that times.

    python -m benchmarks.quiet benchmarks.coverage ...   # at work from the first import on
    quiet.work()                # compile, compute, measure memory; many at once
    with quiet.alone(): ...     # time; nobody else who asked is working

A process that waits for `alone` holds back those who would begin to work, so it is not starved.
Nothing keeps other programs of the machine away.
"""

import contextlib
import fcntl
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(tempfile.gettempdir())
_at_work = contextlib.ExitStack()  # of this process


@contextlib.contextmanager
def _held(name: str, how: int) -> Iterator[None]:
    with (FOLDER / name).open("a") as file:
        fcntl.flock(file, how)
        yield  # closing the file releases it


def work() -> None:
    """Share the machine with others who work, until `rest` or `alone`."""
    rest()  # a second claim could wait for one who waits for the first to end
    with _held("mstc-turn", fcntl.LOCK_EX):  # not while somebody waits to be alone
        _at_work.enter_context(_held("mstc-quiet", fcntl.LOCK_SH))


def rest() -> None:
    """Let others be alone."""
    _at_work.close()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until nobody works, and let nobody begin."""
    rest()
    with _held("mstc-turn", fcntl.LOCK_EX), _held("mstc-quiet", fcntl.LOCK_EX):
        yield


if __name__ == "__main__":
    from benchmarks import quiet  # this file under its own name, which the module will import

    quiet.work()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
