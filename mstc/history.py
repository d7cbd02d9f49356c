"""The reports of this process, newest last; bounded, so that a long run with many graphs does not
grow."""

from __future__ import annotations

from collections import deque

from mstc.report import Report

_REPORTS: deque[Report] = deque(maxlen=256)
_NAMES: dict[int, str] = {}  # what a loop's body was made of, by the hash of its text


def add(report: Report) -> None:
    _REPORTS.append(report)


def note(text: str) -> None:
    """Add to the latest report what turned out when its graphs ran."""
    if _REPORTS and text not in _REPORTS[-1].notes:
        _REPORTS[-1].notes.append(text)


def name_body(spec: str, name: str) -> None:
    """Keep what a loop is of, for pictures; equal layers have one name."""
    if len(_NAMES) > 4096:
        _NAMES.clear()
    _NAMES[hash(spec)] = name


def name_of_body(spec: str) -> str:
    """ "op at file:line", or "" if it was compiled in another process."""
    return _NAMES.get(hash(spec), "")


def reports() -> list[Report]:
    return list(_REPORTS)


def last_report() -> Report:
    """What the latest compilation found, planned and refused.

    Raises:
        LookupError: nothing was compiled with ``backend="mst"`` in this process yet.
    """
    if not _REPORTS:
        raise LookupError(
            'nothing was compiled with backend="mst" yet: call the compiled model once, then ask.'
        )
    return _REPORTS[-1]
