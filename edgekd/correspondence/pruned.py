"""A student cut out of its teacher: which of the teacher's channels each of its own was.

It is known from a record that pruning leaves on the student, and holds however long that is trained; without one it is
looked for in weights that are still the teacher's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from edgekd.correspondence.taps import inner

# By parameter and dimension the positions of the original that are left; a dimension that is not there is whole.
Kept: TypeAlias = "Mapping[str, Mapping[int, tuple[int, ...]]]"
_RECORD = "edgekd_cut_from"
_PROBED = 4  # input channels in which weights are looked for; that of a random weight agrees by chance once in 2²⁴
_CHUNK = 2**24  # comparisons made at once


@dataclass(frozen=True, slots=True)
class _Record:
    origin: str  # fingerprint of the network that it was cut out of
    kept: Kept


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's parameters, which tells it from others of its architecture."""
    digest = hashlib.sha256()
    for name, value in inner(network).named_parameters():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


def remember(network: nn.Module, kept: Kept, origin: str) -> None:
    """Leave on a network what of another one, known by its fingerprint, it was cut out of."""
    setattr(inner(network), _RECORD, _Record(origin, kept))


def remembered(network: nn.Module) -> tuple[Kept, str] | None:
    """What was kept of which network, where that is known."""
    record = getattr(inner(network), _RECORD, None)
    return (record.kept, record.origin) if isinstance(record, _Record) else None


def is_cut_from(teacher: nn.Module, student: nn.Module) -> bool:
    """The student has a record of having been cut out of this very teacher."""
    record = remembered(student)
    return record is not None and record[1] == fingerprint(teacher)


def recorded_map(student: nn.Module, writer: tuple[str, int] | None) -> tuple[int, ...] | None:
    """The teacher's channel for each channel of the student, as its record has it; `writer` as in `channel_map`."""
    record = remembered(student)
    if writer is None or record is None:
        return None
    name, dim = writer
    parameter = dict(inner(student).named_parameters()).get(name)
    whole = tuple(range(parameter.shape[dim])) if parameter is not None else None
    return record[0].get(name, {}).get(dim, whole)


def is_copy(teacher: nn.Module, student: nn.Module) -> bool:
    """Both have parameters of the same names, and none of the student's is larger than the teacher's."""
    of_teacher, of_student = dict(inner(teacher).named_parameters()), dict(inner(student).named_parameters())
    return of_teacher.keys() == of_student.keys() and all(
        mine.ndim == theirs.ndim and all(a <= b for a, b in zip(mine.shape, theirs.shape, strict=True))
        for mine, theirs in zip(of_student.values(), (of_teacher[name] for name in of_student), strict=True)
    )


def channel_map(teacher: nn.Module, student: nn.Module, writer: tuple[str, int] | None) -> tuple[int, ...] | None:
    """The teacher's channel for each channel of the student, by equal values in the weights that make them.

    A student's filter is the teacher's with some input channels left out, and a trained weight is hardly ever there
    twice: the first weights of each filter are looked for in each filter of the teacher.

    Args:
        writer: name of the parameter, and the dimension of it that is the channel.

    Returns:
        None where a channel is found in no filter or in several (weights changed since, or are all alike).
    """
    if writer is None:
        return None
    name, dim = writer
    mine, theirs = (_filters(network, name, dim) for network in (student, teacher))
    if mine is None or theirs is None:
        return None
    found = torch.ones(mine.shape[0], theirs.shape[0], dtype=torch.bool, device=mine.device)
    rows = max(1, _CHUNK // max(1, theirs.numel() // theirs.shape[2]))
    for at in range(min(_PROBED, mine.shape[1])):
        for tap in {0, mine.shape[2] // 2}:
            for first in range(0, mine.shape[0], rows):
                values = mine[first : first + rows, at, tap]
                found[first : first + rows] &= (values[:, None, None] == theirs[None, :, :, tap]).any(2)
    if not bool((found.sum(1) == 1).all()):
        return None
    channels = tuple(int(channel) for channel in found.int().argmax(1))
    return channels if len(set(channels)) == len(channels) else None


def _filters(network: nn.Module, name: str, dim: int) -> Tensor | None:
    """Weights as channels × other channels × kernel."""
    parameter = dict(inner(network).named_parameters()).get(name)
    if parameter is None or parameter.ndim < 2:
        return None
    weight = parameter.detach().movedim(dim, 0)
    return weight.reshape(weight.shape[0], weight.shape[1], -1)
