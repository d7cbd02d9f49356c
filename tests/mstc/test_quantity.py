"""Bytes as people write them."""

from __future__ import annotations

import pytest

from mstc.quantity import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("80GiB", 80 * 2**30), ("24 gb", 24 * 10**9), ("1e9", 10**9), ("0.5MiB", 2**19), ("7B", 7)],
)
def test_sizes_of_memory(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "nan", "inf", "lots", "8 apples", "1e999GB"])
def test_memory_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="say for example 80GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (80 * 2**30, "80 GiB"),
        (2**50, "1,048,576 GiB"),
    ],
)
def test_three_digits(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
