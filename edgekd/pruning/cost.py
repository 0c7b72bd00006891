"""What a network costs: multiply-accumulates, parameters, bytes of its weights file."""

from __future__ import annotations

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_META_BYTES = 256  # more than edgekd writes beside the weights


def macs(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one sample, counted in one run of the module.

    Args:
        inputs: as the module takes them, batch first; the first sample alone is run.
    """
    one = tuple(each[:1] for each in inputs)
    # other kernels of attention are one operator, of which the counter knows nothing on a processor
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*one)
    return counter.get_total_flops() // 2


def parameters(module: nn.Module) -> int:
    """Trainable numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def size_bytes(module: nn.Module) -> int:
    """At most so many bytes has the file of its weights and buffers, in the types that they have."""
    state = {name: value.detach().contiguous().clone() for name, value in module.state_dict().items()}
    return len(safetensors.torch.save(state)) + _META_BYTES
