"""Which variants no other one beats, in accuracy, time and size at once: the Pareto front of a target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgekd.outcome import Front
from edgekd.report.judge import deployable
from edgekd.types import Variant

NAMES = {"drop": "drop", "latency_ms": "latency", "macs": "MACs", "size_bytes": "size", "peak_memory_bytes": "memory"}
LEAST_POINTS = 3  # a front of fewer is no picture


def fronts(variants: Sequence[Variant], targets: Iterable[str]) -> tuple[Front, ...]:
    """The front of each target: accuracy, latency and size; multiply-accumulates where nothing was timed there.

    The figures are compared as they are, without their intervals. Of a search only what was timed in the report's own
    rounds is placed where there is such: the others were beaten in the rounds of their own.
    """
    return tuple(front(deployable(variants, target), target) for target in targets)


def front(variants: Sequence[Variant], target: str, also: tuple[str, ...] = ()) -> Front:
    """The front of these variants, with the figures `also` as further axes."""
    timed = [v for v in variants if v.latency_ms is not None]
    axes = ("drop", "latency_ms" if timed else "macs", "size_bytes", *also)
    together = {v.id for v in timed if v.latency_ms is not None and v.latency_ms.rounds is None}
    offered = [v for v in variants if not together or v.latency_ms is None or v.id in together]
    figures = {v.id: [figure(v, axis) for axis in axes] for v in offered}
    placed = {name: [each for each in row if each is not None] for name, row in figures.items() if None not in row}
    kept = [name for name, row in placed.items() if not any(_beats(other, row) for other in placed.values())]
    kept.sort(key=lambda name: (placed[name][1], placed[name][0], name))
    unplaced = tuple(name for name in figures if name not in placed)
    return Front(target, axes, tuple(kept), unplaced)


def figure(variant: Variant, axis: str) -> float | None:
    """What a variant has on an axis, of which less is better; None where it was not measured."""
    if axis == "drop":
        return variant.drop.value if variant.drop is not None else None
    if axis == "latency_ms":
        return variant.latency_ms.p50 if variant.latency_ms is not None else None
    value: float | None = getattr(variant, axis)
    return value


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """At least as good in all, and better in one: of two that are equal neither beats the other."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))
