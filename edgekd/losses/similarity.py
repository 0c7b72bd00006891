"""SP: similarity preserving, which samples are alike to the teacher."""

from __future__ import annotations

from torch import Tensor

from edgekd.errors import PartError
from edgekd.losses._inputs import both_features, full_precision
from edgekd.losses._vectors import scaled, unit


def similarity(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Squared difference between the similarities of the samples of a batch, as student and teacher see them.

    loss = 1/B² · ‖Ĝ(student) − Ĝ(teacher)‖², with G = F·Fᵀ of the features F as rows (batch × everything else) and Ĝ
    its rows divided by their lengths. Neither channels nor positions have to agree, so it needs no projector. It is 0
    where the features are equal up to a rotation and a factor, and at most 4 / B.

    Reference: Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019 (published with the weight 3000).

    Args:
        student_feature, teacher_feature: batch × positions × channels each, or maps, or vectors.

    Returns:
        A scalar. No gradient reaches the teacher.

    Raises:
        PartError: the batches differ, or are of one sample.
    """
    student, teacher = both_features(student_feature, teacher_feature, "similarity", alike=1)
    if student.shape[0] < 2:
        raise PartError(
            "similarity compares the samples of a batch, and this one has one", fix="use a batch of two samples or more"
        )
    with full_precision(student):
        difference = _alike(student) - _alike(teacher)
    return difference.square().sum() / student.shape[0] ** 2


def _alike(feature: Tensor) -> Tensor:
    rows = scaled(feature.flatten(1), (0, 1))
    return unit(rows @ rows.T, 1)
