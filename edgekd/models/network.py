"""A model with its preprocessing inside: samples as they are stored → logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgekd.types import Preprocessing, TensorSpec


class Network(nn.Module):
    """A user's module behind the preprocessing that belongs to it.

    Images come as uint8 (batch × height × width × channels) and reach the module as (x / 255 - mean) / std in float
    (batch × channels × height × width); other inputs reach it as they are. The preprocessing has no parameters and
    adds no key to the state: `network.module.state_dict()` is the module's own.

    Args:
        module: takes what `prepare` gives, returns logits (batch × classes, or batch × classes × grid), or values;
            one of several heads returns a dictionary of them by head.
        inputs: the samples as they are stored, batch dimension first.
        preprocessing: None where the inputs are no image.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, module: nn.Module, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None) -> None:
        super().__init__()
        self.module = module
        self.inputs = inputs
        self.preprocessing = preprocessing
        if preprocessing is not None:
            mean = torch.tensor(preprocessing.mean, dtype=torch.float64).reshape(1, -1, 1, 1)
            std = torch.tensor(preprocessing.std, dtype=torch.float64).reshape(1, -1, 1, 1)
            self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
            self.register_buffer("offset", (-mean / std).float(), persistent=False)

    def forward(self, *inputs: Tensor) -> Tensor | Mapping[str, Tensor]:
        """What the module says of samples as they are stored."""
        output: Tensor | Mapping[str, Tensor] = self.module(*self.prepare(*inputs))
        return output

    def prepare(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the module takes, from samples as they are stored.

        In ONNX this is Cast, Transpose, Mul, Add: the Cast comes first, because TensorRT takes uint8 as a network
        input only where a Cast follows at once; the division is folded into constants.
        """
        if self.preprocessing is None:
            return inputs
        (image,) = inputs
        return (image.to(self.scale.dtype).permute(0, 3, 1, 2) * self.scale + self.offset,)
