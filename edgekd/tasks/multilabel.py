"""Several labels at once: each holds for a sample or does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import DataError
from edgekd.tasks import ON_LABELS, ON_TEACHER, macro_f1, named, refuse, seen
from edgekd.types import Dataset, Task

if TYPE_CHECKING:
    from torch import Tensor


def multilabel() -> Task:
    """Labels of which any number hold for a sample, each decided for itself.

    outputs: batch × labels logits z, a label's probability being sigmoid(z), decided at one half; labels: batch ×
    labels of 0 and 1. A loss sees every label as a row of two classes with the logits [0, z], whose softmax is that
    sigmoid: cross-entropy is then the binary one, and kd compares the two probabilities of each label.

    Metric: label accuracy, the fraction of a sample's labels that are decided rightly. Where few labels hold it is
    high for a network that decides none, hence macro F1 beside it; and exact match, samples with every label right.
    """
    return Task(
        name="multilabel", metric="label accuracy", rows=_rows, scores=_scores, decisions=_decisions,
        metrics=_metrics, check=_check, label_loss=ON_LABELS, losses=ON_TEACHER, labels="flags",
    )  # fmt: skip


def _rows(output: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    import torch

    rows = torch.nn.functional.pad(output.reshape(-1, 1), (1, 0))
    if labels is None:
        return rows, None
    if not labels.is_floating_point():
        return rows, labels.reshape(-1).long()
    held = labels.reshape(-1, 1)  # of mixed samples: how much of each label holds
    return rows, torch.cat([1 - held, held], 1)


def _scores(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
    scores: np.ndarray = (_decisions(output) == labels).mean(axis=1, dtype=np.float64)
    return scores


def _decisions(output: np.ndarray) -> np.ndarray:
    return output >= 0


def _metrics(output: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    decided, wanted = _decisions(output), labels.astype(bool)
    exact = float((decided == wanted).all(axis=1).mean())
    if not (decided.any() or wanted.any()):
        return {"exact match": exact}
    counts = [some.sum(axis=0) for some in (decided & wanted, decided, wanted)]
    return {"macro F1": macro_f1(*counts), "exact match": exact}


def _check(dataset: Dataset) -> None:
    for split, found in seen(dataset):
        if found.ndim != 2 or found.dtype.kind not in "iub":
            raise refuse(found, dataset, expected="a 0 or a 1 for each label of each sample (samples × labels)")
        named(found, dataset, "labels")
        wrong = found[(found != 0) & (found != 1)]
        if len(wrong):
            raise DataError(
                f"{len(wrong)} {split} labels are neither 0 nor 1, the first is {wrong[0]}", where=dataset.name
            )
