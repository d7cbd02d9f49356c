"""How many floating-point operations a loop does, for `torch.utils.flop_counter`.

By way of it AOTAutograd knows what computing a loop again would cost, when it chooses under
`activation_memory_budget`; and a `FlopCounterMode` of the user's counts what loops do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from mstc.inductor import detect_fake_mode, hide_autocast
from mstc.runtime.loop import Program, chunks_of, program_of


@register_flop_formula(torch.ops.mst.loop, get_raw=True)
def loop_flops(
    inputs: Sequence[torch.Tensor],
    sizes: Sequence[int],
    chunk: int,
    spec: str,
    lowering: str,
    out_val: object = None,
) -> int:
    """Of all chunks of one call of the loop op; chunks of one length are counted once."""
    program = program_of(spec, lowering)
    mode = detect_fake_mode(inputs) or FakeTensorMode()
    with mode, torch.no_grad(), hide_autocast():
        fakes = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs
        ]
        numbers = Counter(size for _, size in chunks_of(sizes[0], chunk))
        return sum(n * _chunk_flops(program, fakes, sizes, size) for size, n in numbers.items())


def _chunk_flops(
    program: Program, inputs: Sequence[torch.Tensor], sizes: Sequence[int], size: int
) -> int:
    with FlopCounterMode(display=False) as counter:
        values = iter(program.body(size, *sizes[1:], *program.first_slices(inputs, sizes, size)))
        for output in program.outputs:
            for count in output.terms:
                *_, left, right = (next(values) for _ in range(count))
                torch.mm(left, right)
            if not output.terms:
                next(values)
    return counter.get_total_flops()
