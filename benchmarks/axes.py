"""The axis of a loop: tokens, or an axis of the weights (hidden features, heads).

    python -m benchmarks.axes                           # resumes where it stopped
    python -m benchmarks.axes --only gated/128 --redo
    python -m benchmarks.axes --page                    # docs/axes.md anew, from what was measured

Per case one fresh process, in which Inductor, mst with loops along tokens, and mst with loops along
the axes that most weights have take turns. Peaks are exact. Errors are relative to the same step in
float64, eager. What mst does by itself is one of these, and noted. Results go to
benchmarks/results/axes-cpu.json; docs/axes.md is made of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import axes_page, coverage, measure, store
from benchmarks.accuracy import Float64, floored_error, gradients
from benchmarks.models import causal_batch
from benchmarks.zoo.routing import decisive_routers
from mstc import history
from mstc.driver import analyze_graph, compile_graph
from mstc.history import reports
from mstc.options import Options, Setting
from mstc.runtime.memory import measure_step

RESULTS = measure.ROOT / "benchmarks" / "results" / "axes-cpu.json"
BASE = "inductor"
CONTENDERS: dict[str, Setting | None] = {
    BASE: None,
    "tokens": Setting(loop_axes="tokens"),
    "weights": Setting(loop_axes="weights"),
    "weights, small": Setting(tightness=1.0, loop_axes="weights"),
}
_LAYERS = 2
_VOCAB = 512  # embeddings of the inputs
_LLAMA_VOCAB = 8192  # of the whole model
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Case:
    """One comparison."""

    kind: str  # a key of `_BLOCKS`, or a whole model
    tokens: int
    hidden: int
    wide: int  # features inside an MLP or an expert, tokens of a vocabulary, heads of attention
    dtype: str = "float32"

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.tokens}x{self.hidden}x{self.wide}/{self.dtype}"


class Gated(nn.Module):
    """Llama's MLP."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """GPT-2's MLP; the bias of the second product is an addition of its own."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, wide), nn.Linear(wide, hidden, bias=False)
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh")) + self.bias


class Attention(nn.Module):
    """Causal self-attention."""

    fused = True

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, hidden = x.shape
        shape = rows, tokens, self.heads, hidden // self.heads
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            scores = q @ k.mT / (hidden // self.heads) ** 0.5
            mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, hidden))


class WrittenOut(Attention):
    """The same with scores of tokens x tokens in sight."""

    fused = False


class Experts(nn.Module):
    """Gated experts in bfloat16, two for every token; the two first products are apart."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(_EXPERTS, hidden))
        shapes = (hidden, wide), (hidden, wide), (wide, hidden)
        self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(_EXPERTS, *shape) * shape[0] ** -0.5) for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        shares, choice = (rows @ self.router.T).float().softmax(-1).topk(2, -1)
        keys, order = choice.flatten().sort()
        counts = torch.histc(keys.float(), bins=_EXPERTS, min=0, max=_EXPERTS - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        y = rows[order // 2]
        y = F.silu(torch._grouped_mm(y, self.gate, offs=ends)) * torch._grouped_mm(
            y, self.up, offs=ends
        )
        y = torch._grouped_mm(y, self.down, offs=ends) * shares.to(x.dtype).flatten()[order, None]
        return torch.zeros_like(rows).index_add(0, order // 2, y).view_as(x)


def _experts(hidden: int, wide: int) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=wide, num_experts=_EXPERTS, num_experts_per_tok=2
    )
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=hidden**-0.5)
    return block


_EXPERTS = 8
_BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "gated": Gated,
    "plain": Plain,
    "fused attention": Attention,
    "attention": WrittenOut,
    "experts": _experts,
    "split experts": Experts,
    "vocabulary": lambda hidden, _: nn.Linear(hidden, hidden),
}


class Model(nn.Module):
    """Embeddings, blocks on a residual stream, a loss: a number per token, or a vocabulary."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCAB, case.hidden)
        block = _BLOCKS[case.kind]
        self.norms = nn.ModuleList(nn.RMSNorm(case.hidden) for _ in range(_LAYERS))
        self.blocks = nn.ModuleList(block(case.hidden, case.wide) for _ in range(_LAYERS))
        self.has_vocabulary = case.kind == "vocabulary"
        width = case.wide if self.has_vocabulary else 1
        self.head = nn.Linear(case.hidden, width, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        scores = self.head(x).float()
        if self.has_vocabulary:
            return F.cross_entropy(scores.flatten(0, 1), labels.flatten())
        return F.softplus(scores).mean()


CASES = (
    Case("gated", 128, 1024, 16384, "bfloat16"),
    Case("gated", 512, 1024, 4096),
    Case("gated", 512, 1024, 4096, "bfloat16"),
    Case("gated", 2048, 1024, 4096, "bfloat16"),
    Case("gated", 4096, 512, 2048),
    Case("plain", 512, 1024, 4096),
    Case("plain", 1024, 768, 3072),
    Case("attention", 2048, 512, 8),
    Case("fused attention", 2048, 512, 8),
    Case("vocabulary", 128, 512, 65536),
    Case("split experts", 512, 256, 2048, "bfloat16"),
    Case("split experts", 4096, 256, 512, "bfloat16"),
    Case("experts", 4096, 256, 512, "bfloat16"),
    Case("llama", 2048, 1024, 4096, "bfloat16"),
)


def _llama(case: Case) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.wide,
        num_hidden_layers=_LAYERS,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 128,
        vocab_size=_LLAMA_VOCAB,
        max_position_embeddings=case.tokens,
    )
    return LlamaForCausalLM(config).train()


