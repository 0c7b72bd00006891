"""Images as a graph without preprocessing takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgekd.types import Arrays, Batch, Preprocessing, Split


def normalise(inputs: Arrays, preprocessing: Preprocessing) -> dict[str, NDArray[np.float32]]:
    """uint8 images (batch × height × width × channels) as float32 (batch × channels × height × width).

    (x / 255 - mean) / std per channel, as `Network.prepare` does it inside the graph.
    """
    mean, std = (np.asarray(values, dtype=np.float32) for values in (preprocessing.mean, preprocessing.std))
    return {
        name: np.ascontiguousarray(((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))
        for name, images in inputs.items()
    }


@dataclass(frozen=True, slots=True)
class PreprocessedSplit:
    """A split of images whose batches come normalised."""

    split: Split
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, order: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """The split's batches, normalised one by one."""
        for batch in self.split.batches(order):
            yield replace(batch, inputs=normalise(batch.inputs, self.preprocessing))
