"""A frozen network with batch normalisation folded into the convolutions: the same answers in less time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from edgekd.correspondence import Tap, Taps
from edgekd.correspondence.taps import inner, places
from edgekd.distillation.logits import forward
from edgekd.distillation.samples import Inputs
from edgekd.models.network import Network

PROBED = 16  # samples on which the two are compared
_TOLERANCE = 1e-4  # of the largest output; folding moves the last digits of float32 (measured: 2e-6 for ResNet-56)


def folded(network: Network, inputs: Inputs, taps: Sequence[Tap] = ()) -> Network:
    """A copy of a network in eval mode that computes the same with fewer passes; the network itself if there is none.

    A convolution's weights take in the normalisation that is the next to read its output: γ / sqrt(σ² + ε) · w (Jacob
    et al., CVPR 2018). Which those are is seen in one forward pass; that nothing else reads the output is shown by
    comparing what the two networks give.

    Args:
        network: what is copied; it is left as it is, and so are its hooks.
        inputs: real samples to try both with.
        taps: what is taken from inside, which has to be the same as well. What is tapped itself is not folded.
    """
    some = {name: value[:PROBED] for name, value in inputs.items()}
    fixed = tapped(network, taps)
    pairs = [pair for pair in _pairs(network, some) if fixed.isdisjoint(map(network.get_submodule, pair))]
    if not pairs:
        return network
    try:
        copied = copy.deepcopy(network)
    except (RuntimeError, TypeError):  # of a module that holds what cannot be copied
        return network
    for convolution, normalisation in pairs:
        modules: Any = [copied.get_submodule(path) for path in (convolution, normalisation)]
        _replace(copied, convolution, fuse_conv_bn_eval(*modules))
        _replace(copied, normalisation, _left_of(modules[1]))
    return copied if alike(network, copied, inputs, taps) else network


def alike(network: Network, changed: Network, inputs: Inputs, taps: Sequence[Tap]) -> bool:
    """Whether two networks give the same, but for the last digits: their outputs, and what is tapped."""
    some = {name: value[:PROBED] for name, value in inputs.items()}
    both = zip(_given(network, some, taps), _given(changed, some, taps), strict=True)
    return all(bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max()) for theirs, ours in both)


def tapped(network: Network, taps: Sequence[Tap]) -> set[nn.Module]:
    """The modules whose inputs or outputs are taken."""
    return {inner(network).get_submodule(place.module) for tap in taps for place in places(tap.path)}


def _given(network: Network, inputs: Inputs, taps: Sequence[Tap]) -> list[Tensor]:
    """A network's output and what is tapped."""
    with Taps(network, taps) as hooks, torch.no_grad():
        output = forward(network, inputs)
        return [output, *hooks.take().values()]


def _pairs(network: Network, inputs: Inputs) -> list[tuple[str, str]]:
    """Paths of each convolution that is called once and of the normalisation that is called once, on its output."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that no other gets its id
    calls: dict[str, int] = {}
    pairs = []

    def called(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[path] = calls.get(path, 0) + 1
        if isinstance(module, _CONVOLUTIONS):
            made[id(output)] = path, output
        elif args and id(args[0]) in made:
            pairs.append((made[id(args[0])][0], path))

    hooks = [
        module.register_forward_hook(partial(called, path))
        for path, module in network.named_modules()
        if _plain(module)
    ]
    try:
        with torch.no_grad():
            forward(network, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(calls[path] == 1 for path in pair)]


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _plain(module: nn.Module) -> bool:
    """A convolution whose weight is its own, or a normalisation that does nothing else and knows its statistics."""
    if type(module) in _NORMALISATIONS or _has_activation(module):
        return module.running_mean is not None
    return isinstance(module, _CONVOLUTIONS) and not is_parametrized(module) and not module._forward_pre_hooks


def _has_activation(module: nn.Module) -> bool:
    """Whether it is timm's normalisation with an activation in the same module."""
    return type(module).__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d)


def _left_of(normalisation: nn.Module) -> nn.Module:
    """What is still to be done when a normalisation is not needed any more."""
    return normalisation.get_submodule("act") if _has_activation(normalisation) else nn.Identity()


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
