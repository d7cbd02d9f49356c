"""Bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_TEXT = re.compile(r"\s*([-+.\deE]+?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of "80GiB", "80 GB" or "1e9".

    Raises:
        ValueError: no number, an unknown unit, or less than a byte.
    """
    match = _TEXT.fullmatch(text)
    unit = (match[2] or "B").upper() if match else ""
    try:
        value = float(match[1]) * _UNITS[unit] if match else float("nan")
    except (ValueError, KeyError):
        value = float("nan")
    if not value >= 1 or value == float("inf"):
        raise ValueError("say for example 80GiB, 24GB or 512MiB")
    return int(value)


def format_bytes(nbytes: float) -> str:
    """Bytes with a unit, three digits."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            value = nbytes / unit
            return f"{value:.3g} {name}" if value < 1000 else f"{value:,.0f} {name}"
    return f"{nbytes:.0f} B"
