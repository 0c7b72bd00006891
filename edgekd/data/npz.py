"""Arrays in a NumPy .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgekd.data.labels import labels_of
from edgekd.data.splits import array_pool, assemble, listed
from edgekd.errors import DataError, nearest
from edgekd.types import Arrays, Dataset, LabelForm, TensorSpec

_STORED_AS = {"float64": "float32", "uint16": "int32", "uint32": "int64"}  # what torch and devices compute with
_KINDS = "biuf"


def npz(
    seed: int,
    *,
    path: str,
    labels: LabelForm | None = None,
    test_fraction: float = 0.2,
    calibration: int | None = None,
) -> Dataset:
    """Arrays `x_train`, `y_train` and, where there is a test split, `x_test`, `y_test`; or just `x` and `y`.

    `y` are integer class indices or names; for other tasks zeros and ones (N, labels), class indices on a grid
    (N, height, width), or numbers (N, values). Every other array is an input under its own name (`ids_train` and
    `mask_train` are the inputs `ids` and `mask`), samples first; `classes` may name the classes, labels or values. One
    uint8 input of shape (N, height, width, channels) or (N, height, width) is taken for images. Nothing in the file
    is unpickled.

    Args:
        seed: of the division into train, calibration and test.
        path: the .npz file.
        labels: what `y` is: "classes", "flags", "maps" or "values"; left out: what the task takes.
        test_fraction: fraction of the samples to test on, where there is no test split.
        calibration: samples held out of training; left out: min(512, a tenth of the training samples).

    Raises:
        DataError: no such file, Python objects in it, arrays missing or of different lengths, labels of another form,
            NaN or infinite values.
    """
    where = str(path)
    arrays = read_arrays(Path(path).expanduser())
    given_classes = arrays.pop("classes", None)
    split = "y_train" in arrays
    suffix = "_train" if split else ""
    train, train_labels = _one_split(arrays, suffix, where)
    parts = [(train, train_labels)]
    if "y_test" in arrays:
        test, test_labels = _one_split(arrays, "_test", where)
        _alike(train, test, where)
        parts.append((test, test_labels))
    unused = sorted(name for name in arrays if split and not name.endswith(("_train", "_test")))
    if unused:
        raise DataError(f"arrays of no split: {listed(unused)}", where=where, expected="names in _train and _test")
    form = labels or "classes"
    stored_labels, classes = labels_of([part[1] for part in parts], given_classes, form, where)
    images = _is_image(train, where)
    notes: list[str] = []
    stored = [_stored(inputs, images, where, notes) for inputs, _ in parts]
    pools = [array_pool(inputs, y) for inputs, y in zip(stored, stored_labels, strict=True)]
    return assemble(
        Path(path).stem,
        tuple(TensorSpec(name, str(a.dtype), ("batch", *a.shape[1:])) for name, a in stored[0].items()),
        classes,
        pools[0],
        pools[1] if len(pools) > 1 else None,
        form=form,
        images=images,
        seed=seed,
        test_fraction=test_fraction,
        calibration=calibration,
        where=where,
        notes=tuple(dict.fromkeys(notes)),
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an .npz file by name; nothing is unpickled.

    Raises:
        DataError: no such file, or not one of plain numbers.
    """
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.npz")] if path.parent.is_dir() else []
        raise DataError("no such file", where=str(path), nearest=nearest(path.name, siblings))
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as problem:
        raise DataError(f"not an .npz file: {problem}", where=str(path)) from problem
    if isinstance(loaded, np.ndarray):
        raise DataError("this is one .npy array", where=str(path), fix="save inputs and labels with numpy.savez")
    arrays = {}
    with loaded:
        for name in loaded.files:
            try:
                arrays[name] = loaded[name]
            except (ValueError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as problem:
                raise DataError(
                    f"the array '{name}' cannot be read: {problem}",
                    where=str(path),
                    fix="save plain numbers; Python objects are never unpickled",
                ) from problem
    return arrays


def _one_split(arrays: Mapping[str, np.ndarray], suffix: str, where: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    labels = arrays.get("y" + suffix)
    if labels is None:
        raise DataError(
            f"there is no array 'y{suffix}', only {listed(sorted(arrays)) or 'nothing'}",
            where=where,
            expected="x_train and y_train, or x and y",
            nearest=nearest("y" + suffix, arrays),
        )
    inputs = {
        name.removesuffix(suffix): array
        for name, array in arrays.items()
        if name.endswith(suffix) and name != "y" + suffix
    }
    if not inputs:
        raise DataError(f"there is no input beside 'y{suffix}'", where=where, expected=f"an array 'x{suffix}'")
    for name, array in inputs.items():
        if array.ndim == 0 or len(array) != len(labels):
            raise DataError(
                f"'{name}{suffix}' has shape {array.shape}, 'y{suffix}' {labels.shape}",
                where=where,
                expected="as many samples in one as in the other",
            )
    return inputs, labels


def _alike(train: Arrays, test: Arrays, where: str) -> None:
    def form(inputs: Arrays) -> dict[str, str]:
        return {name: f"{array.dtype} × {array.shape[1:]}" for name, array in sorted(inputs.items())}

    if form(train) != form(test):
        raise DataError(f"test inputs are {form(test)}", where=where, expected=f"{form(train)}, as in training")


def _is_image(inputs: Arrays, where: str) -> bool:
    (name, array), *others = inputs.items()
    if others or array.dtype != np.uint8 or array.ndim not in (3, 4):
        return False
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3, 4):
        raise DataError(
            f"the images '{name}' have shape {array.shape}",
            where=where,
            expected="channels last: (N, height, width, channels)",
            fix="transpose(0, 2, 3, 1)",
        )
    return True


def _stored(inputs: Arrays, images: bool, where: str, notes: list[str]) -> dict[str, np.ndarray]:
    stored = {}
    for name, array in inputs.items():
        if array.dtype.kind not in _KINDS:
            raise DataError(f"the input '{name}' holds {array.dtype} values", where=where, expected="numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise DataError(f"the input '{name}' has {count:,} values that are NaN or infinite", where=where)
        wanted = _STORED_AS.get(str(array.dtype))
        if wanted is not None:
            notes.append(f"the input '{name}' was converted from {array.dtype} to {wanted}")
            array = array.astype(wanted)
        array = array.astype(array.dtype.newbyteorder("="))
        stored[name] = array[:, :, :, None] if images and array.ndim == 3 else array
    return stored
