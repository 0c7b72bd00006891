"""Cross-layer equalisation: channels of very different size are made alike without changing what the network gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgekd.quantize.quantizer import POOL, aten
from edgekd.quantize.simulation import Layer, Simulation, fake_quantizer, rank, traced

# f(s · x) = s · f(x) for s > 0, channel by channel.
HOMOGENEOUS = {
    aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default,
    aten.max_pool2d.default, aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default,
    aten.contiguous.default, aten.clone.default, aten.alias.default,
}  # fmt: skip
_FLAT = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims}
_SWEEPS = 40
_SETTLED = 1e-3  # of the logarithm of a factor: what a further sweep would change is less


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers, of which the second alone reads what the first gives, through homogeneous functions."""

    first: Layer
    second: Layer


def equalize(simulation: Simulation) -> tuple[Pair, ...]:
    """Rescale each pair of neighbours so that each channel has the same range on both sides; the pairs there are.

    For channel i with the ranges r₁ = max|W₁| of what makes it and r₂ = max|W₂| of what reads it, s = √(r₁ / r₂):
    W₁ and b₁ are divided by s, W₂ multiplied; both ranges become √(r₁ · r₂). Pairs share layers, so this is repeated
    until nothing moves (Nagel, van Baalen, Blankevoort, Welling, ICCV 2019, section 4.1). Float weights are rewritten;
    ranges of activations must be observed anew.
    """
    pairs = find_pairs(simulation)
    for _ in range(_SWEEPS):
        largest = 0.0
        for pair in pairs:
            first = _outputs_first(pair.first, simulation.float_weight(pair.first))
            second = _inputs_first(pair.second, simulation.float_weight(pair.second))
            factor = torch.sqrt(first.abs().amax(1) / second.abs().amax(1))
            factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)  # a dead channel has no range
            largest = max(largest, float(factor.log().abs().max()))
            rescale(simulation, pair, factor)
        if largest < _SETTLED:
            break
    return pairs


def rescale(simulation: Simulation, pair: Pair, factor: Tensor) -> None:
    """Divide what comes out of `first` by `factor`, for each channel, and multiply what `second` makes of it."""
    first, second = simulation.float_weight(pair.first).detach(), simulation.float_weight(pair.second).detach()
    shape = [-1] + [1] * (first.dim() - 1)
    bias = simulation.float_bias(pair.first)
    simulation.rewrite(pair.first, weight=first / factor.reshape(shape), bias=None if bias is None else bias / factor)
    groups = pair.second.groups
    grouped = second.reshape(groups, second.shape[0] // groups, second.shape[1], -1)
    scaled = grouped * factor.reshape(groups, 1, second.shape[1], 1)
    simulation.rewrite(pair.second, weight=scaled.reshape(second.shape))


def find_pairs(simulation: Simulation) -> tuple[Pair, ...]:
    """Every pair of neighbouring layers between which channels can be rescaled."""
    layers = {layer.node: layer for layer in simulation.layers}
    found = []
    for layer in simulation.layers:
        second = _reader(simulation, layer, layers)
        if second is None or layer.shared or second.shared or layer.transposed or second.transposed:
            continue
        outputs = simulation.float_weight(layer).shape[0]
        if simulation.float_weight(second).shape[1] * second.groups == outputs and _bias_is_stored(simulation, layer):
            found.append(Pair(layer, second))
    return tuple(found)


def _reader(simulation: Simulation, layer: Layer, layers: dict[Node, Layer]) -> Layer | None:
    """The layer that alone reads what `layer` gives, if there is one and only homogeneous functions lie between."""
    node = layer.node
    while len(node.users) == 1:
        after = next(iter(node.users))
        if after in layers:
            dimensions = rank(node)
            same = layers[after].linear == layer.linear or (layers[after].linear and dimensions == 2)
            return layers[after] if after.args[0] is node and same else None
        if fake_quantizer(simulation.graph, after) is None and not _keeps_channels(after, layer):
            return None
        node = after
    return None


def _keeps_channels(node: Node, layer: Layer) -> bool:
    """Is this homogeneous in each output channel of the layer by itself?"""
    if node.target is aten.mean.dim:
        dims: Any = node.args[1]
        return not layer.linear and sorted(d % 4 for d in dims) == [2, 3] and rank(node.args[0]) == 4
    if node.target in POOL:
        return not layer.linear
    if node.target in _FLAT:
        before, after = traced(node.args[0]), traced(node)
        if layer.linear or before is None or after is None or (before.dim(), after.dim()) != (4, 2):
            return False
        return all(int(side) == 1 for side in before.shape[2:]) and int(after.shape[1]) == int(before.shape[1])
    return node.target in HOMOGENEOUS


def _bias_is_stored(simulation: Simulation, layer: Layer) -> bool:
    given = len(layer.node.args) > 2 and layer.node.args[2] is not None
    return not given or simulation.bias_path(layer) is not None


def _outputs_first(layer: Layer, weight: Tensor) -> Tensor:
    """Output channels × all else."""
    return weight.flatten(1)


def _inputs_first(layer: Layer, weight: Tensor) -> Tensor:
    """Input channels × all that reads them."""
    groups = layer.groups
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(groups * weight.shape[1], -1)
