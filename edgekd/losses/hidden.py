"""Hidden states: a small transformer's layers that repeat layers of a large one."""

from __future__ import annotations

from torch import Tensor

from edgekd.losses._inputs import both_rows, squared_difference


def hidden(projected_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference between the student's projected hidden states and the teacher's.

    loss = 1/(n·C) · Σ_i Σ_c (student_ic − teacher_ic)², over the n tokens of the batch that count and C channels: the
    formula of `hint`, under its own name since it is taken on other layers, the outputs of transformer blocks and of
    the embedding. It is 0 where both are equal.

    Reference: Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu: TinyBERT: Distilling BERT for Natural Language
    Understanding, Findings of EMNLP 2020.

    Args:
        projected_feature, teacher_feature: batch × tokens × channels each.
        mask: batch × tokens, False where a token is padding and does not count.

    Returns:
        A scalar, in the square of the feature's unit. No gradient reaches the teacher.

    Raises:
        PartError: the shapes differ, or no token counts.
    """
    return squared_difference(*both_rows(projected_feature, teacher_feature, mask, "hidden"))
