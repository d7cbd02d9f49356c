"""The processes of contenders, seen from the one that measures: start, ask, outlive."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from benchmarks import coverage, measure

COMMAND = [sys.executable, "-m", "benchmarks.peers.worker"]
_TEXT = 700  # characters of an output that are kept


class Gone(RuntimeError):
    """A contender failed, ended or did not answer; the message says which."""


class Process:
    """A contender's process (worker.py); leaving the `with` ends it.

    `begun` is a cache folder that it begins with: what every process would build before the first
    kernel of its own.
    """

    def __init__(self, begun: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mstc-peer-")
        caches = Path(self._folder.name, "kernels")
        shutil.copytree(begun, caches)
        self._output = Path(self._folder.name, "output")
        self._pipe, theirs = Pipe()
        with self._output.open("wb") as output, theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                cwd=measure.ROOT,
                env=measure.cold_caches(Path(self._folder.name), caches),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its compilers end with it
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, message: object, timeout_s: float) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            Gone: there is none.
        """
        try:
            self._pipe.send(message)
            if not self._pipe.poll(timeout_s):
                raise Gone(f"no answer after {timeout_s:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise Gone(self._last_words()) from error
        if "failed" in answer:
            raise Gone(answer["failed"])
        return answer

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()
        self._folder.cleanup()

    def _last_words(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "killed, as the system does when memory runs out"
        output = self._output.read_text(errors="replace")[-_TEXT:]
        return f"exit status {status}: {coverage.shortened(output)}"
