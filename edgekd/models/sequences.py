"""What a sequence network needs to know of its data, and the parts that such networks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.types import TensorSpec


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences as the data holds them: of ids, where `vocabulary` is their number, or of vectors."""

    length: int | str  # steps; a string where samples differ in it
    channels: int  # of a vector; 0 for ids
    vocabulary: int | None


def sequence_of(inputs: tuple[TensorSpec, ...], model: str, vocabulary: int | None = None) -> Sequences:
    """The sequence input, which a mask (batch × time) may follow.

    Args:
        inputs: what the data holds, batch dimension first: ids (integers, batch × time) or vectors (floats, batch ×
            time × channels), and a mask where sequences are padded.
        model: the model's name, for messages.
        vocabulary: number of ids, where the data does not tell.

    Raises:
        ModelError: the inputs are no sequence, or it is not known how many ids there are.
    """
    first = inputs[0]
    ids = first.dtype.startswith(("int", "uint")) and len(first.shape) == 2
    vectors = first.dtype.startswith("float") and len(first.shape) == 3 and isinstance(first.shape[2], int)
    masks = inputs[1:]
    if not (ids or vectors) or len(masks) > 1 or any(mask.shape[1:] != first.shape[1:2] for mask in masks):
        given = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in inputs)
        raise ModelError(
            f"it takes one sequence, and a mask where it is padded; the data has {given}",
            where=model,
            expected="integers (batch × time) or floats (batch × time × channels), then a mask (batch × time)",
        )
    if not ids:
        if vocabulary is not None:
            raise ModelError("vocabulary is for ids, the data has vectors", where=model, fix="leave it out")
        return Sequences(first.shape[1], int(first.shape[2]), None)
    count = vocabulary or first.values
    if count is None or count < (first.values or 1):
        expected = "the number of ids" if first.values is None else f"at least {first.values}, as the data has"
        raise ModelError(f"vocabulary is {vocabulary}", where=model, expected=expected, fix="set vocabulary")
    return Sequences(first.shape[1], 0, count)


class Heads(nn.ModuleDict):
    """One linear layer for each task on the same features."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(batch × features) → outputs (batch × classes) by the name of the head."""
        return {name: head(x) for name, head in self.items()}


def head(features: int, classes: int | Mapping[str, int]) -> nn.Linear | Heads:
    """The last layer: for one task its logits, for several a dictionary of them.

    Raises:
        ModelError: a head has a name that a torch module cannot have.
    """
    if not isinstance(classes, Mapping):
        return nn.Linear(features, classes)
    try:
        return Heads({name: nn.Linear(features, count) for name, count in classes.items()})
    except KeyError as problem:  # a dot, or the name of a method
        raise ModelError(
            f"a head cannot have that name: {problem.args[0]}", where=f"heads {list(classes)}"
        ) from problem


def pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the steps that are no padding: (batch × time × channels) → (batch × channels).

    A sample that is all padding gives zeros.
    """
    if mask is None:
        return x.mean(1)
    kept = (mask != 0).to(x.dtype)[:, :, None]
    return (x * kept).sum(1) / kept.sum(1).clamp(min=1)
