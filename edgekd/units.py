"""Quantities as people write them on a command line, 5ms, 4MB, 1%, 20m, and as they read them: 0.218 ms, 1.12 MB."""

from __future__ import annotations

import math
import re

from edgekd.errors import RecipeError

MINUS = "−"
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


def size(value: int, significant: int = 3) -> str:
    """Bytes in decimal units, as file managers and app stores count: 288 kB, 1.12 MB."""
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5 or unit == "GB":
            return f"{value} B" if unit == "B" else f"{digits(amount, significant)} {unit}"
        amount /= 1000
    raise AssertionError


def quantity(value: int, significant: int = 3) -> str:
    """A count with its SI prefix: 40.8 M, 270 k, 12."""
    amount = float(value)
    for prefix in ("", "k", "M", "G"):
        if amount < 999.5:
            return f"{value}" if not prefix else f"{digits(amount, significant)} {prefix}"
        amount /= 1000
    return f"{digits(amount, significant)} T"


def plain(text: str) -> str:
    """The figure without zeros at the end of its decimals, "5.00 ms" → "5 ms": limits and ticks are exact."""
    number, space, unit = text.partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def digits(value: float, significant: int = 3) -> str:
    """A number with so many significant digits, never in exponent form."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = significant - 1 - math.floor(math.log10(abs(float(f"{value:.{significant - 1}e}"))))
    return f"{round(value, decimals):.{max(decimals, 0)}f}".replace("-", MINUS)
