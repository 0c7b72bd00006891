"""ReviewKD: fused features of several stages, each compared at several sizes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from edgekd.errors import PartError
from edgekd.losses._inputs import fixed, squared_difference

_SIDES = (4, 2, 1)  # of the pooled grids, in positions


def review(fused_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss: the mean squared difference of each level as it is and pooled, summed over levels.

    loss = Σ_l Σ_k w_k · MSE(pool_k(student_l), pool_k(teacher_l)) / Σ_k w_k, with w = 1 for the maps as they are, then
    ½, ¼, ⅛ for average pools to 4 × 4, 2 × 2 and 1 × 1, those left out that are not smaller than the maps. It is 0
    where all maps are equal.

    Reference: Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021 (published with the weight 5
    on CIFAR-100 and 1 on ImageNet, growing over the first epochs; the teacher's features are those before activation).

    Args:
        fused_features: the student's through the fusion, shallow to deep, batch × channels × height × width each.
        teacher_features: the teacher's, of the same shapes.

    Returns:
        A scalar, in the square of the feature's unit. No gradient reaches the teacher.

    Raises:
        PartError: there are no levels, or their number or shapes differ.
    """
    mine, theirs = ([tuple(level.shape) for level in side] for side in (fused_features, teacher_features))
    if not mine or mine != theirs or any(len(shape) != 4 for shape in mine):
        raise PartError(
            f"review compares levels of shapes {mine} with the teacher's {theirs}",
            expected="as many levels, batch × channels × height × width each, of equal shapes",
        )
    levels = [_level(s.float(), fixed(t)) for s, t in zip(fused_features, teacher_features, strict=True)]
    return sum(levels[1:], start=levels[0])


def _level(student: Tensor, teacher: Tensor) -> Tensor:
    total, weight, weights = squared_difference(student, teacher), 1.0, 1.0
    for side in _SIDES:
        if side < min(student.shape[2:]):
            weight /= 2
            weights += weight
            pooled = squared_difference(adaptive_avg_pool2d(student, side), adaptive_avg_pool2d(teacher, side))
            total = total + weight * pooled
    return total / weights
