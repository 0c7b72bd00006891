"""Data: one file a source; each returns a Dataset of train, calibration and test samples that never overlap."""

from __future__ import annotations

from edgekd import plugins
from edgekd.errors import DataError
from edgekd.types import Dataset, Part


def load(part: Part, seed: int, *, where: str = "data") -> Dataset:
    """The data a recipe names: a part of this folder, or what a user's `package.module:callable` returns.

    A user's callable may take the seed, and may return a Dataset, any map-style torch Dataset, a (train, test) pair
    of them or {"train": …, "test": …}; see `edgekd.data.samples.wrapped`.

    Raises:
        PartError: there is no such part, or it does not take an option.
        DataError: the data cannot be used.
    """
    made = plugins.build("data", part, seed, where=where)
    if not isinstance(made, Dataset):
        from edgekd.data.samples import Reading, wrapped

        return wrapped(made, part.name, Reading(seed))
    for name, split in (("train", made.train), ("calibration", made.calibration), ("test", made.test)):
        if len(split) == 0:
            raise DataError(f"the {name} split is empty", where=part.name)
    if len(made.classes) < 2:
        raise DataError(f"there is {len(made.classes)} class", where=part.name, expected="at least two")
    if not made.inputs:
        raise DataError("it has no inputs", where=part.name)
    return made
