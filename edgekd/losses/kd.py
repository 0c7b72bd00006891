"""Knowledge distillation by softened outputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from edgekd.errors import PartError
from edgekd.types import Outputs


def kd(student: Outputs, teacher: Outputs, labels: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Kullback-Leibler divergence of the student's softened outputs from the teacher's, averaged over the batch.

    loss = T² · 1/B · Σ_b Σ_c p_bc · (log p_bc − log q_bc), with p = softmax(teacher / T) and q = softmax(student / T).
    Summed over classes, not averaged, so that its size does not shrink with their number; T² keeps the size of the
    gradients when T changes. It is 0 where both agree up to a constant. No gradient reaches the teacher.

    Reference: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, NIPS Deep Learning Workshop 2014.

    Args:
        student, teacher: logits, batch × classes each; computed in float32 whatever their type.
        labels: not used.
        temperature: T; the higher, the more the small probabilities count.

    Returns:
        A scalar in nats.

    Raises:
        PartError: the temperature is not positive.
    """
    if not temperature > 0:
        raise PartError(f"kd has temperature = {temperature}", expected="a number above 0", fix="4 is usual")
    target = log_softmax(teacher.logits.detach().float() / temperature, dim=1)
    guess = log_softmax(student.logits.float() / temperature, dim=1)
    return kl_div(guess, target, reduction="batchmean", log_target=True) * temperature**2
