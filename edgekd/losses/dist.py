"""DIST: correlations of the outputs instead of their equality, for teachers much stronger than the student."""

from __future__ import annotations

from torch import Tensor

from edgekd.errors import PartError
from edgekd.losses._inputs import both_outputs, not_negative, positive
from edgekd.losses._vectors import unit


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Tensor:
    """What correlation with the teacher lacks, over the classes of each sample and over the samples of each class.

    loss = T² · (inter · (1 − mean_b ρ(q_b, p_b)) + intra · (1 − mean_c ρ(q_c, p_c))), with p = softmax(teacher / T) and
    q = softmax(student / T), their rows b and columns c, and ρ Pearson's correlation. The second term needs a batch of
    some size. A row or a column of equal probabilities (but for rounding) has no correlation: it counts as ρ = 0 and
    gets no gradient, so a student whose last layer starts at zero needs another loss beside this one.

    Reference: Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022 (published with
    the weight 2 beside cross-entropy of weight 1; T = 4 on CIFAR).

    Args:
        student_logits, teacher_logits: rows × classes each; computed in float32 whatever their type.
        temperature: T.
        inter: weight of the correlations over classes.
        intra: weight of the correlations over the batch.

    Returns:
        A scalar, at most 2 · T² · (inter + intra); 0 where both agree up to a constant and all correlations exist. No
        gradient reaches the teacher.

    Raises:
        PartError: an option is out of its range, the shapes differ, or a correlation is over fewer than three classes
            or fewer than two rows.
    """
    positive("dist", temperature=temperature)
    not_negative("dist", inter=inter, intra=intra)
    student, teacher = both_outputs(student_logits, teacher_logits, "dist")
    if inter and student.shape[1] < 3:
        raise PartError(
            "dist correlates over classes, and over fewer than three that is no more than a sign",
            fix="set inter = 0 to leave the correlation over the batch, or use kd",
        )
    if intra and student.shape[0] < 2:
        raise PartError("dist correlates over the batch, and this one has one row", fix="set intra = 0")
    q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    missing = q.new_zeros(())
    if inter:
        missing = missing + inter * (1 - _correlation(q, p, dim=1).mean())
    if intra:
        missing = missing + intra * (1 - _correlation(q, p, dim=0).mean())
    return missing * temperature**2


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return (_deviations(a, dim) * _deviations(b, dim)).sum(dim)


def _deviations(values: Tensor, dim: int) -> Tensor:
    """Differences from the mean, of length 1; sizes are taken relative to the values, since a column may be tiny."""
    size = values.detach().amax(dim, keepdim=True).clamp(min=1e-30)
    return unit((values - values.mean(dim, keepdim=True)) / size, dim)
