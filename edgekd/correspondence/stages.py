"""Where a network may be listened to: the ends of its stages or its blocks, its head's input, its attention."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from edgekd.correspondence.inputs import Inputs
from edgekd.correspondence.layout import Axes, Perturbed, perturb
from edgekd.correspondence.taps import Kind, Tap, places
from edgekd.correspondence.trace import Call
from edgekd.errors import ModelError, nearest

Family: TypeAlias = Literal["convolutional", "tokens", "recurrent", "vectors"]

_LEAST_WORK = 0.01  # part of the network's multiply-accumulates that a stage has


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found in one network.

    Args:
        family: by what the deepest stage gives: maps, tokens, sequences of a recurrent layer, or nothing but vectors.
        stages: candidates for a pair, shallow to deep: ends of stages, or blocks.
        penultimate: what the head is given, where there is a head.
        relations: queries, keys and values of the last self-attention, where there is one.
        dense: the output has a grid.
        every: all that can be tapped, by path.
        writers: which weights make the channels of a tap (or take them, where its path ends in :in): path of the tap →
            name of the parameter, its dimension.
        bidirectional: paths of stages that a bidirectional recurrent layer gives.
        notes: what was not found.
    """

    family: Family
    stages: tuple[Tap, ...]
    penultimate: Tap | None
    relations: Tap | None
    dense: bool
    every: Mapping[str, Tap]
    writers: Mapping[str, tuple[str, int]]
    bidirectional: frozenset[str]
    notes: tuple[str, ...]

    def tap(self, path: str) -> Tap:
        """The tap of a path, which may join several by +.

        Raises:
            ModelError: there is no such place, or what is joined does not fit.
        """
        if path in self.every:
            return self.every[path]
        pieces = places(path)
        for piece in pieces:
            if str(piece) not in self.every:
                module, what = piece.module, f":{piece.what}" if piece.what != "out" else ""
                calls = [choice for choice in self.every if re.fullmatch(rf"{re.escape(module)}#\d+{what}", choice)]
                raise ModelError(
                    f"nothing can be tapped at '{piece}'",
                    nearest="" if calls else nearest(str(piece), self.every),
                    fix=f"it is called {len(calls)} times: name one of {', '.join(calls)}" if calls else "",
                )
        return joined([self.every[str(piece)] for piece in pieces])


def survey(network: nn.Module, inputs: Inputs) -> Survey:
    """Find the stages, the head and the attention of a network by running it on a few samples.

    A network whose costliest repeated block keeps one grid is a row of equal blocks (a transformer, stacked LSTMs), and
    these are its stages. Otherwise a stage ends where the grid changes.

    Raises:
        ModelError: the network fails on the probe.
    """
    reader = _Reader(perturb(network, inputs))
    head = reader.head()
    every = reader.seen.base.calls
    calls = every[: every.index(head)] if head else every[:-1]  # without the output, and what follows the head
    blocks = reader.blocks(calls)
    ends = blocks or reader.stage_ends(calls)
    stages = [reader.tap(call, kind="block" if blocks else "stage") for call in ends]
    penultimate = reader.penultimate(head) if head else None
    writers = {tap.path: found for call, tap in zip(ends, stages, strict=True) if (found := _writer(every, call, tap))}
    if head and penultimate:
        writers[penultimate.path] = (f"{head.name}.weight", 1)
    output = reader.seen.axes(reader.seen.base.root)
    layers = [(call, call.module) for call in ends if isinstance(call.module, nn.RNNBase)]
    notes = [] if penultimate else ["no last linear layer or convolution gives the output: no penultimate features"]
    notes += [] if stages else ["no features with positions before the output: no stages"]
    notes += [
        f"{call.name}: of its {rnn.num_layers} layers the last can be tapped"
        for call, rnn in layers
        if rnn.num_layers > 1
    ]
    named = {tap.path: tap for tap in [*stages, *([penultimate] if penultimate else [])]}
    return Survey(
        family=_family(every, stages),
        stages=tuple(stages),
        penultimate=penultimate,
        relations=reader.relations(calls),
        dense=output is not None and bool(output.grid) and not output.pooled,
        every=reader.every() | named,
        writers=writers,
        bidirectional=frozenset(reader.path(call) for call, rnn in layers if rnn.bidirectional),
        notes=tuple(notes),
    )


