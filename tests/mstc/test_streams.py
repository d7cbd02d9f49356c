"""What one stream has made, another waits for; played with streams that only write down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mstc.runtime import streams
from mstc.runtime.deferred import DeferredTensor
from tests.models import (
    NON_LEAF,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
)

pytestmark = NON_LEAF

VOCAB, HIDDEN, ROWS = 96, 8, 40


@dataclass(eq=False)
class Stream:
    name: str
    events: int = 0
    waited: list[str] = field(default_factory=list)  # for which streams
    kept: list[int] = field(default_factory=list)  # memory that it reads

    def record_event(self) -> tuple[Stream, int]:
        self.events += 1
        return self, self.events

    def wait_event(self, event: tuple[Stream, int]) -> None:
        self.waited.append(event[0].name)


@dataclass
class Player:
    """A GPU's streams, of which one is the current one."""

    current: Stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[Stream]:
        before, self.current = self.current, stream
        try:
            yield stream
        finally:
            self.current = before


@pytest.fixture
def player(monkeypatch: pytest.MonkeyPatch) -> Player:
    found = Player(Stream("first"))
    monkeypatch.setattr(streams, "_current_stream", lambda device: found.current)
    monkeypatch.setattr(
        streams, "_keep_for", lambda tensor, stream: stream.kept.append(tensor.data_ptr())
    )
    return found


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def deferred_logits() -> tuple[Model, Tensor, Tensor]:
    ids, labels = lm_batch(1, ROWS, vocab=VOCAB)
    model = Model()
    logits = compile_mst(model, min_deferred_bytes=1)(ids)
    assert isinstance(logits, DeferredTensor)
    assert not logits.is_materialized
    return model, logits, labels


def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    flat = logits.view(-1, VOCAB)
    return F.cross_entropy(flat, labels.view(-1)), flat.logsumexp(-1).square().mean()


def test_values_are_read_on_the_stream_that_made_them(player: Player) -> None:
    _, logits, labels = deferred_logits()
    loss, penalty = losses(logits, labels)
    (loss + penalty).backward()
    _ = logits + 1
    assert not player.current.waited
    assert not player.current.kept


def test_who_computes_waits_for_what_it_is_computed_from(player: Player) -> None:
    model, logits, _ = deferred_logits()
    with player.on(Stream("second")) as second:
        logits.materialize()
    assert set(second.waited) == {"first"}
    assert model.head.weight.data_ptr() in second.kept


def test_who_comes_later_waits_for_who_computed(player: Player) -> None:
    """Both results were computed together, when the first of them was read."""
    _, logits, labels = deferred_logits()
    loss, penalty = losses(logits, labels)
    with player.on(Stream("second")) as second:
        loss.item()
    with player.on(Stream("third")) as third:
        penalty.item()
    assert "first" in second.waited
    assert third.waited == ["second"]
    with player.on(second):
        before = len(second.waited)
        penalty.item()
        assert "second" not in second.waited[before:]


def test_labels_are_kept_for_who_reads_them(player: Player) -> None:
    """They are copied where the loss is written down, on its stream."""
    _, logits, labels = deferred_logits()
    with player.on(Stream("loss")):
        loss, _ = losses(logits, labels)
    with player.on(Stream("second")) as second:
        loss.item()
    assert {"first", "loss"} == set(second.waited)
    assert len(second.kept) == len(second.waited)


def test_an_op_with_several_results(player: Player) -> None:
    """One of them is read later, and by somebody else."""
    _, logits, _ = deferred_logits()
    flat = logits.view(-1, VOCAB)
    values, where = flat.logsumexp(-1).max(0)
    scaled = (flat * where.float()).sum()
    del where
    with player.on(Stream("second")):
        values.item()
    with player.on(Stream("third")) as third:
        scaled.item()
    assert "second" in third.waited


@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_loss_on_another_stream(player: Player, grad: bool) -> None:
    """It computes the logits inside, from memory that nobody else knows of."""
    _, logits, _ = deferred_logits()
    logits = logits if grad else logits.detach()
    assert isinstance(logits, DeferredTensor)
    with player.on(Stream("second")) as second:
        parts = logits.parts()
    assert set(second.waited) == {"first"}
    assert {part.data_ptr() for part in parts} == set(second.kept)


def test_recording_a_stream_makes_nothing(player: Player) -> None:
    _, logits, _ = deferred_logits()
    torch.ops.aten.record_stream.default(logits, torch.Stream("cpu"))
    assert isinstance(logits, DeferredTensor)
    assert not logits.is_materialized


def test_values_that_are_there(player: Player) -> None:
    _, logits, _ = deferred_logits()
    with player.on(Stream("second")):
        logits.materialize()
    with player.on(Stream("third")) as third:
        logits.materialize()
    assert third.waited == ["second"]


def test_a_cpu_has_no_streams() -> None:
    tensor = torch.ones(2)
    assert streams.place_of(tensor) is None
    streams.follow(None, tensor)
