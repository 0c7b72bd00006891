"""A user's own model and a folder of images, from `edgekd init` to a bundle that an app opens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from PIL import Image
from sklearn.datasets import load_digits

MODELS = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width), nn.ReLU6())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def student(classes, *, width: int = 16):
    return Small(classes, width)
"""


def _photos(folder: Path) -> None:
    """Real images: scanned digits 0 to 3, enlarged to 20 × 24 RGB files."""
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label < 4 and i < 700:
            path = folder / f"digit {label}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).convert("RGB").resize((20, 24)).save(path, quality=95)


def test_a_timm_teacher_and_a_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _photos(tmp_path / "my photos")
    (tmp_path / "own_models_of_test.py").write_text(MODELS)
    words = (
        "my photos",
        "--name",
        "photos",
        "--teacher",
        "timm.test_resnet",
        "--student",
        "own_models_of_test:student",
    )
    assert call("init", *words) == 0
    recipe = tmp_path / "edgekd.toml"
    text = recipe.read_text().replace("crop_pixels = 4\nflip = true", "crop_pixels = 2")
    teacher, student = text.split("[student]")
    teacher = teacher.replace("epochs = 30", "epochs = 8\nbatch_size = 32")
    student = student.replace("epochs = 30", "epochs = 40\nbatch_size = 32")
    text = f"{teacher}[student]\nwidth = 24{student}"
    recipe.write_text(text)
    assert call("compress", "--target", "host", "--target", "jetson", "--max-drop", "30%") == 0
    report = json.loads((tmp_path / "runs" / "photos" / "report.json").read_text())
    rows = {row["id"]: row for row in report["variants"]}
    assert rows["host/student-int8"]["agreement"] > 0.6
    assert rows["host/student-int8"]["parity"]["cosine"] > 0.9
    import edgekd

    model = edgekd.load(tmp_path / "runs" / "photos" / "bundles" / "host")
    assert model.labels == tuple(f"digit {i}" for i in range(4))
    answer = model(Image.open(next((tmp_path / "my photos" / "digit 2").glob("*.jpg"))))
    assert answer.label in model.labels
