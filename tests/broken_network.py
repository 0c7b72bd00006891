"""A network that rounding costs a lot, and who teaches it anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import trainings
from torch import Tensor, nn

from edgekd import distillation, qad
from edgekd.deploy import Calibration
from edgekd.distillation import Teacher
from edgekd.models.network import Network
from edgekd.types import Augment, Dataset, Json, LossTerm, Part, Preprocessing, TrainOptions

OPTIONS = TrainOptions(batch_size=64, precision="fp32", threads=1, ema_decay=0.9)
KD = (LossTerm(Part("kd", {"temperature": 4.0})),)
WIDE = 2.0  # standard deviation of the logarithm of what channels are multiplied by


class Depthwise(nn.Module):
    """Depthwise and pointwise convolutions, and hard swishes between which channels can be rescaled."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        self.blocks = nn.Sequential(*(self._block(width, 2 if at == 0 else 1) for at in range(3)))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _block(width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.Hardswish(),
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def silent(event: str, /, **fields: Json) -> None:
    """Nobody listens."""


def broken(work: Path) -> Network:
    """A network that knows its digits, of whose channels some are a hundred times as wide as others."""
    data = trainings.handwritten()
    torch.manual_seed(0)
    network = Network(Depthwise(), data.inputs, Preprocessing((8, 8), (0.5,), (0.5,)))

    def trained(epochs: int, rate: float) -> None:
        options = replace(OPTIONS, epochs=epochs, learning_rate=rate, compile="off")
        distillation.train(network, data, options, Augment(), task=trainings.task(), seed=0, work=work, say=silent)

    trained(10, 0.1)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in cast("Depthwise", network.module).blocks:
            norm, pointwise = block[1], block[3]  # type: ignore[index]
            factor = torch.exp(WIDE * torch.randn(16, generator=random)).clamp(min=1)
            norm.weight *= factor
            norm.bias *= factor
            pointwise.weight /= factor.reshape(1, -1, 1, 1)
    trained(3, 0.001)  # a hard swish is not a straight line: what was rescaled is trained a little
    return network


def recovery(network: Network, data: Dataset, epochs: int = 3, **options: Any) -> qad.Recovery:
    """The network taught by itself in float."""
    return qad.Recovery(
        (Teacher(network),), (), data, Calibration(data), trainings.task(),
        qad.options(replace(OPTIONS, **options), epochs), Augment(), 0, None,
    )  # fmt: skip
