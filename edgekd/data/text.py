"""Texts with labels in CSV files; they reach a network as token ids and a mask."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.data import wordpieces
from edgekd.data.labels import labels_of
from edgekd.data.splits import Pool, assemble, divide, listed
from edgekd.data.tables import columns
from edgekd.data.wordpieces import Encoded
from edgekd.errors import DataError
from edgekd.types import Batch, Dataset, LabelForm, TensorSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"  # the asset by which an app makes ids of a text
_HELD_OUT = ("dev", "val", "valid", "validation")
_COVERED = 0.99  # of the texts fit into the length that is chosen where none is given
_LONGEST = 512  # ids; what is chosen never exceeds it
_STEP = 8  # a chosen length is a multiple of it: vector units and tensor cores work so


def text(
    seed: int,
    *,
    path: str,
    text: str = "text",
    label: str | tuple[str, ...] = "label",
    labels: LabelForm | None = None,
    classes: tuple[str, ...] | None = None,
    tokenizer: str | None = None,
    vocabulary: int = 8000,
    corpus: tuple[str, ...] = (),
    length: int | None = None,
    test_fraction: float = 0.2,
    calibration: int | None = None,
) -> Dataset:
    """Texts in `train.csv` and, where there is one, `test.csv` of a folder; or in one CSV file.

    The inputs are `ids` and `mask`, both int64, batch × length; the mask is 1 for an id and 0 for the padding behind
    it. A validation file (`dev.csv`, `val.csv`, `valid.csv` or `validation.csv`) is the calibration split, or the test
    split where there is no `test.csv`. The tokenizer never sees a test text; it is the asset `tokenizer.json`.

    Args:
        seed: of the division into train, calibration and test.
        path: the folder or file; UTF-8, with a header line.
        text: name of the column of texts.
        label: name of the column of labels, or of several.
        labels: what they are: "classes" (integers or names, in one column), "flags" (0 or 1, a column each) or
            "values" (numbers, a column each); left out: what the task takes.
        classes: names of the classes, in the order of the logits; integer labels count in them from 0. Left out: the
            labels themselves, sorted, or the names of the columns.
        tokenizer: a tokenizer.json, or a folder that holds one (as of a Hugging Face model); left out: a lower-case
            WordPiece tokenizer is trained.
        vocabulary: number of pieces at most, where the tokenizer is trained.
        corpus: CSV files of training texts to train the tokenizer on, so that several tasks share one; left out: the
            training texts.
        length: ids that a text is cut or padded to; left out: what 99 of 100 of the corpus or training texts fit in,
            in multiples of 8, at most 512.
        test_fraction: fraction of the texts to test on, where there is no test file.
        calibration: texts held out of training, or taken of the validation file; left out: min(512, a tenth of the
            training texts), or the whole file.

    Raises:
        DataError: files, columns, texts or labels that are missing or cannot be read, or test texts in the corpus.
    """
    root, where = Path(path).expanduser(), str(path)
    files, notes = _files(root)
    titles, form = (label,) if isinstance(label, str) else label, labels or "classes"
    cells = {part: columns(file, (text, *titles)) for part, file in files.items()}
    texts = {part: found[0] for part, found in cells.items()}
    given, names = _labels([found[1:] for found in cells.values()], titles, classes, form, where)
    targets = dict(zip(files, given, strict=True))
    if corpus:
        known = _corpus(corpus, text, files)
    elif "test" in files:
        known = texts["train"]
    else:  # divided as `assemble` will, so that no test text is among them
        strata = targets["train"] if form == "classes" else np.zeros(len(targets["train"]), np.int64)
        rows = divide(strata, seed=seed, test_fraction=test_fraction, calibration=calibration, where=where)
        known = [texts["train"][row] for row in np.union1d(rows.train, rows.calibration)]
    made = _tokenizer(tokenizer, vocabulary, known, bool(corpus), where)
    wordpieces.fit(made, _covering(made, known) if length is None else length, where)
    encoded = {part: wordpieces.encode(made, texts[part]) for part in files}
    notes += _account(made, known if tokenizer is None else None, files, encoded)
    asset = made.to_str().encode()
    pools = {part: _pool(encoded[part], targets[part], texts[part], asset) for part in files}
    if "held out" in pools and calibration is not None:
        pools["held out"] = _some(pools["held out"], calibration, where)
    shape = ("batch", encoded["train"].ids.shape[1])
    dataset = assemble(
        root.stem,
        (TensorSpec("ids", "int64", shape, wordpieces.values(made)), TensorSpec("mask", "int64", shape)),
        names,
        pools["train"],
        pools.get("test"),
        images=False,
        seed=seed,
        test_fraction=test_fraction,
        calibration=calibration,
        where=where,
        form=form,
        held_out=pools.get("held out"),
        notes=notes,
    )
    return replace(dataset, assets={TOKENIZER: asset})


class TextSplit:
    """The texts `rows` of encoded ones in memory; a batch is widened to int64 and gets its mask as it is read."""

    def __init__(self, encoded: Encoded, labels: np.ndarray, rows: np.ndarray) -> None:
        self._encoded, self._labels, self._rows = encoded, labels, rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray:
        """Of every sample, in order."""
        labels: np.ndarray = self._labels[self._rows]
        return labels

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One Batch for each index array, in that order."""
        positions = np.arange(self._encoded.ids.shape[1])
        for indices in order:
            rows = self._rows[indices]
            mask = (positions < self._encoded.counts[rows, None]).astype(np.int64)
            yield Batch(indices, {"ids": self._encoded.ids[rows].astype(np.int64), "mask": mask}, self._labels[rows])


