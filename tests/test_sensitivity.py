"""Which layer costs what in int8, and the fewest that must stay in float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.graph.program import capture, graph_inputs
from edgekd.models.network import Network
from edgekd.quantize import mixed, quantize
from edgekd.quantize.examination import rows_of
from edgekd.quantize.ladder import Ladder
from edgekd.quantize.measured import Loss, measure
from edgekd.quantize.samples import Halves
from edgekd.quantize.sensitivity import analyse, blocks, cost, interval, places, plan, take
from edgekd.quantize.simulation import Simulation
from edgekd.tasks.classification import classification
from edgekd.types import Batch, Json, LayerSensitivity, QuantizationRules, TensorSpec

HOST = QuantizationRules("uint8", False, "int8", True, True, True, 0, "onnxruntime")
TENSORRT = QuantizationRules("int8", True, "int8", True, False, False, 0, "tensorrt")
RULES = {"onnxruntime": HOST, "tensorrt": TENSORRT}
IMAGE = (TensorSpec("x", "float32", ("batch", 3, 8, 8)),)


def silent(event: str, /, **fields: Json) -> None:
    """Nobody listens."""


class Chain(nn.Module):
    """Convolutions in a row. Nothing between them is homogeneous, so that equalisation cannot mend them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Hardswish())
        # A kernel so far spread that on 8 × 8 pixels all but its centre sees nothing but padding.
        self.depthwise = nn.Conv2d(16, 16, 3, padding=8, dilation=8, groups=16)
        self.project = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(nn.functional.hardswish(self.stem(x)))
        x = nn.functional.hardswish(self.depthwise(x))
        x = nn.functional.hardswish(self.project(x))
        return self.head(x.amax((2, 3)))


def chain(*, bad_weight: bool = False, bad_values: bool = False) -> Network:
    """bad_weight: taps that only see padding are 1000 times the others, and so is the step of the weight's integers.
    bad_values: one channel of what the depthwise convolution gives is 1000 times the others.
    """
    torch.manual_seed(1)
    module = Chain().eval()
    with torch.no_grad():
        weight = torch.zeros(16, 1, 3, 3)
        weight[:, :, 1, 1] = torch.linspace(0.8, 1.6, 16).reshape(16, 1)
        module.depthwise.weight.copy_(weight)
        if bad_weight:
            module.depthwise.weight[:, :, 0, 0] = 1000.0
        if bad_values:
            module.depthwise.weight[3] *= 1000.0
            module.project.weight[:, 3] /= 1000.0
        module.stem.weight *= 3
        seen = torch.randn(256, 3, 8, 8)
        logits = module(seen)  # every class is decided for now and then, and surely
        module.head.weight *= 8 / logits.std(0, keepdim=True).T
        module.head.bias.zero_()
        module.head.bias -= module(seen).mean(0)
    return Network(module, IMAGE, None)


def samples(network: Network, count: int = 256, size: int = 32) -> list[Batch]:
    """Labelled by the network itself: in float it makes no mistake."""
    random = np.random.default_rng(0)
    found = []
    for start in range(0, count, size):
        x = random.normal(size=(size, 3, 8, 8)).astype(np.float32)
        with torch.no_grad():
            labels = network(torch.from_numpy(x)).argmax(1).numpy()  # type: ignore[union-attr]
        found.append(Batch(np.arange(start, start + size), {"x": x}, labels))
    return found


def climbed(network: Network, rules: QuantizationRules, *, max_drop: float = 0.1) -> Ladder:
    batches = samples(network)
    args, specs = graph_inputs(network, batches[0].inputs, preprocessing=True)
    program = capture(network, args, specs, preprocessing=True)
    ladder = Ladder(
        Simulation(program, rules), Halves(network, batches, True, False), max_drop=max_drop, task=classification()
    )
    ladder.climb(silent)
    return ladder
