"""Long short-term memory: a classifier of texts and sensor windows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from edgekd.models.recurrent import Recurrent
from edgekd.types import TensorSpec


def lstm(
    classes: int | Mapping[str, int],
    inputs: tuple[TensorSpec, ...],
    *,
    width: int = 128,
    layers: int = 1,
    embedding: int = 64,
    bidirectional: bool = False,
    dropout: float = 0.3,
    vocabulary: int | None = None,
) -> Recurrent:
    """An LSTM over a sequence, the mean over its steps and a linear layer.

    A mask, where the data has one, takes the padding out, which has to be at the end: the logits do not depend on how
    much of it there is. It becomes one LSTM operator a layer and direction in ONNX, which int8 leaves in float.

    Args:
        classes: number of logits; or by name of a head, for several tasks.
        inputs: ids (batch × time) or vectors (batch × time × channels), and a mask (batch × time) where padded.
        width: features of a layer and direction.
        layers: how many.
        embedding: features of an id.
        bidirectional: a second direction, from the end to the beginning; it needs the whole sequence before it begins.
        dropout: probability, in front of every layer.
        vocabulary: number of ids; left out: the data's.

    Reference: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 1997.
    """
    return Recurrent(
        nn.LSTM,
        classes,
        inputs,
        width=width,
        layers=layers,
        embedding=embedding,
        bidirectional=bidirectional,
        dropout=dropout,
        vocabulary=vocabulary,
    )
