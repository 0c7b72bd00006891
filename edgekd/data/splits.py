"""How samples become train, calibration and test: deterministic, stratified by class, never overlapping."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.data.arrays import ArraySplit
from edgekd.errors import DataError
from edgekd.types import Arrays, Dataset, LabelForm, Split, TensorSpec

CALIBRATION_SAMPLES = 512  # enough for the ranges of activations; more changed no accuracy we measured
CALIBRATION_FRACTION = 0.1  # never more than this of the training samples, unless it is asked for
_NAMED = 3  # names an account lists before it only counts


@dataclass(frozen=True, slots=True)
class Pool:
    """Samples that come from one place and are still to be divided.

    Attributes:
        labels: as the task takes them, samples first.
        digests: sha256 of each sample's content, in the same order.
        take: positions in the pool → the split that holds them.
    """

    labels: np.ndarray
    digests: Sequence[bytes]
    take: Callable[[np.ndarray], Split]


@dataclass(frozen=True, slots=True)
class Division:
    """Positions in a pool: disjoint, each sorted."""

    train: np.ndarray
    calibration: np.ndarray
    test: np.ndarray


def array_pool(inputs: Arrays, labels: np.ndarray) -> Pool:
    """A pool of samples in memory; a digest is over the sample's bytes in all its inputs."""
    digests = []
    arrays = [np.ascontiguousarray(inputs[name]) for name in sorted(inputs)]
    for row in range(len(labels)):
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array[row].tobytes())
        digests.append(digest.digest())
    return Pool(labels, digests, lambda rows: ArraySplit(inputs, labels, rows))


def divide(
    labels: np.ndarray, *, seed: int, test_fraction: float | None, calibration: int | None, where: str
) -> Division:
    """Divides samples into train, calibration and test, each with the classes in the same proportion.

    Args:
        labels: int64 class indices, one a sample.
        seed: equal seeds give equal divisions, on every platform and with every version of numpy.
        test_fraction: fraction of all samples that become test samples; None where the data has a test split.
        calibration: number of calibration samples; None is min(512, a tenth of the training samples).
        where: what the errors are about.

    Raises:
        DataError: there are too few samples, or a number is out of its range.
    """
    rows = np.arange(len(labels))
    test = rows[:0]
    if test_fraction is not None:
        if not 0 < test_fraction < 1:
            raise DataError(f"test_fraction is {test_fraction:g}", where=where, expected="a number between 0 and 1")
        test = _stratified(labels, rows, max(1, round(len(rows) * test_fraction)), seed, "test", where)
        rows = np.setdiff1d(rows, test)
    if calibration is None:
        calibration = min(CALIBRATION_SAMPLES, max(1, int(len(rows) * CALIBRATION_FRACTION)))
    elif calibration < 1:
        raise DataError(f"calibration is {calibration}", where=where, expected="at least one sample")
    held_out = _stratified(labels, rows, calibration, seed, "calibration", where)
    return Division(np.setdiff1d(rows, held_out), held_out, test)


def _stratified(labels: np.ndarray, rows: np.ndarray, wanted: int, seed: int, purpose: str, where: str) -> np.ndarray:
    """`wanted` of `rows`, each class in proportion (largest remainders), and one of each class left behind."""
    classes, counts = np.unique(labels[rows], return_counts=True)
    spare = counts - 1
    if wanted > spare.sum():
        raise DataError(
            f"{wanted} {purpose} samples cannot be held out of {len(rows)} samples of {len(classes)} classes",
            where=where,
            expected=f"at most {spare.sum()}, so that every class keeps one sample to train on",
            fix="bring more samples, or hold out fewer (calibration, test_fraction)",
        )
    quota = counts * (wanted / len(rows))
    take = np.minimum(np.floor(quota).astype(np.int64), spare)
    while take.sum() < wanted:
        behind = np.where(take < spare, quota - take, -np.inf)
        take[np.argmax(behind)] += 1
    keys = _shuffle_keys(rows, seed, purpose)
    chosen = []
    for label, count in zip(classes, take, strict=True):
        mine = np.flatnonzero(labels[rows] == label)
        chosen.append(rows[mine[np.argsort(keys[mine], kind="stable")[:count]]])
    return np.sort(np.concatenate(chosen))


