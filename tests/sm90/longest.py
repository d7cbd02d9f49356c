"""Llama-3-8B with 262,144 tokens on one GPU of 80 GB, simulated; see the package.

    python -m tests.sm90.longest    # minutes

The configuration of benchmarks/configs/llama3-8b.json, one sequence, bfloat16, full gradients, and
a memory budget of what the weights leave of the card. Results go to
benchmarks/results/longest-sm90.json.
"""

from __future__ import annotations

import json
import time
from datetime import date

import torch
from transformers import LlamaConfig

import mstc
from benchmarks import coverage, measure
from benchmarks.longest import CONFIG, ON_A_GPU
from mstc.quantity import parse_bytes
from tests.sm90 import device
from tests.sm90.llama import of_config_on_gpu
from tests.sm90.offload import record_moves

TOKENS = 262_144
CARD = 80 * 10**9
BUDGET = "59GiB"  # for the step: weights take 15 GiB


def main() -> None:
    device.install_or_leave()
    shares: list[tuple[int, int]] = []
    record_moves(shares)
    config = LlamaConfig.from_json_file(CONFIG)
    config.use_cache, config.max_position_embeddings = False, TOKENS
    begin = time.perf_counter()
    with of_config_on_gpu(config, TOKENS, torch.bfloat16) as (model, batch):
        trace = mstc.simulate_step(model.train(), options={"memory_budget": BUDGET}, **batch)
        weights = sum(p.nbytes for p in model.parameters())
    environment = measure.environment("cuda")
    record = {
        "tokens": TOKENS,
        "layers": config.num_hidden_layers,
        "budget": parse_bytes(BUDGET),
        "step": trace.peak_nbytes,
        "gradients": trace.grad_nbytes,
        "weights": weights,
        "on_the_host": shares[-1][0],
        "fits": trace.peak_nbytes + weights <= CARD,
        "seconds": round(time.perf_counter() - begin),
        "simulated": environment["device"],
        "versions": environment["versions"],
        "date": date.today().isoformat(),
        "commit": coverage.commit(),
    }
    ON_A_GPU.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
