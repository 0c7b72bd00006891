"""What losses are given, made ready for their formulas: checked, in float32, the teacher's side a constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgekd.errors import PartError


def fixed(given: Tensor) -> Tensor:
    """A constant in float32: no gradient goes through it."""
    return given.detach().float()


def squared_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over everything.

    Unlike torch's `mse_loss` it keeps the difference for the backward pass and not the teacher's tensor, which autograd
    refuses to keep where it comes from inference mode.
    """
    return (student - teacher).square().mean()


def outputs(student: Tensor, loss: str) -> Tensor:
    """A student's outputs in float32, checked to be rows × classes (or × values).

    Raises:
        PartError: they are not, or there is no row.
    """
    shape = tuple(student.shape)
    if student.ndim != 2:
        fix = "bring what is behind the classes to the rows: output.movedim(1, -1).flatten(0, -2)"
        raise PartError(f"{loss} is given outputs of shape {shape}", expected="rows × classes", fix=fix)
    if not shape[0]:
        raise PartError(f"{loss} is given no rows, and the mean of nothing is undefined", fix="leave this batch out")
    return student.float()


def both_outputs(
    student: Tensor, target: Tensor, loss: str, *, of: str = "the teacher's outputs"
) -> tuple[Tensor, Tensor]:
    """A student's outputs and what they are held to, checked to be rows × classes (or × values) of the same shape.

    Raises:
        PartError: they are not, or there is no row.
    """
    value = outputs(student, loss)
    if student.shape != target.shape:
        other_classes = target.ndim == 2 and student.shape[0] == target.shape[0] and "teacher" in of
        fix = "bring the teacher to the student's classes first: teacher[:, [its column of each of the student's]]"
        raise PartError(
            f"{loss} compares outputs of shape {tuple(student.shape)} with {of} of shape {tuple(target.shape)}",
            expected="the same shape",
            fix=fix if other_classes else "",
        )
    return value, fixed(target)


def class_indices(labels: Tensor, student: Tensor, loss: str) -> Tensor:
    """Labels as int64 class indices, one a row.

    Raises:
        PartError: they are probabilities (mixup), or not as many as there are rows.
    """
    if labels.is_floating_point():
        raise PartError(
            f"{loss} sets one class a row apart, and the labels are probabilities",
            expected="class indices",
            fix="train without mixup, or use a loss that asks for no class: kd or dist",
        )
    if labels.shape != student.shape[:1]:
        raise PartError(
            f"{loss} is given labels of shape {tuple(labels.shape)} for outputs of shape {tuple(student.shape)}",
            expected="one class index a row",
        )
    return labels.long()


def positions(feature: Tensor) -> Tensor:
    """A feature as batch × positions × channels in float32; maps and vectors are brought to it.

    Raises:
        PartError: it has fewer than two dimensions.
    """
    if feature.ndim < 2:
        raise PartError(
            f"a feature of shape {tuple(feature.shape)} has no channels",
            expected="batch × positions × channels, batch × channels × height × width, or batch × channels",
        )
    if feature.ndim == 2:
        feature = feature[:, None]
    elif feature.ndim > 3:
        feature = feature.flatten(2).transpose(1, 2)
    return feature.float()


def both_features(student: Tensor, teacher: Tensor, loss: str, *, alike: int) -> tuple[Tensor, Tensor]:
    """Features of student and teacher, batch × positions × channels each, the first `alike` of these equal.

    Raises:
        PartError: they are not.
    """
    values = positions(student), positions(fixed(teacher))
    mine, theirs = (tuple(value.shape) for value in values)
    if mine[:alike] != theirs[:alike]:
        names = ("batch", "positions", "channels")[:alike]
        raise PartError(
            f"{loss} compares a feature of batch × positions × channels = {mine} with the teacher's {theirs}",
            expected=f"the same {' and '.join(names)}",
            fix="pair.aligned brings both to one grid, and a projector the student to the teacher's channels",
        )
    return values


def positions_kept(mask: Tensor, feature: Tensor, loss: str) -> Tensor:
    """The mask as batch × positions of bool, checked against a feature of batch × positions × channels.

    Raises:
        PartError: it is of another shape or of fractions, or leaves no position.
    """
    mask = mask.flatten(1)
    if mask.is_floating_point() or mask.shape != feature.shape[:2]:
        raise PartError(
            f"{loss} is given a mask of {str(mask.dtype).removeprefix('torch.')} and shape {tuple(mask.shape)}",
            expected=f"bool of shape {tuple(feature.shape[:2])}, batch × positions, where False is padding",
        )
    return mask.bool()


def both_rows(student: Tensor, teacher: Tensor, mask: Tensor | None, loss: str) -> tuple[Tensor, Tensor]:
    """The positions that count, of the whole batch: rows × channels of student and teacher.

    Raises:
        PartError: the features differ in shape, the mask does not fit, or no position counts.
    """
    student, teacher = both_features(student, teacher, loss, alike=3)
    if mask is None:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    else:
        kept = positions_kept(mask, student, loss)
        student, teacher = student[kept], teacher[kept]
    if not student.shape[0]:
        raise PartError(f"{loss} is given no position that counts, and the mean of nothing is undefined")
    return student, teacher


def positive(loss: str, **options: float) -> None:
    """Raises PartError where an option is not a finite number above 0."""
    for name, value in options.items():
        if not 0 < value < math.inf:
            raise PartError(f"{loss} has {name} = {value}", expected="a number above 0")


def not_negative(loss: str, **options: float) -> None:
    """Raises PartError where an option is not a finite number of at least 0."""
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise PartError(f"{loss} has {name} = {value}", expected="a number of at least 0")


def full_precision(tensor: Tensor) -> torch.autocast:
    """The context in which products of matrices stay in float32, whatever the loss is called in."""
    return torch.autocast(tensor.device.type, enabled=False)
