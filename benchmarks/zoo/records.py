"""The nouns of the zoo: what a row of the coverage table is made from.

A *scale* gives sizes, an *architecture* builds a model and its batch at a scale.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from benchmarks.models import Subject
from benchmarks.zoo.routing import decisive_routers


class Unavailable(RuntimeError):
    """A model cannot be built here (its class is missing), or has no such mode."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a model and of its batch."""

    hidden: int  # features
    heads: int  # attention heads
    layers: int  # of an encoder and of a decoder each, where there are both
    vocab: int  # tokens
    rows: int  # sequences (or images) in a batch
    tokens: int  # per sequence
    image: int  # pixels, the side of an image

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def wide(self) -> int:
        """Features inside an MLP."""
        return 4 * self.hidden


ROW = Scale(hidden=128, heads=4, layers=2, vocab=8192, rows=1, tokens=1024, image=64)
"""Small enough for a row in a minute, large enough that the default options chunk it."""

TINY = Scale(hidden=32, heads=2, layers=1, vocab=160, rows=2, tokens=16, image=16)
"""For tests: builds, and gives a loss."""

Compiler = Callable[[Any], Callable[..., Any]]


@dataclass(frozen=True)
class Architecture:
    """One row of the table in each mode."""

    name: str  # in keys and on the command line
    title: str  # in the table
    build: Callable[[Scale], nn.Module]
    batch: Callable[[Scale], dict[str, Any]]
    sizes: dict[str, int]  # fields of `Scale` in which the row differs from `ROW`
    has_vocabulary: bool = True  # a head as wide as the vocabulary, on every token
    blocks: tuple[str, ...] = ()  # module lists to checkpoint; empty: transformers' own switch
    experts: int = 0  # of a mixture of experts; 0 where there is none
    compile: Callable[[nn.Module, Compiler], Callable[..., Any]] = lambda model, compiler: compiler(
        model
    )

    def at(self, scale: Scale) -> Scale:
        """The row's own sizes, if `scale` is the rows'; a scale for tests is taken as it is."""
        return replace(scale, **self.sizes) if scale == ROW else scale

    def subject(self, scale: Scale) -> Subject:
        """The same seed gives the same weights and the same batch, in any process.

        Raises:
            Unavailable: the installed version of a library lacks the model.
        """
        sizes = self.at(scale)
        torch.manual_seed(0)
        model = self.build(sizes).train()
        if self.experts:
            decisive_routers(model, self.experts)
        torch.manual_seed(1)
        return Subject(model, self.batch(sizes))


def checkpoint(architecture: Architecture, model: nn.Module) -> None:
    """Have every block recomputed in the backward, as the model's users would.

    Raises:
        Unavailable: the model has no checkpointing.
    """
    if architecture.blocks:
        for path in architecture.blocks:
            for block in model.get_submodule(path).children():
                block.forward = functools.partial(
                    torch_checkpoint, block.forward, use_reentrant=False
                )
        return
    switch: Any = model
    if not getattr(switch, "supports_gradient_checkpointing", False):
        raise Unavailable("the model does not support gradient checkpointing")
    switch.gradient_checkpointing_enable({"use_reentrant": False})
    switch.config.use_cache = False  # what transformers' own warning says to do
