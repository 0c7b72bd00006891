"""DKD: decoupled knowledge distillation, the labelled class and the rest weighted apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from edgekd.losses._inputs import both_outputs, class_indices, not_negative, positive
from edgekd.losses._rest import labelled, log_rest, without


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 2.0,
) -> Tensor:
    """`kd` taken apart: how sure to be of the label, and how the other classes relate, with a weight each.

    loss = T² · 1/B · Σ_b [α · KL((p_y, 1 − p_y) ‖ (q_y, 1 − q_y)) + β · KL(p̂ ‖ q̂)], with p = softmax(teacher / T), q =
    softmax(student / T), y the label, and p̂, q̂ the softmax over the other classes. `kd` is the same with α = 1 and
    β = 1 − p_y, which is why it hardly learns the rest where the teacher is sure. 1 − p_y is a logsumexp over the rest,
    so that its logarithm stays finite. It is 0 where both agree up to a constant.

    Reference: Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022 (β tuned for every pair: 2 to 8
    on CIFAR-100 with T = 4, 0.5 to 2 on ImageNet with T = 1; beside cross-entropy of weight 1).

    Args:
        student_logits, teacher_logits: rows × classes each, three classes or more; computed in float32.
        labels: class indices.
        temperature: T.
        alpha: α, the weight of the label against the rest.
        beta: β, the weight of the rest.

    Returns:
        A scalar in nats. No gradient reaches the teacher.

    Raises:
        PartError: an option is out of its range, the shapes differ, there are fewer than three classes, or the labels
            are probabilities.
    """
    positive("dkd", temperature=temperature)
    not_negative("dkd", alpha=alpha, beta=beta)
    student, teacher = both_outputs(student_logits, teacher_logits, "dkd")
    student, teacher = student / temperature, teacher / temperature
    labels = class_indices(labels, student, "dkd")
    hit = labelled(labels, student, "dkd")
    target = kl_div(_two(hit, labels, student), _two(hit, labels, teacher), reduction="batchmean", log_target=True)
    rest = kl_div(log_rest(hit, student), log_rest(hit, teacher), reduction="batchmean", log_target=True)
    return (alpha * target + beta * rest) * temperature**2


def _two(hit: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
    """Logarithms of the probabilities of the label and of all the rest, rows × 2."""
    pair = torch.cat([logits.gather(1, labels[:, None]), without(hit, logits).logsumexp(1, keepdim=True)], 1)
    return pair.log_softmax(1)
