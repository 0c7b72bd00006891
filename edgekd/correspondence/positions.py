"""Features brought to one grid: batch × channels × positions, whatever dimensions they came in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d, adaptive_max_pool1d

from edgekd.correspondence.taps import Tap
from edgekd.errors import ModelError

_POOLS: Mapping[int, Callable[[Tensor, Any], Tensor]] = {
    1: adaptive_avg_pool1d,
    2: adaptive_avg_pool2d,
    3: adaptive_avg_pool3d,
}


def on_grid(tap: Tap, tensor: Tensor) -> Tensor:
    """A tensor as `Taps.take` gives it, as batch × channels × grid; a vector has a grid of one position.

    Tokens before the grid are left out: they have no position, and the other network may have none of them.

    Raises:
        ModelError: its dimensions are not those of the tap, or its tokens are no grid of the probe's proportions.
    """
    if tensor.ndim != len(tap.layout):
        raise ModelError(f"a tensor of shape {tuple(tensor.shape)}", where=tap.path, expected=f"layout {tap.layout}")
    tensor = tensor.movedim(tap.layout.index("C"), 1)
    if tensor.ndim == 2:
        return tensor[:, :, None]
    if tensor.ndim != 3:
        return tensor
    tensor = tensor[:, :, tap.prefix :]
    return tensor if len(tap.grid) == 1 else tensor.reshape(*tensor.shape[:2], *_sides(tap, tensor.shape[2]))


def _sides(tap: Tap, count: int) -> tuple[int, ...]:
    """The grid of so many tokens, which may be more or fewer than the probe had."""
    if count == math.prod(tap.grid):
        return tap.grid
    height = max(1, round(tap.grid[0] * math.sqrt(count / math.prod(tap.grid))))
    if count % height:
        raise ModelError(f"{count} tokens are no grid like {tap.grid}", where=tap.path)
    return height, count // height


def shared_grid(student: Tensor, teacher: Tensor) -> tuple[int, ...]:
    """The smaller of two grids (batch × channels × grid), side by side; one position where they are not alike."""
    if student.ndim != teacher.ndim:
        return (1,)
    return tuple(min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))


def pooled(feature: Tensor, grid: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Average a feature (batch × channels × grid) down to a grid: what is larger is made smaller, never the reverse.

    Args:
        mask: batch × positions of a feature with one dimension of positions; only those count.

    Returns:
        batch × channels × grid; 0 where no position counts.
    """
    if grid == (1,) and feature.ndim > 3:
        feature = feature.flatten(2)
    if tuple(feature.shape[2:]) == grid:
        return feature
    if mask is None or feature.ndim != 3:
        return _POOLS[len(grid)](feature, grid)
    count = mask[:, None].to(feature.dtype)
    # where, not a product: padding may hold anything, even NaN
    kept = torch.where(mask[:, None], feature, feature.new_zeros(()))
    part = adaptive_avg_pool1d(count, grid[0])
    return adaptive_avg_pool1d(kept, grid[0]) / part.masked_fill(part == 0, 1)


def resized_mask(mask: Tensor, count: int) -> Tensor:
    """A mask (batch × positions, bool) on another number of positions: one counts where one of its own does."""
    if mask.shape[1] == count:
        return mask
    return adaptive_max_pool1d(mask[:, None].float(), count)[:, 0] > 0
