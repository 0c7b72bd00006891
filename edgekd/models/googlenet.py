"""GoogLeNet for small images: a strong teacher of another make than a residual network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.models.geometry import channels_height_width
from edgekd.types import TensorSpec

# Szegedy et al., "Going deeper with convolutions", CVPR 2015, table 1: channels of the 1×1 branch, of the 3×3 branch
# (reduction, convolution), of the 5×5 branch (reduction, convolution) and of the pooling branch's projection.
_STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
_STEM = 192  # what the paper's stem gives to the first inception module


class Inception(nn.Module):
    """Four branches side by side, their channels concatenated; every convolution is followed by batch normalisation."""

    def __init__(self, channels_in: int, branches: tuple[int, ...]) -> None:
        super().__init__()
        one, three_reduced, three, five_reduced, five, pooled = branches
        self.branch1 = _convolution(channels_in, one, 1)
        self.branch3 = nn.Sequential(_convolution(channels_in, three_reduced, 1), _convolution(three_reduced, three, 3))
        self.branch5 = nn.Sequential(_convolution(channels_in, five_reduced, 1), _convolution(five_reduced, five, 5))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), _convolution(channels_in, pooled, 1))
        self.channels_out = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        """(batch × in × h × w) → (batch × out × h × w)."""
        return torch.cat((self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)), 1)


class GoogLeNet(nn.Module):
    """The paper's nine inception modules behind a stem that keeps the resolution, without its auxiliary classifiers."""

    def __init__(self, classes: int, channels: int, width: float, dropout: float) -> None:
        super().__init__()
        self.stem = _convolution(channels, _scaled(_STEM, width), 3)
        stages: list[nn.Sequential] = []
        before = _scaled(_STEM, width)
        for table in _STAGES:
            modules: list[nn.Module] = [] if not stages else [nn.MaxPool2d(3, 2, padding=1)]
            for branches in table:
                module = Inception(before, tuple(_scaled(count, width) for count in branches))
                before = module.channels_out
                modules.append(module)
            stages.append(nn.Sequential(*modules))
        self.layer1, self.layer2, self.layer3 = stages
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(before, classes)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """(batch × channels × h × w) → logits (batch × classes)."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.linear(self.dropout(x.mean((2, 3))))
        return logits


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _convolution(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def googlenet(classes: int, inputs: tuple[TensorSpec, ...], *, width: float = 1.0, dropout: float = 0.0) -> GoogLeNet:
    """A GoogLeNet for images of about 32 × 32 pixels (after Szegedy et al., CVPR 2015), with batch normalisation.

    Args:
        classes: number of logits.
        inputs: one image.
        width: factor on the channels of every layer.
        dropout: probability before the classifier; the paper has 0.4, without batch normalisation.
    """
    channels, _, _ = channels_height_width(inputs, "googlenet")
    if width <= 0:
        raise ModelError(f"width is {width:g}", where="googlenet", expected="a factor above 0")
    return GoogLeNet(classes, channels, width, dropout)
