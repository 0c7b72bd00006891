"""Images in folders named after their class, or a zip file of them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edgekd.data import images
from edgekd.data.arrays import ArraySplit
from edgekd.data.images import Plan, UnreadableError
from edgekd.data.listing import Files, files, layout
from edgekd.data.splits import Pool, assemble, listed
from edgekd.data.streams import StreamedSplit, cores
from edgekd.errors import DataError
from edgekd.types import Arrays, Dataset, TensorSpec

IN_MEMORY_BYTES = 4 << 30  # decoded; a larger data set is streamed
_CHUNK = 128  # images a thread takes at once
_SMALL = 64 * 64  # pixels: up to here threads wait for the interpreter's lock longer than they decode


def imagefolder(
    seed: int,
    *,
    path: str,
    size: int | tuple[int, int] | None = None,
    channels: Literal[1, 3] | None = None,
    test_fraction: float = 0.2,
    calibration: int | None = None,
    memory_bytes: int = IN_MEMORY_BYTES,
    workers: int | None = None,
) -> Dataset:
    """Images in `<class>/` folders, or in `train/<class>/` and `test/<class>/` (or `val/`), or a .zip of either.

    Args:
        seed: of the division into train, calibration and test.
        path: the folder or zip file.
        size: pixels of a side, or (height, width). Left out: the images' own size where they all have the same one,
            else 224 (which the data set's notes then say). An image of another size is scaled until it covers this
            one and cropped in the centre.
        channels: 1 for grey, 3 for RGB; left out: 1 where every image is grey.
        test_fraction: fraction of the images to test on, where there is no test folder.
        calibration: images held out of training; left out: min(512, a tenth of the training images).
        memory_bytes: up to this many decoded bytes stay in memory, more are read while they are used.
        workers: threads to decode with (images of more than 64 × 64), and processes to read ahead with; left out: the
            cores there are.

    Raises:
        DataError: no images, an empty class, a class in one split only, or images that cannot be decoded.
    """
    where = str(path)
    workers = _asked_workers(workers, where)
    found = files(Path(path).expanduser())
    arranged = layout(found, where)
    samples = (*arranged.train, *(arranged.test or ()))
    names = [name for name, _ in samples]
    labels = np.array([label for _, label in samples], dtype=np.int64)
    scan = _scanned(found, names, asked_size(size, where), channels, memory_bytes, max(1, workers), where)
    spec = TensorSpec("image", "uint8", ("batch", *scan.plan.shape))

    def pool(start: int, stop: int) -> Pool:
        def take(rows: np.ndarray) -> ArraySplit | StreamedSplit:
            if scan.pixels is None:
                return StreamedSplit(_Encoded(found, names, scan.plan, where), labels, rows + start, workers)
            return ArraySplit({"image": scan.pixels}, labels, rows + start)

        return Pool(labels[start:stop], scan.digests[start:stop], take)

    middle = len(arranged.train)
    return assemble(
        Path(path).stem,
        (spec,),
        arranged.classes,
        pool(0, middle),
        None if arranged.test is None else pool(middle, len(names)),
        images=True,
        seed=seed,
        test_fraction=test_fraction,
        calibration=calibration,
        where=where,
        notes=(*arranged.notes, *scan.notes),
    )


def asked_size(size: int | tuple[int, int] | None, where: str) -> tuple[int, int] | None:
    """The `size` option as (height, width).

    Raises:
        DataError: a side is less than one pixel.
    """
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise DataError(f"size is {size}", where=where, expected="pixels, e.g. 64, or [height, width]")
    return height, width


def _asked_workers(workers: int | None, where: str) -> int:
    if workers is not None and workers < 0:
        raise DataError(f"workers is {workers}", where=where, expected="0 or more")
    return cores() if workers is None else workers


class _Encoded:
    """Images that stay encoded until they are asked for."""

    def __init__(self, found: Files, names: Sequence[str], plan: Plan, where: str) -> None:
        self._files, self._names, self._plan, self._where = found, names, plan, where
        self.inputs = (TensorSpec("image", "uint8", ("batch", *plan.shape)),)

    def read(self, row: int) -> Arrays:
        """One image, decoded."""
        name = self._names[row]
        try:
            return {"image": images.decode(self._files.read(name), self._plan)}
        except UnreadableError as problem:
            raise _unreadable([(name, str(problem))], self._where) from problem


@dataclass(frozen=True, slots=True)
class _Scan:
    """Every image read once: what it is, and its pixels where they fit in memory."""

    plan: Plan
    digests: list[bytes]
    pixels: np.ndarray | None
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Reading:
    """What the threads of a scan write into, each at its own rows."""

    plan: Plan
    pixels: np.ndarray | None
    digests: list[bytes]
    looks: list[Plan | None]
    free: tuple[bool, bool]  # whether the size and the channels are still to be found out
    surprised: threading.Event = field(default_factory=threading.Event)

    def read(self, found: Files, names: Sequence[str], rows: range) -> list[tuple[str, str]]:
        """Reads some images; what cannot be read is returned with the reason."""
        failures = []
        for row in rows:
            try:
                data = found.read(names[row])
                self.digests[row] = hashlib.sha256(data).digest()
                with images.opened(data) as image:
                    look = self.looks[row] = images.seen(image)
                    if (self.free[0] and look.size != self.plan.size) or (
                        self.free[1] and look.channels != self.plan.channels
                    ):
                        self.surprised.set()
                    if self.pixels is not None and not self.surprised.is_set():
                        self.pixels[row] = images.fit(image, self.plan)
                    elif images.cut_short(data):
                        raise UnreadableError("the file is truncated")
            except UnreadableError as problem:
                failures.append((names[row], str(problem)))
        return failures


def _scanned(
    found: Files,
    names: Sequence[str],
    size: tuple[int, int] | None,
    channels: int | None,
    memory_bytes: int,
    threads: int,
    where: str,
) -> _Scan:
    """Reads every image once, decoding it on the expectation that all are like the first; a second time if not."""
    try:
        with images.opened(found.read(names[0])) as image:
            first = images.seen(image)
    except UnreadableError:
        first = Plan((1, 1), 1)  # the reading below counts it among the unreadable ones
    threads = 1 if first.size[0] * first.size[1] <= _SMALL else threads
    plan = Plan(size or first.size, channels or first.channels)
    digests = [b""] * len(names)
    free = (size is None, channels is None)
    reading = _Reading(plan, _room(plan, len(names), memory_bytes), digests, [None] * len(names), free)
    _in_threads(reading, found, names, threads, where)
    if not reading.surprised.is_set():
        return _Scan(plan, digests, reading.pixels, ())
    looks = [look for look in reading.looks if look is not None]
    plan, notes = settled(looks, size, channels)
    reading = replace(reading, plan=plan, free=(False, False), surprised=threading.Event())
    reading.pixels = _room(plan, len(names), memory_bytes)
    if reading.pixels is not None:
        _in_threads(reading, found, names, threads, where)
    return _Scan(plan, digests, reading.pixels, notes)


def settled(looks: Sequence[Plan], size: tuple[int, int] | None, channels: int | None) -> tuple[Plan, tuple[str, ...]]:
    """What images that differ become, and notes that say so."""
    notes = []
    sizes = sorted({look.size for look in looks}, key=lambda side: (side[0] * side[1], side))
    if size is None and len(sizes) > 1:
        (small, large), size = (sizes[0], sizes[-1]), images.DEFAULT_SIZE
        notes.append(
            f"images differ in size, from {small[0]}×{small[1]} to {large[0]}×{large[1]}: each was scaled to cover "
            f"{size[0]}×{size[1]} pixels and cropped in the centre; the option size chooses another"
        )
    colour = sum(look.channels == 3 for look in looks)
    if channels is None and 0 < colour < len(looks):
        notes.append(f"{len(looks) - colour:,} of {len(looks):,} images are grey and were read as RGB")
    return Plan(size or sizes[0], channels or (3 if colour else 1)), tuple(notes)


def _room(plan: Plan, count: int, memory_bytes: int) -> np.ndarray | None:
    shape = (count, *plan.shape)
    return np.empty(shape, np.uint8) if int(np.prod(shape, dtype=np.int64)) <= memory_bytes else None


def _in_threads(reading: _Reading, found: Files, names: Sequence[str], threads: int, where: str) -> None:
    chunks = [range(start, min(start + _CHUNK, len(names))) for start in range(0, len(names), _CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        failures = [f for part in pool.map(lambda rows: reading.read(found, names, rows), chunks) for f in part]
    if failures:
        raise _unreadable(failures, where)


def _unreadable(failures: Sequence[tuple[str, str]], where: str) -> DataError:
    count = "an image" if len(failures) == 1 else f"{len(failures):,} images"
    return DataError(
        f"{count} cannot be decoded: {listed([f'{name} ({reason})' for name, reason in failures])}",
        where=where,
        fix="replace or remove them",
    )
