"""Which channels go first, and how many of each group: ranking by importance, and a search for the goal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.goals import Importance, Measure, compared
from edgekd.outcome import LeftAlone
from edgekd.pruning.cut import Group
from edgekd.pruning.trace import Traced

_MOST = 0.9  # of a group's channels that one round takes: a layer of hardly any channels lets nothing through
_LEVELS = 1000  # steps of the search, from nothing cut to all that may be
Keep = Mapping[Group, tuple[int, ...]]

NARROW = "too narrow: rounded to multiples of {} channels nothing can be cut"
COUPLED = (
    "its {} channels are {} equal groups, of which each must lose the same, and what is left must be a multiple of {}: "
    "nothing can be cut"
)


class OutOfReach(ModelError):
    """Cutting all that may be cut at once is not enough; `least` is what is left then, in the goal's measure."""

    def __init__(self, least: float, measure: Measure, goal: float, untouched: str) -> None:
        found, asked = compared(measure, least, goal)
        super().__init__(
            f"cutting nine tenths of every layer that can be cut leaves {found}, and {asked} is the goal",
            where="prune", fix="ask for less" + (f"; left alone are {untouched}" if untouched else ""),
        )  # fmt: skip
        self.least = least


def scores(traced: Traced, importance: Importance, seed: int) -> tuple[dict[Group, Tensor], tuple[LeftAlone, ...]]:
    """The importance of each unit of each group, its mean over a group being 1, and the groups that have none.

    Of all layers that have part in a channel the mean counts, summed over what a unit is: squares of weights, their
    absolute values, or |weight · gradient| (Molchanov, Mallya, Tyree, Frosio, Kautz, CVPR 2019), or the scale behind
    it (Liu, Li, Shen, Huang, Yan, Zhang, ICCV 2017).

    Args:
        traced: of a module whose parameters have gradients, where `importance` is "taylor".
        seed: of "random".
    """
    scorer = _scorer(importance)
    found: dict[Group, Tensor] = {}
    without: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for group in traced.groups:
            raw = scorer(traced.views[group])
            if raw is None:
                without.append(group.name)
                continue
            raw = raw.detach().double().cpu()
            # views of heads go unit by unit already, with room for more behind; others go channel by channel
            units = raw[: group.units] if group.counts else raw.reshape(group.width, group.units).sum(0)
            found[group] = units / units.mean().clamp(min=1e-30)
    if not without:
        return found, ()
    return found, (LeftAlone(tuple(without), f"'{importance}' says nothing of its channels"),)


def _scorer(importance: Importance) -> Callable[[Any], Tensor | None]:
    from torch_pruning.pruner import importance as criteria

    made: Mapping[Importance, Callable[[], Any]] = {
        "magnitude": lambda: criteria.GroupMagnitudeImportance(p=2, normalizer=None),
        "l1": lambda: criteria.GroupMagnitudeImportance(p=1, normalizer=None),
        "bn_scale": lambda: criteria.BNScaleImportance(normalizer=None),
        "taylor": lambda: criteria.GroupTaylorImportance(normalizer=None),
        "random": lambda: criteria.RandomImportance(),
    }
    scorer: Callable[[Any], Tensor | None] = made[importance]()
    return scorer


