"""What MODEL names on the command line: a model without memory, and a batch for it.

    config.json, DIRECTORY, hub/name     a configuration of transformers; random weights
    script.py:build                      a function of the user's: ``build(**wanted)`` returns
                                         ``(model, batch)``, the batch a dict (keyword arguments) or
                                         a tuple; of `seq_len`, `batch_size` and `dtype` it is given
                                         those that it takes

Everything is made on the "meta" device: shapes, and no data.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_LABELS_PER_TOKEN = (  # how transformers calls such models
    "ForCausalLM",
    "LMHeadModel",
    "ForMaskedLM",
    "ForConditionalGeneration",
    "ForTokenClassification",
)


class SubjectError(Exception):
    """MODEL, or what goes with it, cannot be used; the message is one line for the user."""


Batch = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True)
class Wanted:
    """The batch and precision that the user asked for."""

    seq_len: int  # tokens per sequence
    batch_size: int = 1
    dtype: str = "bf16"  # of weights, a key of `DTYPES`
    checkpoint: bool = False  # every layer computed again in the backward
    num_layers: int | None = None  # of a configuration, instead of its own; None: all

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SubjectError(f"--dtype {self.dtype}: it must be one of {', '.join(DTYPES)}.")
        for name in ("seq_len", "batch_size"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise SubjectError(f"{option} {getattr(self, name)}: it must be at least 1.")


@dataclass(frozen=True)
class Subject:
    """A model that trains, and one batch."""

    name: str
    model: nn.Module
    batch_of: Callable[[int], Batch]  # tokens per sequence -> arguments of the model
    seq_len: int
    num_layers: int | None = None  # of a configuration whose layers may be fewer; else None
    period: int = 1  # layers after which their kinds repeat
    notes: tuple[str, ...] = ()  # what was changed so that the batch fits

    @property
    def batch(self) -> Batch:
        return self.batch_of(self.seq_len)


def load_subject(model: str, wanted: Wanted) -> Subject:
    """Make what the command line names.

    Raises:
        SubjectError: it does not exist, cannot be imported, or is of a kind that needs a script.
    """
    path, colon, function = model.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_script(Path(path), function, wanted)
    if model.endswith(".py"):
        raise SubjectError(f"{model}: which function makes the model? Say {model}:NAME.")
    return _from_config(model, wanted)


# --- a function of the user's


def _from_script(path: Path, function: str, wanted: Wanted) -> Subject:
    if not path.is_file():
        raise SubjectError(f"{path}: there is no such file.")
    build = _function(path, function)
    made = _build(build, path, function, wanted)

    def batch_of(seq_len: int) -> Batch:
        same = seq_len == wanted.seq_len
        one = made if same else _build(build, path, function, replace(wanted, seq_len=seq_len))
        batch = one[1]
        if isinstance(batch, dict):
            return (), batch
        return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {}

    if wanted.checkpoint:
        _checkpoint(made[0])
    return Subject(f"{path}:{function}", made[0].train(), batch_of, wanted.seq_len)


def _build(
    build: Callable[..., Any], path: Path, function: str, wanted: Wanted
) -> tuple[nn.Module, Any]:
    names = ("seq_len", "batch_size", "dtype")
    values = {n: getattr(wanted, n) for n in names} | {"dtype": DTYPES[wanted.dtype]}
    parameters = inspect.signature(build).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {n: v for n, v in values.items() if takes_all or n in parameters}
    try:
        with torch.device("meta"):
            made = build(**given)
    except Exception as error:  # the user's own code
        raise SubjectError(f"{path}:{function} failed: {_one_line(error)}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise SubjectError(
            f"{path}:{function} returned {type(made).__name__}; it must return (model, batch)."
        )
    return made


def _function(path: Path, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickling look there
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        raise SubjectError(f"{path} cannot be imported: {_one_line(error)}") from error
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise SubjectError(
            f"{path} has no function {name!r} (it has: {', '.join(known) or 'none'})."
        )
    return found


# --- a configuration of transformers


def _from_config(name: str, wanted: Wanted) -> Subject:
    try:
        import transformers
    except ImportError as error:
        raise SubjectError(
            "a configuration needs transformers (pip install 'mstc[hf]'); "
            "or pass script.py:build, a function that returns (model, batch)."
        ) from error
    transformers.logging.set_verbosity_error()
    config = _config(name, transformers)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    notes: list[str] = []
    most = getattr(text, "max_position_embeddings", None)
    if isinstance(most, int) and most < wanted.seq_len:
        text.max_position_embeddings = wanted.seq_len
        notes.append(f"max_position_embeddings raised from {most:,} to {wanted.seq_len:,}")
    depth, period = _layers(config, text)
    if wanted.num_layers is not None:
        _shorten(text, depth or 0, wanted.num_layers)
    if wanted.checkpoint and hasattr(text, "use_cache"):
        text.use_cache = False  # transformers would warn, and switch it off
    kind = _class(config, transformers)
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=DTYPES[wanted.dtype])
    except Exception as error:  # whatever a configuration makes the library raise
        raise SubjectError(f"{name}: {kind.__name__} cannot be made: {_one_line(error)}") from error

    def batch_of(seq_len: int) -> Batch:
        return (), _batch(kind.__name__, config, replace(wanted, seq_len=seq_len))

    batch_of(wanted.seq_len)  # or there is none for such a model
    if wanted.checkpoint:
        _checkpoint(model)
    return Subject(name, model.train(), batch_of, wanted.seq_len, depth, period, tuple(notes))


def _layers(config: Any, text: Any) -> tuple[int | None, int]:
    """How many layers there are, and after how many their kinds repeat; None where one number does
    not say it."""
    depth = getattr(text, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False) or not isinstance(depth, int):
        return None, 1
    kinds = [v for v in vars(text).values() if isinstance(v, list) and len(v) == depth]
    for period in range(1, depth):
        if all(v[i] == v[i - period] for v in kinds for i in range(period, depth)):
            return depth, period
    return depth, max(depth, 1)


def _shorten(text: Any, depth: int, num_layers: int) -> None:
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers


def _config(name: str, transformers: Any) -> Any:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise SubjectError(f"{name}: there is no config.json in this folder.")
    if path.suffix == ".json" and not path.is_file():
        raise SubjectError(f"{name}: there is no such file.")
    if path.is_file():
        try:
            entry = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise SubjectError(f"{name} is no JSON: {_one_line(error)}") from error
        if not isinstance(entry, dict) or "model_type" not in entry:
            raise SubjectError(
                f'{name} has no "model_type": it is no configuration of transformers.'
            )
        if entry["model_type"] not in transformers.CONFIG_MAPPING:
            raise SubjectError(
                f"{name}: transformers {transformers.__version__} does not know the model_type "
                f"{entry['model_type']!r}."
            )
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # no such name, no network, an invalid value
        raise SubjectError(f"{name} cannot be loaded: {_one_line(error)}") from error


def _class(config: Any, transformers: Any) -> Any:
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    for mapping in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_MASKED_LM_MAPPING,
    ):
        if type(config) in mapping:
            return mapping[type(config)]
    raise SubjectError(
        f"a configuration of type {config.model_type!r} names no class to train "
        '(its "architectures"); pass script.py:build instead.'
    )


def _batch(kind: str, config: Any, wanted: Wanted) -> dict[str, Tensor]:
    """Inputs and labels by what transformers calls such models."""
    rows = wanted.batch_size

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device="meta")

    tokens = numbers(rows, wanted.seq_len)
    if kind.endswith("ForImageClassification"):
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (rows, getattr(config, "num_channels", 3), *sides)
        pixels = torch.zeros(shape, dtype=DTYPES[wanted.dtype], device="meta")
        return {"pixel_values": pixels, "labels": numbers(rows)}
    if kind.endswith("ForSequenceClassification"):
        return {"input_ids": tokens, "labels": numbers(rows)}
    needs_more = hasattr(config, "vision_config") or hasattr(config, "num_mel_bins")
    if kind.endswith(_LABELS_PER_TOKEN) and not needs_more:
        return {"input_ids": tokens, "labels": tokens}
    raise SubjectError(
        f"no batch is known for {kind}; pass script.py:build, a function that returns "
        "(model, batch)."
    )


def _checkpoint(model: nn.Module) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise SubjectError(
            "--checkpoint is for models of transformers; let your function return a model that "
            "checkpoints."
        )
    enable({"use_reentrant": False})


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
