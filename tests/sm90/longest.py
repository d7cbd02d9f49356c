"""Llama-3-8B with 262,144 tokens on one GPU of 80 GB, simulated; see the package.

    python -m tests.sm90.longest    # minutes

The configuration of benchmarks/configs/llama3-8b.json, one sequence, bfloat16, full gradients, and
a memory budget of what the weights leave of the card. Results go to
benchmarks/results/longest-sm90.json.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mstc
from mstc import partition
from mstc.quantity import parse_bytes
from passes.offload import Offloaded
from tests.sm90 import device
from tests.sm90.llama import Sizes, on_gpu

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "benchmarks" / "configs" / "llama3-8b.json"
RESULTS = ROOT / "benchmarks" / "results" / "longest-sm90.json"
TOKENS = 262_144
CARD = 80 * 10**9
BUDGET = "59GiB"  # for the step: weights take 15 GiB


@dataclass(frozen=True)
class _Configured(Sizes):
    """A model of a configuration of transformers."""

    config: LlamaConfig | None = None

    def model(self, dtype: torch.dtype, device: str) -> nn.Module:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return LlamaForCausalLM(self.config).train()
        finally:
            torch.set_default_dtype(default)


def main() -> None:
    device.install_or_leave()
    moved: list[int] = []
    offload = partition.offload_saved_values

    def offloaded(*args: object) -> Offloaded | None:
        found = offload(*args)
        moved.append(found.nbytes if found is not None else 0)
        return found

    partition.offload_saved_values = offloaded
    config = LlamaConfig.from_json_file(CONFIG)
    config.use_cache, config.max_position_embeddings = False, TOKENS
    sizes = _Configured(
        *(TOKENS, config.vocab_size, config.hidden_size, config.intermediate_size),
        *(config.num_hidden_layers, config.num_attention_heads, config),
    )
    begin = time.perf_counter()
    with on_gpu(sizes, torch.bfloat16) as (model, batch):
        trace = mstc.simulate_step(model, options={"memory_budget": BUDGET}, **batch)
        weights = sum(p.nbytes for p in model.parameters())
    record = {
        "tokens": TOKENS,
        "layers": config.num_hidden_layers,
        "budget": parse_bytes(BUDGET),
        "step": trace.peak_nbytes,
        "gradients": trace.grad_nbytes,
        "weights": weights,
        "on_the_host": moved[-1],
        "fits": trace.peak_nbytes + weights <= CARD,
        "seconds": round(time.perf_counter() - begin),
        "simulated": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mstc": mstc.__version__,
        },
        "date": date.today().isoformat(),
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
