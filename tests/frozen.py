"""Teachers in eval mode, for tests of what may be done to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.models import adopted
from edgekd.models.network import Network
from edgekd.types import ModelSpec, TensorSpec

IMAGES = (TensorSpec("image", "uint8", ("batch", 16, 16, 3)),)


def settled(network: Network) -> Network:
    """The network with normalisation statistics that are not those of a new one."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return network.eval()


def network(module: nn.Module) -> Network:
    return settled(adopted(module, ModelSpec("a module"), classes=4, inputs=IMAGES, images=True))


def images(count: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)}
