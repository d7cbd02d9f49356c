"""A Hugging Face model, trained under the mst backend: python -m examples.huggingface

The model is called as usual, with labels, and returns loss *and logits*. The loop below never looks
at the logits' values, so mst never makes all of them at once; where a loop does look, they are
computed then. The weights are random here; `from_pretrained` works the same.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mstc  # noqa: F401  (an installed mstc is found without this line)
from mstc.runtime.memory import measure_step


def main(
    tokens: int = 2048,
    vocab: int = 16384,
    hidden: int = 128,
    layers: int = 2,
    steps: int = 4,
    backend: str = "mst",
) -> tuple[list[float], int]:
    """Train on random tokens; returns the losses and the peak intermediate bytes of a step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=tokens,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(vocab, (1, tokens), device=device)

    compiled = torch.compile(model, backend=backend)

    def forward_backward() -> Tensor:
        output = compiled(input_ids=text, labels=text)
        output.loss.backward()
        return output.loss.detach()

    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(forward_backward().item())
        optimizer.step()
        print(f"step {step}: loss {losses[-1]:.4f}")
    trace = measure_step(forward_backward, model.parameters(), device)
    print(f"peak intermediate memory: {trace.peak_intermediate_nbytes / 2**20:.1f} MiB ({backend})")
    return losses, trace.peak_intermediate_nbytes


if __name__ == "__main__":
    main()
