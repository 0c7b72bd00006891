"""A U-Net: a class for each pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from edgekd.errors import ModelError
from edgekd.models.geometry import channels_height_width
from edgekd.types import TensorSpec


class Double(nn.Sequential):
    """Two 3 × 3 convolutions, each with batch normalisation and ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """Down by max pooling, up by repeating pixels, with the maps of equal size side by side on the way up.

    Repeated pixels in place of the paper's transposed convolutions: they leave no checkerboard, and integer runtimes
    have kernels for them.
    """

    def __init__(self, classes: int, channels: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(Double(*pair) for pair in zip([channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(Double(3 * narrow, narrow) for narrow in reversed(widths[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.linear = nn.Conv2d(width, classes, 1)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch × channels × h × w) → logits (batch × classes × h × w)."""
        maps = [self.down[0](x)]
        for block in self.down[1:]:
            maps.append(block(self.pool(maps[-1])))
        x = maps.pop()
        for block, beside in zip(self.up, reversed(maps), strict=True):
            x = block(torch.cat((interpolate(x, size=beside.shape[2:], mode="nearest"), beside), 1))
        logits: Tensor = self.linear(x)
        return logits


def unet(classes: int, inputs: tuple[TensorSpec, ...], *, width: int = 16, depth: int = 3) -> UNet:
    """A U-Net with batch normalisation (after Ronneberger et al., MICCAI 2015): an output of the image's own size.

    Args:
        classes: number of logits of a pixel.
        inputs: one image.
        width: channels at full size; they double where the sides halve.
        depth: how often the sides halve.

    Raises:
        ModelError: the data is no image, or it is too small to be halved that often.
    """
    channels, height, width_pixels = channels_height_width(inputs, "unet")
    if width < 1 or depth < 1:
        raise ModelError(f"width is {width}, depth {depth}", where="unet", expected="at least 1 each")
    if min(height, width_pixels) < 2**depth:
        raise ModelError(
            f"sides of {height}×{width_pixels} pixels cannot be halved {depth} times", where="unet", fix="lower depth"
        )
    return UNet(classes, channels, width, depth)
