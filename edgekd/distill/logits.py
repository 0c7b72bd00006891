"""What a network says about a split."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgekd.distill.samples import Inputs, on_device
from edgekd.errors import DataError, ModelError
from edgekd.models.network import Network
from edgekd.types import Split


def device() -> torch.device:
    """Where training and evaluation compute: an NVIDIA GPU where there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(network: Network, images: bool) -> None:
    """Move a network to the device, laid out as its images are (channels last), which is faster."""
    if images:
        network.to(device(), memory_format=torch.channels_last)  # type: ignore[call-overload]  # as torch documents it
    else:
        network.to(device())


def forward(network: Network, inputs: Inputs) -> Tensor:
    """Logits (batch × classes) for stored samples by input name.

    Raises:
        ModelError: the output is no such tensor.
    """
    logits = network(*(inputs[spec.name] for spec in network.inputs))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model returns {found}", expected="logits as one tensor, batch × classes")
    return logits


def evaluate(network: Network, split: Split, *, batch_size: int = 256) -> np.ndarray:
    """Logits of every sample of a split, in its order, computed in fp32 without augmentation.

    The network is in eval mode meanwhile; afterwards every one of its modules is in the mode it was in before.

    Returns:
        float32, samples × classes.

    Raises:
        DataError: the split is empty.
        ModelError: the model does not return logits.
    """
    if len(split) == 0:
        raise DataError("the split has no samples")
    order = [np.arange(start, min(start + batch_size, len(split))) for start in range(0, len(split), batch_size)]
    modes = {module: module.training for module in network.modules()}
    home = device()
    place(network, images=network.preprocessing is not None)
    network.eval()
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = [
                forward(network, on_device(batch.inputs, home)).float().cpu().numpy() for batch in split.batches(order)
            ]
    finally:
        for module, training in modes.items():
            module.training = training
    return np.concatenate(found)
