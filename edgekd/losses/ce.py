"""Cross-entropy on the labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from edgekd.errors import PartError
from edgekd.types import Outputs


def ce(student: Outputs, teacher: Outputs, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy between the labels and the student's outputs, averaged over the batch.

    loss = −1/B · Σ_b Σ_c t_bc · log q_bc, with q = softmax(student) and t = (1 − ε) · onehot(label) + ε / classes.

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture, CVPR 2016 (ε).

    Args:
        student: logits, batch × classes; computed in float32 whatever their type.
        teacher: not used.
        labels: int64 class indices, batch.
        label_smoothing: ε, in [0, 1).

    Returns:
        A scalar in nats.

    Raises:
        PartError: the label smoothing is out of its range.
    """
    if not 0 <= label_smoothing < 1:
        raise PartError(f"ce has label_smoothing = {label_smoothing}", expected="at least 0 and below 1")
    return cross_entropy(student.logits.float(), labels, label_smoothing=label_smoothing)
