"""Learned rounding: each weight goes up or down, whichever together change the layer's output least."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekd.quantize.bias import mean_error, takes_bias
from edgekd.quantize.quantizer import aten
from edgekd.quantize.simulation import Inputs, Layer, Simulation
from edgekd.quantize.walk import Parts, walk

STEPS = 300
_LEARNING_RATE = 0.05  # of Adam, on the logits of "up"
_STRETCH = (-0.1, 1.1)  # of the sigmoid, so that it reaches 0 and 1 (Louizos, Welling, Kingma, ICLR 2018)
_SHARPNESS = (20.0, 2.0)  # of the term that drives towards 0 or 1: from the first step to the last
_DRIVE = 1.0  # its weight, against the error of rounding to nearest
_POSITIONS = 8192  # of a layer's output that its statistics are taken from
_ELEMENTS = 2**22  # of unfolded inputs at once
_LARGEST = 4608  # inputs to an output; the statistics are its square


@dataclass(frozen=True)
class Moments:
    """Means and covariances of what one layer takes (x, unfolded) and should give (y)."""

    mean_x: Tensor  # groups × inputs
    mean_y: Tensor  # outputs
    xx: Tensor  # groups × inputs × inputs
    xy: Tensor  # groups × outputs of a group × inputs

    def error(self, weight: Tensor) -> Tensor:
        """E[(w·x - y)²] for each row of `weight` (groups × outputs × inputs), without its mean and but for a constant.

        The mean is left to the bias.
        """
        return ((weight @ self.xx - 2 * self.xy) * weight).sum(-1)


def learn_rounding(simulation: Simulation, parts: Sequence[Inputs], *, seconds: float = math.inf) -> tuple[str, ...]:
    """Choose for each weight the grid point below or above it, layer by layer; the names of the layers that changed.

    Minimises E[(w̃·x̂ - y)²] over w̃ = s · clamp(⌊w/s⌋ + h(v)), where x̂ is the layer's input with all before it
    quantized, y what the layer gives in the float network, and h(v) = clamp(1.2 · σ(v) - 0.1, 0, 1) is driven to 0
    or 1 by 1 - |2h - 1|^β (Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for
    Post-Training Quantization, ICML 2020). Without the activation the error is a quadratic form in w̃, so that the
    covariances of x̂ and y hold all there is to know: a step costs the same however many samples there are. Biases
    then take the mean error. A row that learns nothing keeps its nearest rounding. Ranges must be set.

    Args:
        seconds: no layer is begun later than that.
    """
    begun = time.monotonic()
    changed: list[str] = []

    def visit(layer: Layer, given: Parts, wanted: Parts) -> None:
        kernel = tuple(simulation.weight(layer).shape[2:])
        if layer.shared or not _unfolds(layer, kernel, given[0]) or time.monotonic() - begun > seconds:
            return
        weight = _round(layer, simulation.weight(layer).detach(), _moments(layer, kernel, given, wanted))
        simulation.adjust(layer, weight=weight)
        if takes_bias(simulation, layer, given[0]):
            error, bias = mean_error(simulation, layer, given, wanted), simulation.bias(layer)
            simulation.adjust(layer, bias=-error if bias is None else bias - error)
        changed.append(layer.name)

    walk(simulation, parts, visit)
    return tuple(changed)


def _round(layer: Layer, weight: Tensor, moments: Moments) -> Tensor:
    """The weight on its grid, in its own shape."""
    assert layer.site is not None
    quantizer = layer.site.quantizer
    shape = (layer.groups, weight.shape[0] // layer.groups, -1)
    rows = weight.reshape(shape)
    scale = quantizer.scale.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight).reshape(shape)
    low, high = quantizer.quant_min, quantizer.quant_max
    nearest = torch.round(rows / scale).clamp(low, high)
    below = torch.floor(rows / scale)
    up = _learn(rows, scale, below, (low, high), nearest, moments)
    learned = (below + up).clamp(low, high)
    better = moments.error(learned * scale) < moments.error(nearest * scale)
    return (torch.where(better.unsqueeze(-1), learned, nearest) * scale).reshape(weight.shape)


def _learn(
    rows: Tensor, scale: Tensor, below: Tensor, limits: tuple[int, int], nearest: Tensor, moments: Moments
) -> Tensor:
    """0 or 1 for each weight."""
    low, high = _STRETCH
    fraction = (rows / scale - below).clamp(0.01, 0.99)
    logits = torch.logit((fraction - low) / (high - low)).requires_grad_(True)
    moved = nearest * scale - rows
    unit = ((moved @ moments.xx) * moved).sum(-1)  # the error that rounding to nearest adds, for each row
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    optimizer = torch.optim.Adam([logits], lr=_LEARNING_RATE)
    with torch.enable_grad():
        for step in range(STEPS):
            part = step / STEPS
            sharpness = _SHARPNESS[0] + part * (_SHARPNESS[1] - _SHARPNESS[0])
            up = (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)
            error = (moments.error((below + up).clamp(*limits) * scale) / unit).sum()
            drive = (1 - (2 * up - 1).abs().pow(sharpness)).mean(-1).sum()
            loss = error + (_DRIVE * drive if part > 0.2 else 0.0)  # first only the error, as the authors do
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return (logits.detach() > 0).float()


def _unfolds(layer: Layer, kernel: tuple[int, ...], value: Tensor) -> bool:
    """Can the layer be written as a matrix product over positions, of a size that fits?"""
    if layer.linear:
        return value.shape[-1] <= _LARGEST
    if layer.node.target not in (aten.conv1d.default, aten.conv2d.default):
        return False
    inputs = value.shape[1] // layer.groups * math.prod(kernel)
    return inputs <= _LARGEST


def _moments(layer: Layer, kernel: tuple[int, ...], given: Parts, wanted: Parts) -> Moments:
    """From at most 8,192 positions of all samples, chosen at random."""
    samples = sum(len(value) for value in given)
    random = torch.Generator().manual_seed(0)
    kept = max(1, math.ceil(_POSITIONS / samples))
    rows_x, rows_y = [], []
    for value, output in zip(given, wanted, strict=True):
        x, y = _rows(layer, kernel, value, output, kept, random)
        rows_x.append(x)
        rows_y.append(y)
    x, y = torch.cat(rows_x), torch.cat(rows_y)  # positions × groups × inputs, positions × outputs
    x, y = x.transpose(0, 1), y.reshape(len(y), layer.groups, -1).permute(1, 2, 0)
    mean_x, mean_y = x.mean(1), y.mean(2)
    x, y = x - mean_x.unsqueeze(1), y - mean_y.unsqueeze(2)
    count = x.shape[1]
    return Moments(mean_x, mean_y.reshape(-1), x.transpose(1, 2) @ x / count, y @ x / count)


def _rows(
    layer: Layer, kernel: tuple[int, ...], value: Tensor, output: Tensor, kept: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What goes into and what comes out of the layer at some positions: positions × groups × inputs, and × outputs."""
    if layer.linear:
        x, y = value.reshape(len(value), -1, value.shape[-1]), output.reshape(len(output), -1, output.shape[-1])
        chosen = torch.randperm(x.shape[1], generator=random)[:kept]
        return x[:, chosen].flatten(0, 1).unsqueeze(1), y[:, chosen].flatten(0, 1)
    stride, padding, dilation = (_numbers(layer, index, default) for index, default in ((3, 1), (4, 0), (5, 1)))
    if value.dim() == 3:  # one dimension is two of which one is 1
        value, output, kernel = value.unsqueeze(2), output.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, stride[-1]), (0, padding[-1]), (1, dilation[-1])
    y = output.flatten(2)
    chosen = torch.randperm(y.shape[2], generator=random)[:kept]
    at_once = max(1, _ELEMENTS // (value.shape[1] * math.prod(kernel) * y.shape[2]))
    unfolded = [
        torch.nn.functional.unfold(part, kernel, dilation, padding, stride)[:, :, chosen]
        for part in value.split(at_once)  # type: ignore[no-untyped-call]
    ]
    x = torch.cat(unfolded).transpose(1, 2).flatten(0, 1)
    return x.reshape(len(x), layer.groups, -1), y[:, :, chosen].transpose(1, 2).flatten(0, 1)


def _numbers(layer: Layer, index: int, default: int) -> tuple[int, int]:
    given = layer.node.args[index] if len(layer.node.args) > index else [default]
    numbers = [int(number) for number in given]  # type: ignore[union-attr, arg-type]
    return (numbers[0], numbers[-1])
