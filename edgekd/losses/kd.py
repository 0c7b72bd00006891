"""Knowledge distillation by softened outputs."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from edgekd.errors import PartError
from edgekd.losses._inputs import both_outputs, positive
from edgekd.losses._vectors import unit


def kd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0, standardize: bool = False
) -> Tensor:
    """Kullback-Leibler divergence of the student's softened outputs from the teacher's, averaged over the batch.

    loss = T² · 1/B · Σ_b Σ_c p_bc · (log p_bc − log q_bc), with p = softmax(teacher / T) and q = softmax(student / T).
    Summed over classes, not averaged, so that its size does not shrink with their number; T² keeps the size of the
    gradients when T changes. It is 0 where both agree up to a constant. No gradient reaches the teacher.

    Standardised, every row z of both becomes (z − mean z) / std z first (std with classes − 1), so that the student
    learns how its classes relate and is free in their scale: its probabilities then need calibration.

    Reference: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, NIPS Deep Learning Workshop 2014.
    Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024 (published with T = 2 and the
    weight 9).

    Args:
        student_logits, teacher_logits: rows × classes each; computed in float32 whatever their type.
        temperature: T; the higher, the more the small probabilities count.
        standardize: compare standardised logits. A row whose logits are all equal has no gradient then.

    Returns:
        A scalar in nats.

    Raises:
        PartError: the temperature is not positive, the shapes differ, or two classes are to be standardised.
    """
    positive("kd", temperature=temperature)
    student, teacher = both_outputs(student_logits, teacher_logits, "kd")
    if standardize:
        if student.shape[1] < 3:
            raise PartError(
                "kd cannot standardise fewer than three classes: of two logits no more than a sign is left",
                fix="standardize = false",
            )
        student, teacher = _standardized(student), _standardized(teacher)
    target = log_softmax(teacher / temperature, dim=1)
    guess = log_softmax(student / temperature, dim=1)
    return kl_div(guess, target, reduction="batchmean", log_target=True) * temperature**2


def _standardized(logits: Tensor) -> Tensor:
    return unit(logits - logits.mean(1, keepdim=True), 1) * math.sqrt(logits.shape[1] - 1)
