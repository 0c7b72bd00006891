"""What the experiment registers with torchdistill, the way its documentation says."""

from __future__ import annotations

from typing import Any

import resnet
import torch
from task import Settings, schedule, sgd
from torch import nn
from torchdistill.models.registry import register_model  # type: ignore[import-not-found]  # of the peer's environment
from torchdistill.optim.registry import (  # type: ignore[import-not-found]  # likewise
    register_optimizer,
    register_scheduler,
)


@register_model(key="cifar_resnet")  # type: ignore[untyped-decorator]  # torchdistill's
def cifar_resnet(name: str, **_: Any) -> nn.Module:
    """Its own CIFAR ResNets have other shortcuts than the teacher's weights."""
    return resnet.resnet(name)


@register_optimizer(key="sgd_without_norm_decay")  # type: ignore[untyped-decorator]  # torchdistill's
def sgd_without_norm_decay(params: list[nn.Parameter], settings: str) -> torch.optim.Optimizer:
    """The optimizer that all competitors have."""
    return sgd(params, Settings.read(settings))


@register_scheduler(key="straight_lines")  # type: ignore[untyped-decorator]  # torchdistill's
def straight_lines(optimizer: torch.optim.Optimizer, settings: str, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule that all competitors have."""
    return schedule(optimizer, Settings.read(settings), steps)
