"""Cutting channels out of a module: weights are selected, and the plain numbers that describe them follow."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from edgekd.errors import ModelError

Side: TypeAlias = Literal["out", "in"]
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, _InstanceNorm)


@dataclass(frozen=True, slots=True)
class Slot:
    """One dimension of one layer, or of a parameter outside of any layer, that channels are cut from.

    Args:
        path: of the module, or name of the parameter.
        side: what the layer gives or what it takes; of a layer that keeps channels apart (normalisations, depthwise
            convolutions, embeddings) and of a parameter always "out".
        index: for each unit the positions of that dimension that go with it.
        dim: of a parameter.
    """

    path: str
    side: Side
    index: tuple[tuple[int, ...], ...]
    dim: int | None = None

    @property
    def size(self) -> int:
        """Positions of all units together."""
        return sum(map(len, self.index))


@dataclass(frozen=True, slots=True)
class Count:
    """A plain number of a module that says how many units it has, times `each`: heads, or their channels together."""

    path: str
    attribute: str
    each: int


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Channels of several layers that can only be cut together, unit by unit.

    Args:
        name: path of a layer that makes them.
        units: how many can be kept or cut; a unit is a channel, one channel of every group, or a head.
        width: channels of that layer that a unit is.
        slots: where they are.
        counts: numbers that follow.
    """

    name: str
    units: int
    width: int
    slots: tuple[Slot, ...]
    counts: tuple[Count, ...] = ()


Plan: TypeAlias = "Mapping[Group, Sequence[int]]"  # the units of each group that are kept, ascending


def cut(module: nn.Module, plan: Plan) -> None:
    """Cut everything out of `module`, in place, that the plan does not keep.

    Raises:
        ModelError: a layer cannot be cut like that.
    """
    for slot, gone in removed(plan):
        owner, name = _owner(module, slot.path)
        if slot.dim is not None:
            parameter = getattr(owner, name)
            _set(owner, name, parameter, slot.dim, _kept(parameter.shape[slot.dim], gone))
        else:
            _cut_layer(getattr(owner, name) if name else owner, slot, gone)
    for group, units in plan.items():
        for count in group.counts:
            setattr(module.get_submodule(count.path), count.attribute, count.each * len(units))


def removed(plan: Plan) -> list[tuple[Slot, set[int]]]:
    """The positions that go from each dimension; several groups may share one, behind a concatenation."""
    found: dict[tuple[str, str, int | None], tuple[Slot, set[int]]] = {}
    for group, units in plan.items():
        lost = set(range(group.units)) - set(units)
        for slot in group.slots if lost else ():
            _, gone = found.setdefault((slot.path, slot.side, slot.dim), (slot, set()))
            gone.update(position for unit in lost for position in slot.index[unit])
    return list(found.values())


