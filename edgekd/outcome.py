"""What a report concludes of its variants: limits kept or missed, the nearest, the front, what a search has tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["met", "missed", "cannot tell"]


@dataclass(frozen=True, slots=True)
class Limit:
    """What one limit of the budget says of a variant."""

    name: Literal["drop", "latency_ms", "size_bytes", "peak_memory_bytes"]  # the figure that it bounds
    status: Status
    allowed: float
    value: float | None  # None: not measured
    low: float | None  # 95 % interval of the value; of a latency that was not measured, a bound from below
    high: float | None
    excess: float  # by how much a missed limit is passed, as a part of it; 0 where it is not known to be missed
    reason: str


@dataclass(frozen=True, slots=True)
class Nearest:
    """Where no variant of a target can be chosen: the one that misses the budget by least."""

    variant: str  # its id
    excess: float  # the sum of what its missed limits are passed by, each as a part of the limit
    says: str  # what it keeps, and what it misses by how much
    needs: str  # what would have to give for it to be chosen; empty where no limit stands in its way


@dataclass(frozen=True, slots=True)
class Front:
    """The variants of a target that no other one beats: none is at least as good in all axes and better in one."""

    target: str
    axes: tuple[str, ...]  # figures of a variant, of which less is better: "drop", "latency_ms" or "macs", "size_bytes"
    variants: tuple[str, ...]  # ids, by the axis after the drop
    unplaced: tuple[str, ...]  # ids of variants that lack one of the figures


@dataclass(frozen=True, slots=True)
class Candidate:
    """A student that a search has tried."""

    name: str  # "w12"; in the ids of its variants
    options: Mapping[str, float]  # what of the recipe's student was changed: {"width": 12}
    epochs: int  # that it was trained for
    seconds: float | None  # its training, export and measuring took; None: it is not done, or was not to be had
    refused: str | None = None  # why there is no such student


@dataclass(frozen=True, slots=True)
class Search:
    """Which students were tried, and how."""

    asked: int  # candidates that --search asked for
    optimizer: str  # name and version of what proposed them
    objectives: tuple[str, ...]  # that it was to make small, of the best variant of a candidate on the first target
    candidates: tuple[Candidate, ...]
    epochs: int  # of a full training
    workers: int  # processes that tried some
