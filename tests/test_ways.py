"""Ways of calling a model of transformers: what it returns beside the loss, in pieces, packed, with
adapters, to generate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mstc.history import reports
from tests.models import (
    EAGER,
    NON_LEAF,
    assert_same,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    three_way,
    tokens,
    train,
)

transformers = pytest.importorskip("transformers")


def llama(layers: int = 2, written_out: bool = False) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 160,
        "max_position_embeddings": 64,
    }
    if written_out:
        sizes["attn_implementation"] = "eager"
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).train()


def batch(rows: int = 2, length: int = 37) -> dict[str, Tensor]:
    ids = tokens(rows, length, vocab=160)
    return {"input_ids": ids, "labels": ids.clone()}


def test_keys_and_values_are_returned() -> None:
    model, inputs = llama(), batch() | {"use_cache": True}
    eager = model(**inputs).past_key_values
    ours = compile_mst(model)(**inputs)
    for mine, theirs in zip(ours.past_key_values.layers, eager.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)
    three_way(model, kwargs=inputs)


def test_hidden_states_are_returned_and_trained() -> None:
    """A loss of one's own on what the layers make, beside the model's."""
    model, inputs = llama(), batch() | {"output_hidden_states": True}

    def step(call: Callable[..., Any]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            output = call(**inputs)
            assert len(output.hidden_states) == 3
            return output.loss + sum(h.square().mean() for h in output.hidden_states)

        return run

    eager = train(model, step(model))
    ours = train(model, step(compile_mst(model)))
    assert_same(ours, eager)
    assert has_loops(reports())


@NON_LEAF
@pytest.mark.parametrize("head", [False, True])
def test_each_layer_is_compiled_by_itself(head: bool) -> None:
    model, inputs = llama(3), batch()
    eager = train(model, model, kwargs=inputs)
    pieces = [*model.model.layers, *([model.lm_head] if head else [])]
    for piece in pieces:
        piece.compile(backend="mst", options=EAGER)
    assert_same(train(model, model, kwargs=inputs), eager)
    assert has_loops(reports())


@pytest.mark.parametrize("written_out", [False, True])
def test_sequences_packed_into_one(written_out: bool) -> None:
    """Positions that begin again tell transformers where a sequence ends; each trains as alone."""
    model = llama(written_out=written_out)
    lengths = (13, 7, 17)
    ids = tokens(1, sum(lengths), vocab=160)
    at = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(at == 0, -100)  # no token is asked for across a border
    inputs = {"input_ids": ids, "position_ids": at, "labels": labels, "use_cache": False}

    def apart() -> Tensor:
        losses = [model(input_ids=i, labels=i).loss for i in ids.split(lengths, 1)]
        counts = torch.tensor([n - 1.0 for n in lengths])
        return torch.stack(losses) @ counts / counts.sum()

    alone = train(model, apart)
    assert_same(train(model, compile_mst(model), kwargs=inputs), alone)
    assert has_loops(reports())
    three_way(model, kwargs=inputs)


class Adapted(nn.Module):
    """LoRA (Hu et al., ICLR 2022) around a frozen linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(self.dropout(x)))


@pytest.mark.parametrize("where", ["mlp", "head", "everywhere"])
def test_adapters_on_frozen_weights(where: str) -> None:
    model = llama().requires_grad_(requires_grad=False)
    names = {"mlp": ("up_proj", "down_proj"), "head": ("lm_head",), "everywhere": ("",)}[where]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(names):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Adapted(module))
    # rank four: errors scatter by how a processor adds up, theirs as ours
    ours = three_way(model, kwargs=batch(), slack=1e-6)
    assert ours.gradients, "adapters are trained"
    assert all(".down." in n or ".up." in n for n in ours.gradients), "and nothing else"


def test_generation_by_a_compiled_forward() -> None:
    """Prompts of several lengths, then token by token from the cache, as in eager."""
    model = llama().eval()
    twin = copy.deepcopy(model)
    twin.forward = torch.compile(twin.forward, backend="mst", options=EAGER)
    for length in (5, 9):
        prompt = tokens(2, length, vocab=160)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        found = twin.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(found, wanted)