def masked(module: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the same shape in which all that the plan would cut is zero, and no normalisation looks at it.

    What follows computes what the cut network computes, to rounding, where the plan is right.
    """
    after = copy.deepcopy(module)
    cut(after, plan)
    copied = copy.deepcopy(module)
    for slot, gone in removed(plan):
        owner, name = _owner(copied, slot.path)
        layer = getattr(owner, name) if name else owner
        if isinstance(layer, NORMS):
            width = _width(layer)
            setattr(owner, name, _OnlyKept(after.get_submodule(slot.path), _kept(width, gone), width))
        elif isinstance(layer, nn.Parameter):
            _zero(layer, slot.dim or 0, gone)
        else:
            _zero_layer(layer, slot, gone)
    return copied


class _OnlyKept(nn.Module):
    """A normalisation of the channels that are kept; the others come out as zeros."""

    def __init__(self, norm: nn.Module, kept: Sequence[int], width: int) -> None:
        super().__init__()
        self.norm, self.kept, self.width = norm, torch.tensor(kept), width

    def forward(self, x: Tensor) -> Tensor:
        last = isinstance(self.norm, nn.LayerNorm) and x.shape[-1] == self.width
        dim = x.ndim - 1 if last else 1
        given: Tensor = self.norm(x.index_select(dim, self.kept))
        return torch.zeros_like(x).index_copy(dim, self.kept, given)


def _cut_layer(layer: nn.Module, slot: Slot, gone: set[int]) -> None:
    if isinstance(layer, _ConvNd):
        _cut_convolution(layer, slot, gone)
    elif isinstance(layer, nn.Linear):
        if slot.side == "out":
            _each(layer, ("weight", "bias"), 0, kept := _kept(layer.out_features, gone))
            layer.out_features = len(kept)
        else:
            _each(layer, ("weight",), 1, kept := _kept(layer.in_features, gone))
            layer.in_features = len(kept)
    elif isinstance(layer, (_BatchNorm, _InstanceNorm)):
        kept = _kept(layer.num_features, gone)
        _each(layer, ("weight", "bias", "running_mean", "running_var"), 0, kept)
        layer.num_features = len(kept)
    elif isinstance(layer, nn.LayerNorm):
        *before, size = layer.normalized_shape
        _each(layer, ("weight", "bias"), len(before), kept := _kept(size, gone))
        layer.normalized_shape = (*before, len(kept))
    elif isinstance(layer, nn.GroupNorm):
        _each(layer, ("weight", "bias"), 0, kept := _kept(layer.num_channels, gone))
        layer.num_channels = len(kept)
    elif isinstance(layer, nn.PReLU):
        if layer.num_parameters > 1:
            _each(layer, ("weight",), 0, kept := _kept(layer.num_parameters, gone))
            layer.num_parameters = len(kept)
    elif isinstance(layer, nn.Embedding):
        _each(layer, ("weight",), 1, kept := _kept(layer.embedding_dim, gone))
        layer.embedding_dim = len(kept)
    else:
        raise ModelError(f"a {type(layer).__name__} cannot be cut", where=slot.path)


def _cut_convolution(layer: _ConvNd, slot: Slot, gone: set[int]) -> None:
    outside, inside = (1, 0) if isinstance(layer, _ConvTransposeNd) else (0, 1)
    if depthwise(layer):
        kept = _kept(layer.out_channels, gone)
        _each(layer, ("weight",), 0, kept)
        _each(layer, ("bias",), 0, kept)
        layer.in_channels = layer.out_channels = layer.groups = len(kept)
        return
    if layer.groups > 1 and outside == 1:
        raise ModelError("a transposed convolution in groups cannot be cut", where=slot.path)
    if slot.side == "out":
        kept = _kept(layer.out_channels, gone)
        _even(layer, kept, layer.out_channels, slot)
        _each(layer, ("weight",), outside, kept)
        _each(layer, ("bias",), 0, kept)
        layer.out_channels = len(kept)
    else:
        kept = _kept(layer.in_channels, gone)
        _even(layer, kept, layer.in_channels, slot)
        _each(layer, ("weight",), inside, kept[: len(kept) // layer.groups])
        layer.in_channels = len(kept)


def depthwise(layer: nn.Module) -> bool:
    """A convolution of every channel by itself."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.in_channels == layer.out_channels > 1


def _even(layer: _ConvNd, kept: Sequence[int], channels: int, slot: Slot) -> None:
    """Of each group of channels the same ones have to stay."""
    size = channels // layer.groups
    parts = {tuple(at - first for at in kept if first <= at < first + size) for first in range(0, channels, size)}
    if len(parts) != 1:
        raise ModelError("of its groups not the same channels would stay", where=slot.path)


def _width(layer: nn.Module) -> int:
    if isinstance(layer, nn.LayerNorm):
        return int(layer.normalized_shape[-1])
    return int(layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features)  # type: ignore[arg-type]


def _zero_layer(layer: nn.Module, slot: Slot, gone: set[int]) -> None:
    if isinstance(layer, nn.Embedding):
        _zero(layer.weight, 1, gone)
    elif isinstance(layer, nn.PReLU) or depthwise(layer):
        for parameter in layer.parameters():
            _zero(parameter, 0, gone if parameter.shape[0] > 1 else ())
    elif isinstance(layer, (_ConvNd, nn.Linear)):
        transposed, groups = isinstance(layer, _ConvTransposeNd), getattr(layer, "groups", 1)
        if slot.side == "out":
            _zero(layer.weight, 1 if transposed else 0, gone)
            if layer.bias is not None:
                _zero(layer.bias, 0, gone)
        else:
            size = layer.weight.shape[0 if transposed else 1]
            _zero(layer.weight, 0 if transposed else 1, gone if groups == 1 else {at % size for at in gone})
    else:
        raise ModelError(f"a {type(layer).__name__} cannot be cut", where=slot.path)


def _zero(tensor: Tensor, dim: int, positions: Iterable[int]) -> None:
    with torch.no_grad():
        tensor.index_fill_(dim, torch.tensor(list(positions), dtype=torch.long), 0.0)


def _kept(size: int, gone: set[int]) -> list[int]:
    kept = [at for at in range(size) if at not in gone]
    if not kept or any(at >= size for at in gone):
        raise ModelError("more channels were traced to it than it has, or all of them")
    return kept


def _each(layer: nn.Module, names: Iterable[str], dim: int, kept: Sequence[int]) -> None:
    for name in names:
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            _set(layer, name, tensor, dim, kept)


def _set(owner: nn.Module, name: str, tensor: Tensor, dim: int, kept: Sequence[int]) -> None:
    selected = tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(owner, name, nn.Parameter(selected, requires_grad=tensor.requires_grad))
    else:
        setattr(owner, name, selected)


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name
