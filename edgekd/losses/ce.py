"""Cross-entropy on the labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from edgekd.errors import PartError
from edgekd.losses._inputs import both_outputs, class_indices, outputs


def ce(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy between the labels and the student's outputs, averaged over the batch.

    loss = −1/B · Σ_b Σ_c t_bc · log q_bc, with q = softmax(student) and t = (1 − ε) · onehot(label) + ε / classes,
    or (1 − ε) · label + ε / classes for a label of probabilities.

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture, CVPR 2016 (ε).

    Args:
        student_logits: rows × classes; computed in float32 whatever their type.
        labels: int64 class indices, or rows × classes probabilities.
        label_smoothing: ε, in [0, 1).

    Returns:
        A scalar in nats.

    Raises:
        PartError: the label smoothing is out of its range, or the labels do not fit the outputs.
    """
    if not 0 <= label_smoothing < 1:
        raise PartError(f"ce has label_smoothing = {label_smoothing}", expected="at least 0 and below 1")
    if labels.is_floating_point():
        student, target = both_outputs(student_logits, labels, "ce", of="labels")
    else:
        student = outputs(student_logits, "ce")
        target = class_indices(labels, student, "ce")
    return cross_entropy(student, target, label_smoothing=label_smoothing)
