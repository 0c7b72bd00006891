"""Small networks for tests of export and quantization."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.models.network import Network
from edgekd.types import Preprocessing, TensorSpec

SIZE = 8
IMAGE = (TensorSpec("image", "uint8", ("batch", SIZE, SIZE, 3)),)
NORMAL = Preprocessing((SIZE, SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Small(nn.Module):
    """Convolution, depthwise convolution, residual, squeeze and excitation, pool, linear: each kind of layer once."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        y = self.project(y * self.squeeze(y))
        logits: Tensor = self.head(torch.flatten(self.pool(torch.relu(y + x)), 1))
        return logits


class Sensors(nn.Module):
    """Token ids and a sensor window, as two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.words, self.window, self.head = nn.Linear(32, 32), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, tokens: Tensor, window: Tensor) -> Tensor:
        hidden = self.words(self.embed(tokens)).mean(1) + torch.relu(self.window(window))
        logits: Tensor = self.head(torch.tanh(hidden))
        return logits


class BatchOfOne(nn.Module):
    """A forward that only works for the batch it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2 == 0:
            return torch.tanh(self.linear(x)) * int(x.shape[0])
        logits: Tensor = self.linear(x)
        return logits


def settled(module: nn.Module, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None) -> Network:
    """A network whose batch normalisation has seen data, so that its values have a usual size."""
    network = Network(module.train(), inputs, preprocessing)
    with torch.no_grad():
        for seed in range(10):
            given = samples(inputs, 32, seed)
            network(*(torch.from_numpy(given[spec.name]) for spec in inputs))
    return network.eval()


def small(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return settled(Small(), IMAGE, NORMAL)


def sensors() -> Network:
    torch.manual_seed(0)
    specs = (TensorSpec("tokens", "int64", ("batch", 6)), TensorSpec("window", "float32", ("batch", 16)))
    return settled(Sensors(), specs, None)


def samples(inputs: tuple[TensorSpec, ...], count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random samples with the shapes and types of the specs."""
    random = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for spec in inputs:
        shape = (count, *(int(side) for side in spec.shape[1:]))
        if spec.dtype.startswith("float"):
            made[spec.name] = random.normal(size=shape).astype(spec.dtype)
        else:
            made[spec.name] = random.integers(0, 256 if spec.dtype == "uint8" else 50, shape).astype(spec.dtype)
    return made


def logits(network: Network, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {"logits": network(*(torch.from_numpy(given[spec.name]) for spec in network.inputs)).numpy()}
