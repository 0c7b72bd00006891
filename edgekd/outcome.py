"""What a report tells beside its variants: limits, the nearest, the front, a search, layers compared, channels cut."""

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


@dataclass(frozen=True, slots=True)
class Layer:
    """A place in a network whose output is compared, and what it gives for one sample."""

    path: str  # of the module; "linear:in" is what goes into it
    channels: int
    grid: tuple[int, ...]  # positions along each side; empty for a vector
    depth: float  # part of the network's multiply-accumulates that are done there, in [0, 1]


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A layer of the student and the layer of a teacher that it learns from."""

    student: Layer
    teacher: Layer
    loss: str  # between the two
    weight: float  # of the loss; 0: the pair was found, and not used
    cka: float | None  # linear similarity before the training, where it was measured
    projector: str  # trained between the two, and left out afterwards: "64>128" channels, "fusion", "exit", "none"


@dataclass(frozen=True, slots=True)
class Matched:
    """The layers of the student and of a teacher that correspond, for one head of the student."""

    head: str | None  # None: the student has but one
    family: str | None  # what the two networks are to each other, where the losses were left to `match`
    pairs: tuple[LayerPair, ...]  # none: outputs alone are compared, and the notes say why
    notes: tuple[str, ...]  # what was left out, and why


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """Layers that pruning did not touch."""

    layers: tuple[str, ...]  # paths
    reason: str


@dataclass(frozen=True, slots=True)
class Pruning:
    """How a student was cut out of its teacher: what was asked for, what was reached, what was left alone."""

    measure: str  # that the goal is of: "macs", "parameters", "size_bytes" (of the fp32 weights file), "latency_ms"
    goal: float  # at most so much of it
    before: float  # the teacher's
    after: float
    importance: str  # by which channels were ranked
    round_to: int  # channels of every layer that was cut are a multiple of it
    rounds: int  # of cutting, each followed by a distillation
    macs_before: int  # multiply-accumulates for one sample
    macs_after: int
    parameters_before: int
    parameters_after: int
    layers: Mapping[str, tuple[int, int]]  # channels, or heads, before and after, by the layer that makes them
    left_alone: tuple[LeftAlone, ...]
