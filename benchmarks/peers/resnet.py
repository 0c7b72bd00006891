"""ResNets for CIFAR as anyone would write them: He, Zhang, Ren, Sun, CVPR 2016, section 4.2, shortcuts of option A.

The same function and the same names of weights as edgekd's, so that all competitors share teacher and initial student.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet56": 9}


class Block(nn.Module):
    """Two 3 × 3 convolutions with a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int, pooled: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new, self.pooled = stride, channels - channels_in, pooled

    def forward(self, x: Tensor) -> Tensor:
        """(batch × in × h × w) → (batch × out × ⌈h / stride⌉ × ⌈w / stride⌉)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new:
            half = self.new // 2
            x = F.avg_pool2d(x, 1, self.stride) if self.pooled else x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, half, self.new - half))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels.

    Args:
        pooled: take every second pixel by a pooling of one pixel; faster in channels last, slower otherwise.
    """

    def __init__(self, blocks: int, classes: int, pooled: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1, pooled)
        self.layer2 = self._stage(blocks, 16, 32, 2, pooled)
        self.layer3 = self._stage(blocks, 32, 64, 2, pooled)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(blocks: int, channels_in: int, channels: int, stride: int, pooled: bool) -> nn.Sequential:
        rest = [Block(channels, channels, 1, pooled) for _ in range(blocks - 1)]
        return nn.Sequential(Block(channels_in, channels, stride, pooled), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(batch × 3 × h × w) → logits (batch × classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet(name: str, *, classes: int = 10, pooled: bool = False) -> ResNet:
    """resnet8, resnet20, resnet32 or resnet56."""
    return ResNet(BLOCKS[name], classes, pooled)
