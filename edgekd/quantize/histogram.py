"""How often values of a tensor lie where, in a fixed amount of memory however many are counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 8192  # an even number; of values of one sign at least a quarter is used: 8 bins for each of 256 levels
_SMALLEST = -40  # exponent of the narrowest span: values below 1e-12 are zeros


class Histogram:
    """Counts of a stream of values, with their smallest and largest.

    The bins span [-2ᵏ, 2ᵏ) for the smallest integer k that holds every value. When a larger one comes, k grows and
    neighbouring bins become one; since all widths are powers of two, a value falls where it would have fallen had
    the final k been known before. So counts do not depend on how the stream was cut into batches, nor on its order.
    """

    def __init__(self, *, counting: bool = False) -> None:
        self.low, self.high = math.inf, -math.inf
        self.counting = counting
        self.exponent = _SMALLEST
        self.counts = torch.zeros(BINS if counting else 0, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count `values`, of any shape; without `counting` only the smallest and largest are kept."""
        if not values.numel():
            return
        low, high = (float(value) for value in torch.aminmax(values))
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not self.counting or not math.isfinite(low + high):
            return
        self._widen(max(-low, high))
        width = 2.0 ** (self.exponent + 1) / BINS
        bins = torch.floor(values.reshape(-1).float() / width).to(torch.int64).add_(BINS // 2)
        self.counts += torch.bincount(bins, minlength=BINS)

    @property
    def width(self) -> float:
        """Of one bin."""
        return 2.0 ** (self.exponent + 1) / BINS

    @property
    def edges(self) -> Tensor:
        """Lower edges of the bins (float64)."""
        return (torch.arange(BINS, dtype=torch.float64) - BINS // 2) * self.width

    @property
    def centres(self) -> Tensor:
        """Middle of each bin (float64); of the first bin from zero on it is zero, which most of its values are."""
        centres = self.edges + self.width / 2
        centres[BINS // 2] = 0.0
        return centres

    def _widen(self, largest: float) -> None:
        exponent = max(_SMALLEST, math.frexp(largest)[1]) if largest > 0 else _SMALLEST  # largest < 2 ** exponent
        while self.exponent < exponent:
            if not self.counts.any():
                self.exponent = exponent
                return
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
            self.exponent += 1