class _Reader:
    """Reads a perturbed trace; a call's role is looked up in it again and again."""

    def __init__(self, seen: Perturbed) -> None:
        self.seen = seen
        self._repeated = {call.name for call in seen.base.calls if call.count > 1}
        self._axes = {call.key: seen.axes(call) for call in seen.base.calls}

    def path(self, call: Call) -> str:
        """The path of what a call gave."""
        return f"{call.name}#{call.count}" if call.name in self._repeated else call.name

    def positioned(self, call: Call) -> Axes | None:
        """The roles of what a call gave, where it has positions that follow the input's."""
        axes = self._axes[call.key]
        return axes if axes is not None and axes.grid and not axes.pooled else None

    def tap(self, call: Call, *, kind: Kind = "other") -> Tap:
        """The tap of what a call gave."""
        axes = self._axes[call.key]
        assert axes is not None
        return _tap(self.path(call), axes, call.after, kind, cloned=call.gave_changed, ragged=call.gave_ragged)

    def tap_in(self, call: Call, *, kind: Kind = "other") -> Tap | None:
        """The tap of what a call was given, where it has channels."""
        axes = self.seen.axes(call, given=True)
        if axes is None:
            return None
        path = f"{self.path(call)}:in"
        return _tap(path, axes, call.before, kind, cloned=call.given_changed, ragged=call.given_ragged)

    def every(self) -> dict[str, Tap]:
        """All that can be tapped, in the order of the calls."""
        found = {}
        for call in self.seen.base.calls[:-1]:
            if self._axes[call.key] is not None:
                found[self.path(call)] = self.tap(call)
            if (given := self.tap_in(call)) is not None:
                found[given.path] = given
            if (inside := self._inside(call)) is not None:
                found[inside.path] = inside
        return found

    def head(self) -> Call | None:
        """The last layer, where it is one that maps features to the outputs: nothing with parameters follows it."""
        for call in reversed(self.seen.base.calls):
            if not call.children and next(call.module.parameters(), None) is not None:
                module = call.module
                if not isinstance(module, (nn.Linear, _ConvNd)):
                    return None
                width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
                shapes = [tuple(output.shape) for output in self.seen.base.outputs]
                return call if any(width in shape or len(shape) < 2 for shape in shapes) else None
        return None

    def penultimate(self, head: Call) -> Tap | None:
        """What the head is given, before the dropout that may stand there."""
        for call in self.seen.base.calls:
            if isinstance(call.module, _DropoutNd) and call.module.p > 0 and call.gave is head.given:
                return self.tap_in(call, kind="penultimate")
        return self.tap_in(head, kind="penultimate")

    def blocks(self, calls: Sequence[Call]) -> list[Call] | None:
        """The calls of the class of module that holds most of the work, where there are several on one grid.

        Of classes that hold as much (a block, the list of blocks, what is in a block), the outermost with three calls.
        """
        best: list[tuple[float, bool, bool, int, list[Call]]] = []
        for kind in dict.fromkeys(type(call.module) for call in calls):
            of_kind = [call for call in calls if type(call.module) is kind and self.positioned(call)]
            outermost = [call for call in of_kind if not any(type(up.module) is kind for up in _ancestors(call))]
            share = sum(call.after - call.before for call in outermost)
            if kind is not nn.Sequential and len(outermost) > 1 and share >= 0.5:
                level = min(len(list(_ancestors(call))) for call in outermost)
                best.append((share, not outermost[0].children, len(outermost) < 3, level, outermost))
        if not best:
            return None
        most = max(entry[0] for entry in best)
        found = min((entry for entry in best if entry[0] >= 0.9 * most), key=lambda entry: entry[1:4])[4]
        grids = {axes.grid for call in found if (axes := self.positioned(call))}
        return found if len(grids) == 1 else None

    def stage_ends(self, calls: Sequence[Call]) -> list[Call]:
        """The last output on each grid before the grid changes, shallow to deep."""
        allowed = {call.key for call in calls}
        row = [call for call in self._visible(self.seen.base.root) if call.key in allowed and self.positioned(call)]
        runs = [(grid, list(run)) for grid, run in groupby(row, self._grid)]
        kept: list[tuple[tuple[int, ...], list[Call]]] = []
        for at, (grid, run) in enumerate(runs):
            gate = math.prod(grid) == 1 and 0 < at < len(runs) - 1 and runs[at - 1][0] == runs[at + 1][0]
            if kept and kept[-1][0] == grid:
                kept[-1] = (grid, run)
            elif not gate:  # a pooled branch that comes back, as in squeeze and excitation
                kept.append((grid, run))
        ends: list[Call] = []
        for _, run in kept:  # not the input as it comes, a pooled stage, or a crossing between branches
            if run[-1].after >= (ends[-1].after if ends else 0) + _LEAST_WORK:
                ends.append(self._outermost(run[-1]))
        return ends or [self._outermost(run[-1]) for _, run in kept[-1:]]

    def relations(self, calls: Sequence[Call]) -> Tap | None:
        """Queries, keys and values of the last self-attention whose tokens can be told apart.

        It is a `torch.nn.MultiheadAttention`, or three linear layers of one width on one tensor, or one of three times
        its input's width beside one that keeps the width.
        """
        for call in reversed(calls):
            if (inside := self._inside(call)) is not None:
                return dataclasses.replace(inside, kind="relations")
            axes = self.positioned(call)
            if axes is None or len(axes.shape) != 3 or not isinstance(call.module, nn.Linear) or call.parent is None:
                continue
            beside = [other for other in call.parent.children if isinstance(other.module, nn.Linear)]
            width, wide = call.module.in_features, call.module.out_features
            if wide == 3 * width and any(o.module.in_features == o.module.out_features == width for o in beside):
                return self.tap(call, kind="relations")
            shared = [o for o in beside if o.given is call.given and o.module.out_features == wide]
            if len(shared) == 3:
                pieces = [self.tap(other) for other in sorted(shared, key=_query_key_value)]
                return dataclasses.replace(joined(pieces), kind="relations")
        return None

    def _inside(self, call: Call) -> Tap | None:
        """Queries, keys and values of a call of self-attention that computes them itself."""
        given = self.tap_in(call) if call.self_attention else None
        if given is None:
            return None
        at = given.layout.index("C")
        shape = tuple(3 * size if dim == at else size for dim, size in enumerate(given.shape))
        path = f"{self.path(call)}:qkv"
        return dataclasses.replace(given, path=path, channels=3 * given.channels, shape=shape, cloned=False)

    def _grid(self, call: Call) -> tuple[int, ...]:
        axes = self.positioned(call)
        return axes.grid if axes else ()

    def _outermost(self, call: Call) -> Call:
        """The outermost call that gave the same tensor: layer3, not layer3.5.relu."""
        while call.parent is not None and call.parent.parent is not None and call.parent.bare:
            if call.parent.gave is not call.gave:
                break
            call = call.parent
        return call

    def _visible(self, call: Call) -> Iterator[Call]:
        """Calls in the order in which they ended, without what is inside a block."""
        if call.parent is not None and self._is_block(call):
            yield call
            return
        for child in call.children:
            yield from self._visible(child)
        if call.parent is not None:
            yield call

    def _is_block(self, call: Call) -> bool:
        """A layer, or a module that changes the grid once at most; a Sequential is looked into."""
        if not call.children:
            return True
        if type(call.module).forward is nn.Sequential.forward or not all(map(self._is_block, _steps(call))):
            return False
        given = self.seen.axes(call, given=True)
        grids = {given.grid if given else (), *(self._grid(step) for step in _steps(call)), self._grid(call)}
        return len([grid for grid in grids if math.prod(grid) > 1]) <= 2


