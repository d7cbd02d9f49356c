"""Peak memory of a whole training step, in every precision: exact, so a bound that always holds."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mstc
from tests.models import (
    TinyLM,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    lm_batch,
)

TOKENS, VOCAB, HIDDEN = 512, 4096, 32
LOGITS = TOKENS * VOCAB  # elements


class HuggingFaceLoss(TinyLM):
    """The loss in float32, whatever the logits are."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.hidden(ids)).float()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16", "float16"])
def test_no_logits_are_whole(precision: str) -> None:
    torch.manual_seed(0)
    model = HuggingFaceLoss(vocab=VOCAB, hidden=HIDDEN)
    if precision.endswith("16"):
        model.to(getattr(torch, precision))
    batch = lm_batch(TOKENS, vocab=VOCAB)

    def peak(call: object) -> int:
        autocast = torch.autocast("cpu", torch.bfloat16)

        def step() -> None:
            model.zero_grad()
            with autocast if precision == "autocast" else nullcontext():
                loss = call(*batch)  # type: ignore[operator]
            loss.backward()

        step()  # compiles
        trace = mstc.measure_peak(step, parameters=model.parameters())
        return trace.peak_intermediate_nbytes

    ours = peak(compile_mst(model, chunk_rows=32))
    torch._dynamo.reset()
    theirs = peak(torch.compile(model, backend="aot_eager_decomp_partition"))
    narrow = 4 if precision == "float32" else 2
    assert theirs > narrow * LOGITS, "the logits are there"
    weights = (
        3 * 4 * VOCAB * HIDDEN
    )  # a gradient in float32 that is added to, and casts of the head
    assert ours < 0.15 * theirs + weights
    assert ours < narrow * LOGITS, "not even once, in the narrow type"
