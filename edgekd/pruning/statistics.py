"""Statistics of batch normalisation, estimated anew: those of before the cut are of other activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgekd.correspondence.taps import first_input
from edgekd.errors import ModelError


def recalibrate(module: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> int:
    """Set means and variances of batch normalisation to the average over batches, in place; nothing else changes.

    Dropout and the like are off meanwhile. The module ends in eval mode. A batch in which a layer sees one value a
    channel, as behind global pooling where one sample is left at the end, does not count for that layer.

    Args:
        batches: as the module takes them, batch first; of each sample what training would show it.

    Returns:
        The number of batches; 0 where there is nothing to estimate.

    Raises:
        ModelError: there are no batches, or none with two values a channel for some layer.
    """
    layers = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    module.eval()
    hooks = [layer.register_forward_pre_hook(_estimate_if_several, with_kwargs=True) for layer in layers]
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
        single = [layer for layer in layers if not layer.training and not layer.num_batches_tracked]
    finally:
        for hook, layer, momentum in zip(hooks, layers, momenta, strict=True):
            hook.remove()
            layer.momentum = momentum
        module.eval()
    if single or not count:
        path = next(path for path, each in module.named_modules() if each in (single or layers))
        raise ModelError(
            "there are no statistics of one value a channel" if single else "there are no batches for its statistics",
            where=path, fix="give batches of two samples or more",
        )  # fmt: skip
    return count


def _estimate_if_several(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Let a layer estimate from what it is about to see, where there is a variance in it."""
    given, _ = first_input(args, kwargs)
    layer.train(given is None or given.numel() > given.shape[1])
