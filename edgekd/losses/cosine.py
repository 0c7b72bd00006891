"""Direction of the features, whatever their length."""

from __future__ import annotations

from torch import Tensor

from edgekd.losses._inputs import both_rows
from edgekd.losses._vectors import unit


def cosine(projected_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 − cosine between the student's projected feature and the teacher's at each position, averaged.

    loss = 1/n · Σ_i (1 − s_i · t_i / (‖s_i‖ · ‖t_i‖)), over the n positions of the batch that count. It is 0 where both
    point the same way, and 2 where they point opposite ways. A vector of zeros has no direction: its cosine counts as 0
    and it gets no gradient.

    Reference: Sanh, Debut, Chaumond, Wolf: DistilBERT, a Distilled Version of BERT, NeurIPS EMC² Workshop 2019.

    Args:
        projected_feature, teacher_feature: batch × positions × channels each, or maps, or vectors.
        mask: batch × positions, False where a position is padding and does not count.

    Returns:
        A scalar in [0, 2]. No gradient reaches the teacher.

    Raises:
        PartError: the shapes differ, or no position counts.
    """
    student, teacher = both_rows(projected_feature, teacher_feature, mask, "cosine")
    return 1 - (unit(student, 1) * unit(teacher, 1)).sum(1).mean()
