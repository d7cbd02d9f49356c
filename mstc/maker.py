"""Which op makes a value, and for which line of the user's code: told from the frames on the stack.

In code that Inductor wrote, the line ``buf7 = empty_strided_cpu(...)`` names a buffer, and Inductor
knows which nodes of the graph it is for (`mstc.emission` keeps that). Elsewhere, in eager code and
between graphs, it is the innermost frame that is neither PyTorch's nor ours.
"""

from __future__ import annotations

import linecache
import re
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import mstc
import passes
from mstc.emission import EMITTED, ORIGINS, VIEWS, Origin
from passes.source import place

_ASSIGNED = re.compile(r"\s*(\w+) = ")
_WRITTEN = re.compile(r".*\bout=(?:reinterpret_tensor\()?(\w+)")
_ORIGINAL = re.compile(r"Original ATen: \[(.*?)\]")
_COMMENT_LINES = 40  # after an allocation, in which Inductor says what it is for
_OURS = tuple(f"{Path(m.__file__ or '').parent}/" for m in (torch, mstc, passes))
_STDLIB = f"{sysconfig.get_path('stdlib')}/"
_INSTALLED = re.compile(r"/(site|dist)-packages/")  # may be a folder of the standard library's


def maker_of(func: Any) -> Origin:
    """Who makes what the op `func`, which runs now, returns; asked by the one who dispatches it."""
    frame = sys._getframe(2)
    user: FrameType | None = None
    while frame is not None and frame.f_globals.get("__name__") != "mstc.simulate":
        if frame.f_globals.get("__name__") == EMITTED:
            return _emitted(frame) or Origin(_name(func), "")
        if user is None and _is_users(frame.f_code.co_filename):
            user = frame
        frame = frame.f_back
    if user is None:
        return Origin(_name(func), "")
    file, line = user.f_code.co_filename, user.f_lineno
    return Origin(_name(func), place(file, line, linecache.getline(file, line)))


def _emitted(frame: FrameType) -> Origin | None:
    lines = linecache.getlines(frame.f_code.co_filename)[frame.f_lineno - 1 :][:_COMMENT_LINES]
    if not lines:
        return None
    origins: dict[str, Origin] = frame.f_globals[ORIGINS]
    if written := _WRITTEN.match(lines[0]):
        return origins.get(written[1])
    assigned = _ASSIGNED.match(lines[0])
    if assigned and assigned[1] in origins:
        return origins[assigned[1]]
    for line in lines:
        if original := _ORIGINAL.search(line):
            made = [op for op in original[1].split(", ") if op not in VIEWS]
            return Origin(", ".join(made) or original[1], "")
    return None


def _is_users(file: str) -> bool:
    if file.startswith((*_OURS, "<")) or not file:
        return False
    return not file.startswith(_STDLIB) or _INSTALLED.search(file) is not None


def _name(func: Any) -> str:
    return str(func).removesuffix(".default")
