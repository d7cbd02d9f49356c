"""``max_autotune``: Inductor tries its own products against a library's, in bodies as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mstc.history import reports
from mstc.runtime import loop
from tests.models import (
    INDUCTOR,
    TinyLM,
    assert_same,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    lm_batch,
    train,
)


def test_gradients_and_loops_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    compile_body = loop.compile_body

    def compiled(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[5]["max_autotune"])
        return compile_body(*args, **kwargs)

    monkeypatch.setattr(loop, "compile_body", compiled)
    model, batch = TinyLM(), lm_batch(24, ignored=3)
    eager = train(model, model, batch)
    call = torch.compile(model, backend="mst", options=INDUCTOR | {"max_autotune": True})
    assert_same(train(model, call, batch), eager)
    assert has_loops(reports())
    assert asked
    assert all(asked), "bodies are tuned like everything else"
