"""Batched augmentation of images; each change is a pure function of (sample, view, seed).

No generator is involved: what happens to sample 7 in view 3 does not depend on its batch, the order or the workers, so
teacher and student see the same image, a resumed run sees what an undisturbed one would, and outputs may be kept by
(sample, view).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import RecipeError
from edgekd.types import Augment

GREY = 128  # of cut-out squares: the middle of uint8, close to 0 once normalised


def random_bits(samples: np.ndarray, *, seed: int, purpose: str, view: int = 0) -> np.ndarray:
    """A pseudo-random uint64 for each sample, the same on every machine and in every version.

    A counter-based generator: splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
    OOPSLA 2014) of the sample's number, started from a hash of what it is for.
    """
    start = int.from_bytes(hashlib.sha256(f"{purpose} {seed} {view}".encode()).digest()[:8], "little")
    z = (samples.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def below(bits: np.ndarray, bound: int) -> np.ndarray:
    """Each of the random bits as an int64 in [0, bound); its bias is below bound / 2³²."""
    return (((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def augmented(images: Tensor, samples: np.ndarray, view: int, options: Augment, *, seed: int) -> Tensor:
    """The images of one batch as they are in one view of the data.

    Crop: padded by reflection, then cut out at a random place. Flip: every image is mirrored in every other view, and
    half of them begin mirrored (Jordan: 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv 2024), so that two
    views in a row never repeat a side. Cutout: a grey square with its centre anywhere in the image (DeVries, Taylor:
    Improved Regularization of Convolutional Neural Networks with Cutout, arXiv 2017).

    Args:
        images: uint8, batch × height × width × channels; left as it is.
        samples: int64 position of each image in its split.
        view: usually the epoch.

    Returns:
        The changed images, same shape and type, on the same device.
    """
    n, height, width, channels = images.shape
    pixels = images.reshape(n * height * width, channels)
    if options.crop_pixels or options.flip:
        rows, columns = _crop(samples, view, options.crop_pixels, (height, width), seed)
        if options.flip:
            mirrored = (random_bits(samples, seed=seed, purpose="flip") + np.uint64(view)) & np.uint64(1) == 1
            columns[mirrored] = columns[mirrored, ::-1]
        pixels = pixels.index_select(0, _positions(rows, columns, height, width, images.device))
    if options.cutout_pixels:
        rows, columns = _square(samples, view, options.cutout_pixels, (height, width), seed)
        if pixels.data_ptr() == images.data_ptr():
            pixels = pixels.clone()
        pixels.index_fill_(0, _positions(rows, columns, height, width, images.device), GREY)
    return pixels.view(n, height, width, channels)


def check(options: Augment, shape: tuple[int | str, ...], where: str) -> None:
    """Refuse an augmentation that images of this shape (batch, height, width, channels) cannot bear.

    Raises:
        RecipeError: the crop or the square is as large as the image.
    """
    sides = [side for side in shape[1:3] if isinstance(side, int)]
    for key, pixels in (("crop_pixels", options.crop_pixels), ("cutout_pixels", options.cutout_pixels)):
        if sides and pixels >= min(sides):
            raise RecipeError(
                f"{key} is {pixels}, and the images are {' × '.join(map(str, sides))} pixels",
                where=where,
                expected=f"less than {min(sides)}",
                fix="an eighth of the side is usual",
            )


def _crop(
    samples: np.ndarray, view: int, margin: int, size: tuple[int, int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each sample, which row each row comes from (batch × height), and the same for columns."""
    found = []
    for side, purpose in zip(size, ("crop row", "crop column"), strict=True):
        shift = below(random_bits(samples, seed=seed, purpose=purpose, view=view), 2 * margin + 1) - margin
        source = np.abs(np.arange(side) + shift[:, None])
        found.append(side - 1 - np.abs(side - 1 - source))
    return found[0], found[1]


def _square(
    samples: np.ndarray, view: int, side: int, size: tuple[int, int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each sample, the rows and columns of a square; what sticks out is folded onto the edge it sticks out of."""
    found = []
    for limit, purpose in zip(size, ("cutout row", "cutout column"), strict=True):
        centre = below(random_bits(samples, seed=seed, purpose=purpose, view=view), limit)
        found.append(np.clip(centre[:, None] - side // 2 + np.arange(side), 0, limit - 1))
    return found[0], found[1]


def _positions(rows: np.ndarray, columns: np.ndarray, height: int, width: int, device: torch.device) -> Tensor:
    """Positions in the batch's list of pixels: rows (batch × a) crossed with columns (batch × b), flattened."""
    lines = torch.from_numpy(np.arange(len(rows))[:, None] * height + rows).to(device)
    return (lines[:, :, None] * width + torch.from_numpy(columns).to(device)[:, None, :]).view(-1)
