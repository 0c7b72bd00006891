"""Samples to quantize with: labelled ones where the files say so, else samples alone."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import numpy as np

from edgekd.data.arrays import ArraySplit
from edgekd.data.imagefolder import imagefolder
from edgekd.data.images import EXTENSIONS, Plan, UnreadableError, decode, opened, seen
from edgekd.data.listing import Files, files
from edgekd.data.npz import npz, read_arrays
from edgekd.errors import DataError
from edgekd.types import Arrays, Dataset, TensorSpec

MOST = 640  # samples without labels that are read: 512 to calibrate with, the rest to compare on
_PART = 5  # of samples without labels every fifth is compared on, the others calibrate


def samples(path: Path, *, size: tuple[int, int] | None, channels: int | None, seed: int) -> Dataset:
    """The samples in a folder or zip of images, or in an .npz file, labelled where they are.

    Images in folders named after their class, and .npz files with `y`, are read as the data parts imagefolder and npz
    read them. Images in one folder, and .npz files without `y`, are samples without labels: `classes` is empty.

    Args:
        path: the folder, .zip or .npz file.
        size: height and width that images are brought to; None: their own, which must be one.
        channels: of images, 1 or 3; None: their own.
        seed: of the division.

    Raises:
        DataError: there is nothing of that kind, or it cannot be read.
    """
    if path.suffix == ".npz":
        arrays = read_arrays(path)
        if any(name in arrays for name in ("y", "y_train")):
            return npz(seed, path=str(path))
        return _alone({name: array for name, array in arrays.items() if name != "classes"}, path.stem, str(path))
    found = files(path.expanduser())
    images = sorted(name for name in found.names if PurePosixPath(name).suffix.lower() in EXTENSIONS)
    if images and len({PurePosixPath(name).parent for name in images}) == 1:
        return _alone({"image": _decoded(found, images, size, channels, str(path))}, path.stem, str(path))
    fixed = channels if channels in (1, 3) else None
    return imagefolder(seed, path=str(path), size=size, channels=fixed)  # type: ignore[arg-type]


def _alone(inputs: Arrays, name: str, where: str) -> Dataset:
    counts = {len(array) if array.ndim else 0 for array in inputs.values()}
    if len(counts) != 1:
        told = ", ".join(f"'{key}' {array.shape}" for key, array in inputs.items()) or "nothing"
        raise DataError(f"it holds {told}", where=where, expected="inputs with as many samples each")
    count = min(counts.pop(), MOST)
    if not count:
        raise DataError("there are no calibration samples", where=where, expected="at least one")
    kept = {key: _stored(array[:count], where) for key, array in inputs.items()}
    rows = np.arange(count)
    tested = rows[_PART - 1 :: _PART] if count >= _PART else rows
    calibrating = np.setdiff1d(rows, tested) if count >= _PART else rows
    notes = ["the samples have no labels: what is compared is the outputs"]
    if count < _PART:
        notes.append(f"there are {count} samples: what calibrates is also what is compared on")
    digest = hashlib.sha256()
    for key in sorted(kept):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(kept[key]).tobytes())
    first = next(iter(kept.values()))
    labels = np.zeros(count, np.int64)
    train, test = ArraySplit(kept, labels, calibrating), ArraySplit(kept, labels, tested)
    specs = tuple(TensorSpec(key, str(array.dtype), ("batch", *array.shape[1:])) for key, array in kept.items())
    return Dataset(
        name, specs, (), train, train, test,
        images=len(kept) == 1 and first.dtype == np.uint8 and first.ndim == 4 and first.shape[3] in (1, 3),
        fingerprint=digest.hexdigest(), notes=tuple(notes),
    )  # fmt: skip


def _stored(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise DataError(f"it holds {array.dtype} values", where=where, expected="numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError("it holds values that are NaN or infinite", where=where)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _decoded(
    found: Files, names: list[str], size: tuple[int, int] | None, channels: int | None, where: str
) -> np.ndarray:
    chosen = names if len(names) <= MOST else [names[i] for i in np.linspace(0, len(names) - 1, MOST).astype(int)]
    try:
        if size is None or channels not in (1, 3):
            own = seen(opened(found.read(chosen[0])))
            size, channels = size or own.size, channels if channels in (1, 3) else own.channels
        return np.stack([decode(found.read(name), Plan(size, channels)) for name in chosen])
    except UnreadableError as problem:
        raise DataError(f"an image cannot be read: {problem}", where=where) from problem
