"""The contenders: for each, which cases it can do, what it needs, and how a user would use it.

`make(task)` gives a function of the task's inputs that does its work; it may change the task's
module. Peers are used through their published functions. Those that are written for eager PyTorch
run in it, unless their own documentation compiles them; where a peer replaces only the loss of a
model, Inductor compiles the rest.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from benchmarks import measure
from benchmarks.peers.cases import CASES, Task
from benchmarks.peers.losses import CHUNKS, chunk_loss, chunked_loss

Work = Callable[..., Any]
HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels


@dataclass(frozen=True)
class Contender:
    title: str
    make: Callable[[Task], Work]
    cases: tuple[str, ...] = CASES
    compiles: bool = True  # something must have been compiled after a step
    package: str | None = None  # that must be importable
    only_gpu: bool = False
    note: Callable[[], str] | None = None  # after two steps: what it did not do, or ""

    def missing(self, device: str) -> str:
        """Why it cannot run here, or ""."""
        if self.only_gpu and device != "cuda":
            return "needs a GPU"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"package {self.package} is not installed"
        return ""


# --- PyTorch's own


def _eager(task: Task) -> Work:
    return task.module


def _inductor(task: Task) -> Work:
    return measure.compiled(task.module, "inductor")


def _mst(task: Task) -> Work:
    return measure.compiled(task.module, "mst")


def _auto_chunker(task: Task) -> Work:
    options = {"auto_chunker.enable": True, "auto_chunker.num_chunk": CHUNKS}
    return measure.compiled_by(task.module, "inductor", options)


def _with_budget(share: float, task: Task) -> Work:
    config: Any = functorch_config
    config.activation_memory_budget = share  # of this process, which has no other contender
    return _inductor(task)


def _checkpointed(task: Task) -> Work:
    """Every decoder layer is computed again in the backward."""
    if task.case == "layer":
        return functools.partial(checkpoint, task.module, use_reentrant=False)
    task.module.gradient_checkpointing_enable({"use_reentrant": False})
    task.module.config.use_cache = False  # as transformers' warning says
    return task.module


def _checkpointed_inductor(task: Task) -> Work:
    return measure.compiled(_checkpointed(task), "inductor")


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


# --- other libraries', and ideas of theirs


def _head(loss: HeadLoss, task: Task) -> Work:
    """A loss from hidden state, head and labels; what comes before it is compiled by Inductor."""
    module = task.module
    if task.case == "linear-ce":

        def head(hidden: Tensor, labels: Tensor) -> Tensor:
            return loss(hidden, module.head.weight, labels)

        return head
    body = measure.compiled(module.model, "inductor")

    def model(input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = body(input_ids=input_ids).last_hidden_state
        shifted = labels[:, 1:].flatten()
        return loss(hidden[:, :-1].flatten(0, 1), module.lm_head.weight, shifted)

    return model


def _compiled_chunks(task: Task) -> Work:
    compiled: Any = measure.compiled(chunk_loss, "inductor")
    return _head(functools.partial(chunked_loss, of_chunk=compiled), task)


def _mlps(task: Task) -> list[Any]:
    from transformers.models.llama.modeling_llama import LlamaMLP

    return [module for module in task.module.modules() if isinstance(module, LlamaMLP)]


def _deepspeed(task: Task) -> Work:
    """As TiledMLP's docstring says: one shard per `hidden` tokens."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import (  # pyright: ignore
        TiledMLP,
    )

    def tiled(mlp: Any, x: Tensor) -> Tensor:
        shards = math.ceil(x.shape[-2] / x.shape[-1])
        return TiledMLP.apply(type(mlp).forward, mlp, x, shards, list(mlp.parameters()))

    for mlp in _mlps(task):
        mlp.forward = functools.partial(tiled, mlp)
    return task.module


def _liger(task: Task) -> Work:
    from liger_kernel import transformers as liger  # pyright: ignore

    if task.case == "linear-ce":
        fused = liger.LigerFusedLinearCrossEntropyLoss()
        return _head(lambda hidden, weight, labels: fused(weight, hidden, labels), task)
    if task.case == "mlp":
        config = task.module.config
        module = liger.LigerSwiGLUMLP(config).to(task.inputs["x"])
        module.load_state_dict(task.module.state_dict())
        task.module = module
        return module
    liger.apply_liger_kernel_to_llama(model=task.module)
    return task.module


def _cut_cross_entropy(task: Task) -> Work:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore

    return _head(linear_cross_entropy, task)


def _mini_sequence(task: Task) -> Work:
    from minis.mini_sequence import minisequence  # pyright: ignore

    parameters = dict(task.module.named_parameters())
    wrapped = minisequence(task.module)
    task.leaves = lambda: parameters  # its wrappers change the names
    return wrapped


# --- what they did not do


def _nothing_chunked() -> str:
    from torch._inductor import metrics

    return "" if metrics.num_auto_chunking else "found nothing to chunk"


def _no_loop() -> str:
    import mstc

    report = mstc.last_report()
    chunked = report is not None and any(graph.loops for graph in report.graphs)
    return "" if chunked else "left the graph as it was"


_LOSSES = ("linear-ce", "model")
_LAYERS = ("layer", "model")
CONTENDERS: dict[str, Contender] = {
    "eager": Contender("eager", _eager, compiles=False),
    "inductor": Contender("Inductor", _inductor),
    "auto_chunker": Contender(
        f"Inductor, `auto_chunker`, {CHUNKS} chunks", _auto_chunker, _LOSSES, note=_nothing_chunked
    ),
    "checkpoint": Contender("eager, layers checkpointed", _checkpointed, _LAYERS, compiles=False),
    "checkpoint+inductor": Contender(
        "Inductor, layers checkpointed", _checkpointed_inductor, _LAYERS
    ),
    "budget 0.5": Contender(
        "Inductor, `activation_memory_budget` 0.5", functools.partial(_with_budget, 0.5)
    ),
    "budget 0": Contender(
        "Inductor, `activation_memory_budget` 0", functools.partial(_with_budget, 0.0)
    ),
    "linear_cross_entropy": Contender(
        "`F.linear_cross_entropy`",
        functools.partial(_head, _linear_cross_entropy),
        _LOSSES,
        compiles=False,
    ),
    "chunked loss": Contender(
        f"chunked loss, {CHUNKS} chunks",
        functools.partial(_head, chunked_loss),
        _LOSSES,
        compiles=False,
    ),
    "chunked loss+inductor": Contender(
        f"chunked loss, {CHUNKS} chunks, each compiled", _compiled_chunks, _LOSSES
    ),
    "deepspeed": Contender(
        "DeepSpeed's TiledMLP",
        _deepspeed,
        ("mlp", "layer", "model"),
        compiles=False,
        package="deepspeed",
    ),
    "liger": Contender(
        "Liger Kernel",
        _liger,
        ("linear-ce", "mlp", "model"),
        compiles=False,
        package="liger_kernel",
        only_gpu=True,
    ),
    "cut_cross_entropy": Contender(
        "Cut Cross Entropy",
        _cut_cross_entropy,
        _LOSSES,
        compiles=False,
        package="cut_cross_entropy",
        only_gpu=True,
    ),
    "mini-s": Contender(
        "Mini-Sequence Transformer, reference",
        _mini_sequence,
        ("model",),
        compiles=False,
        package="minis",
    ),
    "mst": Contender("**mst**", _mst, note=_no_loop),
}
BASE = "inductor"


def of_case(case: str) -> list[str]:
    return [name for name, contender in CONTENDERS.items() if case in contender.cases]
