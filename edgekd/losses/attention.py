"""AT: attention transfer, where the teacher's activations are large."""

from __future__ import annotations

from torch import Tensor

from edgekd.errors import PartError
from edgekd.losses._inputs import both_features
from edgekd.losses._vectors import scaled, unit


def attention(student_feature: Tensor, teacher_feature: Tensor, *, p: float = 2.0) -> Tensor:
    """Squared distance between the maps of where student and teacher are active, averaged over the batch.

    loss = 1/B · Σ_b ‖ŝ_b − t̂_b‖², with the map x_bn = Σ_c |feature_bnc|^p of each sample b over its positions n, and
    x̂_b = x_b / ‖x_b‖. Channels may differ in number, positions may not. It is 0 where the maps are proportional, and at
    most 2. Published code averages over positions where this sums, so that its size does not shrink with the grid: its
    weight of 1000 is 1000 / positions here. A sample of zeros has no map and gets no gradient.

    Reference: Zagoruyko, Komodakis: Paying More Attention to Attention: Improving the Performance of Convolutional
    Neural Networks via Attention Transfer, ICLR 2017.

    Args:
        student_feature, teacher_feature: batch × positions × channels each, or maps.
        p: how much the strongest channels count.

    Returns:
        A scalar in [0, 2]. No gradient reaches the teacher.

    Raises:
        PartError: p is below 1, batch or positions differ, or there is but one position.
    """
    if not 1 <= p <= 16:
        raise PartError(f"attention has p = {p}", expected="a number from 1 to 16", fix="2 is usual")
    student, teacher = both_features(student_feature, teacher_feature, "attention", alike=2)
    if student.shape[1] < 2:
        raise PartError(
            "attention compares where a feature is active, and this one has one position", fix="use cosine or hint"
        )
    return (_map(student, p) - _map(teacher, p)).square().sum(1).mean()


def _map(feature: Tensor, p: float) -> Tensor:
    return unit((scaled(feature, (1, 2)).abs() ** p).sum(2), 1)
