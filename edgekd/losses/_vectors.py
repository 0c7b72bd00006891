"""Vectors of length 1, for losses that do not depend on the size of what they compare."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NOTHING = 1e-6  # a largest magnitude below it is no direction: its gradient would be above a million


def scaled(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`values` divided by their largest magnitude along `dim`, so that squares neither overflow nor vanish.

    The divisor is a constant to autograd: it belongs in front of what does not depend on the scale. Where there is
    nothing but zeros (below 1e-6), the result is 0 and gets no gradient.
    """
    largest = values.detach().abs().amax(dim, keepdim=True)
    return values / largest.masked_fill(largest < _NOTHING, math.inf)


def unit(values: Tensor, dim: int) -> Tensor:
    """`values` divided by their Euclidean length along `dim`; a vector of zeros (below 1e-6) stays 0, without gradient.

    Exact and finite for large vectors too, whose squares float32 does not hold.
    """
    values = scaled(values, dim)
    length: Tensor = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / length.clamp(min=1)  # 1 or more wherever it is not 0, since the largest magnitude is 1 now
