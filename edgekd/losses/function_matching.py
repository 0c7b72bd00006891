"""Function matching: the teacher's outputs as they are, without labels."""

from __future__ import annotations

from torch import Tensor

from edgekd.losses.kd import kd


def function_matching(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's outputs from the teacher's, averaged over the batch.

    loss = 1/B · Σ_b Σ_c p_bc · (log p_bc − log q_bc), with p = softmax(teacher) and q = softmax(student): `kd` at the
    temperature 1. It asks for no labels. It is meant alone, with mixup, with the same view of each image for both, and
    with a long training: the student is to be the same function, not only on the training images.

    Reference: Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov: Knowledge Distillation: A Good Teacher Is Patient and
    Consistent, CVPR 2022.

    Args:
        student_logits, teacher_logits: rows × classes each; computed in float32 whatever their type.

    Returns:
        A scalar in nats; 0 where both agree up to a constant. No gradient reaches the teacher.

    Raises:
        PartError: the shapes differ.
    """
    return kd(student_logits, teacher_logits, temperature=1.0)
