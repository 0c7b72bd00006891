"""The report as what a page shows: every figure already in words, every gap numbered with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from markupsafe import Markup

from edgekd.outcome import Matched
from edgekd.report import figures, layers, searched, sensitivity, story
from edgekd.report.pictures import Picture, pictures
from edgekd.report.searched import FrontTable, SearchTold
from edgekd.report.story import Headline
from edgekd.types import Json, Report, Variant

_NO_REASON = "no reason was recorded"
_STAGE = {"teacher": "teacher", "student": "student weights", "pruned": "pruned weights", "onnx": "ONNX",
          "quantized": "quantized ONNX", "engine": "engine"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure and what stands below it; `note` is the number of the reason why there is none."""

    text: str
    sub: str = ""
    note: int | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure."""

    label: str
    cell: Cell


@dataclass(frozen=True, slots=True)
class Row:
    """A variant in the table; cells are in the order of `Page.columns`."""

    id: str
    badges: tuple[str, ...]
    made_of: str
    cells: tuple[Cell, ...]
    status: str | None


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one target, or of what all targets share."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Why:
    """A variant's verdict with all its reasons."""

    id: str
    status: str
    reasons: tuple[str, ...]
    statuses: tuple[str, ...]  # of each reason that is one of a limit, else empty


@dataclass(frozen=True, slots=True)
class Gap:
    """A figure that was not measured, for which variants, and why."""

    number: int
    what: str
    of: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Place:
    """All that is told of one target."""

    headline: Headline
    tiles: tuple[Tile, ...]
    pictures: tuple[Picture, ...]
    bounds: tuple[tuple[str, str], ...]  # device and mode, least time
    bounds_of: str
    front: FrontTable | None


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers that losses compare: a figure in two widths, and the same as a table."""

    title: str
    wide: Markup
    narrow: Markup
    rows: tuple[tuple[str, ...], ...]  # in the order of `layers.COLUMNS`
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything the templates write, in its order."""

    name: str
    budget: str
    places: tuple[Place, ...]
    columns: tuple[str, ...]
    groups: tuple[Group, ...]
    footnote: str
    why: tuple[Why, ...]
    comparisons: tuple[tuple[str, str, str], ...]  # who, how much, verdict
    taught: str
    layers: tuple[Layers, ...]
    layer_columns: tuple[str, ...]
    gaps: tuple[Gap, ...]
    notes: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    timings: tuple[tuple[str, str], ...]
    recipe_sha256: str
    rerun: str
    search: SearchTold | None
    search_columns: tuple[str, ...]
    sensitivity: tuple[sensitivity.Told, ...]
    sensitivity_columns: tuple[str, ...]


@dataclass
class _Gaps:
    """Numbers the reasons in the order in which the page first needs them."""

    found: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def mark(self, variant: Variant, key: str, what: str) -> Cell:
        reason = variant.missing.get(key, _NO_REASON)
        of = self.found.setdefault((what, reason), [])
        if variant.id not in of:
            of.append(variant.id)
        return Cell(figures.DASH, note=list(self.found).index((what, reason)) + 1)

    def listed(self) -> tuple[Gap, ...]:
        return tuple(Gap(i, what, tuple(of), why) for i, ((what, why), of) in enumerate(self.found.items(), 1))


def page(report: Report) -> Page:
    """What the report shows."""
    gaps = _Gaps()
    places = tuple(_place(report, headline, gaps) for headline in story.headlines(report))
    columns = _columns(report)
    groups = _groups(report, columns, gaps)
    targets = " ".join(f"--target {name}" for name in report.chosen)
    return Page(
        name=report.name,
        budget=story.budget_line(report.budget, report.metric),
        places=places,
        columns=tuple(columns),
        groups=groups,
        footnote=story.footnote(report.metric),
        why=_why(report),
        comparisons=tuple(
            (f"{found.candidate} against {found.baseline}", figures.comparison(found), found.verdict)
            for found in report.comparisons
        ),
        taught=f"{story.pruned(report.pruning)} {story.taught(report.training)}".strip(),
        layers=tuple(map(_layers, report.correspondence)),
        layer_columns=layers.COLUMNS,
        gaps=gaps.listed(),
        notes=report.notes,
        environment=tuple(_flat(report.environment)),
        timings=tuple((name, figures.duration(seconds)) for name, seconds in report.timings_s.items()),
        recipe_sha256=report.recipe_sha256,
        rerun=f"edgekd {report.command} {targets}{_again(report)}".strip(),
        search=searched.told(report),
        search_columns=searched.COLUMNS,
        sensitivity=tuple(sensitivity.told(found, report.metric) for found in report.sensitivity if found.layers),
        sensitivity_columns=sensitivity.COLUMNS,
    )


def _again(report: Report) -> str:
    return f" --search {report.search.asked}" if report.search else ""


