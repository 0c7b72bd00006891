"""The calibration split in two halves: one that ranges come from, and one that shows what they are worth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from edgekd.errors import DataError
from edgekd.graph.program import graph_inputs
from edgekd.models.network import Network
from edgekd.quantize.simulation import Inputs
from edgekd.types import Arrays, Batch


@dataclass(frozen=True, slots=True)
class Stored:
    """Calibration samples as they are stored, batch by batch, without labels; read as often as it is asked for.

    Raises:
        DataError: they could be read but once.
    """

    batches: Iterable[Arrays | Batch]

    def __post_init__(self) -> None:
        if iter(self.batches) is self.batches:
            raise DataError(
                "the calibration samples can be read only once",
                expected="something that can be read again, such as a list",
            )

    def __iter__(self) -> Iterator[Arrays]:
        for batch in self.batches:
            yield batch.inputs if isinstance(batch, Batch) else batch


@dataclass(frozen=True, slots=True)
class Ranging:
    """Every second sample, from the first on, as the graph takes it."""

    halves: Halves

    def __iter__(self) -> Iterator[Inputs]:
        for inputs, _ in self.halves.read("ranging"):
            yield inputs


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The other samples with their labels; of a single sample, that one."""

    halves: Halves

    def __iter__(self) -> Iterator[tuple[Inputs, np.ndarray | None]]:
        found = False
        for pair in self.halves.read("held out"):
            found = True
            yield pair
        if not found:
            yield from self.halves.read("ranging")


@dataclass(frozen=True, slots=True)
class Halves:
    """Calibration samples, cut in two by their number: even ones for ranges, odd ones held out.

    Args:
        preprocessing: whether the graph takes samples as stored, or normalised float32.
        one_by_one: for a graph of a fixed batch.
    """

    network: Network
    batches: Iterable[Arrays | Batch]
    preprocessing: bool
    one_by_one: bool

    @property
    def ranging(self) -> Ranging:
        """Samples that ranges and corrections come from."""
        return Ranging(self)

    @property
    def held_out(self) -> HeldOut:
        """Samples that what was tried is compared on."""
        return HeldOut(self)

    def read(self, which: Literal["ranging", "held out"]) -> Iterator[tuple[Inputs, np.ndarray | None]]:
        """One half, batch by batch, or sample by sample for a graph of a fixed batch."""
        before = 0
        for batch in self.batches:
            inputs, labels = (batch.inputs, batch.labels) if isinstance(batch, Batch) else (batch, None)
            count = len(next(iter(inputs.values())))
            first = (before + (which == "held out")) % 2
            before += count
            rows = np.arange(first, count, 2)
            if not len(rows):
                continue
            stored = {name: array[rows] for name, array in inputs.items()}
            args, _ = graph_inputs(self.network, stored, preprocessing=self.preprocessing)
            chosen = None if labels is None else labels[rows]
            if not self.one_by_one:
                yield args, chosen
                continue
            for i in range(len(rows)):
                one = tuple(torch.narrow(arg, 0, i, 1) for arg in args)
                yield one, None if chosen is None else chosen[i : i + 1]
