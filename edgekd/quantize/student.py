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

from edgekd.errors import ModelError
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

    Raises:
        ModelError: there is nothing to train, or the graph takes one sample at a time.
    """

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        why = simulation.program.why_static
        if why is not None:
            raise ModelError(f"the quantized network takes one sample at a time, and cannot be trained: {why}")
        if not simulation.quantized:
            raise ModelError("no layer of the network is quantized, so there is nothing to train")
        self.simulation = simulation  # no submodule: an exported graph refuses train() and eval()
        self.values = nn.ParameterDict()
        self._layers: dict[str, tuple[Layer, Part, str]] = {}  # by parameter: with its path in the graph
        self._ranges: dict[str, tuple[FakeQuantizer, Range]] = {}
        for layer in simulation.layers:
            if layer.site is not None:
                self._add(layer)
        for number, site in enumerate(simulation.sites):
            found = site.quantizer.range
            if site.kind != "weight" and found is not None:
                self._ranges[f"range/{number}"] = site.quantizer, found
                self.values[f"range/{number}"] = nn.Parameter(torch.zeros(()))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of what the simulation's graph takes."""
        with torch.autocast(inputs[0].device.type, enabled=False), self._learning(), self.simulation.simulating():
            values = {path: self._placed(name) for name, (_, _, path) in self._layers.items()}
            logits: Tensor = functional_call(self.simulation.graph, values, inputs)
        return logits

    def write_back(self) -> None:
        """Leave weights, biases and ranges in the simulation, which gives from now on what this module gives."""
        with torch.no_grad():
            for name, (layer, part, _) in self._layers.items():
                self.simulation.adjust(layer, **{part: self._value(name)})
            for name, (quantizer, ends) in self._ranges.items():
                quantizer.set_range(*_stretched(ends, self.values[name]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Torch moves a module by this; what the simulation computes with goes with it."""
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.values[next(iter(self._layers))].device
        self.simulation.to(device)
        for name, (quantizer, (low, high)) in self._ranges.items():
            self._ranges[name] = quantizer, (low.to(device), high.to(device))
        return result

    @contextlib.contextmanager
    def _learning(self) -> Iterator[None]:
        """Within, activations have the ranges that this module has."""
        before = [(quantizer, quantizer.range) for quantizer, _ in self._ranges.values()]
        for name, (quantizer, ends) in self._ranges.items():
            quantizer.set_range(*_stretched(ends, self.values[name]))
            quantizer.learned = partial(_rounded, quantizer, self.values[name])
        try:
            yield
        finally:
            for quantizer, ends_before in before:
                assert ends_before is not None
                quantizer.learned = None
                quantizer.set_range(*ends_before)

    def _placed(self, name: str) -> Tensor:
        """A weight as the graph is given it, which rounds it there; a bias is rounded here, to the layer's own grid."""
        value, (layer, part, _) = self._value(name), self._layers[name]
        step = self.simulation.bias_step(layer) if part == "bias" else None
        if step is None:
            return value
        whole = value.detach()
        return value + ((torch.round(whole.double() / step) * step).float() - whole)

    def _value(self, name: str) -> Tensor:
        """A weight or bias of the graph."""
        value: Tensor = self.values[name] * self.get_buffer(f"unit of {name}")
        return value

    def _add(self, layer: Layer) -> None:
        assert layer.site is not None
        weight, bias, path = (
            self.simulation.weight(layer),
            self.simulation.bias(layer),
            self.simulation.bias_path(layer),
        )
        quantizer = layer.site.quantizer
        shape = [1] * weight.dim()
        shape[quantizer.ch_axis or 0] = -1
        step = quantizer.scale.reshape(shape)
        self._register(layer, "weight", layer.weight, weight, step)
        if bias is not None and path is not None:
            # What an output moves by where each of its weights moves by a step, for inputs of size one.
            moves = step.reshape(-1) * math.sqrt(weight.numel() / len(bias))
            self._register(layer, "bias", path, bias, moves if moves.shape == bias.shape else moves.mean())

    def _register(self, layer: Layer, part: Part, path: str, value: Tensor, unit: Tensor) -> None:
        name = path.replace(".", "/")
        if name not in self.values:  # layers may share a weight
            self._layers[name] = layer, part, path
            self.values[name] = nn.Parameter((value / unit).detach().contiguous())
            self.register_buffer(f"unit of {name}", unit.detach().clone(), persistent=False)


def _stretched(ends: Range, value: Tensor) -> Range:
    factor = torch.exp(_STRETCH * value.detach())
    return ends[0] * factor, ends[1] * factor


def _rounded(quantizer: FakeQuantizer, value: Tensor, x: Tensor) -> Tensor:
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    if not math.isfinite(scale):
        return x * scale  # of a training that diverges, which its loss then says
    result: Tensor = _Round.apply(x, value, scale, zero, quantizer.quant_min, quantizer.quant_max)
    return result


class _Round(torch.autograd.Function):
    """Rounding to a grid whose step is s · exp(0.03 v); the gradient reaches both the values and v.

    With y(x) what is given, y(s) = s · q for a fixed integer q beyond the ends, and s · (q - x / s) + x within: so
    ∂y/∂ln s = y beyond the ends, and y - x within.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, scale: float, zero: int, least: int, most: int) -> Tensor:
        result, inside = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(x, scale, zero, least, most)
        # What is kept is nobody else's: an activation behind it may work in place.
        ctx.save_for_backward(torch.where(inside, result - x, result), inside)
        made: Tensor = result
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        change, inside = ctx.saved_tensors
        return gradient * inside, _STRETCH * (gradient * change).sum(), None, None, None, None