def _place(report: Report, headline: Headline, gaps: _Gaps) -> Place:
    chosen, teacher = headline.chosen, story.teacher_on(report, headline.target)
    bounded = chosen or next((v for v in report.variants if v.target == headline.target and v.estimates), None)
    return Place(
        headline=headline,
        tiles=_tiles(chosen, teacher, report, gaps) if chosen else (),
        pictures=pictures(report, headline.target),
        bounds=tuple(
            (f"{e.device}, {e.mode}", f"≥ {figures.digits(e.lower_bound_ms, 2)} ms")
            for e in (bounded.estimates if bounded else ())
        ),
        bounds_of=bounded.id if bounded else "",
        front=searched.front_table(report, headline.target),
    )


def _tiles(chosen: Variant, teacher: Variant, report: Report, gaps: _Gaps) -> tuple[Tile, ...]:
    size = _size(chosen, gaps)
    if chosen.size_bytes and teacher.size_bytes:
        size = Cell(size.text, f"teacher {figures.size(teacher.size_bytes)}")
    latency = _p50(chosen, gaps)
    if chosen.latency_ms is not None:
        speed = story.speed_up(chosen, teacher, report)
        beside = f"teacher {figures.milliseconds(teacher.latency_ms.p50)}" if speed and teacher.latency_ms else ""
        latency = Cell(latency.text, beside or latency.sub)
    accuracy = _accuracy(chosen, report, gaps)
    if chosen.accuracy:
        accuracy = Cell(accuracy.text, f"{accuracy.sub} on {chosen.accuracy.n:,} samples")
    drop = _drop(chosen, report, gaps)
    if chosen.drop:
        drop = Cell(f"{drop.text} points", drop.sub)
    return (
        Tile(figures.titled(report.metric), accuracy),
        Tile("Drop against the teacher", drop),
        Tile("Size", size),
        Tile("Latency, median", latency),
        Tile("Peak memory", _memory(chosen, gaps)),
    )


def _layers(found: Matched) -> Layers:
    title = "Layers that were compared" + (f", for {found.head}" if found.head else "")
    wide, narrow = (layers.drawing(found.pairs, width, share) for width, share in ((1108, 0.32), (344, 0.35)))
    notes = (story.relation(found.family), *found.notes)
    return Layers(title, wide, narrow, layers.table(found.pairs), tuple(note for note in notes if note))


def _columns(report: Report) -> dict[str, Callable[[Variant, _Gaps], Cell]]:
    """Heading → how its cells are made."""
    others = dict.fromkeys(name for v in report.variants for name in v.metrics)
    columns: dict[str, Callable[[Variant, _Gaps], Cell]] = {
        "Size": _size,
        "Parameters, MACs": _cost,
        figures.titled(report.metric): lambda v, g: _accuracy(v, report, g),
        "Drop, points": lambda v, g: _drop(v, report, g),
        **{figures.titled(name): partial(_metric, name) for name in others},
        "Agreement": lambda v, g: _agreement(v, report, g),
        "Parity, cosine": _parity,
        "Latency p50": _p50,
        "p90, p99": _tail,
        "Peak memory": _memory,
    }  # fmt: skip
    if any(v.energy_mj is not None for v in report.variants):
        columns["Energy"] = _energy
    return columns


def _groups(report: Report, columns: Mapping[str, Callable[[Variant, _Gaps], Cell]], gaps: _Gaps) -> tuple[Group, ...]:
    chosen, refused = set(report.chosen.values()), story.turned_down(report)
    groups = []
    for target in dict.fromkeys([None, *report.chosen, *(v.target for v in report.variants)]):
        rows = []
        for v in report.variants:
            if v.target != target:
                continue
            badges = [word for word, is_so in (
                ("chosen", v.id in chosen), ("teacher", v.id == report.teacher), ("turned down", v.id in refused),
            ) if is_so]  # fmt: skip
            made_of = " · ".join(part for part in (_STAGE[v.stage], v.precision, v.runtime) if part)
            cells = tuple(make(v, gaps) for make in columns.values())
            rows.append(Row(v.id, tuple(badges), made_of, cells, v.verdict.status if v.verdict else None))
        if rows:
            groups.append(Group("Shared by all targets" if target is None else f"Target {target}", tuple(rows)))
    return tuple(groups)


def _why(report: Report) -> tuple[Why, ...]:
    refused = story.turned_down(report)
    found = []
    for variant in report.variants:
        reasons = [*(variant.verdict.reasons if variant.verdict else ())]
        if variant.id in refused:
            reasons.append(f"not chosen: {refused[variant.id]}")
        if variant.verdict or reasons:
            of_limits = [limit.status for limit in variant.verdict.limits] if variant.verdict else []
            statuses = (*of_limits, *[""] * (len(reasons) - len(of_limits)))
            found.append(Why(variant.id, variant.verdict.status if variant.verdict else "", tuple(reasons), statuses))
    return tuple(found)


