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
    assert [row["settings"]["method"] for row in rows] == ["none", "kd", "kd, T = 1"]
    assert all(set(row["accuracy"]) == {"trec", "sst2", "subj", "mpqa"} for row in rows)
    teachers = [json.loads(line) for line in (tmp_path / "teachers.jsonl").read_text().splitlines()]
    one = next(row for row in teachers if row["settings"]["role"] == "teacher")
    assert one["parameters_without_embeddings"] >= 4 * rows[0]["parameters_without_embeddings"]
    assert "| student, kd, 1 epochs" in printed
    assert run("text.py", tmp_path, *texts)[0] == rows


def test_recurrent(tmp_path: Path, texts: tuple[str, ...]) -> None:
    rows, printed = run("recurrent.py", tmp_path, *texts, "--tasks", "sst2")
    assert [row["settings"]["method"] for row in rows] == ["none", "kd", "kd, T = 1", "ce + kd", "kd + cosine"]
    assert [bool(row["pairs"]) for row in rows] == [False, False, False, False, True]
    assert "| sst2 | kd + cosine | 1 |" in printed
    assert run("recurrent.py", tmp_path, *texts, "--tasks", "sst2")[0] == rows


def test_few_samples(tmp_path: Path) -> None:
    rows, printed = run("few_samples.py", tmp_path, "--epochs", "1", "--seeds", "0")
    assert len({row["settings"]["method"] for row in rows}) == len(rows) == 7
    assert all(row["teacher"] > 0.5 for row in rows)
    assert "| none | 1 |" in printed


@pytest.fixture
def few(tmp_path: Path, shared_data: Path) -> Path:
    """A data folder with thirty images of each class for training and thirty for tests."""
    folder = tmp_path / "data"
    (folder / "cifar10").mkdir(parents=True)
    (folder / "teachers").symlink_to(shared_data / "teachers")
    counts: Counter[str] = Counter()
    with (
        zipfile.ZipFile(shared_data / "cifar10" / "cifar10-images.zip") as whole,
        zipfile.ZipFile(folder / "cifar10" / "cifar10-images.zip", "w") as part,
    ):
        for name in whole.namelist():
            place = name.rpartition("/")[0]
            counts[place] += 1
            if counts[place] <= 30:
                part.writestr(name, whole.read(name))
    return folder


def test_vit(tmp_path: Path, few: Path) -> None:
    options = ("--epochs", "2", "--views", "1", "--teacher-epochs", "1", "--seeds", "0")
    rows, printed = run("vit.py", tmp_path, "--data", str(few), *options)
    found: Mapping[str, dict[str, Any]] = {row["settings"].get("method", "teacher"): row for row in rows}
    assert set(found) == {"none", "teacher", "kd", "kd + auto", "kd + srd"}
    assert all(found[name]["pairs"] for name in ("kd + auto", "kd + srd"))
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


def test_trained_and_ptq(tmp_path: Path, few: Path) -> None:
    options = ("--data", str(few), "--models", "resnet20")
    trained, printed = run("trained.py", tmp_path, *options)
    assert [row["settings"]["model"] for row in trained] == ["resnet20"]
    assert trained[0]["macs"] == 40_551_040
    assert "| resnet20 | 269,722 |" in printed
    weights = tmp_path / "store" / "trained" / "resnet20.safetensors"
    assert [file.name for file in weights.parent.iterdir()] == [weights.name]
    assert run("trained.py", tmp_path, *options)[0] == trained
    (tmp_path / "results.jsonl").unlink()
    more = (*options, "--tools", "edgekd", "--quick", "--latencies", str(tmp_path / "latencies.jsonl"))
    rows, printed = run("ptq.py", tmp_path, *more)
    (found,) = rows[0]["variants"].values()
    assert found["drop"]["value"] == pytest.approx(found["fp32"] - found["accuracy"]["value"])
    assert found["nodes"]["QuantizeLinear"] > 0
    (times,) = [json.loads(line) for line in (tmp_path / "latencies.jsonl").read_text().splitlines()]
    assert set(times["p50_ms"]) == {"fp32", "edgekd auto"}
    assert "| resnet20 | edgekd auto |" in printed
    assert run("ptq.py", tmp_path, *more)[0] == rows
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))  # another network: its results are others
    assert len(run("ptq.py", tmp_path, *more)[0]) == 2


