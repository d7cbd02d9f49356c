"""What all tests share: the golden files, and compile caches of their own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

# A graph that an earlier run left in PyTorch's caches would be served with no pass run; set before
# torch is imported, and for the processes that tests start.
_CACHES = tempfile.mkdtemp(prefix="mstc-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHES
os.environ.pop("TRITON_CACHE_DIR", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and more threads would wait for each other; see `two_threads`.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/*.txt anew instead of comparing with them",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # after the caches are set

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Kernels share their work between two threads, as users' do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[object, str], None]:
    """``golden(text, name)``: `text` must be what ``tests/golden/<name>.txt`` says."""

    def compare(text: object, name: str) -> None:
        path = GOLDEN / f"{name}.txt"
        got = str(text).rstrip() + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(got)
            return
        assert path.exists(), f"{path.name} is missing; write it with pytest --update-golden"
        assert got == path.read_text(), f"{path.name} differs; check, then pytest --update-golden"

    return compare
