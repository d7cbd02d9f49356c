"""Whole models as their users call them: loss and gradients against float64, beside a backend without
chunking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from benchmarks.nanogpt import GPT, GPTConfig
from tests.models import (
    INDUCTOR,
    Step,
    TinyLM,
    assert_same,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    lm_batch,
    three_way,
    tokens,
    train,
)

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 64,
}


def _causal(name: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=160,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config).train()


def _batch(ignored: int = 0, rows: int = 2, length: int = 37) -> dict[str, Tensor]:
    ids = tokens(rows, length, vocab=160)
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "Gemma2"])
def test_hugging_face(name: str) -> None:
    three_way(_causal(name), kwargs=_batch(ignored=5))
    (report,) = [mstc.last_report()]
    assert report.deferred, "the logits should have left the graph"


def test_bert() -> None:
    batch = _batch(ignored=20) | {"attention_mask": torch.ones(2, 37, dtype=torch.long)}
    batch["attention_mask"][1, 30:] = 0
    three_way(_bert(), kwargs=batch)


def test_nanogpt() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=160, n_layer=2, n_head=2, n_embd=32))
    ids = tokens(2, 38, vocab=160)
    three_way(model, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    assert mstc.last_report().deferred


@pytest.mark.parametrize("tied", [False, True])
def test_number_of_items_in_a_batch(tied: bool) -> None:
    """What Trainer passes for gradient accumulation: a sum, divided by a number or a tensor."""
    model = _causal("Llama", tie_word_embeddings=tied)
    batch = _batch(ignored=5)
    for items in (100, torch.tensor(100)):
        batch["num_items_in_batch"] = items  # type: ignore[assignment]
        three_way(model, kwargs=batch)


def test_left_padding_and_position_ids() -> None:
    batch = _batch(ignored=4)
    batch["attention_mask"] = torch.ones(2, 37, dtype=torch.long)
    batch["attention_mask"][0, :4] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    three_way(_causal("Llama"), kwargs=batch)


def test_input_embeddings_with_gradient() -> None:
    model = _causal("Llama")
    embeddings = torch.randn(2, 37, 32)
    batch = _batch()

    def run(call: Any, x: Tensor) -> Step:
        return train(model, lambda x: call(inputs_embeds=x, labels=batch["labels"]), (x,))

    eager = run(model, embeddings.clone().requires_grad_())
    ours = run(compile_mst(model), embeddings.clone().requires_grad_())
    assert ours.gradients["input 0"].norm() > 0
    assert_same(ours, eager)


def test_logits_are_read() -> None:
    """A curious caller gets the logits of eager, before the step and with a gradient."""
    model, batch = _causal("Llama"), _batch()
    call = compile_mst(model)
    with torch.no_grad():
        expected = model(**batch)
    output = call(**batch)
    assert isinstance(output, type(expected))
    torch.testing.assert_close(output.logits + 0, expected.logits)
    assert (output.logits.argmax(-1) == expected.logits.argmax(-1)).all()
    torch.testing.assert_close(output.loss, expected.loss)


def test_a_loss_of_ones_own() -> None:
    """No labels go in: the model returns logits, and the loss is computed outside."""
    model, batch = _causal("Llama"), _batch()

    def loss(call: Any) -> Any:
        def step() -> Tensor:
            logits = call(input_ids=batch["input_ids"]).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

        return step

    eager = train(model, loss(model))
    assert_same(train(model, loss(compile_mst(model))), eager)


def test_three_optimizer_steps() -> None:
    import copy

    model = _causal("Qwen3", tie_word_embeddings=True)
    twin = copy.deepcopy(model)
    call = compile_mst(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for length in (37, 37, 29):
        batch = _batch(length=length)
        ours, theirs = train(model, call, kwargs=batch), train(twin, twin, kwargs=batch)
        assert_same(ours, theirs, tolerance=2e-5)
        for optimizer in optimizers:
            optimizer.step()


def test_gradient_checkpointing() -> None:
    model = _causal("Llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    three_way(model, kwargs=_batch())


def test_bf16_weights() -> None:
    three_way(
        _causal("Llama"),
        kwargs=_batch(rows=4, length=64),
        dtype=torch.bfloat16,
        slack=4e-3,
    )


def test_autocast() -> None:
    three_way(_causal("Llama"), kwargs=_batch(rows=4, length=64), autocast=True, slack=4e-3)


def test_with_inductor() -> None:
    """Bodies, outer graph, deferred logits: all through the compiler, against Inductor itself."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=96, n_layer=1, n_head=2, n_embd=16))
    ids = tokens(2, 38)
    three_way(
        model,
        (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()),
        options=INDUCTOR,
        baseline="inductor",
    )


def test_with_inductor_in_bf16() -> None:
    three_way(
        TinyLM(bias=True),
        lm_batch(4, 64, ignored=9),
        dtype=torch.bfloat16,
        options=INDUCTOR,
        baseline="inductor",
        slack=2e-3,
    )
    assert has_loops([mstc.last_report()])
