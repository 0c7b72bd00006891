"""What a teacher said about each sample in each view, kept on disk so that it has to say it only once.

    <root>/<key>/manifest.json       the facts that decide what the teacher says, and how many samples there are
    <root>/<key>/<tensor>.<view>     a row for each sample (see `rows`); 0 is what is not there yet
    <root>/.<key>.lock               held while files are made or removed, never while rows are read or written
    <root>/.<key>.used               locked, by any number of trainings, as long as they use it: it is not removed

An augmented image is a pure function of (sample, view), so that what the teacher said about it once holds whenever the
view comes again, in whatever batch (Shen, Xing: A Fast Knowledge Distillation Framework for Visual Recognition, ECCV
2022; Wu et al.: TinyViT, ECCV 2022). The images are not stored, since the view can be made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from edgekd.distillation.augment import random_bits
from edgekd.distillation.rows import Form, decoded, differences, encoded, form_of
from edgekd.errors import StoreError
from edgekd.store import disk_error, make_folder, write_text
from edgekd.types import Json, Say

try:
    import fcntl
except ImportError:  # Windows: nobody knows there whether a cache is in use
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # of the files; raised where older ones would be read wrong
MANIFEST = "manifest.json"
_RESIDENT_BYTES = 256 << 20  # of a mapped view that may stay in memory; what is beyond is left to the system's cache
_FAULT_BYTES = 64 << 10  # that the system maps around a row that is touched
_CHECKED_VIEWS = 4
_CANDIDATES = 1024  # samples of a view that are looked at for ones that are there
# What computing again may change, relative to the 2-norm of a sample's output, by the fact "precision". float16's
# rounding is 0.0005, and sums of float32 in another order are far less; bf16 rounds to 0.004 in every layer.
_TOLERANCE = {"fp32": 0.01, "bf16": 0.06}
_PARTIAL = ".partial"
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Checked:
    """How a sampled verification went."""

    samples: int  # that were computed again
    error: float  # largest relative difference among them


class TeacherCache:
    """A teacher's outputs by (view, sample), as float16 in memory-mapped files: one view is mapped at a time.

    Caches of equal facts are one: trainings that come later, run beside or share the work find each other's rows. A
    view's files are made whole when it first comes, so that no write into them can find the disk full; killed at any
    moment, what is there is right and what is not there is computed again. A tensor that another training kept
    already is shared; one it did not keep is added.

    Args:
        root: folder of all caches; this one's is `folder`.
        facts: all that decides what the teacher says about sample i in view v: its weights and preprocessing, the
            data, the split, the augmentation with its VERSION, the precision ("precision": "fp32" or "bf16").
        samples: of the split.
        limit_bytes: of disk that this cache may take; views that come when it is used up are not kept, which is said
            once. Never is more than half of what is free on the disk taken for a view, so that checkpoints fit too.
        keep: shape of one sample's output by tensor name; "logits" is the network's output.
        say: told "note" and "corrupt".
        top: classes kept of each sample's logits; None: all of up to 1000, the 100 largest of more.

    Raises:
        StoreError: the folder is of other facts, or cannot be written.
    """

    def __init__(
        self,
        root: Path,
        facts: Mapping[str, Json],
        *,
        samples: int,
        limit_bytes: int,
        keep: Mapping[str, Sequence[int]],
        say: Say,
        top: int | None = None,
    ) -> None:
        self.folder = folder_of(root, facts)
        self._samples, self._limit_bytes, self._say = samples, limit_bytes, say
        self._facts = json.loads(json.dumps({**facts, "format": FORMAT, "samples": samples}, allow_nan=False))
        self._forms = tuple(form_of(name, tuple(shape), top) for name, shape in keep.items())
        self._tolerance = _TOLERANCE[str(facts.get("precision", "fp32"))]
        self._view: _View | None = None
        self._left_out: set[int] = set()  # views that found no room
        make_folder(root)
        weakref.finalize(self, os.close, _used(self.folder))  # in use as long as this object lives
        with _locked(self.folder):
            self._claim()

    def take(self, view: int, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        """Outputs by tensor name, batch first, or None where one of the samples is not there.

        They are float16; logits of which the largest alone are kept are float32.
        """
        mapped = self._mapped(view)
        rows = None if mapped is None else mapped.read(indices)
        if rows is None:
            return None
        return {form.name: decoded(form, found) for form, found in zip(self._forms, rows, strict=True)}

    def put(self, view: int, indices: np.ndarray, outputs: Mapping[str, np.ndarray | Tensor]) -> dict[str, np.ndarray]:
        """Keep outputs, and give them back as `take` will: a target must not depend on when it is used.

        Where a sample is there already, it stays as it is. What is not kept for want of room is rounded all the same.

        Raises:
            ModelError: an output is NaN, or not of the shape that was told.
        """
        rows = [encoded(form, outputs[form.name]) for form in self._forms]
        mapped = self._mapped(view) or self._made(view)
        if mapped is not None:
            rows = mapped.write(indices, rows)
        return {form.name: decoded(form, found) for form, found in zip(self._forms, rows, strict=True)}

    def flush(self) -> None:
        """Make sure that the disk holds what was put in; before a checkpoint that counts on it."""
        if self._view is not None:
            self._view.flush()

    def close(self) -> None:
        """Unmap what is mapped; the cache may be used on."""
        self._view = None

    def check(
        self, live: Callable[[int, np.ndarray], Mapping[str, np.ndarray | Tensor]], *, count: int = 64
    ) -> Checked:
        """Compute some of the outputs again, and compare.

        Args:
            live: (view, indices) → what the teacher says now, by tensor name.
            count: samples at most, spread over at most four views.

        Raises:
            StoreError: what is kept is not what the teacher says.
        """
        worst, checked = 0.0, 0
        for view, indices in self._sampled(count):
            mapped = self._mapped(view)
            rows = mapped.read(indices) if mapped is not None and len(indices) else None
            if rows is None:
                continue
            now = live(view, indices)
            for form, found in zip(self._forms, rows, strict=True):
                errors = differences(form, found, now[form.name])
                worst, at = max(worst, float(errors.max())), int(errors.argmax())
                if errors[at] > self._tolerance:
                    raise StoreError(
                        f"what is kept of the teacher is not what it says now: '{form.name}' of sample "
                        f"{indices[at]} in view {view} differs by {errors[at]:.0%}",
                        where=str(self.folder),
                        expected=f"at most {self._tolerance:.0%}",
                        fix="remove this folder: it is filled again",
                    )
            checked += len(indices)
        return Checked(checked, worst)

    def _sampled(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Views that are there, each with some of the samples that are there."""
        views = sorted(int(path.suffix[1:]) for path in self.folder.glob(f"{self._forms[0].stem}.*"))
        spread = {views[at * len(views) // _CHECKED_VIEWS] for at in range(_CHECKED_VIEWS)} if views else set()
        for view in sorted(spread):
            order = np.argsort(random_bits(np.arange(self._samples), seed=0, purpose="check", view=view))
            mapped = self._mapped(view)
            if mapped is not None:
                yield view, mapped.begun(order[:_CANDIDATES])[: -(-count // len(spread))]

    # ------------------------------------------------------------ files

    def _claim(self) -> None:
        """Make the folder this cache's, or find that it is."""
        path = self.folder / MANIFEST
        self.folder.mkdir(exist_ok=True)
        for partial in self.folder.glob(f"*{_PARTIAL}"):
            partial.unlink()  # of a process that was killed
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            damage = "" if isinstance(kept, dict) else "it holds no facts"
        except FileNotFoundError:
            kept, damage = None, "it is missing" if any(self.folder.iterdir()) else ""
        except ValueError as problem:
            kept, damage = None, f"it cannot be read: {problem}"
        if damage:  # whose rows these are is not known any more
            self._say("corrupt", path=str(path), reason=damage)
            for file in self.folder.iterdir():
                file.unlink()
        elif kept is not None:
            changed = _changed(kept, self._facts)
            if changed:
                raise StoreError(
                    f"what is kept here belongs to other facts: {', '.join(changed)}",
                    where=str(self.folder),
                    fix="remove this folder: it is filled again",
                )
            os.utime(path)  # it is used now: see `remove_oldest`
            return
        write_text(path, json.dumps(self._facts, indent=1, sort_keys=True) + "\n")

    def _path(self, form: Form, view: int) -> Path:
        return self.folder / f"{form.stem}.{view}"

    def _size(self, form: Form) -> int:
        return 2 * self._samples * form.width

    def _mapped(self, view: int) -> _View | None:
        """A view, mapped in place of the one before; None where it is not there."""
        if self._view is None or self._view.number != view:
            self._view = None
            memories = []
            for form in self._forms:
                memory = self._memory(self._path(form, view), self._size(form))
                if memory is None:
                    return None
                memories.append(memory)
            self._view = _View(view, memories, [form.width for form in self._forms])
        return self._view

    def _memory(self, path: Path, size: int) -> mmap.mmap | None:
        """A file, mapped; None where it is not there. One of the wrong size is removed, so that it is made again."""
        try:
            with path.open("r+b") as file:
                found = os.fstat(file.fileno()).st_size
                if found == size:
                    return mmap.mmap(file.fileno(), size)
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise disk_error(problem, path) from problem
        with _locked(self.folder):
            if path.exists() and path.stat().st_size != size:  # unless another process was here first
                self._say("corrupt", path=str(path), reason=f"it has {found:,} bytes and should have {size:,}")
                path.unlink()
        return None

    def _made(self, view: int) -> _View | None:
        """A view whose files were made where they are not there; None where there is no room."""
        if view in self._left_out:
            return None
        with _locked(self.folder):
            self._claim()  # it may have been removed meanwhile
            sizes = {self._path(form, view): self._size(form) for form in self._forms}
            missing = {path: size for path, size in sizes.items() if not path.exists()}
            reason = self._no_room(sum(missing.values())) or _make(missing)
        if not reason:
            return self._mapped(view)
        if not self._left_out:
            self._say("note", text=f"not all that the teacher says is kept, from view {view} on: {reason}")
        self._left_out.add(view)
        return None

    def _no_room(self, needed_bytes: int) -> str:
        """Why there is no room for so many bytes more, or nothing."""
        used, free = _bytes_in(self.folder), shutil.disk_usage(self.folder).free
        if used + needed_bytes > self._limit_bytes:
            return f"{used / 1e9:.3g} GB are used of cache_gb = {self._limit_bytes / 1e9:.3g}, and a view takes more"
        if needed_bytes > free // 2:
            return f"a view takes {needed_bytes / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB free"
        return ""


class _View:
    """The rows of one view in mapped files, one a tensor, until it is let go. What it gives are copies."""

    def __init__(self, number: int, memories: Sequence[mmap.mmap], widths: Sequence[int]) -> None:
        self.number = number
        self._memories = memories
        self._rows = [
            np.frombuffer(memory, np.uint16).reshape(-1, width) for memory, width in zip(memories, widths, strict=True)
        ]
        self._large = sum(map(len, memories)) > _RESIDENT_BYTES
        self._sample_bytes = sum(2 * width + _FAULT_BYTES for width in widths)  # that one sample makes resident
        self._touched_bytes = 0

    def read(self, indices: np.ndarray) -> list[np.ndarray] | None:
        """The rows of some samples by tensor, or None where one is not there in full."""
        self._touch(len(indices))
        found = []
        for rows in self._rows:
            found.append(rows.take(indices, axis=0))
            if not found[-1].min(initial=1):
                return None
        return found

    def write(self, indices: np.ndarray, given: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Put rows where none are, and give back what is there then."""
        self._touch(len(indices))
        result = []
        for rows, fresh in zip(self._rows, given, strict=True):
            kept = rows.take(indices, axis=0)
            missing = kept.min(axis=1) == 0
            if missing.all():
                rows[indices] = kept = fresh
            elif missing.any():
                kept[missing] = fresh[missing]
                rows[indices[missing]] = fresh[missing]
            result.append(kept)
        return result

    def begun(self, indices: np.ndarray) -> np.ndarray:
        """Those of the samples of which every tensor has a beginning."""
        self._touch(len(indices))
        found: np.ndarray = indices[np.stack([rows[indices, 0] for rows in self._rows]).min(axis=0) > 0]
        return found

    def flush(self) -> None:
        for memory in self._memories:
            memory.flush()

    def _touch(self, samples: int) -> None:
        """Let go of what was touched where that is more than may stay; it is in the system's cache all the same."""
        self._touched_bytes += samples * self._sample_bytes
        if self._large and self._touched_bytes > _RESIDENT_BYTES and sys.platform != "win32":
            for memory in self._memories:
                memory.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = 0


def folder_of(root: Path, facts: Mapping[str, Json]) -> Path:
    """Where the cache of these facts is, or would be."""
    identity = json.dumps([FORMAT, facts], sort_keys=True, allow_nan=False)
    return root / hashlib.sha256(identity.encode()).hexdigest()[:20]


def remove_oldest(root: Path, limit_bytes: int, *, say: Say) -> None:
    """Remove the caches under `root` that were opened longest ago, until all take no more than `limit_bytes`.

    Those that are in use stay, whoever uses them. Where the system cannot say which are (Windows), all of them do.

    Raises:
        StoreError: one cannot be removed.
    """
    caches = sorted((path.stat().st_mtime, path.parent) for path in root.glob(f"*/{MANIFEST}"))
    total = sum(_bytes_in(folder) for _, folder in caches)
    for _, folder in caches:
        if total <= limit_bytes:
            break
        with _locked(folder), _unused(folder) as free:
            if not free or not folder.exists():
                continue
            size = _bytes_in(folder)
            shutil.rmtree(folder)
        total -= size
        say("note", text=f"{folder} was removed to make room: {size / 1e9:.3g} GB of teacher's outputs")


def _used(folder: Path) -> int:
    """A descriptor that says that a cache is in use, until it is closed or its process ends."""
    try:
        sign = _sign(folder)
        if fcntl is not None:
            fcntl.flock(sign, fcntl.LOCK_SH)
    except OSError as problem:
        raise disk_error(problem, folder) from problem
    return sign


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Whether nobody uses a cache; nobody can begin to meanwhile."""
    sign = _sign(folder)
    try:
        if fcntl is not None:
            fcntl.flock(sign, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = fcntl is not None
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(sign)


def _sign(folder: Path) -> int:
    return os.open(folder.with_name(f".{folder.name}.used"), os.O_RDONLY | os.O_CREAT, 0o644)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process makes or removes files of this cache meanwhile; trouble with the disk is told as such."""
    from filelock import FileLock

    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            yield
    except OSError as problem:
        raise disk_error(problem, folder) from problem


def _make(sizes: Mapping[Path, int]) -> str:
    """Make files of zeros without holes, all or none; gives the reason where the disk is full."""
    made: list[Path] = []
    try:
        for path, size in sizes.items():
            made.append(path.with_name(f".{path.name}{_PARTIAL}"))
            with made[-1].open("wb") as file:
                if sys.platform == "linux":
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    for start in range(0, size, _CHUNK):
                        file.write(bytes(min(_CHUNK, size - start)))
        for path, partial in zip(sizes, made, strict=True):
            partial.replace(path)
    except OSError as problem:
        for partial in made:
            partial.unlink(missing_ok=True)
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full"
        raise
    return ""


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _changed(kept: Mapping[str, Json], facts: Mapping[str, Json], above: str = "") -> list[str]:
    """The names of facts that differ, those of a table behind its name and a dot."""
    names = []
    for name in sorted({*kept, *facts}):
        one, other = kept.get(name), facts.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            names += _changed(one, other, f"{above}{name}.")
        elif one != other:
            names.append(above + name)
    return names
