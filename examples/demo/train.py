"""Trains the demo's model under one contender, in a process of its own."""

import sys
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import measure
from mstc.runtime.memory import measure_step


@dataclass(frozen=True)
class Setup:
    """What is trained; the same for every contender. A job as JSON carries these fields."""

    device: str
    dtype: str
    hidden: int  # features
    layers: int
    vocab: int  # tokens
    tokens: int  # of one row
    steps: int
    text_nbytes: int  # of sources for the tokenizer


SMALL = Setup("cpu", "float32", 256, 4, 16384, 4096, 8, 4_000_000)
LARGE = Setup("cuda", "bfloat16", 2048, 8, 32768, 16384, 16, 12_000_000)  # where there is a GPU


def build(setup: Setup) -> LlamaForCausalLM:
    """The same weights in every process."""
    heads = max(4, setup.hidden // 128)
    config = LlamaConfig(
        vocab_size=setup.vocab,
        hidden_size=setup.hidden,
        intermediate_size=int(2.75 * setup.hidden),
        num_hidden_layers=setup.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=setup.hidden // heads,
        max_position_embeddings=setup.tokens,
    )
    torch.manual_seed(0)
    with torch.device(setup.device):
        model = LlamaForCausalLM(config).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, setup.dtype))
    return model


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Losses, seconds, memory. The last step's memory is traced; the steps before it are timed."""
    setup = Setup(**job["setup"])
    model = build(setup)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = measure.compiled(model, job["contender"])

    losses: list[Tensor] = []
    times: list[float] = []
    trace = None

    def step(batch: Tensor) -> None:
        losses.append(measure.training_step(compiled, {"input_ids": batch, "labels": batch})())

    *timed, traced = torch.load(job["batches"])
    progress = tqdm([*timed, traced], desc=f"{job['contender']:>8}", unit="step", file=sys.stdout)
    for batch in progress:
        optimizer.zero_grad()
        run = partial(step, batch.to(setup.device))
        if batch is traced:
            trace = measure_step(run, model.parameters(), setup.device)
        else:
            times.append(measure.seconds(run, setup.device))
        optimizer.step()
    assert trace is not None
    return {
        "losses": [loss.item() for loss in losses],
        "compile_s": times[0],
        "step_s": median(times[2:]),
        "peak_intermediate_nbytes": trace.peak_intermediate_nbytes,
    }
