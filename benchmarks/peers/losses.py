"""The loss of a head a few tokens at a time, as fine-tuning libraries write it by hand.

The idea is TRL's, torchtune's and others': project a chunk of the hidden states, take the summed
cross entropy, checkpoint both, so that the backward projects the chunk once more. Written here from
the idea, in the plainest way.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNKS = 16
IGNORED = -100  # the label that counts for nothing


def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    of_chunk: Callable[[Tensor, Tensor, Tensor], Tensor] = chunk_loss,
) -> Tensor:
    """Mean cross entropy of `hidden` [tokens, features] under `weight` [vocabulary, features]."""
    total = hidden.new_zeros(())
    for part, wanted in zip(hidden.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True):
        total = total + checkpoint(of_chunk, part, weight, wanted, use_reentrant=False)
    return total / (labels != IGNORED).sum()
