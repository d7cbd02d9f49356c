"""A Llama and its batch, without data, on the GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Sizes:
    """Of a Llama, and of its batch of one sequence."""

    tokens: int
    vocabulary: int
    hidden: int
    wide: int  # of its MLP
    layers: int
    heads: int  # twice as many as those of keys and values

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.wide,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=self.tokens,
            use_cache=False,
        )

    def model(self, dtype: torch.dtype, device: str) -> nn.Module:
        """With random weights."""
        return model_of(self.config(), dtype, device)


def model_of(config: LlamaConfig, dtype: torch.dtype, device: str) -> nn.Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of the parameters; frequencies are float32 in any case
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


LARGE = Sizes(16384, 16384, 256, 1024, layers=2, heads=4)
TINY = Sizes(40, 160, 32, 128, layers=1, heads=2)


@contextmanager
def on_gpu(sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """A model and a batch that are fake; the mode in which they are is on."""
    with of_config_on_gpu(sizes.config(), sizes.tokens, dtype) as both:
        yield both


@contextmanager
def of_config_on_gpu(
    config: LlamaConfig, tokens: int, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
        yield model_of(config, dtype, "cuda"), {"input_ids": ids, "labels": ids.clone()}


def by_name(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors that a step reads."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **batch}
