"""work/last.pt: everything that a training needs to go on as if nothing had happened."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from edgekd.store import disk_error
from edgekd.types import Say

NAME = "last.pt"
_VERSION = 1


def save(work: Path, identity: str, state: dict[str, Any]) -> None:
    """Write the state whole or not at all: a kill at any moment leaves the one before it.

    Raises:
        StoreError: the disk is full or read-only.
    """
    path = work / NAME
    partial = work / f".{NAME}.partial"
    try:
        with partial.open("wb") as file:
            torch.save({"version": _VERSION, "identity": identity, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise disk_error(problem, path) from problem


def load(work: Path, identity: str, say: Say, *, step: str) -> dict[str, Any] | None:
    """The state that was saved last, read without running code from it; None where training has to start.

    A file that cannot be read, or that comes from another training (`identity`), is told and not used.
    """
    path = work / NAME
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums that torch.save writes
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        say("corrupt", path=str(path), reason=reason)
        return None
    if not isinstance(found, dict) or found.get("version") != _VERSION or found.get("identity") != identity:
        say("note", text=f"{path} belongs to another training; {step} starts again")
        return None
    state: dict[str, Any] = found["state"]
    return state


def remove(work: Path) -> None:
    """Training has ended: the checkpoint is no part of its result."""
    (work / NAME).unlink(missing_ok=True)
