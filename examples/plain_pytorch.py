"""A plain PyTorch language model, trained under the mst backend: python -m examples.plain_pytorch

Only the `torch.compile` line is about mst. The loss is written as everybody writes it; the logits
(tokens x vocabulary) are the largest tensor of the step by far, and mst never makes all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc  # noqa: F401  (an installed mstc is found without this line)
from mstc.runtime.memory import measure_step


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, vocab: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.blocks = nn.Sequential(*(Block(hidden, heads=4) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embed(tokens))))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


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
    model = LanguageModel(vocab, hidden, layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(vocab, (1, tokens + 1), device=device)

    compiled = torch.compile(model, backend=backend)

    def forward_backward() -> Tensor:
        loss = compiled(text[:, :-1], text[:, 1:])
        loss.backward()
        return loss.detach()

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
