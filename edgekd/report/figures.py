"""Figures as people read them: units, a fitting number of digits, and a real minus sign."""

from __future__ import annotations

import math

from edgekd.types import Comparison, Interval, Latency, Variant
from edgekd.units import MINUS as MINUS
from edgekd.units import digits as digits
from edgekd.units import plain as plain
from edgekd.units import quantity as quantity
from edgekd.units import size as size

DASH, TIMES = "—", "×"
_PRECISE_FROM = 5000  # samples from which a hundredth of a percent means something


def short_name(variant: Variant) -> str:
    """Its id without the target, for places that are about one target."""
    return variant.id.removeprefix(f"{variant.target}/")


def titled(text: str) -> str:
    """With a capital at its start; a word that is spelt in its own way stays: "pixel accuracy", but "mIoU"."""
    first = text.partition(" ")[0]
    return text[:1].upper() + text[1:] if first.islower() else text


def percent(fraction: float, n: int = 0) -> str:
    """0.9912 → "99.1 %", with two decimals where n samples carry them."""
    text = f"{fraction * 100:.{_decimals(n)}f}"
    if fraction < 1 and float(text) == 100:  # 100.0 is said only of all samples
        text = f"{math.floor(fraction * 100 * 10 ** _decimals(n)) / 10 ** _decimals(n):.{_decimals(n)}f}"
    return text.replace("-", MINUS) + " %"


def points(fraction: float, n: int = 0, *, signed: bool = True) -> str:
    """A difference of fractions in percentage points, 0.002 → "+0.2"; nothing but a sign where it rounds to zero."""
    text = f"{abs(fraction) * 100:.{_decimals(n)}f}"
    if float(text) == 0:
        return f"{0:.{_decimals(n)}f}"
    return (MINUS if fraction < 0 else "+" if signed else "") + text


def limit_points(fraction: float) -> str:
    """An allowed drop, exact: "1 point", "0.5 points"."""
    text = plain(points(fraction, _PRECISE_FROM, signed=False))
    return f"{text} point" if text == "1" else f"{text} points"


def percent_interval(figure: Interval) -> str:
    """[98.7, 99.6] of a fraction, in percent."""
    return f"[{percent(figure.low, figure.n)[:-2]}, {percent(figure.high, figure.n)[:-2]}]"


def points_interval(figure: Interval) -> str:
    """[−0.4, +0.8] of a difference, in points."""
    return f"[{points(figure.low, figure.n)}, {points(figure.high, figure.n)}]"


def milliseconds(value: float) -> str:
    """Three significant digits: 0.218 ms, 2.18 ms, 21.8 ms, 218 ms."""
    return f"{digits(value)} ms"


def latency_interval(latency: Latency) -> str:
    """[0.215, 0.221] of a median, in milliseconds."""
    return f"[{digits(latency.low)}, {digits(latency.high)}]"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 1 h 12 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def factor(ratio: float) -> str:
    """23.4 → "23×", 5.12 → "5.1×"."""
    text = f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.05 else f"{ratio:.2f}"
    return text + TIMES


def comparison(found: Comparison) -> str:
    """How many times faster or slower, with its interval; ratios are turned round, so that more is faster."""
    low, high = found.ratio.low, found.ratio.high
    if found.verdict == "slower":
        return f"{found.ratio.value:.2f}{TIMES} slower [{low:.2f}, {high:.2f}]"
    return f"{1 / found.ratio.value:.2f}{TIMES} as fast [{1 / high:.2f}, {1 / low:.2f}]"


def _decimals(n: int) -> int:
    return 2 if n >= _PRECISE_FROM else 1
