"""The garbage collector rests while the passes run, and is afterwards as it was before."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest

import passes
from mstc.collector import no_collections
from mstc.errors import FallbackWarning
from tests.models import (
    TinyLM,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
    train,
)


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    assert gc.isenabled()
    yield
    gc.enable()


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_it_rests_during_the_passes_alone(
    was_on: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_passes, found = passes.run_passes, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        found.append(gc.isenabled())
        if fails:
            raise RuntimeError("a mistake of ours")
        return run_passes(*args, **kwargs)

    monkeypatch.setattr(passes, "run_passes", watched)
    if not was_on:
        gc.disable()
    model = TinyLM()
    warns = pytest.warns(FallbackWarning, match="a mistake of ours")
    with warns if fails else contextlib.nullcontext():
        train(model, compile_mst(model), lm_batch(2, 16))
    assert found == [False]
    assert gc.isenabled() == was_on


def test_whoever_found_it_running_starts_it() -> None:
    with no_collections():
        with no_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
