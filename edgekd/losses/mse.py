"""Mean squared error, for tasks whose outputs are values."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from edgekd.errors import PartError
from edgekd.losses._inputs import both_outputs, squared_difference


def mse(
    student_values: Tensor,
    teacher_values: Tensor,
    labels: Tensor,
    *,
    to: Literal["teacher", "labels"] = "teacher",
) -> Tensor:
    """Mean squared difference of the student's values from the teacher's or from the labels.

    loss = 1/(B·V) · Σ_b Σ_v (student_bv − target_bv)². It is 0 where both are equal.

    Args:
        student_values, teacher_values: rows × values each; computed in float32 whatever their type.
        labels: rows × values; a column alone may come as rows.
        to: what the student is held to.

    Returns:
        A scalar, in the square of the values' unit. No gradient reaches the teacher.

    Raises:
        PartError: the shapes differ, or `to` is neither of the two.
    """
    if to not in ("teacher", "labels"):
        raise PartError(f"mse has to = '{to}'", expected="'teacher' or 'labels'")
    if to == "teacher":
        return squared_difference(*both_outputs(student_values, teacher_values, "mse"))
    if labels.ndim == 1:
        labels = labels[:, None]  # beside rows × 1 it would broadcast to rows × rows
    return squared_difference(*both_outputs(student_values, labels, "mse", of="labels"))
