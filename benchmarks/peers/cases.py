"""The work that contenders compete at: modules as their users write them, with inputs.

Random weights and inputs from fixed seeds, so every process has the same. A case either returns its
loss, or is given the gradient of its output, as a layer inside a model is.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import accuracy
from benchmarks.models import loss_of
from benchmarks.peers.losses import chunked_loss


@dataclass(frozen=True)
class Size:
    hidden: int  # features
    wide: int = 0  # features inside the MLP
    vocab: int = 0  # tokens
    layers: int = 0
    head_dim: int = 64  # features per attention head


SIZES: dict[str, dict[str, Size]] = {
    # linear-ce: 768 x 50,257 is what torch's own test of its auto-chunker has; here a sixth of it
    "cpu": {
        "linear-ce": Size(128, vocab=8192),
        "mlp": Size(256, wide=896),
        "layer": Size(128, wide=448, layers=1),
        "model": Size(128, wide=448, vocab=8192, layers=2),
    },
    "cuda": {
        "linear-ce": Size(768, vocab=50257),
        "mlp": Size(4096, wide=14336),
        "layer": Size(2048, wide=8192, layers=1, head_dim=128),
        "model": Size(2048, wide=8192, vocab=128256, layers=4, head_dim=128),
    },
    # large enough that all who chunk do so, small enough for a test
    "tiny": {
        "linear-ce": Size(32, vocab=8192),
        "mlp": Size(64, wide=256),
        "layer": Size(64, wide=256, layers=1, head_dim=32),
        "model": Size(32, wide=64, vocab=2048, layers=2, head_dim=16),
    },
}
CASES = tuple(SIZES["cpu"])
_K = 1024
LENGTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "linear-ce": (_K, 4 * _K, 16 * _K, 64 * _K),
        "mlp": (_K, 4 * _K, 16 * _K, 64 * _K),
        "layer": (_K, 4 * _K, 16 * _K),
        "model": (_K, 4 * _K, 16 * _K),
    },
    "cuda": dict.fromkeys(CASES, (_K, 4 * _K, 16 * _K, 64 * _K, 256 * _K, 512 * _K)),
}
"""Device -> case -> tokens."""


@dataclass
class Task:
    """A case at one length, on a device."""

    case: str
    size: Size
    tokens: int
    module: Any  # an nn.Module; forward(**inputs)
    inputs: dict[str, Tensor]
    gradient: Tensor | None = None  # of the module's output; None: it returns a loss

    def step(self, fn: Callable[..., Any]) -> Callable[[], None]:
        """Forward and backward of `fn`, which does the module's work; outputs live through it."""

        def step() -> None:
            output = fn(**self.inputs)
            if self.gradient is None:
                loss_of(output).backward()
            else:
                output.backward(self.gradient)

        return step

    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by name: parameters, and inputs that are not ids."""
        inputs = {f"input {n}": value for n, value in self.inputs.items() if value.requires_grad}
        return dict(self.module.named_parameters()) | inputs

    def clear(self) -> None:
        for leaf in self.leaves().values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        found = {name: leaf.grad for name, leaf in self.leaves().items()}
        return {name: grad.double() for name, grad in found.items() if grad is not None}


class LinearCrossEntropy(nn.Module):
    """A language model's head, without bias, and its loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head = nn.Linear(size.hidden, size.vocab, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden), labels)


class Layer(nn.Module):
    """One decoder layer of transformers' Llama, with the positions that it needs."""

    def __init__(self, size: Size, tokens: int) -> None:
        from transformers.models.llama import modeling_llama as llama

        super().__init__()
        config = _config(size, tokens)
        self.layer = llama.LlamaDecoderLayer(config, 0)
        self.rotary = llama.LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        output: Any = self.layer(hidden, position_embeddings=self.rotary(hidden, positions))
        return output[0] if isinstance(output, tuple) else output


def _config(size: Size, tokens: int) -> Any:
    from transformers import LlamaConfig  # it takes seconds to import

    heads = size.hidden // size.head_dim
    sizes: dict[str, Any] = {
        "hidden_size": size.hidden,
        "intermediate_size": size.wide,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": size.head_dim,
        "vocab_size": size.vocab or 8,
        "max_position_embeddings": tokens,
        "attn_implementation": "sdpa",  # a layer alone has no default
    }
    return LlamaConfig(**sizes)


def _module(case: str, size: Size, tokens: int) -> nn.Module:
    if case == "linear-ce":
        return LinearCrossEntropy(size)
    if case == "layer":
        return Layer(size, tokens)
    if case == "mlp":
        from transformers.models.llama.modeling_llama import LlamaMLP

        return LlamaMLP(_config(size, tokens))
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(_config(size, tokens))


def build(case: str, scale: str, tokens: int, device: str, dtype: torch.dtype) -> Task:
    """The same seed gives the same weights and inputs, in any process."""
    size = SIZES[scale][case]
    torch.manual_seed(0)
    module = _module(case, size, tokens).train()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device, dtype)
    module.to(device)  # the buffers, which stay in float32
    torch.manual_seed(1)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    def ids(*shape: int) -> Tensor:
        return torch.randint(size.vocab, shape).to(device)

    if case == "linear-ce":
        inputs = {"hidden": floats(tokens, size.hidden).requires_grad_(), "labels": ids(tokens)}
        return Task(case, size, tokens, module, inputs)
    if case == "model":
        tokens_of = ids(1, tokens)
        inputs = {"input_ids": tokens_of, "labels": tokens_of.clone()}
        return Task(case, size, tokens, module, inputs)
    name = "x" if case == "mlp" else "hidden"
    inputs = {name: floats(1, tokens, size.hidden).requires_grad_()}
    return Task(case, size, tokens, module, inputs, floats(1, tokens, size.hidden))


def truth(task: Task) -> dict[str, Tensor]:
    """The gradients in float64."""

    def doubled(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    inputs = {name: doubled(value) for name, value in task.inputs.items()}
    gradient = None if task.gradient is None else doubled(task.gradient)
    module = copy.deepcopy(task.module).double()
    wide = Task(task.case, task.size, task.tokens, module, inputs, gradient)
    with accuracy.Float64():
        wide.step(_in_chunks(module) if task.case == "linear-ce" else module)()
    return wide.gradients()


def _in_chunks(module: LinearCrossEntropy) -> Callable[..., Tensor]:
    """Whole logits in float64 would take more memory than any contender."""

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return chunked_loss(hidden, module.head.weight, labels)

    return loss
