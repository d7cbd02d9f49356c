"""What ``mstc doctor`` looks at."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from torch._dynamo import list_backends

import mstc
from mstc.inductor import cache_folder, cpp_compiler

Verdict = Literal["ok", "optional", "missing"]
_OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict  # "optional": not there, and only some uses need it
    found: str  # what there is, or what to do


def run_all() -> list[Check]:
    """All checks, the essential ones first."""
    return [
        Check("python", "ok", platform.python_version()),
        Check("mstc", "ok", f"{mstc.__version__} in {Path(mstc.__file__).parent}"),
        _torch(),
        _backend(),
        _compiler(),
        _device(),
        _cache(),
        _package("triton", "kernels on a GPU (a GPU build of torch brings it)"),
        _package("transformers", "models of Hugging Face: pip install 'mstc[hf]'"),
        _package("matplotlib", "mstc plot: pip install 'mstc[cli]'"),
    ]


def _torch() -> Check:
    version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    if version < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return Check("torch", "missing", f"{torch.__version__}; mstc needs {oldest} or newer")
    return Check("torch", "ok", torch.__version__)


def _backend() -> Check:
    names = [e.name for e in metadata.entry_points(group="torch_dynamo_backends")]
    if "mst" in names:
        return Check("backend", "ok", 'torch.compile(model, backend="mst") needs no import')
    if "mst" in list_backends(exclude_tags=()):
        return Check("backend", "optional", "known after `import mstc` only: mstc is not installed")
    return Check("backend", "missing", "not registered: reinstall mstc")


def _compiler() -> Check:
    try:
        return Check("C++ compiler", "ok", cpp_compiler())
    except Exception as error:  # PyTorch's own, of several kinds
        verdict: Verdict = "optional" if torch.cuda.is_available() else "missing"
        return Check("C++ compiler", verdict, f"Inductor needs one on a CPU: {error}")


def _device() -> Check:
    if not torch.cuda.is_available():
        return Check("device", "ok", f"CPU, {torch.get_num_threads()} threads; no GPU")
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return Check("device", "ok", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free")


def _cache() -> Check:
    folder = cache_folder()
    if folder is None:
        return Check("compile caches", "optional", "switched off: every process compiles anew")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            "compile caches",
            "missing",
            f"{folder} cannot be written to ({os.strerror(error.errno or 0)}): "
            "set TORCHINDUCTOR_CACHE_DIR to a folder that can",
        )
    return Check("compile caches", "ok", str(folder))


def _package(name: str, use: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "optional", f"for {use}")
