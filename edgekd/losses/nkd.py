"""NKD: normalised knowledge distillation, the labelled class and the rest apart."""

from __future__ import annotations

from torch import Tensor

from edgekd.losses._inputs import both_outputs, class_indices, not_negative, positive
from edgekd.losses._rest import labelled, log_rest


def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
) -> Tensor:
    """Cross-entropy on the label, the same weighted by the teacher's belief in it, and that of the normalised rest.

    loss = −1/B · Σ_b [(1 + p_y) · log q_y + γ · T² · Σ_{c≠y} p̂_c · log q̂_c], with p = softmax(teacher) and q =
    softmax(student) at the temperature 1, and p̂, q̂ the softmax over the classes other than the label y at T.
    The cross-entropy on the labels is in it, as published: no `ce` beside it. Since the label pulls at the student, its
    minimum is not at the teacher: it falls to γ · T² · (entropy of p̂) as q̂ becomes p̂ and q_y becomes 1.

    Reference: Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss and Customized Soft Labels, ICCV 2023.

    Args:
        student_logits, teacher_logits: rows × classes each, three classes or more; computed in float32.
        labels: class indices.
        temperature: T, of the rest.
        gamma: γ, the weight of the rest.

    Returns:
        A scalar in nats. No gradient reaches the teacher.

    Raises:
        PartError: an option is out of its range, the shapes differ, there are fewer than three classes, or the labels
            are probabilities.
    """
    positive("nkd", temperature=temperature)
    not_negative("nkd", gamma=gamma)
    student, teacher = both_outputs(student_logits, teacher_logits, "nkd")
    labels = class_indices(labels, student, "nkd")
    hit = labelled(labels, student, "nkd")
    believed = teacher.softmax(1).gather(1, labels[:, None])
    target = (1 + believed) * student.log_softmax(1).gather(1, labels[:, None])
    rest = log_rest(hit, teacher / temperature).exp() * log_rest(hit, student / temperature)
    return -(target.mean() + gamma * temperature**2 * rest.sum(1).mean())
