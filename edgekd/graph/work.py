"""Counting the work of a network while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """A counter of all work with weights: fused layers are one operator each, of which torch's counts nothing.

    Attention, alone and in a `torch.nn.TransformerEncoderLayer`, runs unfused meanwhile; an LSTM's operator is told.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    told = {torch.ops.aten.mkldnn_rnn_layer: _lstm_flops}
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=told) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _lstm_flops(x: Sequence[int], of_inputs: Sequence[int], of_states: Sequence[int], *_: object, **__: object) -> int:
    """Of one layer in one direction, from the shapes of its input (steps × batch × channels) and its two weights."""
    return 2 * math.prod(x[:2]) * (math.prod(of_inputs) + math.prod(of_states))
