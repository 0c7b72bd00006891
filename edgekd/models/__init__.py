"""Models: one file a family; each builds a torch module for a number of classes and the data's inputs."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import EdgekdError, ModelError
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.types import ModelSpec, Part, Preprocessing, TensorSpec

# Of ImageNet's training images, as torchvision, timm and most published checkpoints use them.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SYMBOLIC_SIZE = 16  # what a dimension without a fixed size is tried with


def build(
    spec: ModelSpec,
    *,
    classes: int | Mapping[str, int],
    inputs: tuple[TensorSpec, ...],
    images: bool,
    dense: bool | Collection[str] = False,
) -> Network:
    """The network a recipe names, with its weights and its preprocessing, tried once on a batch of two.

    Mean and std are the recipe's, else the model's own (its `pretrained_cfg`, as timm has it), else ImageNet's for
    RGB and 0.5 for any other number of channels. Initial weights follow torch's seed.

    Args:
        spec: the model, its options and weights.
        classes: number of outputs; of a network with several heads, whose forward returns a dictionary, by head.
        inputs: the samples as they are stored, batch dimension first.
        images: whether the one input is a uint8 image to be normalised inside the network.
        dense: whether outputs have a grid behind the classes; of several heads, the names of those that have.

    Raises:
        PartError: there is no such model, or it does not take an option.
        ModelError: it cannot be built or loaded, or does not give (batch × classes) floating-point logits, with a
            grid behind where `dense`, for each head.
    """
    if isinstance(classes, Mapping):
        _check_heads(spec)
    try:
        module = plugins.build("models", Part(spec.name, spec.options), classes, inputs, where=f"model {spec.name}")
    except EdgekdError:
        raise
    except Exception as problem:  # what builds a model may be the user's
        raise ModelError(f"it cannot be built: {type(problem).__name__}: {problem}", where=spec.name) from problem
    if not isinstance(module, nn.Module):
        raise ModelError(f"it returned a {type(module).__name__}", where=spec.name, expected="a torch.nn.Module")
    if spec.weights is not None:
        weights.load(spec.weights, module)
    return adopted(module, spec, classes=classes, inputs=inputs, images=images, dense=dense)


def adopted(
    module: nn.Module,
    spec: ModelSpec,
    *,
    classes: int | Mapping[str, int],
    inputs: tuple[TensorSpec, ...],
    images: bool,
    dense: bool | Collection[str] = False,
) -> Network:
    """A module that is there already as a network, with the mean and std of `spec`; otherwise as `build`."""
    network = Network(module, inputs, _preprocessing(spec, module, inputs, images))
    _try(network, classes, dense, spec.name)
    return network


def _check_heads(spec: ModelSpec) -> None:
    """A model whose signature asks for one number of classes has one head."""
    bound = plugins.bind("models", Part(spec.name, spec.options), where=f"model {spec.name}")
    first = next(iter(inspect.signature(bound).parameters.values()), None)
    if first is not None and first.annotation in (int, "int"):
        raise ModelError(
            "it has one head, and several tasks are asked for",
            where=spec.name,
            expected="a model that takes {head: classes} and returns {head: logits}",
            fix="name a model of your own as package.module:callable",
        )


def _preprocessing(
    spec: ModelSpec, module: nn.Module, inputs: tuple[TensorSpec, ...], images: bool
) -> Preprocessing | None:
    if not images:
        if spec.mean is not None or spec.std is not None:
            raise ModelError("mean and std are for images, the data has none", where=spec.name, fix="leave them out")
        return None
    _, height, width, channels = inputs[0].shape
    if not (isinstance(height, int) and isinstance(width, int) and isinstance(channels, int)):
        raise ModelError(f"images have the shape {inputs[0].shape}", where=spec.name, expected="a fixed size")
    own = getattr(module, "pretrained_cfg", None)
    mean, std = _defaults(own if isinstance(own, Mapping) else {}, channels)
    mean, std = spec.mean or mean, spec.std or std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ModelError(f"{name} has {len(values)} values", where=spec.name, expected=f"{channels}, one a channel")
    check_levels(mean, std, where=spec.name)
    return Preprocessing((height, width), tuple(mean), tuple(std))


def check_levels(mean: Sequence[float], std: Sequence[float], *, where: str) -> None:
    """Raise ModelError where images in [0, 1] cannot have this mean and standard deviation."""
    given = f"mean {list(mean)}, std {list(std)}"
    if not min(std) > 0:
        raise ModelError(given, where=where, expected="values of std above 0")
    if not max(*mean, *std) <= 1:
        raise ModelError(given, where=where, expected="values for pixels in [0, 1]", fix="divide them by 255")


def _defaults(own: Mapping[str, object], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = own.get("mean"), own.get("std")
    if isinstance(mean, Sequence) and isinstance(std, Sequence) and len(mean) == len(std) == channels:
        return tuple(map(float, mean)), tuple(map(float, std))
    if channels == 3:
        return _IMAGENET_MEAN, _IMAGENET_STD
    return (0.5,) * channels, (0.5,) * channels


def _try(network: Network, classes: int | Mapping[str, int], dense: bool | Collection[str], name: str) -> None:
    """One forward pass of two samples, which leaves modes and random state as they were.

    They are black images, or ones: a text of padding alone, with a mask of zeros, is no text.
    """
    samples = []
    for spec in network.inputs:
        sides = [side if isinstance(side, int) else _SYMBOLIC_SIZE for side in spec.shape[1:]]
        value = 0 if network.preprocessing is not None or spec.values == 1 else 1
        samples.append(torch.from_numpy(np.full((2, *sides), value, spec.dtype)))
    given = ", ".join(
        f"{spec.name} {spec.dtype} {tuple(s.shape)}" for spec, s in zip(network.inputs, samples, strict=True)
    )
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = network(*samples)
    except Exception as problem:  # a user's forward may raise anything
        raise ModelError(f"it fails on a batch of two ({given}): {problem}", where=name) from problem
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(classes, Mapping):
        _check_output(output, classes, bool(dense), f"for a batch of two ({given})", name)
        return
    if not isinstance(output, Mapping) or set(output) != set(classes):
        heads = ", ".join(f"'{head}'" for head in classes)
        raise ModelError(f"it returns {_told(output)}", where=name, expected=f"a dictionary of logits: {heads}")
    for head, count in classes.items():
        grid = dense if isinstance(dense, bool) else head in dense
        _check_output(output[head], count, grid, f"from the head '{head}' for a batch of two ({given})", name)


def _check_output(output: object, classes: int, dense: bool, source: str, name: str) -> None:
    grid = ", grid" if dense else ""
    expected = f"floating-point logits of shape (2, {classes}{grid}) {source}"
    if not isinstance(output, Tensor):
        raise ModelError(f"it returns {_told(output)}", where=name, expected=expected, fix="return the logits alone")
    if output.shape[:2] != (2, classes) or (output.ndim > 2) != dense or not output.is_floating_point():
        raise ModelError(f"it returns {_told(output)}", where=name, expected=expected)
    if not torch.isfinite(output).all():
        raise ModelError(
            "it returns NaN or infinite logits for samples of zeros, or of ones where they are no images", where=name
        )


def _told(output: object) -> str:
    """An output in words: its type, and shapes where there are some."""
    if isinstance(output, Tensor):
        return f"{str(output.dtype).removeprefix('torch.')} of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return "a dictionary of " + ", ".join(f"'{key}' ({_told(value)})" for key, value in output.items())
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of " + ", ".join(_told(value) for value in output)
    return f"a {type(output).__name__}"
