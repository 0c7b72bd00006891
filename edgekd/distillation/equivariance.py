"""Augmentation of a teacher's outputs instead of its inputs: one run over the plain images then serves every view.

It is right only as far as the teacher is equivariant: its output for a moved image has to be the moved output. That is
measured before it is relied on, because it often does not hold: positions learned by a transformer do not move with
the image, and strides see other pixels of a mirrored one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, grid_sample

from edgekd.distillation.augment import augmented, geometry
from edgekd.errors import RecipeError
from edgekd.types import Augment

LEAST = 0.98  # cosine between a moved output and the output of the moved image, which distillation may rely on
_VIEWS = (0, 1)  # two in a row: every image is mirrored in one of them


def moved(
    outputs: Mapping[str, Tensor], samples: np.ndarray, view: int, options: Augment, size: Sequence[int]
) -> dict[str, Tensor]:
    """A teacher's outputs for plain images, as they would be for the images in a view, were it equivariant.

    Maps (batch × channels × height × width) are cropped and mirrored as the images are, a shift of s pixels being one
    of s / stride cells, in between by linear interpolation; vectors (batch × channels) stay, since a pooled or
    classified image is taken to be the same thing wherever it lies.

    Args:
        samples: int64 position of each image in its split.
        size: height and width of the images in pixels.

    Raises:
        RecipeError: an output is neither map nor vector, or the augmentation changes what is in an image.
    """
    check_options(options)
    return {name: _moved(name, output, samples, view, options, size) for name, output in outputs.items()}


def agreement(
    outputs: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, samples: np.ndarray, options: Augment
) -> dict[str, float]:
    """How equivariant a teacher is: mean cosine(moved output, output of the moved image) by tensor name.

    Measured with the very crops and sides of the first two views.

    Args:
        outputs: what the teacher says about images, by tensor name.
        images: uint8, batch × height × width × channels.
        samples: int64 position of each image in its split.
    """
    plain = outputs(images)
    found: dict[str, list[float]] = {name: [] for name in plain}
    for view in _VIEWS:
        guessed = moved(plain, samples, view, options, images.shape[1:3])
        right = outputs(augmented(images, samples, view, options))
        for name, guess in guessed.items():
            cosine = cosine_similarity(guess.flatten(1).double(), right[name].flatten(1).double())
            found[name].append(float(cosine.mean()))
    return {name: float(np.mean(cosines)) for name, cosines in found.items()}


def check(figures: Mapping[str, float]) -> None:
    """Refuse to move the outputs of a teacher that is not equivariant.

    Raises:
        RecipeError: the smallest of the figures of `agreement` is below 0.98.
    """
    worst = min(figures, key=lambda name: figures[name])
    if not figures[worst] >= LEAST:  # also where it is not a number
        raise RecipeError(
            f"the teacher's '{worst}' does not move with its images: cosine {figures[worst]:.4f} between the moved "
            "output and the output of the moved image",
            where='teacher_augment = "output"',
            expected=f"at least {LEAST}",
            fix='teacher_augment = "input" lets the teacher see the augmented images',
        )


def check_options(options: Augment) -> None:
    """Refuse augmentations that change what is in an image, which no change of outputs stands for.

    Raises:
        RecipeError: cutout or mixup.
    """
    given = [key for key in ("cutout_pixels", "mixup") if getattr(options, key)]
    if given:
        raise RecipeError(
            f"{' and '.join(given)} cannot be applied to a teacher's outputs",
            where='teacher_augment = "output"',
            expected="crop_pixels and flip alone",
            fix=f'leave {" and ".join(given)} out, or use teacher_augment = "input"',
        )


def _moved(name: str, output: Tensor, samples: np.ndarray, view: int, options: Augment, size: Sequence[int]) -> Tensor:
    if output.ndim == 2:
        return output
    if output.ndim != 4:
        raise RecipeError(
            f"'{name}' has the shape {tuple(output.shape)}: nothing tells where in the image its values are",
            where='teacher_augment = "output"',
            expected="batch × channels × height × width, or batch × channels",
        )
    place = geometry(samples, view, options)
    rows = _cells(place.rows, output.shape[2], size[0])
    columns = _cells(place.columns, output.shape[3], size[1])
    columns[place.mirrored] = columns[place.mirrored, ::-1]
    n, height, width = len(output), *output.shape[2:]
    grid = np.empty((n, height, width, 2), np.float32)  # grid_sample's: x, y in [-1, 1] from first to last cell
    grid[..., 0] = (2 * columns / max(width - 1, 1) - 1)[:, None, :]
    grid[..., 1] = (2 * rows / max(height - 1, 1) - 1)[:, :, None]
    where = torch.from_numpy(grid).to(output.device)
    return grid_sample(output.float(), where, mode="bilinear", padding_mode="border", align_corners=True)


def _cells(shifts: np.ndarray, cells: int, pixels: int) -> np.ndarray:
    """For each sample, which cell (in fractions) each cell comes from, reflected where the image's pixels are.

    Cell j lies over pixel (j + ½) · stride − ½.
    """
    stride = pixels / cells
    first, last = 0.5 / stride - 0.5, (pixels - 0.5) / stride - 0.5  # where the first and last pixel lie, in cells
    source: np.ndarray = np.abs(np.arange(cells) + shifts[:, None] / stride - first) + first
    return last - np.abs(last - source)
