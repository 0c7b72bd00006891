"""Statistics of batch normalisation, estimated anew: those of before the cut are of other activations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate(module: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> int:
    """Set means and variances of batch normalisation to the average over batches, in place; nothing else changes.

    Dropout and the like are off meanwhile. The module ends in eval mode.

    Args:
        batches: as the module takes them, batch first; of each sample what training would show it.

    Returns:
        The number of batches; 0 where there is nothing to estimate.
    """
    layers = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    module.eval()
    count = 0
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain average
            layer.train()
        with torch.no_grad():
            for batch in batches:
                module(*batch)
                count += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        module.eval()
    return count
