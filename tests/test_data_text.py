"""Texts from CSV files: what is read, how ids come about, and what is told where something is wrong."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgekd.data import load
from edgekd.data.text import TOKENIZER, text
from edgekd.data.wordpieces import trained
from edgekd.errors import DataError
from edgekd.types import Dataset, Part, Split

ANIMALS = ["cat", "dog", "horse", "mouse", "lion", "tiger", "whale", "sparrow"]
VERBS = ["sleeps", "runs", "eats", "jumps", "hides"]
ROWS = [(f"The {animal} {verb}, {n}!", n % 2) for n, animal in enumerate(ANIMALS) for verb in VERBS]
TESTS = [(f"A {animal} never {verb}.", n % 2) for n, animal in enumerate(ANIMALS) for verb in VERBS[:2]]


def written(path: Path, rows: Iterable[Sequence[object]], header: Sequence[str] = ("text", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    written(tmp_path / "task" / "train.csv", ROWS)
    written(tmp_path / "task" / "test.csv", TESTS)
    return tmp_path / "task"


def made(path: Path, **options: Any) -> Dataset:
    given: dict[str, Any] = {"path": str(path), "vocabulary": 200} | options
    return load(Part("text", given), 0)


def all_of(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (batch,) = split.batches([np.arange(len(split))])
    return batch.inputs["ids"], batch.inputs["mask"], batch.labels


# ---------------------------------------------------------------- inputs


def test_ids_and_mask_are_what_the_specs_say(folder: Path) -> None:
    data = made(folder)
    assert [(spec.name, spec.dtype) for spec in data.inputs] == [("ids", "int64"), ("mask", "int64")]
    length, values = data.inputs[0].shape[1], data.inputs[0].values
    assert data.inputs[0].shape == data.inputs[1].shape == ("batch", length)
    assert values is not None
    assert data.inputs[1].values is None
    assert (len(data.train), len(data.calibration), len(data.test)) == (36, 4, 16)
    assert data.classes == ("0", "1")
    assert not data.images
    for split in (data.train, data.calibration, data.test):
        ids, mask, labels = all_of(split)
        assert ids.dtype == mask.dtype == labels.dtype == np.int64
        assert ids.shape == mask.shape == (len(split), length)
        assert 0 <= ids.min() <= ids.max() < values
        assert (np.diff(mask, axis=1) <= 0).all()  # ones, then zeros
        assert (ids[mask == 0] == 0).all()
        assert (ids[:, 0] == 2).all()
        assert (ids[np.arange(len(ids)), mask.sum(1) - 1] == 3).all()


def test_batches_come_in_the_order_asked_for(folder: Path) -> None:
    train = made(folder).train
    ids, mask, labels = all_of(train)
    order = [np.array([5, 0, 5]), np.array([35])]
    for batch, rows in zip(train.batches(order), order, strict=True):
        assert np.array_equal(batch.indices, rows)
        assert np.array_equal(batch.inputs["ids"], ids[rows])
        assert np.array_equal(batch.inputs["mask"], mask[rows])
        assert np.array_equal(batch.labels, labels[rows])
    assert np.array_equal(train.labels, labels)  # type: ignore[attr-defined]  # read by the checks of tasks


def test_an_app_gets_the_same_ids_from_the_asset(folder: Path) -> None:
    data = made(folder)
    tokenizer = Tokenizer.from_buffer(data.assets[TOKENIZER])
    ids, mask, _ = all_of(data.test)
    for row, (sentence, _) in enumerate(TESTS):
        encoding = tokenizer.encode(sentence)
        assert encoding.ids == ids[row].tolist()
        assert encoding.attention_mask == mask[row].tolist()


def test_an_app_without_the_library_gets_them_too(folder: Path) -> None:
    known = Tokenizer.from_buffer(made(folder).assets[TOKENIZER]).get_vocab()

    def pieces(word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = [end for end in range(len(word), start, -1) if prefix + word[start:end] in known]
            if not ends:
                return [1]
            found.append(known[prefix + word[start : ends[0]]])
            start = ends[0]
        return found

    words = ["the", "sparrow", "runs", ",", "ox", "☃", "!"]
    ids = [2, *(piece for word in words for piece in pieces(word)), 3]
    assert 1 in ids
    tokenizer = Tokenizer.from_buffer(made(folder).assets[TOKENIZER])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    assert tokenizer.encode("The sparrow RUNS, ox ☃!").ids == ids


def test_length_covers_nearly_all_texts_or_is_the_given_one(folder: Path) -> None:
    assert made(folder).inputs[0].shape[1] == 8
    data = made(folder, length=4)
    ids, mask, _ = all_of(data.test)
    assert ids.shape == (16, 4)
    assert mask.all()
    assert (ids[:, -1] == 3).all()
    assert "40 of 40 texts in train.csv were cut to 4 ids" in data.notes
    assert not any("cut" in note for note in made(folder, length=64).notes)


# ---------------------------------------------------------------- the tokenizer

AGAIN = """
import hashlib, sys
from edgekd.data import load
from edgekd.types import Part
data = load(Part("text", {"path": sys.argv[1], "vocabulary": 200}), 0)
print(data.fingerprint, hashlib.sha256(data.assets["tokenizer.json"]).hexdigest())
"""


def test_equal_texts_give_equal_ids_in_every_process(folder: Path) -> None:
    told = {
        subprocess.run(
            [sys.executable, "-c", AGAIN, str(folder)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1
    assert made(folder).fingerprint in told.pop()


def test_the_order_of_texts_does_not_matter_to_the_tokenizer() -> None:
    sentences = [sentence for sentence, _ in ROWS]
    assert trained(sentences, 200, "").to_str() == trained(sentences[::-1], 200, "").to_str()


def test_rare_characters_do_not_fill_the_vocabulary() -> None:
    many = [chr(0x4E00 + n) for n in range(2000)]
    known = trained(["the cat sleeps " * 3 + character for character in many], 1200, "").get_vocab()
    assert len(known) <= 1200
    assert "cat" in known
    assert sum(character in known for character in many) < 1000


def test_the_tokenizer_never_sees_a_test_text(folder: Path, tmp_path: Path) -> None:
    before = made(folder).assets
    written(folder / "test.csv", [(f"zzyzx {sentence}", label) for sentence, label in TESTS])
    assert made(folder).assets == before
    one = written(tmp_path / "all.csv", [(f"word{n} " * 20, n % 2) for n in range(10, 50)])
    data = made(one, vocabulary=2000, length=30)
    known = Tokenizer.from_buffer(data.assets[TOKENIZER]).get_vocab()
    assert sum(f"word{n}" in known for n in range(10, 50)) == len(data.train) + len(data.calibration) == 32


def test_fingerprint_covers_texts_labels_and_tokenizer(folder: Path) -> None:
    first = made(folder)
    prints = [first.fingerprint, made(folder, vocabulary=70).fingerprint, made(folder, length=7).fingerprint]
    assert made(folder).fingerprint == first.fingerprint
    written(folder / "test.csv", [(TESTS[0][0], 1 - TESTS[0][1]), *TESTS[1:]])
    prints.append(made(folder).fingerprint)
    written(folder / "test.csv", [(f"{TESTS[0][0]} {'and so on ' * 99} to the end", TESTS[0][1]), *TESTS[1:]])
    prints.append(made(folder).fingerprint)
    written(folder / "test.csv", [(f"{TESTS[0][0]} {'and so on ' * 99} to the End", TESTS[0][1]), *TESTS[1:]])
    prints.append(made(folder).fingerprint)  # cut off, but told
    assert len(set(prints)) == len(prints)


def test_a_corpus_makes_one_vocabulary_for_several_tasks(folder: Path, tmp_path: Path) -> None:
    other = written(
        tmp_path / "other" / "train.csv",
        [(f"How big is a {animal}?", "ABC"[n % 3]) for n in range(9) for animal in ANIMALS],
    )
    written(other.with_name("test.csv"), [("Is a whale big?", "A")])
    corpus = [str(folder / "train.csv"), str(other)]
    one, two = made(folder, corpus=corpus), made(other.parent, corpus=corpus[::-1])
    assert one.assets == two.assets
    assert one.inputs == two.inputs
    assert two.classes == ("A", "B", "C")
    assert made(folder).assets != one.assets
    assert any(note.endswith("was trained on 112 texts") for note in one.notes)


@pytest.mark.parametrize("name", ["test.csv", "all.csv"])
def test_a_corpus_with_test_texts_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    file = folder / "test.csv" if name == "test.csv" else written(tmp_path / name, ROWS)
    with pytest.raises(DataError, match="test texts, which the tokenizer must not see"):
        made(folder if name == "test.csv" else file, corpus=[str(file)])


def test_a_tokenizer_is_loaded_from_a_file_or_folder(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "model" / "tokenizer.json"
    kept.parent.mkdir()
    kept.write_bytes(made(folder, vocabulary=70).assets[TOKENIZER])
    trained_here = made(folder, vocabulary=70)
    for path in (kept, kept.parent):
        data = made(folder, tokenizer=str(path))
        assert data.inputs == trained_here.inputs
        assert data.fingerprint == trained_here.fingerprint
        assert not any("was trained" in note for note in data.notes)
    plain = Tokenizer.from_file(str(kept))
    plain.no_padding()
    plain.no_truncation()
    plain.save(str(kept))
    assert all_of(made(folder, tokenizer=str(kept)).test)[0].tolist() == all_of(trained_here.test)[0].tolist()
    with pytest.raises(DataError, match="both given"):
        made(folder, tokenizer=str(kept), corpus=[str(folder / "train.csv")])
    with pytest.raises(DataError, match=r"did you mean 'tokenizer\.json'"):
        made(folder, tokenizer=str(kept.parent / "tokeniser.json"))
    kept.write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        made(folder, tokenizer=str(kept))


def test_reading_starts_no_threads_that_warn_when_a_worker_is_forked(folder: Path) -> None:
    script = (
        "import os, sys\nfrom edgekd.data.text import text\n"
        "text(0, path=sys.argv[1], vocabulary=200)\nos.waitpid(os.fork() or os._exit(0), 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True, text=True)
    assert done.stderr == ""


# ---------------------------------------------------------------- splits and labels


def test_a_validation_file_is_the_calibration_split(folder: Path) -> None:
    written(folder / "dev.csv", [(f"Is it a {animal}?", n % 2) for n, animal in enumerate(ANIMALS)])
    written(folder / "extra.csv", ROWS)
    data = made(folder)
    assert (len(data.train), len(data.calibration), len(data.test)) == (40, 8, 16)
    assert "extra.csv was not used" in data.notes
    assert np.array_equal(all_of(data.calibration)[2], np.arange(8) % 2)
    fewer = made(folder, calibration=3)
    assert (len(fewer.train), len(fewer.calibration)) == (40, 3)
    assert len(made(folder, calibration=100).calibration) == 8
    with pytest.raises(DataError, match="calibration is 0"):
        made(folder, calibration=0)
    (folder / "test.csv").unlink()
    data = made(folder)
    assert (len(data.train), len(data.calibration), len(data.test)) == (36, 4, 8)


def test_one_file_is_divided(tmp_path: Path) -> None:
    data = made(written(tmp_path / "all.csv", ROWS), test_fraction=0.25)
    assert (len(data.train), len(data.calibration), len(data.test)) == (27, 3, 10)
    assert data.name == "all"


@pytest.mark.parametrize(
    ("labels", "options", "classes", "first"),
    [
        (["yes", "no"], {}, ("no", "yes"), 1),
        (["yes", "no"], {"classes": ["yes", "no"]}, ("yes", "no"), 0),
        (["0", "1"], {"classes": ["bad", "good"]}, ("bad", "good"), 0),
        (["5", "10"], {}, ("5", "10"), 0),
        ([" 1 ", "0"], {}, ("0", "1"), 1),
    ],
)
def test_labels_are_names_or_integers(
    tmp_path: Path, labels: list[str], options: dict[str, Any], classes: tuple[str, ...], first: int
) -> None:
    for name in ("train.csv", "test.csv"):
        written(tmp_path / name, [(sentence, labels[n % 2]) for n, (sentence, _) in enumerate(ROWS)])
    data = made(tmp_path, **options)
    assert data.classes == classes
    assert all_of(data.test)[2][0] == first


def test_other_columns_flags_and_values(tmp_path: Path) -> None:
    rows = [(n, sentence, n % 2, int(n % 3 == 0), n / 10) for n, (sentence, _) in enumerate(ROWS)]
    file = written(tmp_path / "all.csv", rows, header=("id", " review", "rude", "long", "stars"))
    flags = made(file, text="review", label=["rude", "long"], labels="flags")
    assert flags.classes == ("rude", "long")
    assert all_of(flags.test)[2].shape == (8, 2)
    values = text(0, path=str(file), text="review", label="stars", labels="values", vocabulary=200)
    assert values.classes == ("stars",)
    assert all_of(values.train)[2].dtype == np.float32
    for options, told in (
        ({"label": ["rude", "long"]}, "there are 2 columns of labels"),
        ({"label": "review", "labels": "values"}, "'review' holds 'The cat sleeps, 0!'; expected a number"),
        ({"label": "rude", "labels": "maps"}, "a text has no grid"),
    ):
        with pytest.raises(DataError, match=told.replace("(", r"\(")):
            made(file, text="review", **options)


def test_doubts_are_told(folder: Path) -> None:
    written(folder / "test.csv", [*TESTS, ROWS[0], ("☃ ☃ ☃", 1)])
    notes = made(folder).notes
    assert "1 of 18 test samples are exact copies of training samples" in notes
    assert any("of the ids in test.csv stand for words that the tokenizer does not know" in note for note in notes)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"texts,label\na b,0\n",
            "there is no column 'text' in the header; expected one of texts, label; did you mean",
        ),
        (b"text,text,label\na,b,0\n", "there is more than one column 'text'"),
        (b"", "expected a header line, e.g. text,label"),
        (b"text,label\n", "there are no rows"),
        (b"text,label\na, b,0\n", "line 2 has 3 cells; expected 2, as the header. Put a text that holds a comma"),
        (b'text,label\n"a "quoted" word",0\n', "not CSV, in or before line 2"),
        (b'text,label\n"never closed,0\n', "not CSV, in or before line 2: unexpected end of data"),
        (b"text,label\na,0\n\n  ,1\n", "'text' is empty in line 4"),
        (b"text,label\na,0\nb,\n", "'label' is empty in line 3"),
        ("text,label\ncafé,0\n".encode("latin-1"), "line 2 is not UTF-8. Save the file as UTF-8"),
        ("text,label\na,0\n".encode("utf-16"), "line 1 is not UTF-8"),
        (b"text,label\na,0\nb,0\nc,0\nd,0\n", "there is 1 class"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        made(tmp_path)
    assert told in str(caught.value)
    assert "train.csv" in str(caught.value) or "class" in told


def test_a_byte_order_mark_and_quoted_line_breaks_are_no_trouble(tmp_path: Path) -> None:
    lines = "".join(f'"{sentence}\r\nand ""more""",{label}\r\n' for sentence, label in ROWS)
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + f"text,label\r\n{lines}".encode())
    data = made(tmp_path)
    assert len(data.train) + len(data.calibration) + len(data.test) == 40


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vocabulary": 20}, "vocabulary is 20; expected at least"),
        ({"length": 2}, "length is 2; expected more than the 2 marks around a text"),
        ({"classes": ["one"]}, "20 labels name no class, the first is 1"),
        ({"corpus": ["nowhere.csv"]}, "no such file"),
    ],
)
def test_impossible_options_are_told(folder: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as caught:
        made(folder, **options)
    assert told in str(caught.value)


def test_labels_and_files_that_are_missing(folder: Path, tmp_path: Path) -> None:
    written(folder / "test.csv", [("What is it?", 2), *TESTS])
    with pytest.raises(DataError, match="the test split has classes that training never sees: '2'"):
        made(folder)
    (folder / "train.csv").rename(folder / "training.csv")
    with pytest.raises(DataError, match=r"there is test.csv, training.csv; expected train.csv"):
        made(folder)
    with pytest.raises(DataError, match="did you mean 'task'"):
        made(tmp_path / "taks")


# ---------------------------------------------------------------- real texts


@pytest.mark.parametrize(("name", "classes", "test"), [("trec", 6, 500), ("sst2", 2, 1821)])
def test_real_texts(shared_data: Path, name: str, classes: int, test: int) -> None:
    data = text(0, path=str(shared_data / "text" / name), vocabulary=2000)
    assert (len(data.classes), len(data.test)) == (classes, test)
    ids, mask, _ = all_of(data.test)
    assert 5 < mask.sum(1).mean() < ids.shape[1] <= 96
    assert (ids == 1).mean() < 0.01  # nearly every word has pieces
