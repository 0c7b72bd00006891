"""A class for each pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import DataError, ModelError
from edgekd.tasks import ON_LABELS, ON_TEACHER, refuse, seen
from edgekd.types import Dataset, Task

if TYPE_CHECKING:
    from torch import Tensor


def segmentation(*, ignore_index: int = 255) -> Task:
    """A class for each point of a grid: the pixels of an image, the frames of a sequence.

    outputs: batch × classes × grid logits; labels: batch × grid class indices, on the grid of the outputs. Every point
    is a row for losses, those of `ignore_index` left out.

    Metric: pixel accuracy, the mean over the samples of the fraction of their points that are right. Large classes
    rule it, hence mIoU beside it: the mean over the classes of hits / (decided or wanted), counted over all samples.
    A sample of ignored points alone has no score.

    Args:
        ignore_index: the label of points that have none; they count nowhere.
    """

    def rows(output: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        flat = output.movedim(1, -1).reshape(-1, output.shape[1])
        if labels is None:
            return flat, None
        _same_grid(tuple(output.shape[2:]), tuple(labels.shape[1:]))
        wanted = labels.reshape(-1)
        kept = wanted != ignore_index
        return flat[kept], wanted[kept].long()

    def scores(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
        decided = _decisions(output)
        _same_grid(decided.shape[1:], labels.shape[1:])
        grid = tuple(range(1, labels.ndim))
        judged = labels != ignore_index
        right, of = ((decided == labels) & judged).sum(axis=grid), judged.sum(axis=grid)
        found: np.ndarray = right[of > 0] / of[of > 0]
        return found

    def metrics(output: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        judged = labels != ignore_index
        decided, wanted = _decisions(output)[judged], labels[judged]
        most = int(max(decided.max(initial=0), wanted.max(initial=0))) + 1
        hits, ours, theirs = (
            np.bincount(some, minlength=most) for some in (wanted[decided == wanted], decided, wanted)
        )
        there = (ours + theirs) > 0
        return {"mIoU": float((hits[there] / (ours + theirs - hits)[there]).mean())}

    def check(dataset: Dataset) -> None:
        classes = len(dataset.classes)
        if 0 <= ignore_index < classes:
            raise DataError(
                f"ignore_index is {ignore_index}, which is a class too: '{dataset.classes[ignore_index]}'",
                where="segmentation",
                expected=f"a number that is none of the {classes} classes, e.g. -1",
            )
        for split, found in seen(dataset):
            if found.ndim < 2 or found.dtype.kind not in "iu":
                raise refuse(found, dataset, expected="an integer class index for each point of each sample's grid")
            odd = found[((found < 0) | (found >= classes)) & (found != ignore_index)]
            if len(odd):
                raise DataError(
                    f"{len(odd):,} points of {split} labels name no class, the first is {odd[0]}",
                    where=dataset.name,
                    expected=f"0 to {classes - 1}, or {ignore_index} for points without a label",
                    fix="[task] ignore_index says which number stands for no label",
                )

    return Task(
        name="segmentation", metric="pixel accuracy", rows=rows, scores=scores, decisions=_decisions, metrics=metrics,
        check=check, label_loss=ON_LABELS, losses=ON_TEACHER, labels="maps", dense=True,
    )  # fmt: skip


def _decisions(output: np.ndarray) -> np.ndarray:
    """The class of each point in the smallest integers that hold it; what is decided already stays as it is."""
    if output.dtype.kind in "iu":
        return output
    decided: np.ndarray = output.argmax(axis=1).astype(np.uint8 if output.shape[1] <= 256 else np.int32)
    return decided


def _same_grid(ours: tuple[int, ...], labels: tuple[int, ...]) -> None:
    if ours != labels:
        raise ModelError(
            f"the output has a grid of {' × '.join(map(str, ours))}, the labels of {' × '.join(map(str, labels))}",
            where="segmentation",
            fix="let the model end with an interpolation to its input's size, or bring labels of the output's size",
        )
