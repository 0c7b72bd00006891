"""One class for each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import DataError
from edgekd.tasks import BESIDE_LAYERS, ON_LABELS, ON_TEACHER, macro_f1, refuse, seen
from edgekd.types import Dataset, Task

if TYPE_CHECKING:
    from torch import Tensor


def classification() -> Task:
    """One class out of several for each sample.

    outputs: batch × classes logits; labels: int64 class indices. Metric: accuracy; beside it macro F1, in which a rare
    class counts as much as a frequent one.
    """
    return Task(
        name="classification", metric="accuracy", rows=_rows, scores=_scores, decisions=_decisions, metrics=_metrics,
        check=_check, label_loss=ON_LABELS, losses=ON_TEACHER, beside_layers=BESIDE_LAYERS,
    )  # fmt: skip


def _rows(output: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return output, labels


def _scores(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
    scores: np.ndarray = (_decisions(output) == labels).astype(np.float64)
    return scores


def _decisions(output: np.ndarray) -> np.ndarray:
    decided: np.ndarray = output.argmax(axis=1)
    return decided


def _metrics(output: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    decided, classes = _decisions(output), output.shape[1]
    counts = [np.bincount(some, minlength=classes) for some in (labels[decided == labels], decided, labels)]
    return {"macro F1": macro_f1(*counts)}


def _check(dataset: Dataset) -> None:
    for split, found in seen(dataset):
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise refuse(found, dataset, expected="an integer class index for each sample")
        wrong = found[(found < 0) | (found >= len(dataset.classes))]
        if len(wrong):
            raise DataError(
                f"{len(wrong)} {split} labels name no class, the first is {wrong[0]}",
                where=dataset.name,
                expected=f"integers from 0 to {len(dataset.classes) - 1}, for {len(dataset.classes)} classes",
            )
