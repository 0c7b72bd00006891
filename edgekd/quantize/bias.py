"""Bias correction: what quantization shifts on average is taken back in the biases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgekd.quantize.simulation import Inputs, Layer, Simulation
from edgekd.quantize.walk import Parts, quantized_output, walk


def correct_biases(simulation: Simulation, parts: Sequence[Inputs]) -> tuple[str, ...]:
    """Subtract from each layer's bias the mean error of each output channel; the names of the layers corrected.

    b ← b - E[ŷ - y], where y is what the layer gives in the float network and ŷ what it gives with its own weight
    and all before it quantized and corrected (Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through
    Weight Equalization and Bias Correction, ICCV 2019, section 4.2, with samples; Banner, Nahshan, Soudry: Post
    training 4-bit quantization, NeurIPS 2019).

    Args:
        parts: samples, cut along the batch; 256 are plenty.
    """
    corrected: list[str] = []

    def visit(layer: Layer, given: Parts, wanted: Parts) -> None:
        if not takes_bias(simulation, layer, given[0]):
            return
        correct(simulation, layer, given, wanted)
        corrected.append(layer.name)

    walk(simulation, parts, visit)
    return tuple(corrected)


def correct(simulation: Simulation, layer: Layer, given: Parts, wanted: Parts) -> None:
    """Take the mean error of each output channel back in the layer's bias."""
    error, bias = mean_error(simulation, layer, given, wanted), simulation.simulated_bias(layer)
    simulation.adjust(layer, bias=-error if bias is None else bias - error)


def mean_error(simulation: Simulation, layer: Layer, given: Parts, wanted: Parts) -> Tensor:
    """E[ŷ - y] for each output channel of the layer, over samples and positions."""
    total, count = torch.zeros(()), 0
    for value, output in zip(given, wanted, strict=True):
        difference = quantized_output(simulation, layer, value) - output
        rows = difference.movedim(-1 if layer.linear else 1, 0).flatten(1)
        total = total + rows.sum(1, dtype=torch.float64)
        count += rows.shape[1]
    return (total / count).float()


def takes_bias(simulation: Simulation, layer: Layer, value: Tensor) -> bool:
    """Whether the layer has a stored bias, or one can be added without another operator in the graph.

    A product of a matrix with several rows a sample has no bias in ONNX: it would be an addition behind it.
    """
    if simulation.bias(layer) is not None:
        return True
    computed = len(layer.node.args) > 2 and layer.node.args[2] is not None
    return not computed and not (layer.linear and value.dim() > 2)