def _size(v: Variant, gaps: _Gaps) -> Cell:
    return Cell(figures.size(v.size_bytes)) if v.size_bytes is not None else gaps.mark(v, "size_bytes", "size")


def _cost(v: Variant, gaps: _Gaps) -> Cell:
    if v.parameters is None:
        return gaps.mark(v, "parameters", "parameters")
    if v.macs is None:
        return Cell(figures.quantity(v.parameters), f"MACs {figures.DASH}", gaps.mark(v, "macs", "MACs").note)
    return Cell(figures.quantity(v.parameters), f"{figures.quantity(v.macs)} MACs")


def _accuracy(v: Variant, report: Report, gaps: _Gaps) -> Cell:
    if v.accuracy is None:
        return gaps.mark(v, "accuracy", report.metric)
    return Cell(figures.percent(v.accuracy.value, v.accuracy.n), figures.percent_interval(v.accuracy))


def _drop(v: Variant, report: Report, gaps: _Gaps) -> Cell:
    if v.id == report.teacher:
        return Cell("reference")
    if v.drop is None:
        return gaps.mark(v, "drop", f"{report.metric} drop")
    return Cell(figures.points(v.drop.value, v.drop.n, signed=False), figures.points_interval(v.drop))


def _metric(name: str, v: Variant, gaps: _Gaps) -> Cell:
    return Cell(figures.digits(v.metrics[name])) if name in v.metrics else gaps.mark(v, "accuracy", name)


def _agreement(v: Variant, report: Report, gaps: _Gaps) -> Cell:
    if v.id == report.teacher:
        return Cell("reference")
    if v.agreement is None:
        return gaps.mark(v, "agreement", "agreement with the teacher")
    return Cell(figures.percent(v.agreement, v.accuracy.n if v.accuracy else 0))


def _parity(v: Variant, gaps: _Gaps) -> Cell:
    if v.parity is None:
        return gaps.mark(v, "parity", "parity with the stage before")
    cosine = min(v.parity.cosine, 1.0)
    # the digits that differ from 1 are what matters
    shown = f"{cosine:.6f}" if cosine > 0.9999 else f"{cosine:.4f}"
    worst = v.parity.max_abs
    largest = figures.digits(worst, 2) if worst == 0 or worst >= 1e-3 else f"{worst:.0e}".replace("-0", figures.MINUS)
    return Cell(shown.replace("-", figures.MINUS), f"max {largest}")


def _p50(v: Variant, gaps: _Gaps) -> Cell:
    if v.latency_ms is None:
        return gaps.mark(v, "latency_ms", "latency")
    elsewhere = ", own rounds" if v.latency_ms.rounds is not None else ""
    return Cell(figures.milliseconds(v.latency_ms.p50), figures.latency_interval(v.latency_ms) + elsewhere)


def _tail(v: Variant, gaps: _Gaps) -> Cell:
    if v.latency_ms is None:
        return gaps.mark(v, "latency_ms", "latency")
    return Cell(figures.milliseconds(v.latency_ms.p90), figures.milliseconds(v.latency_ms.p99))


def _memory(v: Variant, gaps: _Gaps) -> Cell:
    if v.peak_memory_bytes is None:
        return gaps.mark(v, "peak_memory_bytes", "peak memory")
    return Cell(figures.size(v.peak_memory_bytes))


def _energy(v: Variant, gaps: _Gaps) -> Cell:
    return Cell(f"{figures.digits(v.energy_mj)} mJ") if v.energy_mj is not None else gaps.mark(v, "energy_mj", "energy")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested data as lines; what is missing is a dash with its reason beside it."""
    reasons = value.get("missing")
    reasons = reasons if isinstance(reasons, dict) else {}
    for key, inner in value.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if key == "missing" and isinstance(inner, dict):
            continue
        if isinstance(inner, dict) and inner and all(isinstance(part, bool) for part in inner.values()):
            yield name, ", ".join(part for part, there in inner.items() if there) or "none of those looked for"
        elif isinstance(inner, dict) and inner and all(isinstance(part, str) for part in inner.values()):
            yield name, ", ".join(f"{part} {text}" for part, text in inner.items())
        elif isinstance(inner, dict):
            yield from _flat(inner, f"{name}: ")
        else:
            yield name, _plain(key, inner) + (f" ({reasons[key]})" if inner is None and key in reasons else "")


def _plain(key: str, value: Json) -> str:
    if value is None:
        return figures.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith("_bytes"):
        return figures.size(value)
    if isinstance(value, float):
        return figures.digits(value, 4)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain("", part) for part in value)
    return str(value)
