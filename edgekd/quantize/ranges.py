"""Which range of each value the integers span: from what was seen of activations, and from the weights themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgekd.quantize.fake_quantizer import FakeQuantizer, Range
from edgekd.quantize.histogram import BINS, Histogram
from edgekd.quantize.simulation import Simulation

PERCENTILE = 99.99  # of the values stay inside, half of the rest is beyond each end
_CANDIDATES = torch.linspace(0.02, 1.0, 99, dtype=torch.float64)  # parts of an end that are tried
_WEIGHT_CANDIDATES = torch.linspace(0.5, 1.0, 51)
_CHUNK = 16  # candidates whose errors are computed at once


def minmax(seen: Histogram, quantizer: FakeQuantizer) -> Range:
    """From the smallest to the largest value seen."""
    return torch.tensor(seen.low), torch.tensor(seen.high)


def percentile(seen: Histogram, quantizer: FakeQuantizer) -> Range:
    """All but the outermost 0.01 % of the values: of two-sided ones half at each end (to the width of a bin)."""
    outside = (1 - PERCENTILE / 100) * float(seen.counts.sum())
    if seen.low < 0 < seen.high:
        outside /= 2
    below = torch.cumsum(seen.counts, 0).double()
    above = torch.flip(torch.cumsum(torch.flip(seen.counts, (0,)), 0), (0,)).double()
    low = seen.edges[int((below <= outside).sum())] if seen.low < 0 else torch.tensor(seen.low)
    high = seen.edges[BINS - 1 - int((above <= outside).sum())] + seen.width if seen.high > 0 else seen.high
    return torch.tensor(max(float(low), seen.low)), torch.tensor(min(float(high), seen.high))


def mse(seen: Histogram, quantizer: FakeQuantizer) -> Range:
    """The range of the smallest mean squared error, rounding and clipping together, over the histogram.

    Each end is tried at 99 places between zero and the largest value, first both in proportion, then each alone
    (Sung, Shin, Hwang: Resiliency of Deep Neural Networks under Quantization, 2015; Shin, Hwang, Sung, ICASSP 2016:
    the step is found by minimising the squared error).
    """
    used = seen.counts.nonzero().squeeze(1)
    values, counts = seen.centres[used], seen.counts[used].double()
    low, high = torch.tensor(seen.low).double(), torch.tensor(seen.high).double()

    def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        errors = _errors(values, counts, lows, highs, quantizer)
        index = int(errors.argmin())
        return lows[index], highs[index]

    whole_low, whole_high, ones = low, high, torch.ones_like(_CANDIDATES)
    low, high = best(whole_low * _CANDIDATES, whole_high * _CANDIDATES)
    if seen.low < 0 < seen.high and not quantizer.symmetric:
        low, high = best(whole_low * _CANDIDATES, high * ones)
        low, high = best(low * ones, whole_high * _CANDIDATES)
    return low.float(), high.float()


METHODS: dict[str, Callable[[Histogram, FakeQuantizer], Range]] = {
    "minmax": minmax, "percentile": percentile, "mse": mse,
}  # fmt: skip


def set_activations(simulation: Simulation, method: str) -> None:
    """Give each activation the range that `method` finds in what was observed.

    Args:
        method: minmax; percentile or mse where histograms were observed.
    """
    for site in simulation.sites:
        seen = site.quantizer.seen
        if site.kind != "weight" and seen is not None:
            site.quantizer.set_range(*METHODS[method](seen, site.quantizer))


def set_weights(simulation: Simulation, method: str) -> None:
    """Give each quantized weight its range, one for each output channel where the rules say so.

    Args:
        method: minmax; mse: of 51 parts of the largest magnitude, from a half to all of it, that of the smallest
            squared error.
    """
    for layer in simulation.layers:
        if layer.site is not None:
            layer.site.quantizer.set_range(*_weight_range(simulation.weight(layer), layer.site.quantizer, method))


def _weight_range(weight: Tensor, quantizer: FakeQuantizer, method: str) -> Range:
    axis = quantizer.ch_axis
    rows = weight.detach().reshape(1, -1) if axis is None else weight.detach().transpose(0, axis).flatten(1)
    largest = rows.abs().amax(1)
    if method == "mse":
        lowest = torch.full_like(largest, torch.inf)
        best = largest
        for part in _WEIGHT_CANDIDATES:
            scale, _ = quantizer.parameters_of(-largest * part, largest * part)
            scale = scale.unsqueeze(1)
            rounded = torch.round(rows / scale).clamp(quantizer.quant_min, quantizer.quant_max) * scale
            error = (rows - rounded).square().sum(1)
            best, lowest = torch.where(error <= lowest, largest * part, best), torch.minimum(error, lowest)
        largest = best
    return -largest, largest


def _errors(values: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, quantizer: FakeQuantizer) -> Tensor:
    """The summed squared error of quantizing `values`, each `counts` times, for each range."""
    scales, zeros = quantizer.parameters_of(lows, highs)
    found = []
    for start in range(0, len(scales), _CHUNK):
        scale, zero = scales[start : start + _CHUNK].double(), zeros[start : start + _CHUNK]
        step, offset = scale.unsqueeze(1), zero.unsqueeze(1)
        levels = (torch.round(values / step) + offset).clamp(quantizer.quant_min, quantizer.quant_max) - offset
        found.append(((levels * step - values).square() * counts).sum(1))
    return torch.cat(found)
