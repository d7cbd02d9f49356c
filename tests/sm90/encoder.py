"""Compiles an encoder's step behind a padding mask for sm_90; see the package."""

from __future__ import annotations

import json
import re
from contextlib import suppress

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, BertModel

from tests.sm90 import device
from tests.sm90.emitted import Stopped, collected, stop

TOKENS, HEADS, HIDDEN = 4096, 2, 64
_SHAPE = f"(1, {HEADS}, {TOKENS}, {TOKENS})"


def main() -> None:
    device.install_or_leave()
    config = BertConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=TOKENS,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = BertModel(config, add_pooling_layer=False)
            ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        with collected(stop) as modules, suppress(Stopped):
            compiled = torch.compile(model, backend="mst")
            compiled(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.sum()
    result = [
        {
            "role": module.role,
            "buffers": module.buffers,
            # strides of the masks that attention reads
            "strides": [
                re.findall(rf"{re.escape(_SHAPE)}, (\([^)]*\))", line)
                for line in module.text.splitlines()
                if "efficient_attention" in line and " = torch.ops" in line
            ],
        }
        for module in modules
    ]
    print(json.dumps({"modules": result}))


if __name__ == "__main__":
    main()
