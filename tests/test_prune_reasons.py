"""What pruning says where it cannot do what was asked for: the true reason, in units that people read."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torchvision
from cuts import built, cut_to, images, reasons
from torch import Tensor, nn

from edgekd import pruning
from edgekd.errors import ModelError
from edgekd.goals import Prune, compared, outcome, told
from edgekd.outcome import Pruning
from edgekd.pruning import rank
from edgekd.pruning.cut import Count, Group
from edgekd.pruning.trace import trace


def test_costs_are_told_in_units() -> None:
    assert told("latency_ms", 0.12139) == "0.121 ms"
    assert told("latency_ms", 1000) == "1000 ms"
    assert told("size_bytes", 2_337_410) == "2.34 MB"
    assert told("macs", 12_000_000) == "12 M multiply-accumulates"
    assert compared("latency_ms", 0.36004, 0.36) == ("0.36004 ms", "0.36 ms")  # 0.360 ms is no more than 0.36 ms
    assert compared("size_bytes", 100, 100) == ("100 B", "100 B")
    assert compared("macs", 144, 10, 1000) == ("14.4 % of the multiply-accumulates", "1 %")


@pytest.mark.parametrize(
    ("measure", "goal", "before", "after", "text"),
    [
        (
            "latency_ms",
            0.36,
            0.8,
            0.351,
            "it took 0.351 ms in fp32 when it was cut (its teacher 0.8 ms), and at most 0.36",
        ),
        (
            "size_bytes",
            2e6,
            4e6,
            1.9e6,
            "its fp32 weights are 1.9 MB (its teacher's 4 MB), and at most 2 MB was asked for",
        ),
        ("macs", 600.0, 1100, 500, "at most 60 % of the multiply-accumulates was asked for"),  # of the teacher's own
    ],
)
def test_a_goal_is_told_beside_what_is_left(measure: str, goal: float, before: float, after: float, text: str) -> None:
    account = Pruning(measure, goal, before, after, "magnitude", 8, 1, 1000, 500, 90, 45, {}, ())
    assert text in outcome(account)


def test_a_network_that_torch_pruning_cannot_follow_is_told_from_one_that_cannot_run() -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"division or modulo by zero.*[Dd]istil it into a student of its own"):
        cut_to(torchvision.models.shufflenet_v2_x0_5().eval(), images(64), 0.6)

    class Numpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            logits: Tensor = self.head(x.mean((2, 3))) * float(x.mean().numpy())
            return logits

    with pytest.raises(ModelError, match="A forward that runs under autograd"):
        cut_to(Numpy(), images(), 0.6)


def test_groups_that_must_lose_the_same_are_not_called_narrow() -> None:
    """Three groups of eight channels: one of each gone leaves 21, and only 24 is a multiple of 8."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.grouped = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, groups=3)
            self.thin, self.wide, self.head = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 32, 1), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.thin(self.grouped(self.stem(x).relu()).relu()).relu()
            logits: Tensor = self.head(self.wide(x).relu().mean((2, 3)))
            return logits

    found = reasons(cut_to(built(Grouped), images(), 0.97, round_to=8))
    assert found["grouped"] == rank.COUPLED.format(24, 3, 8)
    assert found["thin"] == rank.NARROW.format(8)
    assert rank.narrow(Group("heads", 1, 64, (), (Count("a", "num_heads", 1),)), 8) == rank.NARROW.format(8)
    assert rank.narrow(Group("wider", 16, 3, ()), 8) is None


def test_as_little_is_left_as_all_rounds_may_leave() -> None:
    wide, grouped = Group("wide", 200, 1, ()), Group("grouped", 16, 3, ())
    left = {
        rounds: [len(units) for units in rank.smallest((wide, grouped), 8, rounds).values()] for rounds in (1, 2, 40)
    }
    assert left == {1: [24, 8], 2: [8, 8], 40: [8, 8]}
    assert [len(units) for units in rank.smallest((wide,), 1, 2).values()] == [2]


def test_what_rounds_can_reach_is_looked_at_before_anything_is_cut() -> None:
    module: Any = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40 * 14 * 14, 5))
    seen: list[tuple[int, str]] = []

    def check(smallest: nn.Module, untouched: str) -> None:
        seen.append((smallest[0].out_channels, untouched))  # type: ignore[index]
        raise ModelError("so little is not enough")

    with pytest.raises(ModelError, match="so little"):
        pruning.prune(module, (images(),), "macs", 1e3, Prune(macs=0.5), ahead=pruning.Ahead(1, check))
    assert seen == [(4, "3: it gives the output")]


def test_a_long_recurrence_is_traced_in_silence() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 6, batch_first=True, bidirectional=True)
            self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.hidden(self.gru(x)[0].mean(1)).relu())
            return logits

    module = Steps().eval()
    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always")
        found = trace(module, (torch.randn(2, 150, 4),))
    assert [str(each.message) for each in told_of if "recursive" in str(each.message)] == []
    assert {group.name for group in found.groups} == {"hidden"}
