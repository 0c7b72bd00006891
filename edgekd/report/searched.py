"""The front as a table, and what a search has tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgekd.outcome import Candidate, Front, Search
from edgekd.report import figures
from edgekd.report.front import LEAST_POINTS, NAMES, figure
from edgekd.report.judge import deployable
from edgekd.types import Report

COLUMNS = ("Candidate", "Trained", "Took", "Best variant on the front", "Outcome")


@dataclass(frozen=True, slots=True)
class FrontTable:
    """The variants of a target that no other one beats."""

    axes: str  # in words
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    unplaced: str  # a sentence on those that lack a figure; empty where there are none


@dataclass(frozen=True, slots=True)
class SearchTold:
    """A search in a sentence, and its candidates in the order of `COLUMNS`."""

    text: str
    rows: tuple[tuple[str, ...], ...]


def front_table(report: Report, target: str) -> FrontTable | None:
    """The front of a target; None where fewer than three variants can be placed, so that there is none to see."""
    front = next((found for found in report.pareto if found.target == target), None)
    there = {v.id: v for v in deployable(report.variants, target)}
    placed = [v for v in there.values() if front and all(figure(v, axis) is not None for axis in front.axes)]
    if front is None or len(placed) < LEAST_POINTS:
        return None
    columns = (
        "Variant",
        figures.titled(report.metric),
        *(figures.titled(NAMES[axis]) for axis in front.axes),
        "Budget",
    )
    rows = []
    for name in front.variants:
        v = there[name]
        accuracy = figures.percent(v.accuracy.value, v.accuracy.n) if v.accuracy else figures.DASH
        n = v.accuracy.n if v.accuracy else 0
        cells = [_cell(axis, figure(v, axis) or 0.0, n) for axis in front.axes]
        rows.append((figures.short_name(v), accuracy, *cells, v.verdict.status if v.verdict else figures.DASH))
    short = [figures.short_name(there[name]) for name in front.unplaced if name in there]
    unplaced = f"{', '.join(short)}: a figure is missing, so nobody knows whether it is on the front" if short else ""
    return FrontTable(_words(front, report.metric), columns, tuple(rows), unplaced)


def told(report: Report) -> SearchTold | None:
    """What a search has tried; None where there was none."""
    search = report.search
    if search is None:
        return None
    done = [each for each in search.candidates if each.refused is None]
    text = f"{len(done)} of {search.asked} candidates asked for were made"
    if search.workers > 1:
        text += f" by {search.workers} processes"
    goals = [NAMES.get(name, name) for name in search.objectives]
    text += f"; {search.optimizer} proposed them, to make {', '.join(goals[:-1])} and {goals[-1]} small."
    return SearchTold(text, tuple(_row(each, search, report) for each in search.candidates))


def line(report: Report) -> str:
    """The search in a line for a terminal; empty where there was none."""
    search = report.search
    if search is None:
        return ""
    done = sum(each.refused is None for each in search.candidates)
    on = "; ".join(f"{found.target}: {_shortened(found)}" for found in report.pareto)
    return f"{done} candidates were tried. On the front: {on}"


def _shortened(front: Front, most: int = 6) -> str:
    names = [name.removeprefix(f"{front.target}/") for name in front.variants]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _row(candidate: Candidate, search: Search, report: Report) -> tuple[str, ...]:
    trained = f"{candidate.epochs} of {search.epochs} epochs"
    took = figures.DASH if candidate.seconds is None else figures.duration(candidate.seconds)
    on_front = {name for front in report.pareto for name in front.variants}
    own = [v for v in report.variants if v.candidate == candidate.name]
    kept = [v.id for v in own if v.id in on_front]
    chosen = [v.id for v in own if v.id in report.chosen.values()]
    outcome = candidate.refused or (f"chosen: {', '.join(chosen)}" if chosen else _budget(own))
    return candidate.name, trained, took, ", ".join(kept) or figures.DASH, outcome


def _budget(own: Sequence[object]) -> str:
    statuses = [getattr(getattr(v, "verdict", None), "status", None) for v in own]
    counts = [(statuses.count(status), status) for status in ("met", "missed", "cannot tell")]
    return ", ".join(f"{count} {status}" for count, status in counts if count)


def _words(front: Front, metric: str) -> str:
    names = [metric if axis == "drop" else NAMES[axis] for axis in front.axes]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _cell(axis: str, value: float, n: int) -> str:
    if axis == "drop":
        return f"{figures.points(value, n, signed=False)} points"
    if axis == "latency_ms":
        return figures.milliseconds(value)
    return figures.quantity(round(value)) if axis == "macs" else figures.size(round(value))
