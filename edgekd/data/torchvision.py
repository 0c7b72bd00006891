"""The classification data sets of torchvision.datasets, by the name of their class."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, Literal

from edgekd.data.imagefolder import IN_MEMORY_BYTES, asked_size
from edgekd.data.samples import Reading, wrapped
from edgekd.errors import DataError, nearest
from edgekd.types import Dataset

_SPLITS = (("train", "test"), ("train", "val"), ("train", "valid"), ("trainval", "test"))


def torchvision(
    seed: int,
    *,
    dataset: str,
    root: str = "data",
    download: bool = False,
    size: int | tuple[int, int] | None = None,
    channels: Literal[1, 3] | None = None,
    test_fraction: float = 0.2,
    calibration: int | None = None,
    memory_bytes: int = IN_MEMORY_BYTES,
    workers: int | None = None,
) -> Dataset:
    """A data set of torchvision.datasets, e.g. dataset="CIFAR10"; its own test split where it has one.

    Args:
        seed: of the division into train, calibration and test.
        dataset: name of the class.
        root: folder its files are in.
        download: whether torchvision may fetch files that are missing; never unless the recipe says so.
        size, channels, test_fraction, calibration, memory_bytes, workers: as for imagefolder.

    Raises:
        DataError: there is no such data set, its files are not in `root`, or it is not one of images with a class.
    """
    known = importlib.import_module("torchvision.datasets")
    where = f"torchvision.{dataset}"
    choices = sorted(name for name in known.__all__ if inspect.isclass(getattr(known, name)))
    if dataset not in choices:
        raise DataError(f"torchvision has no data set '{dataset}'", where=where, nearest=nearest(dataset, choices))
    source = getattr(known, dataset)
    takes = inspect.signature(source).parameters
    place: dict[str, Any] = {"root": Path(root).expanduser()} if "root" in takes else {}
    if download and "download" not in takes:
        raise DataError("torchvision cannot download it", where=where, fix="set download = false, fetch it by hand")
    if "download" in takes:
        place["download"] = download
    if "train" in takes:
        made: object = tuple(_made(source, place | {"train": train}, root, where) for train in (True, False))
    elif "split" in takes:
        made = _by_split(source, place, root, where)
    else:
        made = _made(source, place, root, where)
    side = asked_size(size, where)
    return wrapped(made, where, Reading(seed, test_fraction, calibration, side, channels, memory_bytes, workers))


def _by_split(source: Any, place: dict[str, Any], root: str, where: str) -> tuple[object, object]:
    """The train and test splits; data sets call them differently and refuse a word they do not know."""
    for train, test in _SPLITS:
        try:
            first = _made(source, place | {"split": train}, root, where)
            return first, _made(source, place | {"split": test}, root, where)
        except ValueError:
            continue  # torchvision's verify_str_arg: no split of that name; the next pair may be there
    raise DataError("it has no split for training and one for testing", where=where)


def _made(source: Any, options: dict[str, Any], root: str, where: str) -> object:
    try:
        return source(**options)
    except (RuntimeError, FileNotFoundError) as problem:
        first = str(problem).splitlines()[0]
        raise DataError(
            f"its files are not in '{root}': {first}",
            where=where,
            fix="put them there, or set download = true in [data]",
        ) from problem
    except TypeError as problem:
        raise DataError(f"it cannot be opened by name alone: {problem}", where=where) from problem
    except ModuleNotFoundError as problem:
        raise DataError(f"it needs the package {problem.name}", where=where) from problem
