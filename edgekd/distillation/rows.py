"""How outputs become rows of 16-bit numbers: float16 with every bit inverted, so that 0 is what was never written.

A file that was just made reads as zeros, and so does what a power cut kept from the disk. Inverted, 0 would be a NaN,
which is refused: no output is ever taken for missing, and nothing missing for an output.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import ModelError

LOGITS = "logits"  # the tensor of which the largest values alone may be kept
MANY = 1000  # classes; above, only the largest logits are kept
TOP = 100  # of them, where no other number is asked for: 402 bytes a sample
_LARGEST = float(np.finfo(np.float16).max)
_HALF = 1 << 15  # classes that fit into 16 bits in which not all are set


@dataclass(frozen=True, slots=True)
class Form:
    """How one tensor is kept.

    top: None keeps every value. Else a row is the k largest logits with their classes and the logarithm of the sum of
    exp of the others, which come back as equal logits of that sum (as in Shen, Xing: A Fast Knowledge Distillation
    Framework for Visual Recognition, ECCV 2022, "marginal smoothing").
    """

    name: str
    shape: tuple[int, ...]  # of one sample's
    top: int | None = None

    @property
    def width(self) -> int:
        """16-bit numbers a sample."""
        if self.top is None:
            return int(np.prod(self.shape, dtype=np.int64))
        return self.top * (3 if self.shape[0] > _HALF else 2) + 1

    @property
    def stem(self) -> str:
        """The name of its files: readable, fit for every file system, and another one for every other form."""
        digest = hashlib.sha256(repr((self.name, self.shape, self.top)).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9.]+', '_', self.name)[:40]}-{digest[:10]}"


def form_of(name: str, shape: tuple[int, ...], top: int | None) -> Form:
    """How a tensor of this name and shape is kept: logits of many classes by their `top` largest, all else whole."""
    if name != LOGITS or len(shape) != 1 or (top is None and shape[0] <= MANY):
        return Form(name, shape)
    top = TOP if top is None else top
    return Form(name, shape, top) if top < shape[0] else Form(name, shape)


def encoded(form: Form, values: np.ndarray | Tensor) -> np.ndarray:
    """Values (batch × shape) as uint16 rows (batch × width); what is beyond float16's range becomes its end.

    Raises:
        ModelError: a value is NaN, or the shape is another one.
    """
    given = _tensor(values)
    if tuple(given.shape[1:]) != form.shape:
        raise ModelError(
            f"the teacher's '{form.name}' has the shape {tuple(given.shape[1:])} now",
            expected=f"{form.shape}, as in its first batch",
            fix="outputs can be kept only where every sample's have one shape; cache_gb = 0 keeps none",
        )
    given = given.reshape(len(given), -1).float()
    if bool(given.sum().isnan()) and bool(given.isnan().any()):  # the sum alone is nearly free; ∞ − ∞ is no fault
        raise ModelError(
            f"the teacher's '{form.name}' holds values that are not numbers (NaN)",
            where="teacher",
            fix="look for inputs that are not finite; where bf16 or its weights are the cause, no student can learn",
        )
    if form.top is None:
        return _bits(given)
    largest, classes = given.topk(form.top, dim=1)
    rest = given.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
    found = classes.cpu().numpy()
    indices = [found] if form.shape[0] <= _HALF else [found % _HALF, found // _HALF]
    return np.concatenate([_bits(largest), _bits(rest), *(~index.astype(np.uint16) for index in indices)], axis=1)


def decoded(form: Form, rows: np.ndarray) -> np.ndarray:
    """Values (batch × shape) of rows: float16 as they were kept, or float32 logits made of the largest and the rest."""
    if form.top is None:
        return (~rows).view(np.float16).reshape(len(rows), *form.shape)
    values, rest, classes = _parts(form, rows)
    others = form.shape[0] - values.shape[1]
    logits = np.repeat(rest - np.float32(np.log(others)), form.shape[0], axis=1)
    np.put_along_axis(logits, classes, values, axis=1)
    return logits


def differences(form: Form, rows: np.ndarray, values: np.ndarray | Tensor) -> np.ndarray:
    """How far kept rows are from values: |kept − value| / |value| for each sample (2-norms); NaN counts as 1.

    A sample whose norm is next to nothing is held against a tenth of the mean norm. Of logits kept by their largest,
    what was kept is compared: two that are nearly equal may have changed places.
    """
    live = np.clip(_tensor(values).float().cpu().numpy().reshape(len(rows), -1), -_LARGEST, _LARGEST)
    if form.top is None:
        kept = decoded(form, rows).reshape(len(rows), -1).astype(np.float32)
    else:
        largest, rest, classes = _parts(form, rows)
        others = live.copy()
        np.put_along_axis(others, classes, -np.inf, axis=1)
        live_rest = np.logaddexp.reduce(others, axis=1, keepdims=True)
        kept = np.concatenate([largest, rest], axis=1)
        live = np.concatenate([np.take_along_axis(live, classes, axis=1), live_rest], axis=1)
    norms = np.linalg.norm(live, axis=1)
    found: np.ndarray = np.linalg.norm(kept - live, axis=1) / np.maximum(np.maximum(norms, 0.1 * norms.mean()), 1e-6)
    found[np.isnan(found)] = 1.0
    return found


def _tensor(values: np.ndarray | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def _bits(values: Tensor) -> np.ndarray:
    halves = values.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
    return np.invert(halves.view(np.uint16))


def _parts(form: Form, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest logits, the rest (batch × 1) and the classes of the largest."""
    top = form.top or 0
    plain = ~rows
    halves = plain[:, : top + 1].view(np.float16).astype(np.float32)
    classes = plain[:, top + 1 : 2 * top + 1].astype(np.int64)
    if form.shape[0] > _HALF:
        classes += plain[:, 2 * top + 1 :].astype(np.int64) * _HALF
    return halves[:, :top], halves[:, top:], classes