def joined(taps: Sequence[Tap]) -> Tap:
    """Several taps as one, their channels concatenated.

    Raises:
        ModelError: they differ in more than their channels.
    """
    first = taps[0]
    at = first.layout.index("C")
    shapes = {(tap.layout, tap.batch, (*tap.shape[:at], *tap.shape[at + 1 :])) for tap in taps}
    if len(shapes) > 1:
        told = ", ".join(f"{tap.path} {tap.layout} {tap.shape}" for tap in taps)
        raise ModelError(f"channels cannot be joined: {told}", expected="tensors that differ in channels alone")
    channels = sum(tap.channels for tap in taps)
    return dataclasses.replace(
        first,
        path="+".join(tap.path for tap in taps),
        shape=(*first.shape[:at], channels, *first.shape[at + 1 :]),
        channels=channels,
        depth=max(tap.depth for tap in taps),
        cloned=any(tap.cloned for tap in taps),
    )


def _tap(path: str, axes: Axes, depth: float, kind: Kind, *, cloned: bool, ragged: bool) -> Tap:
    return Tap(
        path=path,
        layout=axes.layout,
        shape=axes.shape,
        channels=axes.channels,
        depth=depth,
        stride=axes.stride,
        kind=kind,
        grid=axes.grid,
        prefix=axes.prefix,
        batch=axes.batch,
        cloned=cloned,
        ragged=ragged,
    )


def _ancestors(call: Call) -> Iterator[Call]:
    while call.parent is not None:
        call = call.parent
        yield call


def _steps(call: Call) -> Iterator[Call]:
    """The calls inside a call, those of a Sequential in its place."""
    for child in call.children:
        if child.children and type(child.module).forward is nn.Sequential.forward:
            yield from _steps(child)
        else:
            yield child


def _query_key_value(call: Call) -> int:
    """Queries, keys, values by the names that they usually have; as they were called where they have others."""
    words = re.split(r"[_.\d]+", call.name.rpartition(".")[2])
    return next(("qkv".index(word[0]) for word in words if word and word[0] in "qkv"), 3)


def _writer(calls: Sequence[Call], end: Call, tap: Tap) -> tuple[str, int] | None:
    """The last weights with as many outputs as the tap has channels, up to the call that gives it."""
    for call in reversed(calls[: calls.index(end) + 1]):
        weight = getattr(call.module, "weight", None)
        if not call.children and isinstance(weight, nn.Parameter) and weight.ndim >= 2:
            dim = 1 if isinstance(call.module, _ConvTransposeNd) else 0
            if weight.shape[dim] == tap.channels and not isinstance(call.module, nn.Embedding):
                return f"{call.name}.weight", dim
    return None


def _family(calls: Sequence[Call], stages: Sequence[Tap]) -> Family:
    if not stages:
        return "vectors"
    recurrent = [call for call in calls if isinstance(call.module, (nn.RNNBase, nn.RNNCellBase))]
    if sum(call.after - call.before for call in recurrent) >= 0.5:
        return "recurrent"
    return "convolutional" if stages[-1].layout.startswith("BC") else "tokens"
