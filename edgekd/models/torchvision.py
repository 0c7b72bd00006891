"""The classification models of torchvision, as `torchvision.NAME`."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from edgekd.errors import ModelError, nearest
from edgekd.models.geometry import channels_height_width
from edgekd.models.weights import load_pretrained
from edgekd.types import TensorSpec

# What makes a model return its logits alone, and initialise without a warning.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True, "transform_input": False},
}


def torchvision(
    classes: int, inputs: tuple[TensorSpec, ...], *, name: str, pretrained: str | None = None, **options: Any
) -> nn.Module:
    """A torchvision classifier for `classes`, its first convolution made anew where the data is not RGB.

    Args:
        classes: number of logits.
        inputs: one image; vision transformers get the data's size.
        name: as torchvision has it, e.g. "mobilenet_v3_small".
        pretrained: a local weights file to start from, its classifier left out where the classes differ. Nothing is
            ever downloaded.
        options: passed to the model's builder; auxiliary outputs are off.

    Raises:
        ModelError: torchvision has no such model, or does not take an option.
    """
    library = importlib.import_module("torchvision.models")
    where = f"torchvision.{name}"
    channels, height, width = channels_height_width(inputs, where)
    known = library.list_models(module=library)
    if name not in known:
        raise ModelError(f"torchvision has no classifier '{name}'", where=where, nearest=nearest(name, known))
    filled = _OPTIONS.get(name, {}) | ({"image_size": height} if name.startswith("vit_") else {})
    if name == "maxvit_t":
        filled = {"input_size": (height, width)}
    try:
        module: nn.Module = library.get_model(name, weights=None, num_classes=classes, **(filled | options))
    except Exception as problem:  # whatever the architecture's own code raises on an option it does not take
        raise ModelError(
            f"torchvision cannot build it for {height}×{width} images: {problem}", where=where
        ) from problem
    if channels != 3:
        _take_channels(module, channels)
    if pretrained is not None:
        load_pretrained(pretrained, module)
    return module


def _take_channels(module: nn.Module, channels: int) -> None:
    """Replaces the first convolution by one for `channels`: torchvision's models take RGB only."""
    name, first = next((name, m) for name, m in module.named_modules() if isinstance(m, nn.Conv2d))
    replaced = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]  # torch types its own attributes more widely than its arguments
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        first.dilation,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(replaced.weight, mode="fan_out", nonlinearity="relu")
    module.set_submodule(name, replaced)
