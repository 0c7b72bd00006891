"""Which variants go into which chart, and what stands where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from edgekd.report import charts, figures, story
from edgekd.report.charts import Limits, Point, Step
from edgekd.report.front import LEAST_POINTS, NAMES, figure
from edgekd.report.judge import deployable
from edgekd.types import Report, Variant

_ORDER = ("teacher", "student", "pruned", "onnx", "quantized", "engine")
_SCATTER = ((540, 330), (344, 300))  # width and height in pixels: beside each other, and on a phone
_STEPS = ((1108, 220), (344, 260))
_FRONT = ((1108, 340), (344, 320))
_MOST_LABELS = 12  # points of a chart that all have their labels
_SHOWN: dict[str, Callable[[float], str]] = {
    "latency_ms": lambda value: figures.plain(figures.digits(value)),
    "size_bytes": lambda value: figures.plain(figures.size(round(value))),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart in two widths, or the sentence that stands in its place."""

    title: str
    wide: Markup | None
    narrow: Markup | None
    instead: str
    full_width: bool = False


def pictures(report: Report, target: str) -> tuple[Picture, ...]:
    """The front where there is one to see, accuracy against latency and against size, and accuracy stage by stage."""
    return (*_fronts(report, target), _latency(report, target), _size(report, target), _stages(report, target))


def _fronts(report: Report, target: str) -> tuple[Picture, ...]:
    """Accuracy against latency (size, where nothing was timed), with what the front keeps: marks grow with the rest."""
    front = next((found for found in report.pareto if found.target == target), None)
    there = [v for v in deployable(report.variants, target) if front and v.id not in front.unplaced]
    placed = [v for v in there if front and all(figure(v, axis) is not None for axis in front.axes)]
    if front is None or len(placed) < LEAST_POINTS:
        return ()
    across, grows = ("latency_ms", "size_bytes") if "latency_ms" in front.axes else ("size_bytes", "macs")
    teacher = story.teacher_on(report, target)
    rows = [*placed, *([teacher] if None not in (figure(teacher, across), figure(teacher, grows)) else [])]
    most = max(figure(v, grows) or 0.0 for v in placed) or 1.0
    on_front, points = [], []
    for v in rows:
        if v.accuracy is None:
            continue
        cost, share = figure(v, across) or 0.0, min(1.0, (figure(v, grows) or 0.0) / most)
        ends = (v.latency_ms.low, v.latency_ms.high) if across == "latency_ms" and v.latency_ms else (cost, cost)
        kind = _kind(report, v)
        kind = "front" if kind == "other" and v.id in front.variants else kind
        named = v.id in front.variants or kind in ("chosen", "teacher")
        point = Point(figures.short_name(v), v.accuracy, cost, *ends, kind, named, radius=3.0 + 7.0 * share**0.5)
        points.append(point)
        on_front += [point] if v.id in front.variants else []
    limit = report.budget.max_latency_ms if across == "latency_ms" else report.budget.max_size_bytes
    title = f"The front: {report.metric}, {NAMES[across]} and {NAMES[grows]} (larger marks)"
    name = "latency, ms" if across == "latency_ms" else "size"
    return (_scatter(report, title, points, limit, name, _SHOWN[across], on_front, _FRONT),)


def _latency(report: Report, target: str) -> Picture:
    title = f"{figures.titled(report.metric)} against latency"
    there = [v for v in report.variants if v.target == target and v.latency_ms]
    if not there:
        why = next(
            (v.missing["latency_ms"] for v in report.variants if v.target == target and "latency_ms" in v.missing), ""
        )
        return Picture(title, None, None, f"No latency was measured on {target}" + (f": {why}." if why else "."))
    named = _named(there)
    shared = [v for v in report.variants if v.target is None and story.comparable(v.latency_ms, there[0].latency_ms)]

    def point(v: Variant) -> Point | None:
        if v.accuracy is None or v.latency_ms is None:
            return None
        latency = v.latency_ms
        name, kind = figures.short_name(v), _kind(report, v)
        return Point(name, v.accuracy, latency.p50, latency.low, latency.high, kind, named(kind))

    return _scatter(
        report,
        title,
        _merged(report, [*shared, *there], point),
        report.budget.max_latency_ms,
        "latency, ms",
        _SHOWN["latency_ms"],
    )


