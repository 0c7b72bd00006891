"""Which dimension of a tensor is what: found by running the network on another batch and other sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from edgekd.correspondence.inputs import Inputs, attempts, picture_dims
from edgekd.correspondence.trace import Call, Trace, trace

_POSITIONS = {1: "N", 2: "HW", 3: "DHW"}  # letters of one, two and three dimensions of positions
_MOST_TOKENS = 5  # class, distillation and register tokens that may stand before a grid
SAMPLES = 3  # of the traced batch, and one fewer for the comparison

_Shapes: TypeAlias = "Mapping[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...]]]"  # call → given, gave


@dataclass(frozen=True, slots=True)
class Axes:
    """Roles of a tensor's dimensions."""

    layout: str  # batch first, as a Tap has it
    shape: tuple[int, ...]  # in that order, -1 for the batch
    batch: int  # where the batch is
    channels: int
    grid: tuple[int, ...]
    prefix: int
    stride: float | None
    pooled: bool  # the grid stays as it is when the input grows


@dataclass(frozen=True, slots=True)
class Perturbed:
    """A trace, and what became of its shapes on fewer samples and on other sides."""

    base: Trace
    fewer: _Shapes  # call → shapes given and gave
    resized: _Shapes
    complete: bool  # the network takes other sides
    sides: tuple[int, ...]  # positions of the input: (height, width), or (length,)
    picture: bool

    def axes(self, call: Call, *, given: bool = False) -> Axes | None:
        """The roles of what a call gave (or was given), or None where no batch or no channels are to be found."""
        tensor, at = (call.given, 0) if given else (call.gave, 1)
        if tensor is None or call.key not in self.fewer:
            return None
        shape, fewer = tuple(tensor.shape), self.fewer[call.key][at]
        ragged = call.given_ragged if given else call.gave_ragged  # follows the lengths it is told, not the sides
        resized = self.resized[call.key][at] if call.key in self.resized and not ragged else None
        return axes(shape, fewer, resized, self.sides, picture=self.picture)


def perturb(network: nn.Module, inputs: Inputs) -> Perturbed:
    """Trace the network on a few samples, on one fewer, and on inputs of other sides where it takes them."""
    few = inputs.rows(0, SAMPLES)
    base = trace(network, few)
    fewer = _shapes(trace(network, inputs.rows(0, SAMPLES - 1)))
    main = few.main
    usual = picture_dims(network, main) if main.ndim >= 4 else tuple(range(1, min(main.ndim, 2)))
    best: tuple[int, bool, _Shapes, tuple[int, ...]] = (0, False, {}, usual)
    for alternative in attempts(network, main):
        for sides in alternative:
            if all(size == main.shape[dim] for dim, size in sides.items()):
                continue
            tried = trace(network, few.resized(sides), partial=True)
            if len(tried.calls) > best[0]:
                best = (len(tried.calls), tried.problem is None, _shapes(tried), tuple(sides))
        if best[1]:
            break
    _, complete, resized, dims = best
    return Perturbed(base, fewer, resized, complete, tuple(main.shape[dim] for dim in dims), main.ndim >= 4)


def _shapes(traced: Trace) -> _Shapes:
    def shape(tensor: Tensor | None) -> tuple[int, ...]:
        return () if tensor is None else tuple(tensor.shape)

    return {call.key: (shape(call.given), shape(call.gave)) for call in traced.calls}


def axes(
    shape: tuple[int, ...],
    fewer: tuple[int, ...],
    resized: tuple[int, ...] | None,
    sides: tuple[int, ...],
    *,
    picture: bool,
) -> Axes | None:
    """Roles from the shapes of a tensor on three samples, on two, and on inputs of other sides (None: not known).

    The batch is what goes from three to two, alone. Positions are what changes with the sides of the input, channels
    the one other dimension. Where no side changes, the shape decides: two equal dimensions are a grid, else channels
    come first in maps and last in sequences.

    Args:
        sides: positions of the input.
        picture: the input is an image, so that a sequence of tokens may be a grid behind some others.
    """
    changed = [dim for dim, size in enumerate(shape) if len(fewer) == len(shape) and fewer[dim] != size]
    if len(changed) != 1 or (shape[changed[0]], fewer[changed[0]]) != (SAMPLES, SAMPLES - 1):
        return None
    batch = changed[0]
    rest = [dim for dim in range(len(shape)) if dim != batch]
    known = resized is not None and len(resized) == len(shape)
    moved = [dim for dim in rest if known and resized is not None and resized[dim] != shape[dim]]
    channel = _channel(shape, rest, moved, batch, sides, picture=picture)
    if channel is None:
        return None
    positions = [dim for dim in rest if dim != channel]
    letters = iter(_POSITIONS[len(positions)] if positions else "")
    layout = "B" + "".join("C" if dim == channel else next(letters) for dim in rest)
    grid, prefix = tuple(shape[dim] for dim in positions), 0
    if picture and len(positions) == 1:
        grid, prefix = token_grid(shape[positions[0]], sides)
    pooled = known and bool(positions) and not moved
    return Axes(
        layout,
        (-1, *(shape[dim] for dim in rest)),
        batch,
        shape[channel],
        grid,
        prefix,
        None if pooled or not (grid and sides) else (math.prod(sides) / math.prod(grid)) ** (1 / len(sides)),
        pooled,
    )


def _channel(
    shape: Sequence[int], rest: list[int], moved: list[int], batch: int, sides: tuple[int, ...], *, picture: bool
) -> int | None:
    if not rest or len(rest) > 4 or len(moved) == len(rest):
        return None
    still = [dim for dim in rest if dim not in moved]
    if len(still) == 1:
        return still[0]
    if moved:
        return still[0]  # a spectrogram of which only time was changed, a film of which only the picture was
    if len(rest) == 2:
        first, last = (len(token_grid(shape[dim], sides)[0]) for dim in rest)
        return rest[0] if batch == 0 and picture and first < last else rest[1]
    first, second, last = shape[rest[0]], shape[rest[1]], shape[rest[-1]]
    return rest[-1] if len(rest) == 3 and first == second != last else rest[0]


def token_grid(count: int, sides: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """A sequence of tokens as a grid and the number of tokens before it.

    The grid has the proportions of the image: of all strides, the one that leaves the fewest tokens over, five at most.
    Where none does, the largest square that leaves no more; else it is no grid.
    """
    if len(sides) == 2:
        strides = range(1, max(sides) + 1)
        grids = [(max(1, sides[0] // s), max(1, sides[1] // s)) for s in strides]
        fitting = [(count - h * w, (h, w)) for h, w in grids if 0 <= count - h * w <= min(_MOST_TOKENS, count - 1)]
        if fitting and count > _MOST_TOKENS:
            over, grid = min(fitting)
            return grid, over
        root = math.isqrt(count)
        if root > 1 and count - root * root <= _MOST_TOKENS:
            return (root, root), count - root * root
    return (count,), 0
