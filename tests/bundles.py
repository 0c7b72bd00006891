"""What the tests of bundles share: one for the host, and ways to run and to damage it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_onnx

from edgekd import plugins
from edgekd import target as targets
from edgekd.bundle import Source, write
from edgekd.store import sha256_of
from edgekd.types import Part, Preprocessing, Task, Verdict

PREPROCESSING = Preprocessing((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def host_bundle(folder: Path, **more: Any) -> Path:
    """A bundle for the host with an int8 and an fp32 model."""
    work = folder.parent / "models"
    work.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "name": "colours",
        "target": targets.load("host"),
        "models": [
            Source(tiny_onnx.classifier(work / "int8.onnx", "int8"), "int8"),
            Source(tiny_onnx.classifier(work / "fp32.onnx"), "fp32"),
        ],
        "samples": {"image": tiny_onnx.images()},
        "labels": tiny_onnx.LABELS,
        "preprocessing": PREPROCESSING,
        "provenance": {"artifacts": {"onnx": "0123456789abcdef0123"}, "torch": "2.14.1"},
        "verdict": Verdict("met", ("accuracy drop 0.2 % of 1 % allowed",)),
    }
    return write(folder, **(given | more))


def task_bundle(folder: Path, name: str) -> Path:
    """A bundle for the host whose model is one of that task."""
    work = folder.parent / "models"
    work.mkdir(exist_ok=True)
    task: Task = plugins.build("tasks", Part(name))
    make = tiny_onnx.segmenter if task.dense else tiny_onnx.classifier
    return host_bundle(folder, models=[Source(make(work / f"{name}.onnx"), "fp32")], task=task)


def run(bundle: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [python, str(bundle / "run.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest."""
    table = json.loads((bundle / "edgekd.json").read_text(encoding="utf-8"))
    change(table)
    (bundle / "edgekd.json").write_text(json.dumps(table), encoding="utf-8")


def relist(bundle: Path, name: str) -> None:
    """Enter a changed file in the manifest, as a forger would."""

    def change(table: dict[str, Any]) -> None:
        for file in table["files"]:
            if file["path"] == name:
                file.update(sha256=sha256_of(bundle / name), size_bytes=(bundle / name).stat().st_size)

    rewrite(bundle, change)
