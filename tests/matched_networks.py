"""Pairs of networks to match, and what is fed to them."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
import torch_pruning
from torch import Tensor, nn
from varied_networks import WORDS

from edgekd import models
from edgekd.correspondence import Correspondence
from edgekd.models.network import Network
from edgekd.types import ModelSpec, TensorSpec

IMAGE = (TensorSpec("image", "uint8", ("batch", 32, 32, 3)),)


def built(name: str, **options: Any) -> Network:
    return models.build(ModelSpec(name, options), classes=10, inputs=IMAGE, images=True)


def pixels(count: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def of_timm(name: str, **options: Any) -> nn.Module:
    network: nn.Module = timm.create_model(name, num_classes=10, **options)
    return network


def vit(name: str = "vit_tiny_patch16_224", depth: int = 6) -> nn.Module:
    return of_timm(name, img_size=32, patch_size=4, depth=depth, embed_dim=48, num_heads=3)


def ids_of(length: int = 9) -> Tensor:
    return torch.randint(0, WORDS, (4, length), generator=torch.Generator().manual_seed(0))


def paths(found: Correspondence, *roles: str) -> list[tuple[str, str]]:
    return [pair.paths for pair in found.pairs if not roles or pair.role in roles]


def pruned_copy() -> tuple[Network, Network]:
    torch.manual_seed(0)
    teacher = built("resnet20", shortcut="conv")
    student = copy.deepcopy(teacher)
    importance = torch_pruning.importance.MagnitudeImportance()
    pruner = torch_pruning.pruner.MagnitudePruner(
        student.module, torch.randn(1, 3, 32, 32), importance, pruning_ratio=0.5, ignored_layers=[student.module.linear]
    )
    pruner.step()
    return teacher, student
