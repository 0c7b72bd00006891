"""The charts of the report: the metric against cost, and the metric stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgekd.report import figures, svg
from edgekd.report.svg import Axis, Box, element
from edgekd.types import Interval

KINDS = ("chosen", "teacher", "front", "other", "missed")  # of points, those that take their places first
_LOG_FROM = 5.0  # a cost axis becomes logarithmic where its largest value is so many times its smallest


@dataclass(frozen=True, slots=True)
class Point:
    """One variant in a scatter chart."""

    label: str
    accuracy: Interval
    cost: float
    cost_low: float
    cost_high: float
    kind: str  # chosen, teacher, front, missed or other: a class of the style sheet
    named: bool = True  # with its label; one without has it where the pointer rests
    radius: float = 5.0  # pixels


@dataclass(frozen=True, slots=True)
class Step:
    """One stage in a step chart."""

    label: str
    accuracy: Interval


@dataclass(frozen=True, slots=True)
class Limits:
    """Lines of the budget; None is no line."""

    accuracy: float | None
    cost: float | None
    out_of_reach: bool = False  # the limit of cost lies far below every point, off the chart


def scatter(
    points: Sequence[Point],
    limits: Limits,
    metric: str,
    cost_name: str,
    shown: Callable[[float], str],
    width: int,
    height: int,
    front: Sequence[Point] = (),
) -> Markup:
    """The metric (upwards) against a cost (to the right), with intervals as bars and the budget as dashed lines.

    A step line joins those of `front` that are the most accurate at their cost.
    """
    frame = Box(50.0, 22.0, width - 14.0, height - 44.0)
    costs = [edge for p in points for edge in (p.cost_low, p.cost_high)]
    marks = [p.cost for p in points] + ([limits.cost] if limits.cost is not None else [])
    # a limit far away from all points would squeeze them into a corner: it is told in words instead
    far = limits.cost is not None and not min(costs) / 20 <= limits.cost <= max(costs) * 20
    if far:
        marks.pop()
    logarithmic = max(marks) / min(marks) >= _LOG_FROM
    x = svg.padded([*costs, *marks], frame.left, frame.right, logarithmic=logarithmic, share=0.09)
    if not logarithmic and x.low < 0:
        x = Axis(0.0, x.high, x.start_px, x.end_px)
    heights = [edge for p in points for edge in (p.accuracy.low, p.accuracy.high)]
    if limits.accuracy is not None:
        heights.append(limits.accuracy)
    y = svg.padded(heights, frame.bottom, frame.top, logarithmic=False, share=0.07, above=0.15)  # room for labels
    below = far and limits.cost is not None and limits.cost < min(costs)
    drawn = Limits(limits.accuracy, None if far else limits.cost, out_of_reach=below)
    parts = [
        _grid(frame, x, y, shown, metric, cost_name),
        _budget(frame, x, y, drawn),
        _staircase(front, x, y, frame),
        *(_bars(p, x, y) for p in points),
    ]
    parts += [_mark(p, x, y) for p in sorted(points, key=lambda p: p.kind == "chosen")]
    parts += _labels(points, x, y, frame)
    return _chart(f"{figures.titled(metric)} against {cost_name}", _told(points, shown), parts, width, height)


def steps(stages: Sequence[Step], metric: str, width: int, height: int) -> Markup:
    """The metric of each stage as a step, with its interval, and the change from the stage before in points."""
    frame = Box(50.0, 36.0, width - 14.0, height - 34.0)
    heights = [edge for s in stages for edge in (s.accuracy.low, s.accuracy.high)]
    y = svg.padded(heights, frame.bottom, frame.top, logarithmic=False, share=0.1)
    parts = [_rows(frame, y, metric)]
    wide = (frame.right - frame.left) / len(stages)
    for index, stage in enumerate(stages):
        left, right, at = frame.left + index * wide, frame.left + (index + 1) * wide, y.px(stage.accuracy.value)
        middle = (left + right) / 2
        low, high = y.px(stage.accuracy.low), y.px(stage.accuracy.high)
        parts.append(element("line", cls="bar", x1=middle, x2=middle, y1=low, y2=high))
        change = stage.accuracy.value - stages[index - 1].accuracy.value if index else 0.0
        if index:
            before = y.px(stages[index - 1].accuracy.value)
            parts.append(element("line", cls="riser", x1=left, x2=left, y1=before, y2=at))
        kind = "start" if not index else _direction(change, stage.accuracy.n)
        parts.append(element("line", cls=f"tread {kind}", x1=left + 1.5, x2=right - 1.5, y1=at, y2=at))
        value = figures.percent(stage.accuracy.value, stage.accuracy.n)
        told = value if not index else figures.points(change, stage.accuracy.n)
        above = min(high, at) - 7
        parts.append(element("text", told, cls=f"value {kind}", x=middle, y=above, text_anchor="middle"))
        label = svg.shortened(stage.label, max(4, int(wide / 6.4)))
        parts.append(element("text", label, cls="tick", x=middle, y=frame.bottom + 19, text_anchor="middle"))
    told = "; ".join(f"{s.label}: {figures.percent(s.accuracy.value, s.accuracy.n)}" for s in stages)
    return _chart(f"{figures.titled(metric)} stage by stage", told, parts, width, height)


def _direction(change: float, n: int) -> str:
    if float(figures.points(abs(change), n, signed=False)) == 0:
        return "same"
    return "gain" if change > 0 else "loss"


def _chart(title: str, description: str, parts: Sequence[Markup], width: int, height: int) -> Markup:
    inner = element("title", title) + element("desc", description) + svg.joined(parts)
    return element(
        "svg", inner, cls="chart", viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{title}. {description}"
    )


def _told(points: Sequence[Point], shown: Callable[[float], str]) -> str:
    return "; ".join(f"{p.label}: {figures.percent(p.accuracy.value, p.accuracy.n)} at {shown(p.cost)}" for p in points)


def _rows(frame: Box, y: Axis, metric: str) -> Markup:
    """Horizontal grid lines with the metric there."""
    ticks = [tick for tick in y.ticks(5) if tick <= 1 + 1e-9]
    decimals = 0 if all(abs(t * 100 - round(t * 100)) < 1e-6 for t in ticks) else 1
    decimals = (
        decimals if all(abs(t * 10 ** (2 + decimals) - round(t * 10 ** (2 + decimals))) < 1e-4 for t in ticks) else 2
    )
    parts = []
    for tick in ticks:
        at = y.px(tick)
        parts.append(element("line", cls="grid", x1=frame.left, x2=frame.right, y1=at, y2=at))
        text = f"{tick * 100:.{decimals}f}".replace("-", figures.MINUS)
        parts.append(element("text", text, cls="tick", x=frame.left - 7, y=at + 4, text_anchor="end"))
    parts.append(element("text", f"{metric}, %", cls="axis", x=8, y=12, text_anchor="start"))
    return svg.joined(parts)


def _grid(frame: Box, x: Axis, y: Axis, shown: Callable[[float], str], metric: str, name: str) -> Markup:
    parts = [_rows(frame, y, metric)]
    for tick in x.ticks(6 if frame.right - frame.left > 380 else 4):
        at = x.px(tick)
        parts.append(element("line", cls="grid", x1=at, x2=at, y1=frame.top, y2=frame.bottom))
        parts.append(element("text", shown(tick), cls="tick", x=at, y=frame.bottom + 17, text_anchor="middle"))
    scale = ", logarithmic" if x.logarithmic else ""
    parts.append(element("text", name + scale, cls="axis", x=frame.right, y=frame.bottom + 36, text_anchor="end"))
    return svg.joined(parts)


def _budget(frame: Box, x: Axis, y: Axis, limits: Limits) -> Markup:
    """The allowed corner (cheap and accurate) tinted, its edges dashed."""
    if limits.accuracy is None and limits.cost is None and not limits.out_of_reach:
        return Markup("")
    bottom = frame.bottom if limits.accuracy is None else y.px(limits.accuracy)
    right = frame.right if limits.cost is None else x.px(limits.cost)
    parts = []
    if not limits.out_of_reach:
        width, height = right - frame.left, bottom - frame.top
        parts.append(element("rect", cls="allowed", x=frame.left, y=frame.top, width=width, height=height))
    if limits.accuracy is not None:
        parts.append(element("line", cls="limit", x1=frame.left, x2=frame.right, y1=bottom, y2=bottom))
    if limits.cost is not None:
        parts.append(element("line", cls="limit", x1=right, x2=right, y1=frame.top, y2=frame.bottom))
    note = "the limit lies far to the left of this chart" if limits.out_of_reach else "within budget"
    at = frame.bottom - 6 if limits.out_of_reach else bottom - 6
    parts.append(element("text", note, cls="note", x=frame.left + 6, y=at, text_anchor="start"))
    return svg.joined(parts)


def _staircase(front: Sequence[Point], x: Axis, y: Axis, frame: Box) -> Markup:
    """What is to be had at each cost: from every step to the next one that is more accurate."""
    steps: list[Point] = []
    for point in sorted(front, key=lambda p: (p.cost, -p.accuracy.value)):
        if not steps or point.accuracy.value > steps[-1].accuracy.value:
            steps.append(point)
    if not steps:
        return Markup("")
    path = f"M{x.px(steps[0].cost):.1f} {y.px(steps[0].accuracy.value):.1f}"
    for point in steps[1:]:
        path += f"H{x.px(point.cost):.1f}V{y.px(point.accuracy.value):.1f}"
    return element("path", cls="front", d=f"{path}H{frame.right:.1f}")


def _bars(point: Point, x: Axis, y: Axis) -> Markup:
    at_x, at_y = x.px(point.cost), y.px(point.accuracy.value)
    low, high = y.px(point.accuracy.low), y.px(point.accuracy.high)
    parts = [element("line", cls="bar", x1=at_x, x2=at_x, y1=low, y2=high)]
    parts += [element("line", cls="bar", x1=at_x - 3, x2=at_x + 3, y1=edge, y2=edge) for edge in (low, high)]
    if point.cost_high > point.cost_low:
        left, right = x.px(point.cost_low), x.px(point.cost_high)
        parts.append(element("line", cls="bar", x1=left, x2=right, y1=at_y, y2=at_y))
    return svg.joined(parts)


def _mark(point: Point, x: Axis, y: Axis) -> Markup:
    at_x, at_y = x.px(point.cost), y.px(point.accuracy.value)
    tip = element("title", point.label)
    if point.kind == "teacher":
        diamond = f"M{at_x:.1f} {at_y - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5Z"
        return element("path", tip, cls="point teacher", d=diamond)
    ring = (
        element("circle", cls="ring", cx=at_x, cy=at_y, r=point.radius + 4.5) if point.kind == "chosen" else Markup("")
    )
    return ring + element("circle", tip, cls=f"point {point.kind}", cx=at_x, cy=at_y, r=point.radius)


def _labels(points: Sequence[Point], x: Axis, y: Axis, frame: Box) -> list[Markup]:
    """Chosen and teacher choose their places first."""
    taken = [_around(p, x, y) for p in points] + [_bar_box(p, x, y) for p in points]
    centres = [(x.px(p.cost), y.px(p.accuracy.value)) for p in points]
    order = sorted((p for p in points if p.named), key=lambda p: KINDS.index(p.kind))
    most = 26 if frame.right - frame.left > 380 else 17
    parts: list[Markup] = []
    for point in order:
        at_x, at_y = x.px(point.cost), y.px(point.accuracy.value)
        label = svg.shortened(point.label, most)
        box, far = svg.place(
            at_x, at_y, label, taken, centres, frame, point.radius + (6.0 if point.kind == "chosen" else 2.0)
        )
        taken.append(box)
        if far:
            edge = min(max(at_x, box.left), box.right)
            near = (
                box.bottom - 2 if box.bottom < at_y else box.top + 2 if box.top > at_y else (box.top + box.bottom) / 2
            )
            parts.append(element("line", cls="leader", x1=at_x, x2=edge, y1=at_y, y2=near))
        parts.append(element("text", label, cls=f"label {point.kind}", x=box.left, y=box.bottom - 4))
    return parts


def _around(point: Point, x: Axis, y: Axis) -> Box:
    at_x, at_y = x.px(point.cost), y.px(point.accuracy.value)
    reach = point.radius + 2
    return Box(at_x - reach, at_y - reach, at_x + reach, at_y + reach)


def _bar_box(point: Point, x: Axis, y: Axis) -> Box:
    at_x = x.px(point.cost)
    return Box(at_x - 3, y.px(point.accuracy.high), at_x + 3, y.px(point.accuracy.low))
