"""Text through `edgekd compress` and `edgekd distill`: one task to a bundle, and two tasks in one student."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call

GOOD, BAD = ("fine", "lovely", "bright"), ("dull", "awful", "grey")
RECIPE = """
name = "words"
[data]
name = "text"
path = "mood"
length = 8
[teacher]
model = "transformer"
width = 32
depth = 2
heads = 2
[teacher.train]
epochs = 6
batch_size = 32
optimizer = "adamw"
learning_rate = 0.003
precision = "fp32"
[student]
model = "lstm"
width = 16
embedding = 16
[distill]
epochs = 8
batch_size = 32
optimizer = "adamw"
learning_rate = 0.01
precision = "fp32"
"""
TWO = """
name = "two"
[[task]]
head = "mood"
data = { name = "text", path = "mood", length = 8, corpus = ["mood/train.csv", "place/train.csv"] }
teacher = [
  { model = "lstm", width = 32, weight = 2.0, train = TRAIN },
  { model = "gru", width = 32, train = TRAIN },
]
[[task]]
head = "place"
data = { name = "text", path = "place", length = 8, corpus = ["mood/train.csv", "place/train.csv"] }
teacher = { model = "lstm", width = 32, train = TRAIN }
[student]
model = "lstm"
width = 16
[distill]
epochs = 20
batch_size = 32
optimizer = "adamw"
learning_rate = 0.01
precision = "fp32"
""".replace("TRAIN", '{ epochs = 5, batch_size = 32, optimizer = "adamw", learning_rate = 0.01 }')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """mood/ and place/ with train.csv and test.csv each, in the current folder."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    filler = ("the", "day", "was", "quite", "and", "very", "sea", "hill")
    for name, words in (
        ("mood", (BAD, GOOD)),
        ("place", (("harbour", "wave"), ("forest", "stone"), ("street", "roof"))),
    ):
        (tmp_path / name).mkdir()
        for split, count in (("train", 200), ("test", 60)):
            with (tmp_path / name / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(["text", "label"])
                for index in range(count):
                    label = index % len(words)
                    text = [*random.choice(filler, 4), random.choice(words[label])]
                    rows.writerow([" ".join(random.permutation(text)), f"{name}{label}"])
    return tmp_path


def _run(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert call(*words, "--json") in (0, 3)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_text_goes_from_a_csv_to_a_bundle_with_its_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "edgekd.toml").write_text(RECIPE, encoding="utf-8")
    report = _run("compress", "--quick", "--target", "host", capsys=capsys)
    rows = {row["id"]: row for row in report["variants"]}
    assert rows["host/student-fp32"]["accuracy"]["value"] == pytest.approx(rows["student"]["accuracy"]["value"])
    dynamic = rows["host/student-dynamic"]  # worth it for an LSTM
    assert (dynamic["precision"], dynamic["stage"]) == ("dynamic", "quantized")
    assert dynamic["latency_ms"]["p50"] > 0
    assert dynamic["parity"]["cosine"] > 0.9
    assert dynamic["size_bytes"] < rows["host/student-fp32"]["size_bytes"]
    notes = " ".join(report["notes"])
    assert ("host/student-w8" in rows) != ("there is no student-w8: its weights" in notes)
    bundle = folder / "runs" / "words" / "bundles" / "host"
    listed = json.loads((bundle / "edgekd.json").read_text(encoding="utf-8"))["files"]
    assert "tokenizer.json" in str(listed)
    assert (bundle / "tokenizer.json").stat().st_size > 0
    assert call("bundle", "verify", str(bundle)) == 0


def test_one_student_of_two_tasks_and_three_teachers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "edgekd.toml").write_text(TWO, encoding="utf-8")
    found = _run("distill", capsys=capsys)
    tasks = {task["head"]: task for task in found["tasks"]}
    assert len(tasks["mood"]["teachers"]) == 2
    assert len(tasks["place"]["teachers"]) == 1
    for task in tasks.values():  # the word that decides is in every text: chance is a half and a third
        assert task["student"]["accuracy"]["value"] > 0.85
    assert (folder / "runs" / "two" / "student.safetensors").is_file()
    assert call("compress", "--quick") == 2
    assert "one output can be deployed" in capsys.readouterr().err


def test_the_resolved_recipe_of_two_tasks_makes_the_same_student(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "edgekd.toml").write_text(TWO, encoding="utf-8")
    first = _run("distill", "--quick", capsys=capsys)
    again = _run("distill", "runs/two/recipe.toml", "-o", "again", capsys=capsys)
    assert [task["student"] for task in again["tasks"]] == [task["student"] for task in first["tasks"]]


def test_two_tokenizers_for_one_student_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = TWO.replace(', corpus = ["mood/train.csv", "place/train.csv"]', ", vocabulary = 60")
    (folder / "edgekd.toml").write_text(own, encoding="utf-8")
    assert call("distill", "--quick") == 2
    assert "the same corpus" in capsys.readouterr().err
