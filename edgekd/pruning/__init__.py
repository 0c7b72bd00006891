"""Structured pruning: whole channels and heads are cut out, so that what is left is a smaller dense network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekd.correspondence.pruned import Kept, fingerprint, remember, remembered
from edgekd.errors import ModelError
from edgekd.goals import Importance, Measure, Prune, compared
from edgekd.models import weights
from edgekd.outcome import LeftAlone
from edgekd.pruning import cost, rank, shapes
from edgekd.pruning.cut import Group, cut
from edgekd.pruning.rank import OutOfReach
from edgekd.pruning.shapes import Shapes, restore, traceable
from edgekd.pruning.statistics import recalibrate
from edgekd.pruning.trace import Inputs, Traced, merged, trace

VERSION = 1  # of what pruning does with its options; raised where the same options would cut otherwise

# A latency is searched for so much below its goal: timings of one network on a machine that bench.latency calls steady
# differ by it, and of candidates at the goal the search would take the one that was timed too fast.
SLACK = 0.03
_SEARCHES = 3  # for a latency, each with more slack, until a cut that is timed again keeps the goal

__all__ = [
    "SLACK", "VERSION", "Ahead", "Cut", "OutOfReach", "measured", "prune", "recalibrate", "restore", "traceable",
    "write",
]  # fmt: skip

KEPT = "everything in it ranks above what had to go"


@dataclass(frozen=True, slots=True)
class Cut:
    """A network after one round of pruning, in eval mode.

    Args:
        module: the smaller network; it knows what it was cut out of.
        shapes: its structure, against the architecture that the first round began with.
        before, after: of the goal's measure.
        layers: channels or heads before and after, by the layer that makes them.
        left_alone: layers that were not touched, and why.
    """

    module: nn.Module
    shapes: Shapes
    before: float
    after: float
    layers: Mapping[str, tuple[int, int]]
    left_alone: tuple[LeftAlone, ...]


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is looked at before the first of several rounds cuts anything.

    Args:
        rounds: how many there may be.
        check: told the network with as much cut as they may cut of it together, and what was left alone and why; raises
            where that costs too much.
    """

    rounds: int
    check: Callable[[nn.Module, str], None]


def measured(measure: Measure, module: nn.Module, inputs: Inputs, timer: Callable[[nn.Module], float] | None) -> float:
    """What a network costs in a measure; `timer` gives the milliseconds of "latency_ms"."""
    if measure == "macs":
        return cost.macs(module, inputs)
    if measure == "parameters":
        return cost.parameters(module)
    if measure == "size_bytes":
        return cost.size_bytes(module)
    assert timer is not None
    return timer(module)


def prune(
    module: nn.Module,
    inputs: Inputs,
    measure: Measure,
    goal: float,
    options: Prune,
    *,
    seed: int = 0,
    round_to: int = 1,
    architecture: nn.Module | None = None,
    gradients: Callable[[nn.Module], None] | None = None,
    timer: Callable[[nn.Module], float] | None = None,
    batches: Callable[[], Iterable[tuple[Tensor, ...]]] | None = None,
    ahead: Ahead | None = None,
) -> Cut:
    """Cut the least important channels and heads out of a copy of a network, until it costs at most `goal`.

    The output layer, and layers whose channels cannot be followed, stay as they are. A latency is timed again once the
    cut is found; where the machine is so unsteady that it is over the goal each time, `Cut.after` says so.

    Args:
        module: on the processor; padding shortcuts of our ResNets become convolutions first.
        inputs: some samples as the module takes them, batch first.
        options: the ranking, and what to leave alone.
        architecture: as it was before the first of several rounds, of which one keeps everything where what is there
            costs no more than the goal; None: there is one round, for which such a goal is an error.
        gradients: fills the gradients of a module's parameters, for "taylor".
        timer: milliseconds that a module takes, for a goal of latency.
        batches: training samples to estimate the statistics of batch normalisation from; None: they stay.
        ahead: a look at what all rounds together can reach.

    Raises:
        ModelError: the network cannot be traced, nothing can be cut, or (`OutOfReach`) the goal is out of reach.
    """
    try:
        begun = traceable(module).eval()
    except RuntimeError as problem:  # of tensors that a forward under autograd has left in it
        raise ModelError(f"it cannot be copied: {problem}", where=type(module).__name__) from problem
    probe = copy.deepcopy(begun).requires_grad_(True)
    before = measured(measure, begun, inputs, timer)
    enough = before <= goal
    if enough and architecture is None:
        had, asked = compared(measure, before, goal)
        raise ModelError(f"it costs {had} already, and {asked} is the goal", where="prune")
    traced = trace(probe, inputs, options.ignore)
    if options.importance == "taylor":
        if gradients is None:
            raise ModelError("'taylor' ranks by gradients, and there are none", where="prune.importance")
        gradients(probe)
        rank.gradients_of_zero(probe.eval())
    wide, left = _candidates(traced, options.importance, seed, round_to)
    reasons = "; ".join(f"{', '.join(each.layers)}: {each.reason}" for each in left)
    if not wide and not enough:
        raise ModelError(
            "nothing in the network can be cut", where=type(module).__name__, fix=f"left alone are {reasons}"
        )
    if ahead is not None and not enough:
        ahead.check(_after(begun, rank.smallest(wide, round_to, ahead.rounds)), reasons)
    search = partial(
        rank.search, wide, goal=goal, measure=measure, together=options.global_ranking, round_to=round_to,
        untouched=reasons,
    )  # fmt: skip
    keep: rank.Keep = {group: tuple(range(group.units)) for group in wide}
    after = before
    if not enough:
        keep, after = _searched(search, begun, inputs, measure, goal, timer)
    made = _after(begun, keep)
    whole = tuple(group.name for group, units in keep.items() if len(units) == group.units)
    if whole:
        left.append(LeftAlone(whole, KEPT))
    kept, origin = _record(module, begun, keep)
    remember(made, kept, origin)
    if batches is not None:
        recalibrate(made, batches())
    base = traceable(architecture) if architecture is not None else begun
    layers = {group.name: (_size(group, group.units), _size(group, len(units))) for group, units in keep.items()}
    layers = {name: sizes for name, sizes in layers.items() if sizes[0] != sizes[1]}
    return Cut(made, shapes.difference(base, made, kept, origin), before, after, layers, tuple(left))


