"""A depthwise-separable network for small images: a student for processors with little memory."""

from __future__ import annotations

from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.models.geometry import channels_height_width
from edgekd.types import TensorSpec

_STEM = 32
# Channels and stride of each block: the layout of Howard et al., "MobileNets", 2017, table 1, with the strides that
# a 224-pixel image needs and a 32-pixel one does not left out, and the blocks of 1,024 channels too.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1))


class Separable(nn.Sequential):
    """A 3 × 3 convolution of each channel by itself, then a 1 × 1 convolution across channels."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_in, 3, stride, padding=1, groups=channels_in, bias=False),
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )


class DSCNN(nn.Module):
    """A convolution, six depthwise-separable blocks, global average pooling and a classifier."""

    def __init__(self, classes: int, channels: int, width: float) -> None:
        super().__init__()
        counts = [_scaled(_STEM, width), *(_scaled(count, width) for count, _ in _BLOCKS)]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, counts[0], 3, padding=1, bias=False), nn.BatchNorm2d(counts[0]), nn.ReLU()
        )
        strides = [stride for _, stride in _BLOCKS]
        blocks = [Separable(*sizes) for sizes in zip(counts[:-1], counts[1:], strides, strict=True)]
        self.layer1, self.layer2, self.layer3 = blocks[0], nn.Sequential(*blocks[1:3]), nn.Sequential(*blocks[3:])
        self.linear = nn.Linear(counts[-1], classes)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """(batch × channels × h × w) → logits (batch × classes)."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _scaled(channels: int, width: float) -> int:
    """Channels in multiples of 8, which vector units and tensor cores work in."""
    return max(8, round(channels * width / 8) * 8)


def dscnn(classes: int, inputs: tuple[TensorSpec, ...], *, width: float = 1.0) -> DSCNN:
    """A depthwise-separable network for images of about 32 × 32 pixels, plain ReLU so that it quantizes well.

    Args:
        classes: number of logits.
        inputs: one image.
        width: factor on the channels of every layer, rounded to multiples of 8.
    """
    channels, _, _ = channels_height_width(inputs, "dscnn")
    if width <= 0:
        raise ModelError(f"width is {width:g}", where="dscnn", expected="a factor above 0")
    return DSCNN(classes, channels, width)
