"""A place in the student and the place in the teacher that it learns from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from edgekd.correspondence.positions import on_grid, pooled, resized_mask, shared_grid
from edgekd.correspondence.taps import Tap
from edgekd.types import Json

Role: TypeAlias = Literal["earlier", "last", "penultimate", "relations", "chosen"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A tap of the student and its counterpart in the teacher, with the loss between them.

    Args:
        loss: name of the loss, and `options` for it that follow from the pair.
        weight: 0 where the pair is known but not used unless somebody says so.
        cka: linear similarity of the two before training, None where the probe is too small to tell.
        score: of the alignment, in [0, 1]: stride, depth and CKA.
        channel_map: the teacher's channels that count, in the student's order; None: all of them.
        projector: "linear": a loss may need one; "none": the channels are the same already.
        role: what the pair is in both networks.
    """

    student: Tap
    teacher: Tap
    loss: str
    weight: float
    cka: float | None
    score: float
    channel_map: tuple[int, ...] | None = None
    projector: Literal["linear", "none"] = "linear"
    role: Role = "chosen"
    options: Mapping[str, Json] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, str]:
        """The two paths, the student's first, as a recipe names the pair."""
        return self.student.path, self.teacher.path

    @property
    def target_channels(self) -> int:
        """Channels of the teacher that count."""
        return self.teacher.channels if self.channel_map is None else len(self.channel_map)

    def aligned(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What was tapped, as batch × positions × channels each, on the smaller of the two grids.

        The larger one is averaged down to it. Class tokens and the like are left out. Where the grids are not alike
        (a vector and a map, a map and a sequence) each is averaged to one position.

        Args:
            student, teacher: as `Taps.take` gives them.
            mask: batch × positions of the input, False where a position is padding.

        Returns:
            student, teacher (its channels that count), and the mask on their positions, or None where they have none.
        """
        mine, theirs = on_grid(self.student, student), on_grid(self.teacher, teacher)
        if (self.student.ragged or self.teacher.ragged) and mine.ndim == theirs.ndim == 3:
            longest = min(mine.shape[2], theirs.shape[2])
            mine, theirs = mine[:, :, :longest], theirs[:, :, :longest]
            mask = None if mask is None else mask[:, :longest]
        grid = shared_grid(mine, theirs)
        masks = [_on_positions(tap, feature, mask) for tap, feature in ((self.student, mine), (self.teacher, theirs))]
        mine, theirs = (
            pooled(f, grid, m).flatten(2).transpose(1, 2) for f, m in zip((mine, theirs), masks, strict=True)
        )
        both = masks[0] is not None and masks[1] is not None
        kept = resized_mask(mask, mine.shape[1]) if both and mask is not None else None
        return mine, self._selected(theirs, 2), kept

    def maps(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What was tapped, as maps (batch × channels × height × width) each on its own grid.

        A sequence is a map of width 1.
        """
        mine, theirs = on_grid(self.student, student), on_grid(self.teacher, teacher)
        mine, theirs = (feature[..., None] if feature.ndim == 3 else feature for feature in (mine, theirs))
        return mine, self._selected(theirs, 1)

    def _selected(self, feature: Tensor, dim: int) -> Tensor:
        if self.channel_map is None or self.channel_map == tuple(range(feature.shape[dim])):
            return feature
        return feature.index_select(dim, _index(self.channel_map, feature.device))


def _on_positions(tap: Tap, feature: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask on the positions of a sequence; maps and vectors have none."""
    return resized_mask(mask, feature.shape[2]) if mask is not None and len(tap.grid) == 1 else None


@functools.lru_cache(maxsize=64)
def _index(channels: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: a copy to a GPU in every step would make it wait."""
    with torch.inference_mode(False):
        return torch.tensor(channels, device=device)
