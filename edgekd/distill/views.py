"""The teacher's outputs for the views of the training data that come again, so that it computes each only once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.store import disk_error

NAME = "teacher_views.npy"
_LARGEST = float(np.finfo(np.float16).max)
_CHUNK = 1 << 22  # values written at once


class TeacherViews:
    """Logits by (view, sample) in a file, as float16: 20 bytes a sample and view for ten classes.

    An augmented image is a pure function of (sample, view), so that what the teacher said about it once holds whenever
    the view comes again (Shen, Xing: A Fast Knowledge Distillation Framework, ECCV 2022; here nothing but the outputs
    is stored, as the view can be computed again). What is not there yet is not a number.

    Args:
        work: the folder of the training.
        shape: views, samples, classes.
        fresh: forget what is there.

    Raises:
        StoreError: the disk is full or read-only.
    """

    def __init__(self, work: Path, shape: tuple[int, int, int], *, fresh: bool) -> None:
        path = work / NAME
        try:
            if fresh or not _usable(path, shape):
                _write_empty(path, shape)
            self._logits: np.memmap[tuple[int, ...], np.dtype[np.float16]] = np.lib.format.open_memmap(path, mode="r+")
        except OSError as problem:
            raise disk_error(problem, path) from problem

    def take(self, view: int, indices: np.ndarray) -> np.ndarray | None:
        """float32 logits (batch × classes), or None where one of the samples is not there."""
        found = np.asarray(self._logits[view][indices], np.float32)
        return None if np.isnan(found).any() else found

    def put(self, view: int, indices: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Keep logits, and give them back as `take` will: a target must not depend on when it is used."""
        kept = np.clip(logits, -_LARGEST, _LARGEST).astype(np.float16)
        self._logits[view, indices] = kept
        return np.asarray(kept, np.float32)

    def flush(self) -> None:
        """Make sure that the file holds what was put in; before a checkpoint that counts on it."""
        self._logits.flush()


def remove(work: Path) -> None:
    """Training has ended: the outputs are no part of its result."""
    (work / NAME).unlink(missing_ok=True)


def _usable(path: Path, shape: tuple[int, int, int]) -> bool:
    if not path.exists():
        return False
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # cut short by a kill, or not an array: computed again
        return False
    return bool(found.shape == shape and found.dtype == np.float16)


def _write_empty(path: Path, shape: tuple[int, int, int]) -> None:
    """Written in full, not made by seeking: on a full disk a hole in a mapped file would kill the process later."""
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    values = int(np.prod(shape))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, values, _CHUNK):
            file.write(np.full(min(_CHUNK, values - start), np.nan, "<f2").tobytes())
