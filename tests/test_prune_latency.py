"""A goal of latency: each candidate is timed, and no timing is the same twice."""

from __future__ import annotations

import random
from typing import Any

from cuts import PIXELS, built, images
from torch import nn

from edgekd import pruning
from edgekd.bench import latency
from edgekd.goals import Prune
from edgekd.models.resnet import resnet8
from edgekd.pruning import cost


def test_latency_is_a_goal_where_somebody_measures_it() -> None:
    module = built(lambda: resnet8(10, PIXELS, width=8))
    asked: list[int] = []

    def timer(candidate: nn.Module) -> float:
        asked.append(cost.macs(candidate, (images(),)))
        return asked[-1] / 1e6

    made: Any = pruning.prune(module, (images(),), "latency_ms", 0.5 * timer(module), Prune(latency_ms=1), timer=timer)
    assert 0.4 < made.after / made.before <= 0.5
    assert len(asked) < 30  # each of them is an export and a measurement


def test_a_latency_that_is_not_the_same_twice_is_kept_all_the_same() -> None:
    """Of candidates around the goal the search takes one that was timed too fast, so it looks a little below."""
    module = built(lambda: resnet8(10, PIXELS, width=8))
    assert pruning.SLACK == latency.STEADY_SPREAD
    for seed in range(12):
        noise = random.Random(seed)

        def timer(candidate: nn.Module, noise: random.Random = noise) -> float:
            return cost.macs(candidate, (images(),)) / 1e6 * (1 + noise.gauss(0, 0.02))

        goal = 0.5 * cost.macs(module, (images(),)) / 1e6
        made: Any = pruning.prune(module, (images(),), "latency_ms", goal, Prune(latency_ms=1), timer=timer)
        assert made.after <= goal
        assert 0.42 * goal < cost.macs(made.module, (images(),)) / 1e6 < 1.02 * goal


def test_a_latency_over_the_goal_however_often_is_told_as_it_is() -> None:
    module = built(lambda: resnet8(10, PIXELS, width=8))
    found: dict[int, int] = {}

    def timer(candidate: nn.Module) -> float:
        """Twice as much for a network that was timed before, as on a machine that becomes busy."""
        macs = cost.macs(candidate, (images(),))
        found[macs] = found.get(macs, 0) + 1
        return macs * min(found[macs], 2)

    goal = 0.5 * cost.macs(module, (images(),))
    made: Any = pruning.prune(module, (images(),), "latency_ms", goal, Prune(latency_ms=1), timer=timer)
    assert made.after == 2 * cost.macs(made.module, (images(),)) > goal
