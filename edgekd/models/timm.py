"""The models of the timm library, as `timm.NAME`."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from edgekd.errors import ModelError, nearest
from edgekd.models.geometry import channels_height_width
from edgekd.models.weights import load_pretrained
from edgekd.types import TensorSpec


def timm(
    classes: int, inputs: tuple[TensorSpec, ...], *, name: str, pretrained: str | None = None, **options: Any
) -> nn.Module:
    """A timm model with its classifier for `classes` and its first layer for the data's channels.

    Args:
        classes: number of logits.
        inputs: one image; models built for one size get the data's.
        name: as timm has it, with a pretrained tag or without ("resnet18.a1_in1k"); the tag decides mean and std.
        pretrained: a local weights file to start from, its classifier left out where the classes differ. Nothing is
            ever downloaded.
        options: passed to timm.create_model.

    Raises:
        ModelError: timm has no such model, or does not take an option.
    """
    library = importlib.import_module("timm")
    where = f"timm.{name}"
    channels, height, width = channels_height_width(inputs, where)
    architecture = name.partition(".")[0]
    if not library.is_model(architecture):
        raise ModelError(
            f"timm has no model '{architecture}'", where=where, nearest=nearest(architecture, library.list_models())
        )
    config = library.get_pretrained_cfg(name, allow_unregistered=False)
    if config is not None and config.fixed_input_size:
        options.setdefault("img_size", (height, width))
    try:
        module: nn.Module = library.create_model(
            name, pretrained=False, num_classes=classes, in_chans=channels, **options
        )
    except Exception as problem:  # whatever the architecture's own code raises on an option it does not take
        raise ModelError(
            f"timm cannot build it for {height}×{width} images of {channels} channels: {problem}", where=where
        ) from problem
    if pretrained is not None:
        load_pretrained(pretrained, module)
    return module