def build(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its batch: the same in any process."""
    torch.manual_seed(0)
    if case.kind == "llama":
        model = _llama(case).to(getattr(torch, case.dtype))
        return model, causal_batch(_LLAMA_VOCAB, 1, case.tokens, "cpu")
    model = Model(case)
    if case.kind.endswith("experts"):
        decisive_routers(model, _EXPERTS)
    ids = torch.randint(_VOCAB, (1, case.tokens))
    return model.to(getattr(torch, case.dtype)), {"ids": ids, "labels": ids.clone()}


def row(job: dict[str, Any]) -> dict[str, Any]:
    """One case: contender -> peak, error, seconds of each round, loops."""
    coverage.let_dynamo_compile_everything()
    case = Case(**job["case"])
    model, batch = build(case)
    truth = _truth(case)
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, setting in CONTENDERS.items():
        known = len(reports())
        compiled = measure.compiled_by(model, _backend(setting))
        step = measure.training_step(compiled, batch)
        measure.clear_gradients(model)
        step()
        error = floored_error(gradients(model), truth)
        step()  # so that nothing is made or tuned while measuring
        trace = measure_step(step, model.parameters())
        found[name] = {
            "peak_nbytes": trace.peak_nbytes,
            "peak_intermediate_nbytes": trace.peak_intermediate_nbytes,
            "error": error["all"],
            "worst": error["worst"],
        }
        if setting is not None:
            found[name] |= _found(known)
        steps[name] = step
    del truth
    times = _alternate(steps, model, job["rounds"])
    for name, values in times.items():
        found[name]["rounds_s"] = [round(value, 5) for value in values]
    return {"case": job["case"], "contenders": found, "planned": planned(case)}


def planned(case: Case) -> list[dict[str, Any]]:
    """The loops that mst makes by itself."""
    model, batch = build(case)
    known = len(reports())

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        report, call = analyze_graph(gm, inputs, Options())
        history.add(report)
        return call

    measure.compiled_by(model, backend)(**batch)
    return _found(known)["loops"]


def _alternate(
    steps: dict[str, Callable[[], object]], model: nn.Module, rounds: int
) -> dict[str, list[float]]:
    """Seconds of the processor of each round of each step, in turns. These, unlike the clock's, do
    not count what other programs of the machine do meanwhile."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            measure.clear_gradients(model)
            begin = time.process_time()
            step()
            times[name].append(time.process_time() - begin)
    return times


def _truth(case: Case) -> dict[str, Tensor]:
    model, batch = build(case)
    step = measure.training_step(model.double(), batch)
    with Float64():
        step()
    return gradients(model)


def _backend(setting: Setting | None) -> str | Callable[..., Any]:
    if setting is None:
        return BASE

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, inputs, Options(setting=setting))

    return backend


_OF_A_LOOP = ("seed", "mode", "axis_length", "chunk", "count")


def _found(known: int) -> dict[str, Any]:
    """The loops of what was compiled after `known` reports, and what was refused or went wrong."""
    new = reports()[known:]
    graphs = [graph for report in new for graph in report.graphs]
    loops = [loop for graph in graphs for loop in graph.loops]
    return {
        "loops": [{name: getattr(loop, name) for name in _OF_A_LOOP} for loop in loops],
        "refused": [f"{r.subject}: {r.reason}" for graph in graphs for r in graph.refusals],
        "notes": [note for report in new for note in report.notes],
    }


def main(arguments: list[str]) -> int:
    if measure.serve(row, arguments):
        return 0
    parser = argparse.ArgumentParser(
        prog="benchmarks.axes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", help="cases whose key contains this text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", type=Path, help="a folder that keeps C++ kernels between runs")
    parser.add_argument("--redo", action="store_true", help="also cases that the results have")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--force", action="store_true", help="drop results of other versions")
    options = parser.parse_args(arguments)
    if not options.page:
        measured(options)
    axes_page.write(json.loads(RESULTS.read_text()))
    return 0


def measured(options: argparse.Namespace) -> None:
    header = measure.environment("cpu") | {"date": date.today().isoformat()}
    results = store.load(RESULTS, header, options.force)
    for case in tqdm([c for c in CASES if (options.only or "") in c.key], unit="case"):
        if case.key in results["records"] and not options.redo:
            continue
        try:
            found = measure.run_fresh(
                "benchmarks.axes",
                {"case": vars(case), "rounds": options.rounds},
                timeout_s=_TIMEOUT_S,
                kernels=options.kernels,
            )
        except measure.WorkerFailed as error:
            tqdm.write(f"{case.key}: {error}")  # no row: the next run tries again
            continue
        results["records"][case.key] = found
        store.save(RESULTS, results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
