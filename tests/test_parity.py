"""Whole models as their users call them: loss and gradients against float64, beside a backend
without chunking."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from benchmarks.nanogpt import GPT, GPTConfig
from tests.models import (
    INDUCTOR,
    NON_LEAF,
    Step,
    TinyLM,
    assert_same,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
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


@pytest.mark.parametrize(
    ("name", "layers"), [("Llama", 2), ("Mistral", 1), ("Qwen3", 1), ("Gemma2", 2)]
)
def test_hugging_face(name: str, layers: int) -> None:
    three_way(_causal(name, num_hidden_layers=layers), kwargs=_batch(ignored=5))
    assert mstc.last_report().deferred, "the logits should have left the graph"


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


@pytest.mark.parametrize("items", [100, torch.tensor(100)], ids=["int", "tensor"])
def test_number_of_items_in_a_batch(items: int | Tensor) -> None:
    """What Trainer passes for gradient accumulation: a sum, divided by a number or a tensor."""
    tied = isinstance(items, Tensor)
    model = _causal("Llama", tie_word_embeddings=tied, num_hidden_layers=1)
    three_way(model, kwargs=_batch(ignored=5) | {"num_items_in_batch": items})


def test_left_padding_and_position_ids() -> None:
    model, batch = _causal("Llama", num_hidden_layers=1), _batch(ignored=4)
    batch["attention_mask"] = torch.ones(2, 37, dtype=torch.long)
    batch["attention_mask"][0, :4] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    eager = train(model, model, kwargs=batch)
    assert_same(train(model, compile_mst(model), kwargs=batch), eager)


def test_input_embeddings_with_gradient() -> None:
    model = _causal("Llama", num_hidden_layers=1)
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
    model, batch = _causal("Llama", num_hidden_layers=1), _batch()
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
    model, batch = _causal("Llama", num_hidden_layers=1), _batch()

    def loss(call: Any) -> Any:
        def step() -> Tensor:
            logits = call(input_ids=batch["input_ids"]).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

        return step

    eager = train(model, loss(model))
    assert_same(train(model, loss(compile_mst(model))), eager)


def test_three_optimizer_steps() -> None:
    model = _causal("Qwen3", tie_word_embeddings=True, num_hidden_layers=1)
    twin = copy.deepcopy(model)
    call = compile_mst(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for length in (37, 37, 37):
        batch = _batch(length=length)
        ours, theirs = train(model, call, kwargs=batch), train(twin, twin, kwargs=batch)
        assert_same(ours, theirs, tolerance=2e-5)
        for optimizer in optimizers:
            optimizer.step()


@NON_LEAF
def test_gradient_checkpointing() -> None:
    model = _causal("Llama", num_hidden_layers=1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    three_way(model, kwargs=_batch())


def test_bf16_weights() -> None:
    three_way(
        _causal("Llama", num_hidden_layers=1),
        kwargs=_batch(rows=4, length=64),
        dtype=torch.bfloat16,
        slack=4e-3,
    )


def test_autocast() -> None:
    three_way(
        _causal("Llama", num_hidden_layers=1),
        kwargs=_batch(rows=4, length=64),
        autocast=True,
        slack=4e-3,
    )


class LogitsToo(TinyLM):
    """Returns the logits beside the loss, as models with a head do."""

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = self.head(self.hidden(ids))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return loss, logits


class Recurrent(TinyLM):
    """A state that is written into a tensor step by step, before the head."""

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out, state = torch.empty_like(x), torch.zeros_like(x[:, 0])
        for step in range(ids.shape[1]):
            state = torch.tanh(0.5 * state + x[:, step])
            out[:, step] = state
        return super().hidden(ids) + out


def test_values_written_step_by_step() -> None:
    """Each write is a new value of the whole in the functional graph, but no memory."""
    three_way(Recurrent(vocab=192), lm_batch(4, 24, ignored=5, vocab=192))
    plan = mstc.last_report().graphs[-1]
    logits, hidden = 4 * 24 * 192 * 4, 4 * 24 * 16 * 4
    assert plan.peak_before < 2 * logits + hidden, "not a buffer of hidden values per step"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("dtype", "slack"), [(torch.float32, 2.5e-7), (torch.bfloat16, 2e-3)], ids=["float32", "bf16"]
)
def test_with_inductor(dtype: torch.dtype, slack: float) -> None:
    """Bodies, outer graph, deferred logits: all through the compiler, against Inductor itself."""
    three_way(
        LogitsToo(bias=True),
        lm_batch(4, 64, ignored=9),
        dtype=dtype,
        options=INDUCTOR,
        baseline="inductor",
        slack=slack,
    )
    assert mstc.last_report().deferred
