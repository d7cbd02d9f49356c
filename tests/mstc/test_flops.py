"""Operations of loops, as PyTorch's counter and partitioner see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mstc
from mstc.runtime.flops import loop_flops
from mstc.runtime.loop import loop_op
from tests.models import (
    EAGER,
    NON_LEAF,
    compile_mst,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
)
from tests.mstc.test_budget import BATCH, Deep


class _Calls(TorchDispatchMode):
    """What the loop op is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or Dynamo would not run what it has compiled

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is loop_op:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


@NON_LEAF
@pytest.mark.parametrize("rows", [8, 37, 301, 1000])
def test_all_that_the_model_does_and_the_recomputed_part(rows: int) -> None:
    """Every product of this model is in a loop; 301 rows leave a shorter last chunk."""
    model, batch = Deep(), BATCH()
    with FlopCounterMode(display=False) as counter:
        model(*batch)[0].backward()
    compiled = compile_mst(model, **EAGER | {"chunk_rows": rows})
    compiled(*batch)[0].backward()
    (graph,) = mstc.last_report().graphs
    assert graph.extra_work > 0.05
    with _Calls() as calls:
        compiled(*batch)[0].backward()
    total = sum(loop_flops(*args) for args in calls.found)
    assert total == round(counter.get_total_flops() * (1 + graph.extra_work))


def test_the_counter_of_pytorch_knows_it() -> None:
    with _Calls() as calls:
        compile_mst(Deep(), **EAGER)(*BATCH())
    args = calls.found[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loop_op(*args)
    assert counter.get_total_flops() == loop_flops(*args) > 0
