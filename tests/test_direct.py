"""edgekd.distill() on modules and data in hand; prune and quantize_model are in the tests of their packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import edgekd
from edgekd.direct import Distilled


class Net(nn.Module):
    """Two convolutions and a linear head on their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return logits


def distilled(**options: Any) -> Distilled:
    torch.manual_seed(0)
    samples = TensorDataset(torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8), torch.arange(64) % 4)
    return edgekd.distill(Net(16), Net(8), (samples, samples), epochs=1, batch_size=16, threads=1, **options)


def names(result: Distilled) -> list[str]:
    told: Any = result.training
    return [term["name"] for term in told["losses"]["student"]]


def test_where_no_loss_is_named_layers_are_compared_too() -> None:
    assert names(distilled()) == ["ce", "kd", "srd"]


def test_the_losses_that_are_named_are_taken_and_no_others() -> None:
    assert names(distilled(losses=["kd", {"name": "ce", "weight": 0.5}])) == ["kd", "ce"]


def test_one_loss_may_be_named_alone() -> None:
    assert names(distilled(losses="auto")) == ["ce", "kd", "srd"]


def test_the_result_tells_how_good_both_are() -> None:
    result = distilled(losses=["kd"])
    assert 0 <= result.accuracy.value <= 1
    assert result.drop.value == result.teacher_accuracy.value - result.accuracy.value
