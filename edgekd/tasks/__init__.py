"""Tasks: what a head is for, one file each. A user's own is a callable that returns a `Task` too.

A task turns outputs and labels into the rows that losses see, into a score a sample (the mean is the metric) and into
decisions, and says which losses a network is trained and distilled by where the recipe names none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgekd.errors import DataError
from edgekd.types import Dataset, LossTerm, Part, Split

ON_LABELS = LossTerm(Part("ce"))
# Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, NIPS workshop 2014: mostly the teacher's soft
# targets, a little of the labels; T = 4 and 0.9 : 0.1 are what the reference implementations of the field use.
ON_TEACHER = (LossTerm(Part("kd", {"temperature": 4.0}), 0.9), LossTerm(Part("ce"), 0.1))
# Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024.
BESIDE_LAYERS = (ON_LABELS, LossTerm(Part("kd", {"temperature": 1.0})))

_FEW = 64  # samples that are read where labels do not lie in memory


def seen(dataset: Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """The labels of each split by its name: all where they lie in memory, else those of its first samples."""
    for name, split in (("training", dataset.train), ("calibration", dataset.calibration), ("test", dataset.test)):
        yield name, _labels(split)


def refuse(found: np.ndarray, dataset: Dataset, *, expected: str) -> DataError:
    """The error for labels of another form than a task takes; it names the task that takes them."""
    return DataError(
        f"labels are {found.dtype} of shape ({', '.join(['samples', *map(str, found.shape[1:])])})",
        where=dataset.name,
        expected=expected,
        fix='[task] name = … says what they are: "classification", "multilabel", "segmentation" or "regression"',
    )


def named(found: np.ndarray, dataset: Dataset, what: str) -> None:
    """Raises DataError where the labels' columns are not as many as the data's names for them."""
    if found.shape[1] != len(dataset.classes):
        raise DataError(
            f"labels have {found.shape[1]} columns, but there are {len(dataset.classes)} names of {what}",
            where=dataset.name,
            expected="as many names as columns",
        )


def macro_f1(hits: np.ndarray, decided: np.ndarray, wanted: np.ndarray) -> float:
    """The mean over classes of F1 = 2 · hits / (decided + wanted); a class that never comes up is left out.

    Args:
        hits: how often each class was decided rightly.
        decided: how often it was decided.
        wanted: how often it is the label.
    """
    there = (decided + wanted) > 0
    return float((2 * hits[there] / (decided + wanted)[there]).mean())


def _labels(split: Split) -> np.ndarray:
    known = getattr(split, "labels", None)
    if isinstance(known, np.ndarray):
        return known
    return next(iter(split.batches([np.arange(min(_FEW, len(split)))]))).labels
