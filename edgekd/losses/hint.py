"""Hints: a student's layer that repeats a teacher's layer."""

from __future__ import annotations

from torch import Tensor

from edgekd.losses._inputs import both_rows, squared_difference


def hint(projected_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference between the student's projected feature and the teacher's.

    loss = 1/(n·C) · Σ_i Σ_c (student_ic − teacher_ic)², over the n positions of the batch that count and C channels.
    FitNets writes ½ · Σ; the mean does not grow with the size of the layer. It is 0 where both are equal.

    Reference: Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015 (the mean is
    often given a weight of 100).

    Args:
        projected_feature, teacher_feature: batch × positions × channels each, or maps, or vectors.
        mask: batch × positions, False where a position is padding and does not count.

    Returns:
        A scalar, in the square of the feature's unit. No gradient reaches the teacher.

    Raises:
        PartError: the shapes differ, or no position counts.
    """
    return squared_difference(*both_rows(projected_feature, teacher_feature, mask, "hint"))
