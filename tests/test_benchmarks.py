"""Each benchmark in a tiny form: it runs, writes its lines, and does not do again what is there."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, folder: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """The lines that a benchmark has written after this run, and what it printed."""
    results = folder / "results.jsonl"
    command = [sys.executable, str(BENCHMARKS / script), "--results", str(results), "--store", str(folder / "store")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in results.read_text().splitlines()], done.stdout


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, ...]:
    """Options for four tiny tasks on texts, in which a word tells the class."""
    for task, classes in (("trec", 6), ("sst2", 2), ("subj", 2), ("mpqa", 2)):
        folder = tmp_path / "data" / "text" / task
        folder.mkdir(parents=True)
        for part, count in (("train", 60), ("test", 24)):
            with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
                rows = [[f"{task} word{at % classes} {part} {at}", at % classes] for at in range(count)]
                csv.writer(file).writerows([["text", "label"], *rows])
    options = {
        "data": tmp_path / "data", "teachers": tmp_path / "teachers.jsonl", "epochs": 1, "teacher-epochs": 1,
        "vocabulary": 120, "seeds": 0, "threads": 1,
    }  # fmt: skip
    return tuple(str(part) for name, value in options.items() for part in (f"--{name}", value))


def test_text(tmp_path: Path, texts: tuple[str, ...]) -> None:
    rows, printed = run("text.py", tmp_path, *texts)
    assert [row["settings"]["method"] for row in rows] == ["none", "kd"]
    assert all(set(row["accuracy"]) == {"trec", "sst2", "subj", "mpqa"} for row in rows)
    teachers = [json.loads(line) for line in (tmp_path / "teachers.jsonl").read_text().splitlines()]
    one = next(row for row in teachers if row["settings"]["role"] == "teacher")
    assert one["parameters_without_embeddings"] >= 4 * rows[0]["parameters_without_embeddings"]
    assert "| student, kd, 1 epochs" in printed
    assert run("text.py", tmp_path, *texts)[0] == rows


def test_recurrent(tmp_path: Path, texts: tuple[str, ...]) -> None:
    rows, printed = run("recurrent.py", tmp_path, *texts, "--tasks", "sst2")
    assert [row["settings"]["method"] for row in rows] == ["none", "kd", "kd + auto"]
    assert [bool(row["pairs"]) for row in rows] == [False, False, True]
    assert "| sst2 | kd + auto | 1 |" in printed
    assert run("recurrent.py", tmp_path, *texts, "--tasks", "sst2")[0] == rows


def test_vit(tmp_path: Path, shared_data: Path) -> None:
    few = tmp_path / "data"
    (few / "cifar10").mkdir(parents=True)
    (few / "teachers").symlink_to(shared_data / "teachers")
    counts: Counter[str] = Counter()
    with (
        zipfile.ZipFile(shared_data / "cifar10" / "cifar10-images.zip") as whole,
        zipfile.ZipFile(few / "cifar10" / "cifar10-images.zip", "w") as part,
    ):
        for name in whole.namelist():
            folder = name.rpartition("/")[0]
            counts[folder] += 1
            if counts[folder] <= 30:
                part.writestr(name, whole.read(name))
    options = ("--epochs", "2", "--views", "1", "--teacher-epochs", "1", "--seeds", "0")
    rows, printed = run("vit.py", tmp_path, "--data", str(few), *options)
    found: Mapping[str, dict[str, Any]] = {row["settings"].get("method", "teacher"): row for row in rows}
    assert set(found) == {"none", "teacher", "kd", "kd + auto"}
    assert found["kd + auto"]["pairs"]
    assert found["teacher"]["parameters"] > 30 * found["none"]["parameters"]
    assert "| kd + auto | 2 |" in printed


def test_cache(tmp_path: Path, shared_data: Path) -> None:
    options = ("--images", "200", "--memory-images", "200", "--views", "2", "--allowed-mb", "500")
    rows, _ = run("cache.py", tmp_path, "--data", str(shared_data), *options)
    parts = {name: [row for row in rows if row["settings"]["part"] == name] for name in ("replay", "weights", "memory")}
    assert all(row["samples_that_differ"] == row["answers_that_differ"] == 0 for row in parts["replay"])
    assert [row["answers_computed"] > 0 for row in parts["replay"]] == [True, False, False, False, False]
    assert all(row["equal_to_first"] for row in parts["weights"])
    assert parts["memory"][0]["outcome"] == "trained"


def test_vnni(tmp_path: Path, shared_data: Path) -> None:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed")
    options = ("--images", "20", "--calibration", "64", "--models", "resnet20")
    rows, printed = run("vnni.py", tmp_path, "--data", str(shared_data), *options)
    for row in rows:
        if row["settings"]["part"] == "layers":
            exact = row["settings"]["cpu"] == "here" or row["settings"]["layer"] == "depthwise"
            assert row["differ_from_exact" if exact else "differ_from_clipped"] == 0
    assert "| resnet20 | edgekd | Haswell | 20 |" in printed
    assert run("vnni.py", tmp_path, "--data", str(shared_data), *options)[0] == rows
