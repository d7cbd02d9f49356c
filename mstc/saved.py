"""Reports on disk, beside PyTorch's compiled graphs.

A graph that comes from PyTorch's cache is not compiled, so no pass sees it. Its report is kept
under a key of everything that the passes would have seen: the Dynamo graph as text (with the user's
source lines, which the report quotes), our sources and all options. A report that cannot be read or
written costs nothing but itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from pathlib import Path

import torch
from torch.fx import GraphModule

from mstc.inductor import cache_folder
from mstc.report import Report
from mstc.whole import whole_file

log = logging.getLogger(__name__)


def report_key(gm: GraphModule, pass_key: object, config: object) -> str:
    """What names the report of a graph.

    Args:
        gm: the graph as Dynamo made it.
        pass_key: of our sources and options.
        config: Inductor's options.
    """
    text = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    gradients = [
        getattr(n.meta.get("example_value"), "requires_grad", False)
        for n in gm.graph.find_nodes(op="placeholder")
    ]
    state = (torch.__version__, torch.is_grad_enabled(), gradients, str(pass_key), str(config))
    return hashlib.sha256(repr((text, state)).encode()).hexdigest()


def _path(kind: str, key: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"mst_{kind}" / f"{key}.json"


def save_entry(kind: str, key: str, text: str) -> None:
    """Keep a text for later processes; a folder that cannot be written costs nothing but that."""
    path = _path(kind, key)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(text)


def load_entry(kind: str, key: str) -> str | None:
    """What was kept under `key`, if it is there and can be read."""
    path = _path(kind, key)
    try:
        return path.read_text() if path is not None and path.exists() else None
    except (OSError, ValueError) as error:
        log.debug("a kept entry cannot be read", exc_info=error)
        return None


def save_report(key: str, report: Report) -> None:
    """Keep a report for the processes that will get its graph from the cache."""
    save_entry("reports", key, report.to_json())


def load_report(key: str) -> Report | None:
    """The report that was kept under `key`, if there is one."""
    text = load_entry("reports", key)
    try:
        return None if text is None else Report.from_json(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        log.debug("a kept report cannot be read", exc_info=error)
        return None
