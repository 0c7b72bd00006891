"""Residual networks for small images (He, Zhang, Ren, Sun, "Deep residual learning", CVPR 2016, section 4.2)."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.models.geometry import channels_height_width
from edgekd.types import TensorSpec

Shortcut = Literal["pad", "conv"]
Model = TypeVar("Model", bound=nn.Module)


class PadShortcut(nn.Module):
    """The paper's shortcut without parameters (option A): every second pixel, and zeros for the new channels.

    Written as a pooling of one pixel and a padding: strided slices become several nodes in ONNX, and ncnn's converter
    does not take them at all. The zeros are split evenly before and after, as in the published checkpoints.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        new = channels_out - channels_in
        self.before, self.after, self.stride = new // 2, new - new // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        """(batch × in × h × w) → (batch × out × ⌈h / stride⌉ × ⌈w / stride⌉)."""
        if self.stride > 1:
            x = F.max_pool2d(x, 1, self.stride)
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def as_convolution(self, channels_in: int) -> nn.Conv2d:
        """The 1 × 1 convolution that computes the same: ones where a channel goes through, zeros elsewhere."""
        channels_out = self.before + channels_in + self.after
        conv = nn.Conv2d(channels_in, channels_out, 1, self.stride, bias=False, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[range(self.before, self.before + channels_in), range(channels_in)] = 1
        return conv


class Block(nn.Module):
    """Two 3 × 3 convolutions with a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            pad = PadShortcut(channels_in, channels, stride)
            self.shortcut = pad if shortcut == "pad" else pad.as_convolution(channels_in)

    def forward(self, x: Tensor) -> Tensor:
        """(batch × in × h × w) → (batch × out × ⌈h / stride⌉ × ⌈w / stride⌉)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of `blocks` blocks, of width, 2 × width and 4 × width channels."""

    def __init__(self, blocks: int, classes: int, channels: int, width: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1, shortcut)
        self.layer2 = _stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.linear = nn.Linear(4 * width, classes)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and "shortcut" not in name:
                nn.init.kaiming_normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(batch × channels × h × w) → logits (batch × classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(blocks: int, channels_in: int, channels: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = Block(channels_in, channels, stride, shortcut)
    return nn.Sequential(first, *(Block(channels, channels, 1, shortcut) for _ in range(blocks - 1)))


def convolution_shortcuts(network: Model) -> Model:
    """A copy whose parameter-free shortcuts are the 1 × 1 convolutions that compute exactly the same.

    The blocks may be anywhere inside the network. Pruning needs it: torch-pruning cannot follow a padding of channels.
    The convolutions can then be trained.
    """
    copied = copy.deepcopy(network)
    for block in copied.modules():
        if isinstance(block, Block) and isinstance(block.shortcut, PadShortcut):
            conv = block.shortcut.as_convolution(block.conv1.in_channels)
            block.shortcut = conv.to(block.conv1.weight.device, block.conv1.weight.dtype)
    return copied


def _resnet(
    name: str, blocks: int, classes: int, inputs: tuple[TensorSpec, ...], width: int, shortcut: Shortcut
) -> ResNet:
    channels, _, _ = channels_height_width(inputs, name)
    if width < 1:
        raise ModelError(f"width is {width}", where=name, expected="at least one channel")
    return ResNet(blocks, classes, channels, width, shortcut)


def resnet8(classes: int, inputs: tuple[TensorSpec, ...], *, width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """ResNet-8: three stages of one block for images of about 32 × 32 pixels.

    Args:
        classes: number of logits.
        inputs: one image.
        width: channels of the first stage; the others have twice and four times as many.
        shortcut: "pad" has no parameters (the paper's option A); "conv" is a trainable 1 × 1 convolution that starts
            as exactly the same function.
    """
    return _resnet("resnet8", 1, classes, inputs, width, shortcut)


def resnet20(classes: int, inputs: tuple[TensorSpec, ...], *, width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """ResNet-20: three stages of 3 blocks for images of about 32 × 32 pixels.

    Args:
        classes: number of logits.
        inputs: one image.
        width: channels of the first stage; the others have twice and four times as many.
        shortcut: "pad" has no parameters (the paper's option A); "conv" is a trainable 1 × 1 convolution that starts
            as exactly the same function.
    """
    return _resnet("resnet20", 3, classes, inputs, width, shortcut)


def resnet32(classes: int, inputs: tuple[TensorSpec, ...], *, width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """ResNet-32: three stages of 5 blocks for images of about 32 × 32 pixels.

    Args:
        classes: number of logits.
        inputs: one image.
        width: channels of the first stage; the others have twice and four times as many.
        shortcut: "pad" has no parameters (the paper's option A); "conv" is a trainable 1 × 1 convolution that starts
            as exactly the same function.
    """
    return _resnet("resnet32", 5, classes, inputs, width, shortcut)


def resnet56(classes: int, inputs: tuple[TensorSpec, ...], *, width: int = 16, shortcut: Shortcut = "pad") -> ResNet:
    """ResNet-56: three stages of 9 blocks for images of about 32 × 32 pixels.

    Args:
        classes: number of logits.
        inputs: one image.
        width: channels of the first stage; the others have twice and four times as many.
        shortcut: "pad" has no parameters (the paper's option A); "conv" is a trainable 1 × 1 convolution that starts
            as exactly the same function.
    """
    return _resnet("resnet56", 9, classes, inputs, width, shortcut)