def gradients_of_zero(module: nn.Module) -> None:
    """Parameters that the loss did not reach have no gradient, which torch-pruning does not expect."""
    for parameter in module.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def search(
    ranked: Mapping[Group, Tensor],
    cost: Callable[[Keep], float],
    goal: float,
    *,
    measure: Measure,
    together: bool,
    round_to: int,
    refine: bool = True,
    slack: float = 0.0,
    untouched: str = "",
) -> Keep:
    """The units to keep so that the cost is at most the goal, and as near to it as rounding allows.

    Args:
        ranked: importance of the units of each group.
        cost: of the network cut like that; falls where more is cut.
        measure: that cost and goal are in, for the error.
        together: all units are ranked against each other; False: each group loses the same part.
        round_to: channels of each group are kept in multiples of it.
        refine: give back single units as long as the goal is kept, which asks for the cost many more times.
        slack: part of the goal that is left free if it can be, for a cost that is not the same twice.
        untouched: what else costs something and why it cannot be cut, for the error.

    Raises:
        OutOfReach: cutting all that may be cut does not reach the goal.
    """
    groups = list(ranked)
    pooled = torch.cat([ranked[group] for group in groups]).sort().values

    def counts(level: int) -> list[int]:
        part = level / _LEVELS * _MOST
        gone = int(part * len(pooled))
        bar = float(pooled[gone - 1]) if gone else -math.inf
        lost = [int((ranked[group] <= bar).sum()) if together else int(part * group.units) for group in groups]
        return [_rounded(group, group.units - less, round_to) for group, less in zip(groups, lost, strict=True)]

    def costs(kept: Sequence[int]) -> float:
        return cost(_keep(ranked, groups, kept))

    least = costs(counts(_LEVELS))
    if least > goal:
        raise OutOfReach(least, measure, goal, untouched)
    most = goal * (1 - slack)
    level = _first(0, _LEVELS, lambda at: costs(counts(at)) <= most)
    # Between the last two levels several groups change at once: as few of them as are needed.
    before, after = counts(level - 1), counts(level)
    changing = [at for at in range(len(groups)) if before[at] != after[at]]

    def mixed(number: int) -> list[int]:
        return [after[at] if at in changing[:number] else before[at] for at in range(len(groups))]

    kept = mixed(_first(0, len(changing), lambda number: costs(mixed(number)) <= most))
    if refine:
        _give_back(ranked, groups, kept, lambda: costs(kept) <= most, round_to)
    return _keep(ranked, groups, kept)


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first number above `low` that holds, where `high` does and every one behind the first."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _give_back(
    ranked: Mapping[Group, Tensor], groups: Sequence[Group], kept: list[int], holds: Callable[[], bool], round_to: int
) -> None:
    """Keep more units of single groups, the most important ones first, as long as the goal is kept."""
    best = {at: ranked[group].sort(descending=True).values for at, group in enumerate(groups)}
    open_to_more = [at for at, group in enumerate(groups) if kept[at] < group.units]
    while open_to_more:
        at = max(open_to_more, key=lambda at: float(best[at][kept[at]]))
        had = kept[at]
        kept[at] = min(groups[at].units, had + _multiple(groups[at], round_to))
        if not holds():
            kept[at] = had
            open_to_more.remove(at)
        elif kept[at] == groups[at].units:
            open_to_more.remove(at)


def narrow(group: Group, round_to: int) -> str | None:
    """Why rounding leaves nothing of a group to cut; None where it leaves something."""
    if group.units > _multiple(group, round_to):
        return None
    channels = group.units * group.width
    coupled = not group.counts and channels > round_to
    return COUPLED.format(channels, group.width, round_to) if coupled else NARROW.format(round_to)


def smallest(groups: Iterable[Group], round_to: int, rounds: int = 1) -> Keep:
    """As few units of each group as several rounds may leave, whatever is important."""
    return {group: tuple(range(_least(group, round_to, rounds))) for group in groups}


def _multiple(group: Group, round_to: int) -> int:
    """Units of which the channels are a multiple of round_to."""
    return 1 if group.counts else round_to // math.gcd(round_to, group.width)


def _rounded(group: Group, units: int, round_to: int) -> int:
    multiple = _multiple(group, round_to)
    return min(group.units, max(_least(group, round_to), math.floor(units / multiple + 0.5) * multiple))


def _least(group: Group, round_to: int, rounds: int = 1) -> int:
    multiple = _multiple(group, round_to)
    return min(group.units, max(multiple, math.ceil(group.units * (1 - _MOST) ** rounds / multiple) * multiple))


def _keep(ranked: Mapping[Group, Tensor], groups: Sequence[Group], kept: Sequence[int]) -> Keep:
    """The most important units, of equally important ones the first."""
    found: dict[Group, tuple[int, ...]] = {}
    for group, count in zip(groups, kept, strict=True):
        order = torch.argsort(ranked[group], descending=True, stable=True)
        found[group] = tuple(sorted(order[:count].tolist()))
    return found