def test_qad(tmp_path: Path, few: Path) -> None:
    options = ("--data", str(few), "--kinds", "rescaled", "--targets", "host", "--methods", "minmax")
    rows, printed = run("qad.py", tmp_path, *options)
    assert [row["settings"]["epochs"] for row in rows] == [0, 1]
    for row in rows:
        found = {name: each["value"] for name, each in row["accuracy"].items()}
        assert abs(found["graph"] - found["simulated"]) <= 1 / row["accuracy"]["float"]["n"]
    assert len(rows[1]["history"]) == 1
    assert "| rescaled | host | minmax + distilled | 1 |" in printed
    assert run("qad.py", tmp_path, *options)[0] == rows


def test_ptq_table(tmp_path: Path) -> None:
    def variant(drop: float) -> dict[str, Any]:
        interval = {"value": drop, "low": drop - 0.01, "high": drop + 0.01, "n": 100}
        return {"accuracy": interval, "drop": interval, "agreement": 0.9, "fp32": 0.8}

    peers = {"minmax": variant(0.02), "entropy": variant(0.01), "linear": {"failed": "no such operator"}}
    written = [
        {"settings": {"model": "net", "tool": "edgekd"}, "variants": {"auto": variant(0.005)}},
        {"settings": {"model": "net", "tool": "ort"}, "variants": peers | {"fp32 (own)": variant(0.0)}},
    ]
    ratio = {"value": 0.8, "low": 0.7, "high": 0.9, "n": 40, "verdict": "faster"}
    times = {
        "settings": {"model": "net"}, "load": 3.5,
        "p50_ms": {"fp32": 2.0, "edgekd auto": 0.8, "ort minmax": 1.0, "ort entropy": 3.0},
        "ours_over": dict.fromkeys(("fp32", "ort minmax", "ort entropy"), ratio),
    }  # fmt: skip
    lost = {"value": -0.005, "low": -0.01, "high": 0.0, "n": 100}
    against = {"settings": {"model": "net"}, "peer": "ort entropy", "lost_more": lost, "lost_more_than_picked": lost}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (tmp_path / "latencies.jsonl").write_text(json.dumps(times) + "\n")
    (tmp_path / "against.jsonl").write_text(json.dumps(against) + "\n")
    files = ("--latencies", str(tmp_path / "latencies.jsonl"), "--against", str(tmp_path / "against.jsonl"))
    _, printed = run("ptq.py", tmp_path, "--table", *files)
    assert "| net | ort linear | failed: no such operator |" in printed
    # The best peer loses least; the fastest one need not be the same.
    beside = "-0.50 (-1.00 … +0.00) | -0.50 (-1.00 … +0.00) | 0.80, faster | ort minmax | 0.80, faster | 3.5 |"
    assert f"| net | 80.00 | +0.50 | +1.00 | ort entropy | {beside}" in printed


def test_end_to_end_table(tmp_path: Path) -> None:
    def variant(drop: float, ms: float) -> dict[str, Any]:
        return {"accuracy": {"value": 0.9 - drop}, "drop": {"value": drop}, "size_bytes": 1000, "p50_ms": ms}

    ratio = {"value": 9.0, "low": 8.5, "high": 9.5, "n": 40}
    row = {
        "settings": {"student": "net", "epochs": 1}, "times_faster": {"teacher": ratio},
        "variants": {"teacher": variant(0.0, 9.0), "edgekd int8": variant(0.008, 1.0)},
        "best": "edgekd int8", "best_peer": "ort minmax", "goals": {"drop": True, "over_teacher": True},
    }  # fmt: skip
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    _, printed = run("end_to_end.py", tmp_path, "--table")
    assert "| teacher | 90.00 | +0.00 | 1 | 9.000 | 9.00 (8.50 … 9.50) |" in printed
    assert "drop: reached, over_teacher: reached" in printed


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
