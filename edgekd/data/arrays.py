"""A split that lies in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgekd.types import Batch

if TYPE_CHECKING:
    import numpy as np

    from edgekd.types import Arrays


class ArraySplit:
    """The samples `rows` of arrays in memory; a batch is one fancy index per array.

    Args:
        inputs: arrays by input name, samples first.
        labels: as the task takes them, as long as every input.
        rows: int64 positions of this split's samples in the arrays.
    """

    def __init__(self, inputs: Arrays, labels: np.ndarray, rows: np.ndarray) -> None:
        self._inputs, self._labels, self._rows = inputs, labels, rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray:
        """Of every sample, in order."""
        labels: np.ndarray = self._labels[self._rows]
        return labels

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One Batch for each index array, in that order."""
        for indices in order:
            rows = self._rows[indices]
            yield Batch(indices, {name: array[rows] for name, array in self._inputs.items()}, self._labels[rows])
