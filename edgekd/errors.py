"""Every error a user can fix.

    EdgekdError            what, where, expected, nearest, fix: one paragraph, exit code 2
    ├── RecipeError        the recipe or the command line
    ├── TargetError        a target file, or a name that is none
    ├── PartError          a named part (loss, model, data, backend) or one of its options
    ├── DataError          the user's data
    ├── ModelError         the user's model or its weights
    ├── ParityError        an artifact that does not compute what the one before it computes
    ├── BackendError       a toolchain that is missing or refuses the model
    └── StoreError         the disk: full, read-only, not ours

Anything else that escapes is a bug of edgekd and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekdError(Exception):
    """A problem the user can fix, told in one paragraph.

    Args:
        what: what is wrong, as a sentence without a full stop.
        where: the file, key or item it was found in.
        expected: what would have been right.
        nearest: the valid choice closest to what was given.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", nearest: str = "", fix: str = "") -> None:
        self.what, self.where, self.expected, self.nearest, self.fix = what, where, expected, nearest, fix
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected:
            text += f"; expected {self.expected}"
        if self.nearest:
            text += f"; did you mean '{self.nearest}'?"
        text = text if text[-1] in ".?!" else text + "."
        if self.fix:
            text += f" {self.fix[0].upper()}{self.fix[1:]}"
            text = text if text[-1] in ".?!" else text + "."
        return text


class RecipeError(EdgekdError):
    """The recipe or the command line asks for something that does not exist or cannot be."""


class TargetError(EdgekdError):
    """A target file is wrong, or no target has that name."""


class PartError(EdgekdError):
    """A part (loss, model, data, backend) is unknown or got an option it does not take."""


class DataError(EdgekdError):
    """The user's data cannot be used as it is."""


class ModelError(EdgekdError):
    """The user's model or its weights cannot be used as they are."""


class ParityError(EdgekdError):
    """An artifact does not compute what the artifact before it computes."""


class BackendError(EdgekdError):
    """A toolchain is missing, or refuses the model."""


class StoreError(EdgekdError):
    """The disk is full, read-only or holds something that is not ours."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that looks most like `word`, or an empty string where none does."""
    found = difflib.get_close_matches(word, list(choices), n=1)
    return found[0] if found else ""
