"""A simulated network as a module that can be trained: what it gives is rounded, what moves is not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgekd.quantize.fake_quantizer import FakeQuantizer, Range
from edgekd.quantize.simulation import Layer, Simulation

Part: TypeAlias = Literal["weight", "bias"]
_STRETCH = 0.03  # of a range, for one unit of its parameter: a range moves by 3 % where a weight moves by one step


class Rounded(nn.Module):
    """What a simulation gives with every place rounding, to be trained like any module.

    Its parameters are the weights and biases of the quantized layers, and the ranges of activations:

    - A weight is counted in steps of its grid, w / scale. Under an optimizer whose steps do not depend on the size of
      gradients (Adam) a learning rate so means a part of a step, the same for every channel, whatever scale batch
      normalisation left it with. Grids of weights stay as they were calibrated (Wu, Judd, Zhang, Isaev, Micikevicius:
      Integer Quantization for Deep Learning Inference, 2020).
    - A range is learned as the logarithm of a factor on both its ends (Jain, Gural, Wu, Dick: Trained Quantization
      Thresholds, MLSys 2020), with the gradient of Esser et al. (Learned Step Size Quantization, ICLR 2020).

    Rounding has the gradient of the identity, and what is clipped none (Bengio, Léonard, Courville, 2013). Batch
    normalisation is folded and dropout is off, so that training and evaluation compute the same. It computes in
    float32 whatever autocast is around it: bfloat16 has fewer digits than the grids.

    Args:
        simulation: with all its ranges; nothing of it changes before `write_back`.
    """

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self.simulation = simulation  # no submodule: an exported graph refuses train() and eval()
        self.values = nn.ParameterDict()
        self.units = _Units()
        self._layers: dict[str, tuple[Layer, Part]] = {}
        self._paths: dict[str, str] = {}  # in the graph
        for layer in simulation.layers:
            if layer.site is not None:
                self._add(layer)
        self._ranges: dict[str, tuple[FakeQuantizer, Range]] = {}
        for number, site in enumerate(simulation.sites):
            found = site.quantizer.range
            if site.kind != "weight" and found is not None:
                self._ranges[f"range/{number}"] = site.quantizer, found
                self.values[f"range/{number}"] = nn.Parameter(torch.zeros(()))
        self._home = torch.device("cpu")

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of what the simulation's graph takes."""
        weights = {path: self.values[name] * self.units(name) for name, path in self._paths.items()}
        with torch.autocast(inputs[0].device.type, enabled=False), self.simulation.simulating(), self._stretching():
            logits: Tensor = functional_call(self.simulation.graph, weights, inputs)
        return logits

    def write_back(self) -> None:
        """Leave weights, biases and ranges in the simulation, which gives from now on what this module gives."""
        with torch.no_grad():
            for name, (layer, part) in self._layers.items():
                self.simulation.adjust(layer, **{part: self.values[name] * self.units(name)})
            for name, (quantizer, ends) in self._ranges.items():
                quantizer.set_range(*_stretched(ends, self.values[name]))

    @contextlib.contextmanager
    def _stretching(self) -> Iterator[None]:
        """Ranges are as this module has them."""
        for name, (quantizer, ends) in self._ranges.items():
            quantizer.learned = partial(_rounded, quantizer, ends, self.values[name])
        try:
            yield
        finally:
            for quantizer, _ in self._ranges.values():
                quantizer.learned = None

    def _add(self, layer: Layer) -> None:
        weight, bias, path = self.simulation.weight(layer), self.simulation.bias(layer), self.simulation.bias_path(layer)
        steps = _steps(layer, weight)
        self._register(layer, "weight", layer.weight, weight, steps)
        if bias is not None and path is not None:
            # what the output moves by where every weight of a channel moves by a step, in no common direction
            outputs = steps.reshape(-1) * math.sqrt(weight.numel() / len(bias))
            self._register(layer, "bias", path, bias, outputs if outputs.numel() == bias.numel() else outputs.mean())
