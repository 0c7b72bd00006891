"""The classes beside the labelled one, for the losses that treat the two apart."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import one_hot

from edgekd.errors import PartError


def labelled(labels: Tensor, logits: Tensor, loss: str) -> Tensor:
    """rows × classes, True at each row's label.

    Raises:
        PartError: there are fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise PartError(
            f"{loss} distils the classes beside the labelled one, and of {logits.shape[1]} classes one is left at most",
            expected="three classes or more",
            fix="use kd",
        )
    return one_hot(labels, logits.shape[1]).bool()


def without(hit: Tensor, logits: Tensor) -> Tensor:
    """Logits in which the labelled class has no part: a softmax or logsumexp of them is over the rest."""
    return logits.masked_fill(hit, -math.inf)


def log_rest(hit: Tensor, logits: Tensor) -> Tensor:
    """log softmax over the rest, rows × classes; 0 at the labelled class, so that a sum of products skips it."""
    return without(hit, logits).log_softmax(1).masked_fill(hit, 0)
