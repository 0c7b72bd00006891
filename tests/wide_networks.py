"""Networks that int8 takes easily or hardly: the same function, with channels alike or of very different size."""

from __future__ import annotations

import itertools
from typing import Any

import networks
import torch
from rules import HOST
from torch import Tensor, nn

from edgekd.graph.program import capture, graph_inputs
from edgekd.models.network import Network
from edgekd.quantize.ranges import set_activations, set_weights
from edgekd.quantize.simulation import Inputs, Simulation
from edgekd.types import QuantizationRules


class Chain(nn.Module):
    """Convolution, depthwise convolution, 1 × 1 convolution, pool, linear: each pair of neighbours can be rescaled."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False)
        self.point = nn.Conv2d(16, 24, 1)
        self.activation, self.pool, self.head = activation, nn.AdaptiveAvgPool2d(1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.depthwise(self.activation(self.stem(x))))
        logits: Tensor = self.head(self.pool(self.activation(self.point(x))).flatten(1))
        return logits


def chain(*, wide: float = 0.0, sure: float = 1.0, activation: nn.Module | None = None) -> Network:
    """A chain whose channels are rescaled by exp(wide · n), n normal, and back by the next layer.

    Args:
        sure: standard deviation of the logits over samples; their means are equal, so that all classes are decided for.
    """
    torch.manual_seed(0)
    module = Chain(nn.ReLU() if activation is None else activation)
    layers: list[Any] = [module.stem, module.depthwise, module.point, module.head]
    with torch.no_grad():
        for first, second in itertools.pairwise(layers):
            factor = torch.exp(wide * torch.randn(first.weight.shape[0]))
            first.weight *= factor.reshape(-1, 1, 1, 1)
            if first.bias is not None:
                first.bias *= factor
            shape = (-1, 1, 1, 1) if second is module.depthwise else (1, -1, *[1] * (second.weight.dim() - 2))
            second.weight /= factor.reshape(shape)
    network = Network(module.eval(), networks.IMAGE, networks.NORMAL)
    with torch.no_grad():
        logits = network(*inputs_of(network, 256, 77))
        factor = sure / logits.std(0)
        module.head.weight.mul_(factor.unsqueeze(1))
        module.head.bias.sub_(logits.mean(0))
        module.head.bias.mul_(factor)
    return network


def inputs_of(network: Network, count: int = 32, seed: int = 0) -> Inputs:
    return graph_inputs(network, networks.samples(network.inputs, count, seed), preprocessing=True)[0]


def simulated(
    network: Network, rules: QuantizationRules = HOST, *, ranges: str | None = "minmax", **options: Any
) -> Simulation:
    """The network prepared, with ranges from 64 samples."""
    args, specs = graph_inputs(network, networks.samples(network.inputs, 4), preprocessing=True)
    simulation = Simulation(capture(network, args, specs, preprocessing=True), rules, **options)
    if ranges is not None:
        simulation.observe([inputs_of(network), inputs_of(network, seed=1)], histograms=ranges != "minmax")
        set_activations(simulation, ranges)
        set_weights(simulation, "mse" if ranges == "mse" else "minmax")
    return simulation