def _candidates(
    traced: Traced, importance: Importance, seed: int, round_to: int
) -> tuple[dict[Group, Tensor], list[LeftAlone]]:
    """The importance of the units of each group of which something can be cut, and what is left alone."""
    ranked, unranked = rank.scores(traced, importance, seed)
    narrow = {group: why for group in ranked if (why := rank.narrow(group, round_to)) is not None}
    left = [*traced.left_alone, *unranked, *(LeftAlone((group.name,), why) for group, why in narrow.items())]
    return {group: own for group, own in ranked.items() if group not in narrow}, list(merged(left))


def _searched(
    search: Callable[..., rank.Keep],
    begun: nn.Module,
    inputs: Inputs,
    measure: Measure,
    goal: float,
    timer: Callable[[nn.Module], float] | None,
) -> tuple[rank.Keep, float]:
    """The units to keep, and what the network costs then."""

    def exact(keep: rank.Keep) -> float:
        return measured(measure, _after(begun, keep), inputs, timer)

    if measure == "latency_ms":
        for number in range(1, _SEARCHES + 1):
            keep = search(exact, refine=False, slack=number * SLACK)
            after = exact(keep)
            if after <= goal:
                break
        return keep, after
    if measure == "macs":
        keep = search(cost.predicted_macs(begun, inputs))
        after = exact(keep)
        if after <= goal:
            return keep, after
    keep = search(exact)  # of MACs where something in it costs other than its weights say
    return keep, exact(keep)


def _size(group: Group, units: int) -> int:
    """Heads, or channels of the layer that makes them."""
    return units if group.counts else units * group.width


def _after(module: nn.Module, keep: rank.Keep) -> nn.Module:
    made = copy.deepcopy(module)
    cut(made, keep)
    return made


def _record(module: nn.Module, begun: nn.Module, keep: rank.Keep) -> tuple[Kept, str]:
    """What is left of each parameter of the first network: told by a cut of its positions in place of its weights."""
    ghost = copy.deepcopy(begun)
    sizes = {name: value.shape for name, value in ghost.named_parameters()}
    for _, value in ghost.named_parameters():
        value.requires_grad_(False)
        value.data = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
    cut(ghost, keep)
    earlier, origin = remembered(module) or ({}, fingerprint(module))
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, value in ghost.named_parameters():
        own: dict[int, tuple[int, ...]] = {}
        for dim, size in enumerate(sizes[name]):
            known = earlier.get(name, {}).get(dim, tuple(range(size)))
            along = value.movedim(dim, 0).reshape(value.shape[dim], -1)[:, 0].long()
            stride = int(sizes[name][dim + 1 :].numel())
            left = tuple(known[at] for at in ((along // stride) % size).tolist())
            if left != tuple(range(len(left))) or len(left) != size or dim in earlier.get(name, {}):
                own[dim] = left
        if own:
            kept[name] = own
    return kept, origin


def write(made: Cut, folder: Path) -> None:
    """Weights and shapes as two files that `restore` reads."""
    weights.save(folder / "weights.safetensors", made.module, {})
    made.shapes.write(folder / "shapes.json")
