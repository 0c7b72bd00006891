"""A student for CPUs with int8 dot products: few layers, many channels, half the resolution from the first one on.

Measured with ONNX Runtime 1.32, one thread, VNNI: a layer of 16 channels at 32 × 32 takes as long as one of 32 channels
at 16 × 16 with the same multiply-accumulates does not even half of the time, and 12 channels take longer than 16
do. So the network is wide where a narrow ResNet-20 is deep.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.resnet import Block
from edgekd.types import TensorSpec


class Shallow(nn.Module):
    """Stages of residual blocks behind a first convolution of stride 2; each stage has twice the channels."""

    def __init__(self, channels: int, classes: int, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers, before = list[nn.Module](), width
        for stage, count in enumerate(blocks):
            after = width * 2**stage
            for block in range(count):
                layers.append(Block(before, after, 2 if stage and not block else 1, "conv"))
                before = after
        self.blocks = nn.Sequential(*layers)
        self.linear = nn.Linear(before, classes)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and "shortcut" not in name:
                nn.init.kaiming_normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(batch × channels × h × w) → logits (batch × classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def shallow(
    classes: int, inputs: tuple[TensorSpec, ...], *, width: int = 32, blocks: tuple[int, ...] = (3, 3, 3)
) -> nn.Module:
    """A shallow network.

    Args:
        classes: number of logits.
        inputs: one image.
        width: channels of the first stage; a multiple of 16 is what the kernels like.
        blocks: residual blocks of each stage.
    """
    return Shallow(int(inputs[0].shape[-1]), classes, width, tuple(blocks))
