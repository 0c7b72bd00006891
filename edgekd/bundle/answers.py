"""What a model says of one sample, by the form of its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgekd.types import LabelForm

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a classifier says of one image.

    probabilities: softmax of the logits, one a class; not calibrated.
    """

    probabilities: NDArray[np.float64]
    labels: tuple[str, ...]

    @property
    def index(self) -> int:
        """The likeliest class."""
        return int(self.probabilities.argmax())

    @property
    def label(self) -> str:
        """Name of the likeliest class; its index where the model has no labels."""
        return _name(self.labels, self.index)

    @property
    def probability(self) -> float:
        """Of the likeliest class."""
        return float(self.probabilities[self.index])

    def top(self, count: int = 5) -> tuple[tuple[str, float], ...]:
        """The likeliest classes with their probabilities, the likeliest first."""
        return _ranked(self.probabilities, self.labels)[:count]


@dataclass(frozen=True, slots=True)
class Flags:
    """What a multi-label model says of one image.

    probabilities: sigmoid of the logits, one a label; not calibrated.
    """

    probabilities: NDArray[np.float64]
    labels: tuple[str, ...]

    def set(self, threshold: float = 0.5) -> tuple[tuple[str, float], ...]:
        """The labels whose probability is at least `threshold`, with it, the likeliest first."""
        return tuple(item for item in _ranked(self.probabilities, self.labels) if item[1] >= threshold)


@dataclass(frozen=True, slots=True)
class ClassMap:
    """What a segmentation model says of one image.

    classes: index of the likeliest class at each point of the output's grid.
    """

    classes: NDArray[np.integer]
    labels: tuple[str, ...]

    def shares(self) -> tuple[tuple[str, float], ...]:
        """The classes that are there with the fraction of points that each takes, the largest first."""
        found = np.bincount(self.classes.ravel()) / self.classes.size
        return tuple((label, share) for label, share in _ranked(found, self.labels) if share > 0)


@dataclass(frozen=True, slots=True)
class Values:
    """What a regression model says of one image: a value for each name."""

    values: NDArray[np.float64]
    names: tuple[str, ...]

    def by_name(self) -> dict[str, float]:
        """Name → value."""
        return {_name(self.names, i): float(value) for i, value in enumerate(self.values)}


Answer: TypeAlias = Prediction | Flags | ClassMap | Values


def answer(form: LabelForm, output: NDArray[np.floating], labels: tuple[str, ...]) -> Answer:
    """The output for one sample (classes, or classes × grid) as what it says."""
    wide = output.astype(np.float64)
    if form == "maps":
        return ClassMap(wide.argmax(axis=0).astype(np.uint8 if len(wide) <= 256 else np.int32), labels)
    if form == "values":
        return Values(wide, labels)
    if form == "flags":
        return Flags(0.5 * (1 + np.tanh(wide / 2)), labels)  # the sigmoid, without overflow
    exponents = np.exp(wide - wide.max())
    return Prediction(exponents / exponents.sum(), labels)


def _ranked(shares: NDArray[np.float64], labels: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    return tuple((_name(labels, int(i)), float(shares[i])) for i in np.argsort(-shares, kind="stable"))


def _name(labels: tuple[str, ...], index: int) -> str:
    return labels[index] if labels else str(index)
