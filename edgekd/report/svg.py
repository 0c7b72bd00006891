"""SVG as text: elements, axes with round ticks, and labels that keep out of each other's way.

Colours and type sizes come from the page's style sheet by class, so that a chart follows light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_CHAR_PX, _LINE_PX = 7.2, 15.0  # of a label in 12 px type; a little more than most fonts need


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that a label takes or must keep out of; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area both cover, in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start_px: float
    end_px: float
    logarithmic: bool = False

    def px(self, value: float) -> float:
        """Where `value` lies."""
        low, high, at = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start_px + (at - low) / (high - low) * (self.end_px - self.start_px)

    def ticks(self, most: int) -> list[float]:
        """At most about `most` round values within the axis."""
        return _log_ticks(self.low, self.high, most) if self.logarithmic else _ticks(self.low, self.high, most)


def element(name: str, content: Markup | str = "", /, **attributes: object) -> Markup:
    """One element; attribute names are written with `_` for `-`, `cls` for `class`; everything is escaped."""
    parts = [Markup("<") + Markup(name)]
    for key, value in attributes.items():
        shown = f"{value:.1f}" if isinstance(value, float) else value
        key = "class" if key == "cls" else key.replace("_", "-") if key != "viewBox" else key
        parts.append(Markup(' {}="{}"').format(key, shown))
    return Markup("").join(parts) + Markup(">") + escape(content) + Markup("</" + name + ">")


def joined(parts: Sequence[Markup]) -> Markup:
    """The elements one after another."""
    return Markup("").join(parts)


def padded(
    values: Sequence[float], start_px: float, end_px: float, *, logarithmic: bool, share: float, above: float = 0.0
) -> Axis:
    """An axis around `values` with `share` of their range free at both ends, and `above` more at the end."""
    low, high = min(values), max(values)
    if logarithmic:
        gap = max(math.log10(high / low), 0.2) * share
        return Axis(low / 10**gap, high * 10**gap, start_px, end_px, logarithmic=True)
    span = max(high - low, abs(high) * 1e-3, 1e-6)
    return Axis(low - span * share, high + span * (share + above), start_px, end_px)


def text_width(text: str) -> float:
    """About how wide a label is, in pixels."""
    return len(text) * _CHAR_PX


def shortened(text: str, most: int) -> str:
    """`text` in at most so many characters; the middle gives way, since ids differ at their ends."""
    if len(text) <= most:
        return text
    keep = most - 1
    return text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]


def place(
    x: float,
    y: float,
    text: str,
    taken: Sequence[Box],
    points: Sequence[tuple[float, float]],
    frame: Box,
    radius: float,
) -> tuple[Box, bool]:
    """Where a label of a point goes: the free place nearest to it, and whether it is so far that it needs a line.

    Near places are tried before far ones, right and left before above and below; where none is free the one that
    covers least is taken. A place nearer to another point, or behind one, would name the wrong point and costs much.

    Args:
        x: of the point, in pixels.
        y: of the point.
        text: the label.
        taken: what should stay visible.
        points: all points of the chart, this one too.
        frame: the plot.
        radius: of the point's mark.
    """
    width, height = text_width(text), _LINE_PX
    others = [(a, b) for a, b in points if abs(a - x) + abs(b - y) > 1]
    best, best_cost, far = Box(x, y - height, x + width, y), math.inf, False
    for distance in (radius + 4, radius + 12, radius + 24, radius + 38, radius + 54, radius + 72, radius + 92):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), *_SLANTED):
            left = x + dx * distance if dx > 0 else x + dx * distance - width if dx < 0 else x - width / 2
            middle = y + dy * (distance + height / 2 - 2)
            box = Box(left, middle - height / 2, left + width, middle + height / 2)
            own = _distance(box, x, y)
            cost = sum(box.overlap(other) for other in taken) + 8 * (width * height - box.overlap(frame))
            cost += sum(250 for a, b in others if _distance(box, a, b) < own)
            cost += sum(400 for a, b in others if _crosses(x, y, box, a, b)) + distance * 0.5
            if cost < best_cost:
                best, best_cost, far = box, cost, distance > radius + 20
    return best, far


_SLANTED = ((0.8, -0.7), (-0.8, -0.7), (0.8, 0.7), (-0.8, 0.7), (0.25, -1), (-0.25, -1), (0.25, 1), (-0.25, 1))


def _distance(box: Box, x: float, y: float) -> float:
    return math.hypot(max(box.left - x, 0.0, x - box.right), max(box.top - y, 0.0, y - box.bottom))


def _crosses(x: float, y: float, box: Box, a: float, b: float) -> bool:
    """Whether the line from the point at x, y to the label passes another point at a, b."""
    end_x, end_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    return any(math.hypot(x + (end_x - x) * t / 8 - a, y + (end_y - y) * t / 8 - b) < 7 for t in range(9))


def _ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) <= most:
            return found if len(found) >= 2 else _ticks(low, high, most)
    return found[:: math.ceil(len(found) / most)]
