"""Numbers for each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import DataError
from edgekd.tasks import named, refuse, seen
from edgekd.types import Dataset, LossTerm, Part, Task

if TYPE_CHECKING:
    from torch import Tensor


def regression() -> Task:
    """One or several numbers for each sample.

    outputs and labels: batch × values, in the same units. A network is trained by the mean squared error, and
    distilled by the one to the teacher's values (0.9) and the one to the labels (0.1).

    Metric: R², the part of the values' variance over the test split that is explained, averaged over the values: 1 is
    perfect, 0 is as good as always saying their mean, and there is no lowest. A sample's score is
    1 − mean_j (y_j − ŷ_j)² / var(y_j). Beside it RMSE and MAE over all values, in their units.
    """
    mse = LossTerm(Part("mse", {"to": "labels"}))
    return Task(
        name="regression", metric="R²", rows=_rows, scores=_scores, decisions=_decisions, metrics=_metrics,
        check=_check, label_loss=mse, labels="values", values=True,
        losses=(LossTerm(Part("mse"), 0.9), LossTerm(mse.part, 0.1)),
    )  # fmt: skip


def _rows(output: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return output, labels


def _scores(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
    wanted = labels.astype(np.float64)
    spread = wanted.var(axis=0)
    if not spread.all():
        at = int(np.flatnonzero(spread == 0)[0])
        raise DataError(
            f"value {at} is {labels[0, at]:g} in every sample", where="regression", expected="values that differ",
            fix="leave it out, or bring more samples: of what never changes nothing can be explained (R²)",
        )  # fmt: skip
    scores: np.ndarray = 1 - ((output - wanted) ** 2 / spread).mean(axis=1)
    return scores


def _decisions(output: np.ndarray) -> np.ndarray:
    return output


def _metrics(output: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    off = output.astype(np.float64) - labels
    return {"RMSE": float(np.sqrt((off**2).mean())), "MAE": float(np.abs(off).mean())}


def _check(dataset: Dataset) -> None:
    for split, found in seen(dataset):
        if found.ndim != 2 or found.dtype.kind != "f":
            raise refuse(found, dataset, expected="one or several numbers for each sample (float32, samples × values)")
        named(found, dataset, "values")
        if not np.isfinite(found).all():
            raise DataError(f"{split} labels hold NaN or infinite values", where=dataset.name)
