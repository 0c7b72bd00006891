"""OFA-KD: exits on the student's features, for students and teachers of different families."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from edgekd.errors import PartError
from edgekd.losses._inputs import both_outputs, class_indices, positive


def ofa(exit_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, epsilon: float = 1.0) -> Tensor:
    """Cross-entropy of an exit with the teacher's outputs, in which ε raises what the teacher says of the label.

    loss = −1/B · Σ_b Σ_c ((p_bc + 1[c = y])^ε − 1[c = y]) · log q_bc, with p = softmax(teacher), q = softmax(exit) and
    y the label. Features of unlike families do not compare; logits from a small head on them do. At ε = 1 the label
    cancels out and the minimum is at the teacher; otherwise it is at q ∝ (p + 1[c = y])^ε − 1[c = y].

    Reference: Hao, Guo, Han, Hu, Chen, Xu: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
    Distillation, NeurIPS 2023 (ε from 1 to 1.5; exits at four stages, of weight 1 beside cross-entropy and kd).

    Args:
        exit_logits, teacher_logits: rows × classes each; computed in float32 whatever their type.
        labels: class indices; where ε = 1, rows × classes probabilities too.
        epsilon: ε.

    Returns:
        A scalar in nats. No gradient reaches the teacher.

    Raises:
        PartError: ε is not positive, the shapes differ, or labels are probabilities while ε is not 1.
    """
    positive("ofa", epsilon=epsilon)
    student, teacher = both_outputs(exit_logits, teacher_logits, "ofa")
    weights = teacher.softmax(1)
    if epsilon != 1:
        if labels.is_floating_point():
            raise PartError(
                f"ofa has epsilon = {epsilon}, and the labels are probabilities",
                expected="class indices",
                fix="train without mixup, or set epsilon = 1, where the label cancels out",
            )
        hit = one_hot(class_indices(labels, student, "ofa"), student.shape[1]).bool()
        # (1 + p)^ε − 1 without losing the digits of a small p
        weights = torch.where(hit, torch.expm1(epsilon * torch.log1p(weights)), weights**epsilon)
    return -(weights * student.log_softmax(1)).sum(1).mean()
