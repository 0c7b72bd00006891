"""Labels as they are given → as a task takes them: classes, flags, maps or values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.data.splits import listed
from edgekd.errors import DataError
from edgekd.types import LabelForm

_NO_CLASS = 255  # what marks a point without a label in most label maps (Pascal VOC, Cityscapes), beside negative ones
_OTHERWISE = 'or say with [task] name what they are: "multilabel", "segmentation" or "regression"'


def labels_of(
    labels: Sequence[np.ndarray], names: np.ndarray | Sequence[str] | None, form: LabelForm, where: str
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Labels of each split as they are stored, and the names of what a network gives for them.

    classes: int64 class indices, from integers, whole numbers stored as floats, or names (sorted where `names` is
    None). flags: int64 zeros and ones, samples × labels. maps: integers, samples × grid. values: float32, samples ×
    values; one value a sample may come without the second dimension.

    Args:
        labels: of each split, samples first.
        names: of classes, labels or values; None: their numbers.
        form: what they are.
        where: what the errors are about.

    Raises:
        DataError: labels that are not of that form, or not as many names as there are outputs.
    """
    if form == "classes":
        return label_indices(labels, names, where)
    given = None if names is None else tuple(str(name) for name in np.asarray(names).ravel())
    if form == "maps":
        return _maps(labels, given, where)
    flat = [y.reshape(len(y), -1) if y.ndim == 1 and form == "values" else y for y in labels]
    for y in flat:
        if y.ndim != 2 or y.dtype.kind not in "biuf" or y.shape[1] != flat[0].shape[1]:
            each = "one number a sample, or samples × values" if form == "values" else "samples × labels"
            raise DataError(f"labels are {y.dtype} of shape {y.shape}", where=where, expected=f"{each}, as numbers")
    count = flat[0].shape[1]
    unnamed = ("y",) if count == 1 else tuple(f"y{i}" for i in range(count))
    given = given or (unnamed if form == "values" else tuple(map(str, range(count))))
    if len(given) != count:
        raise DataError(f"there are {len(given)} names for {count} columns of labels", where=where)
    return [_flags(y, where) if form == "flags" else _values(y, where) for y in flat], given


def label_indices(
    labels: Sequence[np.ndarray], classes: np.ndarray | Sequence[str] | None, where: str
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Labels of each split as int64 class indices, and the names of the classes.

    Labels may be integers, whole numbers stored as floats, or names; names are sorted where `classes` is None.

    Raises:
        DataError: labels that are none of these, or that name no class.
    """
    names = None if classes is None else tuple(str(name) for name in np.asarray(classes).ravel())
    labels = [y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y for y in labels]
    for y in labels:
        if y.ndim != 1:
            fix = f"take its argmax, {_OTHERWISE}" if y.ndim == 2 else _OTHERWISE.removeprefix("or ")
            raise DataError(f"labels have shape {y.shape}", where=where, expected="one integer a sample", fix=fix)
    if labels[0].dtype.kind in "US":
        words = [y.astype(str) for y in labels]
        names = names or tuple(sorted({str(word) for y in words for word in y}))
        position = {name: index for index, name in enumerate(names)}
        unknown = sorted({str(word) for y in words for word in y} - set(names))
        if unknown:
            raise DataError(f"labels that are not in classes: {listed(unknown)}", where=where)
        return [np.array([position[str(word)] for word in y], dtype=np.int64) for y in words], names
    for y in labels:
        if y.dtype.kind not in "biuf" or (y.dtype.kind == "f" and not np.array_equal(y, np.floor(y))):
            fix = 'set [task] name = "regression" where they are values to predict' if y.dtype.kind == "f" else ""
            raise DataError(
                f"labels are {y.dtype} values", where=where, expected="integer class indices, or names", fix=fix
            )
    indices = [y.astype(np.int64) for y in labels]
    highest = max((int(y.max()) for y in indices if len(y)), default=-1)
    return indices, names or tuple(str(label) for label in range(highest + 1))


def _maps(
    labels: Sequence[np.ndarray], names: tuple[str, ...] | None, where: str
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    for y in labels:
        if y.ndim < 2 or y.dtype.kind not in "biu":
            raise DataError(
                f"labels are {y.dtype} of shape {y.shape}",
                where=where,
                expected="an integer class index for each point: samples × height × width, or another grid",
            )
    # small integers stay as they are, eight times smaller than int64; torch has no larger unsigned ones
    kept = [y.astype(np.uint8 if y.dtype.kind == "b" else y.dtype.newbyteorder("=")) for y in labels]
    kept = [y.astype(np.int64) if y.dtype.kind == "u" and y.dtype.itemsize > 1 else y for y in kept]
    highest = -1
    for y in kept:
        classes = y[y != _NO_CLASS]
        highest = max(highest, int(classes.max())) if classes.size else highest
    return kept, names or tuple(str(label) for label in range(highest + 1))


def _flags(labels: np.ndarray, where: str) -> np.ndarray:
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        raise DataError(
            f"{len(wrong)} labels are neither 0 nor 1, the first is {wrong[0]:g}",
            where=where,
            expected="samples × labels of 0 and 1",
        )
    return labels.astype(np.int64)


def _values(labels: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(labels).all():
        count = int((~np.isfinite(labels)).sum())
        raise DataError(f"{count:,} labels are NaN or infinite", where=where)
    return labels.astype(np.float32)
