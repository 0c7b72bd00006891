"""Learned rounding: each weight goes up or down, whichever together change the layer's output least."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekd.quantize.bias import correct, takes_bias
from edgekd.quantize.quantizer import aten
from edgekd.quantize.simulation import Inputs, Layer, Simulation
from edgekd.quantize.walk import Parts, walk

SWEEPS = 4  # over all weights of a layer; mostly the third changes nothing
_POSITIONS = 8192  # of a layer's output that its statistics are taken from
_ELEMENTS = 2**22  # of unfolded inputs at once
_LARGEST = 4608  # inputs to an output; the statistics are its square


@dataclass(frozen=True)
class Moments:
    """Covariances of what one layer takes (x, unfolded) and should give (y)."""

    count: int  # positions
    xx: Tensor  # groups × inputs × inputs
    xy: Tensor  # groups × outputs of a group × inputs

    def error(self, weight: Tensor) -> Tensor:
        """E[(w·x - y)²] for each row of `weight` (groups × outputs × inputs), without its mean and but for a constant.

        The mean is left to the bias.
        """
        return ((weight @ self.xx - 2 * self.xy) * weight).sum(-1)

    def towards(self, weight: Tensor) -> Moments:
        """With a ridge around `weight`, the wider the fewer positions there are for each input."""
        inputs = self.xx.shape[-1]
        ridge = torch.diagonal(self.xx, dim1=-2, dim2=-1).mean(-1).reshape(-1, 1, 1) * inputs / self.count
        return Moments(self.count, self.xx + ridge * torch.eye(inputs), self.xy + ridge * weight)


def learn_rounding(simulation: Simulation, parts: Sequence[Inputs], *, seconds: float = math.inf) -> tuple[str, ...]:
    """Choose for each weight the grid point below or above it, layer by layer; the names of the layers that were done.

    Minimises E[(w̃·x̂ - y)²] over w̃ = s · clamp(⌊w/s⌋ + u), u ∈ {0, 1}, where x̂ is the layer's input with all before
    it quantized and y what the layer gives in the float network (Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or
    Down? Adaptive Rounding for Post-Training Quantization, ICML 2020, for one layer without its activation).
    That is a quadratic form in u, so that the covariances of x̂ and y hold all there is to know. The authors relax u
    to (0, 1) and use Adam; here each u in turn is flipped if that lowers the error, from rounding to nearest on, which
    came to the same error in a twentieth of the time (benchmarks/LOG.md) and can never end above where it began.
    Weights that few samples speak for are held to their float values by a ridge. Biases then take the mean error.
    Ranges must be set.

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
            correct(simulation, layer, given, wanted)
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
    grid = torch.stack([below.clamp(low, high), (below + 1).clamp(low, high)]) * scale
    up = (nearest > below.clamp(low, high)).float()
    return descend(grid, up, moments.towards(rows)).reshape(weight.shape)


def descend(grid: Tensor, up: Tensor, moments: Moments) -> Tensor:
    """The weights, each at one of its two grid points, after flipping one by one whatever lowers the error.

    Args:
        grid: 2 × groups × outputs × inputs, the lower and the upper point.
        up: where to begin: 1 for the upper one; changed in place.
    """
    step = grid[1] - grid[0]
    weight = grid[0] + up * step
    curvature = torch.diagonal(moments.xx, dim1=-2, dim2=-1).unsqueeze(1)
    for _ in range(SWEEPS):
        slope = weight @ moments.xx - moments.xy
        flipped = False
        for k in range(weight.shape[-1]):
            move = (1 - 2 * up[..., k]) * step[..., k]
            better = 2 * move * slope[..., k] + move.square() * curvature[..., k] < 0
            if better.any():
                flipped = True
                move = torch.where(better, move, 0.0)
                up[..., k] = torch.where(better, 1 - up[..., k], up[..., k])
                slope += move.unsqueeze(-1) * moments.xx[:, None, k]
        weight = grid[0] + up * step
        if not flipped:
            break
    return weight


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
    x, y = x - x.mean(1, keepdim=True), y - y.mean(2, keepdim=True)
    count = x.shape[1]
    return Moments(count, x.transpose(1, 2) @ x / count, y @ x / count)


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
