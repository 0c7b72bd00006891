"""What an image network needs to know of its data: channels, height and width."""

from __future__ import annotations

from edgekd.errors import ModelError
from edgekd.types import TensorSpec


def channels_height_width(inputs: tuple[TensorSpec, ...], model: str) -> tuple[int, int, int]:
    """Channels, height and width of the one image input, uint8 images being stored channels last.

    Args:
        inputs: what the data holds, batch dimension first.
        model: the model's name, for the message.

    Raises:
        ModelError: the data is not one image input of a fixed size.
    """
    first = inputs[0]
    sides = first.shape[1:]
    fixed = [side for side in sides if isinstance(side, int)]
    if len(inputs) != 1 or len(fixed) != 3 or len(sides) != 3:
        given = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in inputs)
        raise ModelError(
            f"it takes one image, the data has {given}",
            where=model,
            fix="name a model of your own as package.module:callable",
        )
    if first.dtype == "uint8":
        return fixed[2], fixed[0], fixed[1]
    return fixed[0], fixed[1], fixed[2]
