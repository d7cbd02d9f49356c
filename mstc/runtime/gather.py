"""The op ``mst::gather``: one entry per row, by PyTorch's own kernel (see `passes.gathers`)."""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("mst", "FRAGMENT")
_LIBRARY.define("gather(Tensor input, Tensor index) -> Tensor")


def _gather(input: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.gather(input, -1, index)


_LIBRARY.impl("gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("mst::gather", _gather, lib=_LIBRARY)

gather_op = torch.ops.mst.gather.default
