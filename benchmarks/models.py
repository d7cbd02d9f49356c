"""The models that the benchmarks train: random weights, as their users call them.

Labels go in, loss *and logits* come out, and configurations keep their defaults (`use_cache` too)
but for sizes and dropout, which is 0 so that gradients can be compared. Names of models live here
and nowhere else: the compiler knows none of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.nanogpt import GPT, GPTConfig


@dataclass(frozen=True)
class Size:
    hidden: int  # features
    layers: int
    head_dim: int  # features per attention head
    vocab: int  # tokens


@dataclass(frozen=True)
class Subject:
    """A model with the batch that it is called with, `model(**batch)`."""

    model: nn.Module
    batch: dict[str, Any]  # tensors; a flag or two


@dataclass(frozen=True)
class _Kind:
    build: Callable[[Size, int], nn.Module]  # size, longest sequence (tokens) -> model
    batch: Callable[[int, int, int, str], dict[str, Tensor]]  # vocab, rows, tokens, device
    layers: int  # on a CPU; the spread of depths and vocabularies is part of the benchmark
    vocab: int  # tokens, on a CPU
    large_vocab: int  # tokens, on a GPU: as published, at most 128k


def _common(size: Size, longest: int, intermediate: float) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": int(intermediate * size.hidden) // 64 * 64,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // size.head_dim,
        "num_key_value_heads": max(1, size.hidden // size.head_dim // 2),
        "head_dim": size.head_dim,
        "vocab_size": size.vocab,
        "max_position_embeddings": longest,
    }


# transformers takes seconds to import and nanogpt does not need it: imports inside.


def _llama(size: Size, longest: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_common(size, longest, 2.75)))


def _mistral(size: Size, longest: int) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_common(size, longest, 3.5)))


def _qwen3(size: Size, longest: int) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_common(size, longest, 3.0)))


def _gemma2(size: Size, longest: int) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**_common(size, longest, 4.0), query_pre_attn_scalar=size.head_dim)
    return Gemma2ForCausalLM(config)


def _bert(size: Size, longest: int) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // size.head_dim,
        vocab_size=size.vocab,
        max_position_embeddings=longest,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def _nanogpt(size: Size, longest: int) -> nn.Module:
    heads = size.hidden // size.head_dim
    return GPT(GPTConfig(longest, size.vocab, size.layers, heads, size.hidden))


def _ids(vocab: int, rows: int, tokens: int, device: str) -> Tensor:
    return torch.randint(vocab, (rows, tokens), device=device)


def causal_batch(
    vocab: int, rows: int, tokens: int, device: str, first: int = 0
) -> dict[str, Tensor]:
    """Token ids from `first` on; the labels are the same ids, which the model shifts."""
    ids = torch.randint(first, vocab, (rows, tokens), device=device)
    return {"input_ids": ids, "labels": ids.clone()}


def masked_batch(vocab: int, rows: int, tokens: int, device: str) -> dict[str, Tensor]:
    """15 % of the tokens are masked and predicted; -100 marks the others, as in the BERT paper."""
    ids = _ids(vocab, rows, tokens, device)
    masked = torch.rand(ids.shape, device=device) < 0.15
    mask_token = min(103, vocab - 1)
    return {
        "input_ids": ids.masked_fill(masked, mask_token),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~masked, -100),
    }


def _nanogpt_batch(vocab: int, rows: int, tokens: int, device: str) -> dict[str, Tensor]:
    ids = _ids(vocab, rows, tokens + 1, device)
    return {"idx": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


_KINDS = {
    "llama": _Kind(_llama, causal_batch, layers=4, vocab=32000, large_vocab=128256),
    "mistral": _Kind(_mistral, causal_batch, layers=2, vocab=32768, large_vocab=32768),
    "qwen3": _Kind(_qwen3, causal_batch, layers=3, vocab=24576, large_vocab=128000),
    "gemma2": _Kind(_gemma2, causal_batch, layers=2, vocab=28672, large_vocab=128000),
    "bert": _Kind(_bert, masked_batch, layers=2, vocab=30522, large_vocab=30522),
    "nanogpt": _Kind(_nanogpt, _nanogpt_batch, layers=4, vocab=16384, large_vocab=50304),
}
NAMES = tuple(_KINDS)
SCALES = ("tiny", "cpu", "cuda")


def size_of(name: str, scale: str) -> Size:
    """`cpu`: fits a laptop. `cuda`: a GPU's. `tiny`: too small to gain anything, and for tests."""
    kind = _KINDS[name]
    if scale == "tiny":
        return Size(hidden=64, layers=2, head_dim=32, vocab=512)
    if scale == "cpu":
        return Size(hidden=256, layers=kind.layers, head_dim=64, vocab=kind.vocab)
    if scale == "cuda":
        return Size(hidden=2048, layers=4, head_dim=128, vocab=kind.large_vocab)
    raise ValueError(f"scale is one of {', '.join(SCALES)}, not {scale!r}")


def describe(name: str, scale: str) -> dict[str, int]:
    return asdict(size_of(name, scale))


def build(
    name: str,
    scale: str,
    rows: int,
    tokens: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    vocab: int | None = None,
) -> Subject:
    """The same seed gives the same weights and the same batch, in any process."""
    kind, size = _KINDS[name], size_of(name, scale)
    if vocab is not None:
        size = replace(size, vocab=vocab)
    torch.manual_seed(0)
    model = kind.build(size, tokens).to(device).train()
    for parameter in model.parameters():
        # Not the buffers: from_pretrained leaves rotary frequencies in float32 too.
        parameter.data = parameter.data.to(dtype)
    torch.manual_seed(1)
    return Subject(model, kind.batch(size.vocab, rows, tokens, device))


def loss_of(output: Any) -> Tensor:
    """The loss in what a benchmark's model returned."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["loss"]
    _logits, loss = output
    return loss
