"""Quantities as people write them on a command line: 5ms, 4MB, 1%, 20m."""

from __future__ import annotations

import re

from edgekd.errors import RecipeError

_MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def milliseconds(text: str, where: str) -> float:
    """Milliseconds in "5ms", "0.8 ms", "200us" or "1s".

    Raises:
        RecipeError: no number, no unit, or not above zero.
    """
    return _quantity(text, _MILLISECONDS, where, "a time with its unit, e.g. 5ms")


def size_bytes(text: str, where: str) -> int:
    """Bytes in "4MB", "900 kB" or "2MiB"; a kB is 1000 bytes, a KiB 1024.

    Raises:
        RecipeError: no number, no unit, or not above zero.
    """
    return round(_quantity(text, _BYTES, where, "a size with its unit, e.g. 4MB"))


def seconds(text: str, where: str) -> float:
    """Seconds in "90s", "20m", "20 min" or "1.5h".

    Raises:
        RecipeError: no number, no unit, or not above zero.
    """
    return _quantity(text, _SECONDS, where, "a time with its unit, e.g. 20m")


def fraction(text: str, where: str) -> float:
    """The fraction in "0.01" or "1%".

    Raises:
        RecipeError: no number, or outside 0 to 1.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise RecipeError(f"'{text}' is no fraction", where=where, expected="0 to 1, e.g. 0.01, or 1%")
    return value


def _quantity(text: str, units: dict[str, float] | dict[str, int], where: str, expected: str) -> float:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zµ]+)\s*", text.lower())
    if not match or match[2] not in units or float(match[1]) <= 0:
        raise RecipeError(f"'{text}' is not understood", where=where, expected=expected)
    return float(match[1]) * units[match[2]]
