"""Networks as a trained one is, cut to a part of their multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import pruning
from edgekd.goals import Prune
from edgekd.pruning import cost
from edgekd.types import TensorSpec

PIXELS = (TensorSpec("image", "uint8", ("batch", 16, 16, 3)),)


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def settled(module: nn.Module, size: int = 16) -> nn.Module:
    """With statistics and scales of batch normalisation as a trained network has them."""
    with torch.no_grad():
        module.train()
        for _ in range(3):
            module(torch.randn(8, 3, size, size))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.copy_(torch.rand_like(layer.weight) + 0.5)
                layer.bias.copy_(torch.randn_like(layer.bias) * 0.1)
    return module.eval()


def built(make: Callable[[], nn.Module], size: int = 16) -> Any:
    torch.manual_seed(0)
    return settled(make(), size)


def cut_to(module: nn.Module, inputs: Tensor, macs: float, **options: Any) -> Any:
    asked = Prune(macs=macs, **options)
    goal = macs * cost.macs(module, (inputs,))
    return pruning.prune(module, (inputs,), "macs", goal, asked, round_to=asked.round_to or 1)


def reasons(made: pruning.Cut) -> dict[str, str]:
    return {layer: each.reason for each in made.left_alone for layer in each.layers}


class Branches(nn.Module):
    """What a user's module may do: residual, concatenation, groups, a shuffle that no tracer understands, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1, groups=2), nn.GroupNorm(4, 24), nn.PReLU(24))
        self.joined = nn.Conv2d(32, 16, 1)
        self.wide, self.narrow = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.down = nn.Conv2d(16, 12, 3, 2, 1)
        self.hidden, self.head = nn.Linear(12 * 16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.joined(torch.cat([self.left(x), self.right(x)], 1))
        y = self.wide(x).relu()
        y = y.reshape(y.shape[0], 2, -1, *y.shape[2:]).transpose(1, 2).flatten(1, 2)  # the shuffle
        x = x + self.narrow(y)
        logits: Tensor = self.head(self.hidden(self.down(x).relu().flatten(1)).relu())
        return logits
