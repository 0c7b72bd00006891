"""What stands between a tapped feature and a loss: trained with the student, thrown away after."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from edgekd.correspondence.pair import Pair
from edgekd.errors import PartError

# By name of a loss's parameter; what one call of the loss is given.
Features: TypeAlias = "dict[str, Tensor | tuple[Tensor, ...] | None]"
FEATURES = frozenset(
    {
        "student_feature",
        "teacher_feature",
        "projected_feature",
        "mask",
        "exit_logits",
        "fused_features",
        "teacher_features",
    }
)
_MOST_FUSED = 512  # channels inside a fusion, as published


def wanted(loss: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the positional parameters of a loss, bound or not: they say what it is given."""
    function = loss.func if isinstance(loss, partial) else loss
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in positional)


class Projection(nn.Linear):
    """A linear map of each position's channels; it starts as the identity where their number does not change."""

    def reset_parameters(self) -> None:
        """Initial weights."""
        super().reset_parameters()
        if self.in_features == self.out_features:
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)


class Exit(nn.Module):
    """A small head on a feature: a hidden layer at each position, the average over positions, class logits.

    Reference: Hao et al.: One-for-All, NeurIPS 2023 (exits at intermediate stages, dropped after training).

    Args:
        channels: of the feature.
        classes: of the logits.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = (
            nn.Linear(channels, channels),
            nn.LayerNorm(channels),
            nn.Linear(channels, classes),
        )

    def forward(self, feature: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch × positions × channels, batch × positions) → logits (batch × classes)."""
        hidden = torch.relu(self.norm(self.hidden(feature)))
        if mask is None:
            mean = hidden.mean(1)
        else:
            kept = torch.where(mask[..., None], hidden, hidden.new_zeros(()))
            mean = kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.head(mean)
        return logits


class Fusion(nn.Module):
    """ReviewKD's fusion: each level is joined with what is above it, by a learned attention, and compared.

    From the deepest level to the shallowest: the student's map to `mid` channels, at the teacher's size; a weight a
    position for it and for the fused map of the level above, enlarged; their sum goes to the teacher's channels for
    the loss, and on to the next level.

    Reference: Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021.

    Args:
        channels: of student and teacher at each level, shallow to deep.
    """

    def __init__(self, channels: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        mid = min(_MOST_FUSED, max(mine for mine, _ in channels))
        self.enter = nn.ModuleList(_convolution(mine, mid, 1) for mine, _ in channels)
        self.leave = nn.ModuleList(_convolution(mid, theirs, 3) for _, theirs in channels)
        self.attention = nn.ModuleList(nn.Conv2d(2 * mid, 2, 1) for _ in channels[:-1])

    def forward(self, levels: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """The student's maps, shallow to deep, fused and at the teacher's channels and sizes."""
        fused: list[Tensor] = []
        above: Tensor | None = None
        for at in reversed(range(len(levels))):
            here = _to_size(self.enter[at](levels[at]), sizes[at])
            if above is not None:
                above = interpolate(above, list(sizes[at]), mode="nearest")
                weights = self.attention[at](torch.cat((here, above), 1)).sigmoid()
                here = here * weights[:, :1] + above * weights[:, 1:]
            fused.append(self.leave[at](here))
            above = here
        return tuple(reversed(fused))


class Adapter(nn.Module):
    """What a feature loss is given, from what was tapped: aligned, projected, fused, or through exits.

    Args:
        pairs: of the loss, shallow to deep where it fuses levels.
        wanted: names of the loss's parameters; those in FEATURES are made, and only the projectors they need.
        classes: of exits.

    Raises:
        PartError: exits are wanted, and there are no classes.
    """

    def __init__(self, pairs: Sequence[Pair], wanted: Collection[str], *, classes: int | None = None) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.wanted = frozenset(wanted) & FEATURES
        self.projections, self.exits, self.fusion = nn.ModuleList(), nn.ModuleList(), None
        if "projected_feature" in self.wanted:
            self.projections.extend(projection(pair) for pair in pairs)
        if "exit_logits" in self.wanted:
            if classes is None:
                raise PartError("exits give class logits, and the output has no classes", fix="leave this loss out")
            self.exits.extend(Exit(pair.student.channels, classes) for pair in pairs)
        if "fused_features" in self.wanted and pairs:
            self.fusion = Fusion([(pair.student.channels, pair.target_channels) for pair in pairs])

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None = None
    ) -> list[Features]:
        """One mapping of named features for each call of the loss: a call a pair, or one for all that are fused.

        Args:
            student, teacher: what `Taps.take` gives.
            mask: batch × positions of the input, False where a position is padding.
        """
        if self.fusion is not None:
            return [self._fused(student, teacher)]
        found: list[Features] = []
        modules = itertools.zip_longest(self.pairs, self.projections, self.exits)
        for pair, project, leave in modules:
            mine, theirs, kept = pair.aligned(student[pair.student.path], teacher[pair.teacher.path], mask)
            features: Features = {"student_feature": mine, "teacher_feature": theirs, "mask": kept}
            if project is not None:
                features["projected_feature"] = project(mine)
            if leave is not None:
                features["exit_logits"] = leave(mine, kept)
            found.append({name: value for name, value in features.items() if name in self.wanted})
        return found

    def _fused(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Features:
        assert self.fusion is not None
        both = [pair.maps(student[pair.student.path], teacher[pair.teacher.path]) for pair in self.pairs]
        theirs = tuple(maps for _, maps in both)
        fused = self.fusion([maps for maps, _ in both], [maps.shape[2:] for maps in theirs])
        return {"fused_features": fused, "teacher_features": theirs}


def projection(pair: Pair) -> nn.Module:
    """What brings the student's channels to the teacher's that count: nothing, where they are the same already."""
    if pair.projector == "none":
        return nn.Identity()
    return Projection(pair.student.channels, pair.target_channels)


def _convolution(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(channels_out)
    )


def _to_size(feature: Tensor, size: Sequence[int]) -> Tensor:
    """Averaged where it is larger on both sides, else its nearest positions."""
    if list(feature.shape[2:]) == list(size):
        return feature
    if all(side >= wanted for side, wanted in zip(feature.shape[2:], size, strict=True)):
        return adaptive_avg_pool2d(feature, (size[0], size[1]))
    return interpolate(feature, list(size), mode="nearest")