def _files(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The file of each part, in the order train, held out, test."""
    if not root.is_dir():
        return {"train": root}, []
    there = {file.stem: file for file in sorted(root.glob("*.csv"))}
    if "train" not in there:
        raise DataError(
            f"there is {listed([file.name for file in there.values()]) or 'no CSV file'}",
            where=str(root),
            expected="train.csv, and test.csv where there is a test split",
            fix="or name one file, which is divided into train and test",
        )
    files = {"train": there.pop("train")}
    held_out = next((there.pop(stem) for stem in _HELD_OUT if stem in there), None)
    if "test" in there:
        files |= {} if held_out is None else {"held out": held_out}
        files["test"] = there.pop("test")
    elif held_out is not None:
        files["test"] = held_out
    return files, [f"{file.name} was not used" for file in there.values()]


def _labels(
    cells: Sequence[Sequence[Sequence[str]]],
    names: Sequence[str],
    classes: Sequence[str] | None,
    form: LabelForm,
    where: str,
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Labels of each part from the cells of its label columns, and the names of what a network gives for them."""
    if form == "maps":
        raise DataError("a text has no grid of labels", where=where, expected="classes, flags or values")
    if form != "classes":
        return labels_of([_numbers(part, names, where) for part in cells], classes or names, form, where)
    if len(names) > 1:
        raise DataError(f"there are {len(names)} columns of labels", where=where, expected="one, with the class")
    words = [[cell.strip() for cell in part[0]] for part in cells]
    found = {word for part in words for word in part}
    whole = all(re.fullmatch(r"-?\d{1,9}", word) for word in found)
    if whole and classes is not None:
        return labels_of([np.array(part, dtype=np.int64) for part in words], classes, form, where)
    named = classes or sorted(found, key=int if whole else None)
    return labels_of([np.array(part) for part in words], named, form, where)


def _numbers(columns: Sequence[Sequence[str]], names: Sequence[str], where: str) -> np.ndarray:
    for name, column in zip(names, columns, strict=True):
        for cell in column:
            try:
                float(cell)
            except ValueError as problem:
                raise DataError(f"'{name}' holds '{cell}'", where=where, expected="a number") from problem
    return np.array(columns, dtype=np.float64).T


def _corpus(corpus: Sequence[str], text: str, files: Mapping[str, Path]) -> list[str]:
    """The texts of all files of the corpus, none of which may hold test texts."""
    ours = [file.resolve() for part, file in files.items() if part != "train" or "test" not in files]
    known = []
    for name in corpus:
        file = Path(name).expanduser()
        if file.resolve() in ours or file.stem == "test":
            raise DataError(
                "it holds test texts, which the tokenizer must not see",
                where=f"corpus: {name}",
                expected="the train.csv of each task",
                fix="divide a single file into train.csv and test.csv" if file.stem != "test" else "leave it out",
            )
        known += columns(file, (text,))[0]
    return known


def _tokenizer(path: str | None, vocabulary: int, known: Sequence[str], corpus: bool, where: str) -> Tokenizer:
    if path is None:
        return wordpieces.trained(known, vocabulary, where)
    if corpus:
        raise DataError("tokenizer and corpus are both given", where=where, fix="leave out the one that is not meant")
    return wordpieces.loaded(Path(path).expanduser())


def _covering(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """The length that nearly all texts fit in."""
    lengths = np.sort(wordpieces.lengths(tokenizer, texts))
    longest = int(lengths[min(len(lengths) - 1, int(_COVERED * len(lengths)))])
    return min(_LONGEST, -(-longest // _STEP) * _STEP)


def _account(
    tokenizer: Tokenizer, known: Sequence[str] | None, files: Mapping[str, Path], encoded: Mapping[str, Encoded]
) -> list[str]:
    """What a careful reader wants to know of the ids."""
    notes = []
    if known is not None:
        notes.append(f"a tokenizer of {tokenizer.get_vocab_size():,} pieces was trained on {len(known):,} texts")
    for part, file in files.items():
        size, length = encoded[part].ids.shape
        if encoded[part].cut:
            notes.append(f"{encoded[part].cut:,} of {size:,} texts in {file.name} were cut to {length} ids")
    unknown = tokenizer.token_to_id(wordpieces.UNKNOWN)
    tested = encoded.get("test")
    if unknown is not None and tested is not None and (tested.ids == unknown).any():
        share = (tested.ids == unknown).sum() / tested.counts.sum()
        notes.append(f"{share:.2%} of the ids in {files['test'].name} stand for words that the tokenizer does not know")
    return notes


def _pool(encoded: Encoded, labels: np.ndarray, texts: Sequence[str], tokenizer: bytes) -> Pool:
    """A pool whose digests are of the whole texts and of the tokenizer: ids alone would not tell what was cut."""
    start = hashlib.sha256(tokenizer).digest()
    digests = [hashlib.sha256(start + text.encode()).digest() for text in texts]
    return Pool(labels, digests, lambda rows: TextSplit(encoded, labels, rows))


def _some(pool: Pool, wanted: int, where: str) -> Pool:
    """`wanted` samples of a pool, evenly over it."""
    if wanted < 1:
        raise DataError(f"calibration is {wanted}", where=where, expected="at least one sample")
    rows = np.linspace(0, len(pool.labels) - 1, min(wanted, len(pool.labels))).astype(np.int64)
    return Pool(pool.labels[rows], [pool.digests[row] for row in rows], lambda chosen: pool.take(rows[chosen]))
