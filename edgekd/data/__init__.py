"""Data: one file a source; each returns a Dataset of train, calibration and test samples that never overlap."""

from __future__ import annotations

import inspect
from dataclasses import replace

from edgekd import plugins
from edgekd.errors import DataError
from edgekd.types import Dataset, LabelForm, Part, Task


def load(part: Part, seed: int, task: Task | None = None, *, where: str = "data") -> Dataset:
    """The data a recipe names: a part of this folder, or what a user's `package.module:callable` returns.

    A part with an option `labels` is told what the task takes, where the recipe does not say it.

    A user's callable may take the seed, and may return a Dataset, any map-style torch Dataset, a (train, test) pair
    of them or {"train": …, "test": …}; see `edgekd.data.samples.wrapped`.

    Args:
        part: the data.
        seed: of the division into train, calibration and test.
        task: what the labels are for; left out: one class a sample.
        where: what the errors are about.

    Raises:
        PartError: there is no such part, or it does not take an option.
        DataError: the data cannot be used, or its labels are not what the task takes.
    """
    form: LabelForm = "classes" if task is None else task.labels
    made = _made(part, seed, form, where)
    if task is not None:
        task.check(made)
    return made


def _made(part: Part, seed: int, form: LabelForm, where: str) -> Dataset:
    name = part.name if ":" in part.name else part.name.partition(".")[0]
    takes = inspect.signature(plugins.find("data", name, where=where)).parameters
    if "labels" in takes and takes["labels"].kind is inspect.Parameter.KEYWORD_ONLY:
        part = replace(part, options={"labels": form} | dict(part.options))
    made = plugins.build("data", part, seed, where=where)
    if not isinstance(made, Dataset):
        from edgekd.data.samples import Reading, wrapped

        return wrapped(made, part.name, Reading(seed, labels=form))
    for name, split in (("train", made.train), ("calibration", made.calibration), ("test", made.test)):
        if len(split) == 0:
            raise DataError(f"the {name} split is empty", where=part.name)
    least = 2 if form in ("classes", "maps") else 1
    if len(made.classes) < least:
        raise DataError(f"there is {len(made.classes)} class", where=part.name, expected=f"at least {least}")
    if not made.inputs:
        raise DataError("it has no inputs", where=part.name)
    return made
