"""Regression, several labels and segmentation through the whole of `edgekd compress`, on images made by rule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    # A small U: full size, half size, and back; a class for each pixel, or its mean over the image.
    def __init__(self, outputs, width, dense):
        super().__init__()
        def block(channels, features, stride=1):
            return nn.Sequential(
                nn.Conv2d(channels, features, 3, stride, 1, bias=False), nn.BatchNorm2d(features), nn.ReLU()
            )
        self.first, self.lower, self.joined = block(3, width), block(width, 2 * width, 2), block(3 * width, width)
        self.dense, self.head = dense, nn.Conv2d(width, outputs, 1) if dense else nn.Linear(width, outputs)

    def forward(self, x):
        first = self.first(x)
        lower = nn.functional.interpolate(self.lower(first), scale_factor=2.0, mode="nearest")
        joined = self.joined(torch.cat([first, lower], 1))
        return self.head(joined if self.dense else joined.mean((2, 3)))

def net(outputs, *, width: int = 12, dense: bool = False):
    return Net(outputs, width, dense)
"""
RECIPE = """
name = "small"
[task]
name = "{task}"
[data]
name = "npz"
path = "data.npz"
[teacher]
model = "own_models_of_tasks:net"
dense = {dense}
[teacher.train]
epochs = 80
batch_size = 32
precision = "fp32"
optimizer = "adamw"
learning_rate = 0.01
[student]
model = "own_models_of_tasks:net"
width = 6
dense = {dense}
[distill]
epochs = 80
batch_size = 32
precision = "fp32"
optimizer = "adamw"
learning_rate = 0.01
[augment]
flip = true
[budget]
max_accuracy_drop = 0.9
"""


def images() -> tuple[np.ndarray, np.ndarray]:
    """Noise with squares of full red, green and blue, and which of the three is where (0: none)."""
    random = np.random.default_rng(0)
    x = random.integers(0, 200, (240, 12, 12, 3), np.uint8)
    for image in x:
        for channel in np.flatnonzero(random.random(3) < 0.5):
            row, column = random.integers(0, 7, 2)
            image[row : row + 5, column : column + 5, channel] = 255
    full = x == 255
    return x, np.where(full.any(3), full.argmax(3) + 1, 0).astype(np.uint8)


def labels(task: str, x: np.ndarray, where: np.ndarray) -> dict[str, np.ndarray]:
    if task == "segmentation":
        where = where.copy()
        where[:, 0] = 255  # nobody labelled the first row
        return {"y": where, "classes": np.array(["none", "red", "green", "blue"])}
    if task == "multilabel":
        return {"y": np.stack([(where == c).any((1, 2)) for c in (1, 2, 3)], 1), "classes": np.array(["r", "g", "b"])}
    return {"y": (x.mean((1, 2)) / 255 - 0.45) * 8, "classes": np.array(["red", "green", "blue"])}


@pytest.mark.parametrize(
    ("task", "metric", "others", "least"),
    [
        pytest.param("regression", "R²", {"RMSE", "MAE"}, 0.3, marks=pytest.mark.slow),
        pytest.param("multilabel", "label accuracy", {"macro F1", "exact match"}, 0.6, marks=pytest.mark.slow),
        ("segmentation", "pixel accuracy", {"mIoU"}, 0.8),
    ],
)
def test_a_task_from_data_to_bundle(
    task: str, metric: str, others: set[str], least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    x, where = images()
    np.savez(tmp_path / "data.npz", x=x, **labels(task, x, where))  # type: ignore[arg-type]  # see numpy's stubs
    (tmp_path / "own_models_of_tasks.py").write_text(MODELS)
    dense = str(task == "segmentation").lower()
    (tmp_path / "edgekd.toml").write_text(RECIPE.format(task=task, dense=dense))
    assert call("compress", "--target", "host", "--quick") == 0
    run = tmp_path / "runs" / "small"
    report = json.loads((run / "report.json").read_text())
    rows: dict[str, dict[str, Any]] = {row["id"]: row for row in report["variants"]}
    assert report["metric"] == metric
    assert rows["host/student-int8"]["accuracy"]["value"] > least
    for name, row in rows.items():
        assert set(row["metrics"]) == others, name
        assert row["verdict"]["reasons"][0].startswith(metric)
        assert (row["agreement"] is None) == (task == "regression")
    assert rows["teacher"]["accuracy"]["value"] == pytest.approx(
        rows["host/teacher-fp32"]["accuracy"]["value"], abs=1e-4
    )
    assert f"{metric} drop at most 90 points" in (run / "report.md").read_text()
    _bundle_answers(task, run / "bundles" / "host", x[0], where[0])


def _bundle_answers(task: str, bundle: Path, image: np.ndarray, where: np.ndarray) -> None:
    import edgekd

    np.save(bundle.parent / "i.npy", image)
    command = [sys.executable, "run.py", "../i.npy", "--selftest"]
    done = subprocess.run(command, cwd=bundle, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {line.split()[1] for line in done.stdout.splitlines() if not line.startswith("selftest")}
    model = edgekd.load(bundle)
    answer = model(image)
    if task == "segmentation":
        assert (answer.classes == where).mean() > 0.7
        assert said == {label for label, _ in answer.shares()}
    elif task == "multilabel":
        assert said == ({label for label, _ in answer.set()} or {"label"})
    else:
        assert said == set(answer.by_name()) == {"red", "green", "blue"}
    model.close()
