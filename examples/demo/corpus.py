"""Text, tokenizer, batches: from the sources of Python's own library, so nothing is downloaded."""

import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor


def sources(max_nbytes: int) -> list[str]:
    """Files of the standard library, in the order of their names, up to `max_nbytes` of text."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    nbytes = 0
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test"} & set(path.relative_to(folder).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        nbytes += len(text)
        if nbytes >= max_nbytes:
            break
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-pair encoding over bytes, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches(texts: list[str], tokenizer: Tokenizer, tokens: int, count: int) -> list[Tensor]:
    """`count` batches of one row, cut from the start of the text without overlap."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text).ids
        if len(ids) >= tokens * count:
            break
    if len(ids) < tokens * count:
        raise ValueError(
            f"{count} batches of {tokens} tokens need more text than {len(ids)} tokens"
        )
    return list(torch.tensor(ids[: tokens * count]).view(count, 1, tokens))