def _shuffle_keys(rows: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """A pseudo-random uint64 for each row: splitmix64 (Steele, Lea, Flood, OOPSLA 2014).

    Not a numpy Generator: its streams may change between versions, and the test split must not.
    """
    start = int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def assemble(
    name: str,
    inputs: tuple[TensorSpec, ...],
    classes: Sequence[str],
    train: Pool,
    test: Pool | None,
    *,
    images: bool,
    seed: int,
    test_fraction: float,
    calibration: int | None,
    where: str,
    held_out: Pool | None = None,
    form: LabelForm = "classes",
    notes: Sequence[str] = (),
) -> Dataset:
    """Divides the pools and makes the Dataset, with its fingerprint.

    `test_fraction` counts only where there is no test pool. Calibration samples are all of `held_out`, which comes
    with a test pool; where there is none, they come out of `train`. Only labels of the form "classes" are divided by
    class; others at random.

    Raises:
        DataError: too few samples or classes, labels that name no class, a class or a value that cannot be learned.
    """
    pools = [pool for pool in (train, held_out, test) if pool is not None]
    _check_labels(pools, classes, form, where)
    if held_out is not None:
        assert test is not None
        parts = [(pool, np.arange(len(pool.labels))) for pool in (train, held_out, test)]
    else:
        fraction = test_fraction if test is None else None
        strata = train.labels if form == "classes" else np.zeros(len(train.labels), np.int64)
        division = divide(strata, seed=seed, test_fraction=fraction, calibration=calibration, where=where)
        tested, test_rows = (train, division.test) if test is None else (test, np.arange(len(test.labels)))
        parts = [(train, division.train), (train, division.calibration), (tested, test_rows)]
    splits = [pool.take(rows) for pool, rows in parts]
    return Dataset(
        name=name,
        inputs=inputs,
        classes=tuple(classes),
        train=splits[0],
        calibration=splits[1],
        test=splits[2],
        images=images,
        fingerprint=_fingerprint(inputs, classes, parts),
        notes=(*notes, *_doubts(parts, classes, form, where)),
    )


def _check_labels(pools: Sequence[Pool], classes: Sequence[str], form: LabelForm, where: str) -> None:
    for pool in pools:
        if len(pool.labels) == 0:
            raise DataError("a split has no samples", where=where)
    for pool in pools if form == "classes" else ():  # which numbers in a map are no class is the task's to check
        wrong = pool.labels[(pool.labels < 0) | (pool.labels >= len(classes))]
        if len(wrong):
            raise DataError(
                f"{len(wrong)} labels name no class, the first is {wrong[0]}",
                where=where,
                expected=f"integers from 0 to {len(classes) - 1}, for {len(classes)} classes",
            )
    if len(classes) < 2 and form in ("classes", "maps"):
        raise DataError(f"there is {len(classes)} class ({', '.join(classes)})", where=where, expected="at least two")
    if form != "classes":
        return
    unknown = np.setdiff1d(pools[-1].labels, pools[0].labels)
    if len(unknown):
        names = listed([f"'{classes[label]}'" for label in unknown])
        raise DataError(f"the test split has classes that training never sees: {names}", where=where)


def _doubts(parts: Sequence[tuple[Pool, np.ndarray]], classes: Sequence[str], form: LabelForm, where: str) -> list[str]:
    """What a careful reader of the accuracies wants to know about the splits."""
    (train, train_rows), (held, held_rows), (tested, test_rows) = parts
    notes = []
    known = {train.digests[row] for row in train_rows} | {held.digests[row] for row in held_rows}
    seen = sum(tested.digests[row] in known for row in test_rows)
    if seen:
        notes.append(f"{seen} of {len(test_rows)} test samples are exact copies of training samples")
    for split, pool, rows in (("training", train, train_rows), ("test", tested, test_rows)):
        labels = pool.labels[rows]
        if form == "values":
            notes += _of_values(labels, classes, split, where)
            continue
        found = np.flatnonzero(labels.any(axis=0)) if form == "flags" else labels
        absent = np.setdiff1d(np.arange(len(classes)), found)
        if len(absent):
            names = listed([f"'{classes[label]}'" for label in absent])
            what = "labels" if form == "flags" else "classes"
            notes.append(f"{len(absent)} {what} have no {split} sample: {names}")
    return notes


def _of_values(labels: np.ndarray, names: Sequence[str], split: str, where: str) -> list[str]:
    """Values that never change are refused; of what is hard to learn a note says how it would be easier."""
    notes = []
    for name, mean, spread in zip(names, labels.mean(0, np.float64), labels.std(0, np.float64), strict=True):
        if spread == 0:
            raise DataError(
                f"the value '{name}' is {mean:g} in every {split} sample", where=where, expected="values that differ"
            )
        if split == "training" and not (0.1 <= spread <= 10 and abs(mean) <= 10):
            notes.append(
                f"the value '{name}' has mean {mean:.4g} and standard deviation {spread:.4g}: a network learns "
                f"(y - {mean:.4g}) / {spread:.4g} with less trouble"
            )
    return notes


def _fingerprint(inputs: Sequence[TensorSpec], classes: Sequence[str], parts: Sequence[tuple[Pool, np.ndarray]]) -> str:
    digest = hashlib.sha256(b"edgekd data 1")
    specs = [[spec.name, spec.dtype, list(spec.shape)] for spec in inputs]
    digest.update(json.dumps([specs, list(classes)]).encode())
    for pool, rows in parts:
        digest.update(len(rows).to_bytes(8, "little"))
        kind = "<f4" if pool.labels.dtype.kind == "f" else "<i8"
        if pool.labels.ndim > 1:
            digest.update(f"{kind} {pool.labels.shape[1:]}".encode())
            for row in rows:  # one by one, since all label maps at once would be large
                digest.update(pool.labels[row].astype(kind).tobytes())
        else:
            digest.update(pool.labels[rows].astype(kind).tobytes())
        for row in rows:
            digest.update(pool.digests[row])
    return digest.hexdigest()


def listed(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