def _size(report: Report, target: str) -> Picture:
    rows = [v for v in report.variants if v.target in (None, target)]
    named = _named(rows)

    def point(v: Variant) -> Point | None:
        if v.accuracy is None or not v.size_bytes:
            return None
        kind = _kind(report, v)
        name, cost = figures.short_name(v), float(v.size_bytes)
        return Point(name, v.accuracy, cost, cost, cost, kind, named(kind))

    return _scatter(
        report,
        f"{figures.titled(report.metric)} against size",
        _merged(report, rows, point),
        report.budget.max_size_bytes,
        "size",
        _SHOWN["size_bytes"],
    )


def _scatter(
    report: Report, title: str, points: list[Point], limit: float | None, name: str, shown: Callable[[float], str],
    front: Sequence[Point] = (), sizes: tuple[tuple[int, int], ...] = _SCATTER,
) -> Picture:  # fmt: skip
    if not points:
        return Picture(title, None, None, "No variant has both figures.")
    teacher, drop = story.teacher_of(report), report.budget.max_accuracy_drop
    least = teacher.accuracy.value - drop if teacher.accuracy is not None and drop is not None else None
    limits = Limits(least, limit)
    drawn = [charts.scatter(points, limits, report.metric, name, shown, w, h, front) for w, h in sizes]
    return Picture(title, drawn[0], drawn[1], "", full_width=bool(front))


def _named(rows: Sequence[Variant]) -> Callable[[str], bool]:
    """Which kinds of points have their label in the chart: all of a few, of many the chosen one and the teacher."""
    return lambda kind: len(rows) <= _MOST_LABELS or kind in ("chosen", "teacher")


def _merged(report: Report, rows: list[Variant], point: Callable[[Variant], Point | None]) -> list[Point]:
    """Points that lie on each other, such as a graph and the engine that is a copy of it, become one."""
    found: dict[tuple[float, float], list[Point]] = {}
    for variant in rows:
        made = point(variant)
        if made:
            found.setdefault((made.cost, made.accuracy.value), []).append(made)
    merged = []
    for same in found.values():
        first = min(same, key=lambda p: charts.KINDS.index(p.kind))
        label = first.label if len(same) == 1 else f"{first.label} (+{len(same) - 1})"
        merged.append(replace(first, label=label, named=any(p.named for p in same)))
    return merged


def _kind(report: Report, variant: Variant) -> str:
    if variant.stage == "teacher":
        return "teacher"
    if variant.id in report.chosen.values():
        return "chosen"
    return "missed" if variant.verdict and variant.verdict.status == "missed" else "other"


def _stages(report: Report, target: str) -> Picture:
    chosen = next((v for v in report.variants if v.id == report.chosen.get(target)), None)
    path = path_to(report, target, chosen)
    end = path[-1] if path else None
    title = f"Where {report.metric} was lost" + (f", up to {figures.short_name(end)}" if end and end.target else "")
    if len(path) < 2:
        return Picture(title, None, None, f"Fewer than two stages have a measured {report.metric}.", full_width=True)
    steps = [Step(_label(v), v.accuracy) for v in path if v.accuracy]
    drawn = [charts.steps(steps, report.metric, w, h) for w, h in _STEPS]
    return Picture(title, drawn[0], drawn[1], "", full_width=True)


def path_to(report: Report, target: str, chosen: Variant | None) -> list[Variant]:
    """The stages from the teacher to `chosen` (or to the last variant of the target), those with an accuracy.

    Of a stage that exists in several precisions, the one on the way is that of the end, else float.
    """
    own = [v for v in report.variants if v.target in (None, target) and v.accuracy is not None]
    end = chosen if chosen is not None and chosen.accuracy is not None else own[-1] if own else None
    if end is None:
        return []
    own = [v for v in own if v.candidate in (None, end.candidate)]
    path = []
    for stage in _ORDER[: _ORDER.index(end.stage) + 1]:
        there = [v for v in own if v.stage == stage and (stage != "teacher" or v.id == report.teacher)]
        if stage == end.stage:
            path.append(end)
        elif there:
            fits = [v for v in there if v.precision == (end.precision if stage == "quantized" else "fp32")]
            if fits or stage != "quantized":
                path.append((fits or there)[0])
    return path


def _label(variant: Variant) -> str:
    return variant.stage if variant.precision == "fp32" else f"{variant.stage} {variant.precision}"
