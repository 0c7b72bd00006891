"""What a network says about a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from edgekd.distillation.samples import Inputs, on_device
from edgekd.errors import DataError, ModelError, nearest
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


def forward(network: Network, inputs: Inputs, head: str | None = None) -> Tensor:
    """A network's output (batch × classes, or with a grid behind) for stored samples by input name.

    Raises:
        ModelError: the output is no such tensor, or the network has not that head.
    """
    output = network(*(inputs[spec.name] for spec in network.inputs))
    if head is not None:
        if not isinstance(output, Mapping) or head not in output:
            heads = sorted(output) if isinstance(output, Mapping) else []
            raise ModelError(
                f"the model has no head '{head}'; it returns {', '.join(heads) or type(output).__name__}",
                expected="a dictionary of outputs by head",
                nearest=nearest(head, heads),
            )
        output = output[head]
    if not isinstance(output, Tensor) or output.ndim < 2:
        found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"the model returns {found}", expected="one tensor, batch × classes (× grid)")
    return output


def evaluate(
    network: Network,
    split: Split,
    *,
    head: str | None = None,
    keep: Callable[[np.ndarray], np.ndarray] | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """What a network says about every sample of a split, in its order, computed in fp32 without augmentation.

    The network is in eval mode meanwhile; afterwards every one of its modules is in the mode it was in before.

    Args:
        keep: what is kept of the outputs of a batch, e.g. the classes of pixels, which take less memory.

    Returns:
        float32, samples × classes (× grid), or what `keep` gives.

    Raises:
        DataError: the split is empty.
        ModelError: the model does not return logits.
    """
    if len(split) == 0:
        raise DataError("the split has no samples")
    order = [np.arange(start, min(start + batch_size, len(split))) for start in range(0, len(split), batch_size)]
    modes = {module: module.training for module in network.modules()}
    home, found = device(), list[np.ndarray]()
    place(network, images=network.preprocessing is not None)
    network.eval()
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for batch in split.batches(order):
                outputs = forward(network, on_device(batch.inputs, home), head).float().cpu().numpy()
                found.append(outputs if keep is None else keep(outputs))
    finally:
        for module, training in modes.items():
            module.training = training
    return np.concatenate(found)
