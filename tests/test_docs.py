"""The documentation says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import edgekd
from edgekd import plugins, recipe, toml
from edgekd.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "reference.py"), "--check"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            path = link.partition("#")[0]
            assert (page.parent / path).exists(), f"{page.name}: {link}"


def test_every_verb_and_part_that_a_page_names_exists() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for verb in re.findall(r"(?:^(?:tools/)?|`|-m )edgekd ([a-z]+)", text, re.MULTILINE):
            assert verb in cli.commands, f"{page.name}: edgekd {verb}"
    parts = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    for kind in ("data", "tasks", "models", "losses", "backends"):
        for name in plugins.names(kind):
            assert f"### `{name}`" in parts


def test_every_verb_is_in_the_readme() -> None:
    (line,) = re.findall(r"## Commands\n\n(.+?); see", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert [name.split()[0] for name in re.findall(r"`([^`]+)`", line)] == list(cli.commands)


def test_the_python_samples_on_distillation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would run them: one after another, each going on with what those before it left."""
    monkeypatch.chdir(tmp_path)
    samples = _samples("distillation.md", "python")
    assert len(samples) == 6
    names = _what_a_reader_has()
    for text in samples:
        if text.startswith("# my_losses.py"):
            (tmp_path / "my_losses.py").write_text(text)
        exec(compile(text, "docs/distillation.md", "exec"), names)
    assert (tmp_path / "runs" / "student" / "weights.safetensors").exists()
    assert len(names["distiller"].objective.terms) > 1, "the table that was read back adds losses"
    own = [{"name": "my_losses:mine", "power": 4.0}]
    again = edgekd.Distiller(names["teacher"], names["student"], names["images"], losses=own)
    assert again(names["images"]).item() > 0


@pytest.mark.parametrize("page", ["distillation.md", "own-model.md"])
def test_the_recipe_samples_are_recipes(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fills in what it does not say from a small recipe."""
    monkeypatch.chdir(tmp_path)
    for text in _samples(page, "python"):
        if text.startswith("# my_"):
            (tmp_path / text.split()[1]).write_text(text)
    small = {
        "name": "small",
        "data": {"name": "digits"},
        "teacher": {"model": "resnet20"},
        "student": {"model": "resnet8"},
    }
    found = _samples(page, "toml")
    assert found
    for text in found:
        table = toml.loads(text)
        several = isinstance(table.get("task"), list)
        rest = {key: value for key, value in small.items() if not several or key not in ("data", "teacher")}
        recipe.parse(rest | table, source=page, folder=tmp_path)


def test_the_loop_of_the_readme_runs() -> None:
    (text,) = (sample for sample in _samples("../README.md", "python") if "Distiller" in sample)
    names = _what_a_reader_has() | {"edgekd": edgekd, "torch": torch}
    before = [value.clone() for value in names["student"].parameters()]
    exec(compile(text, "README.md", "exec"), names)
    after = list(names["student"].parameters())
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def _samples(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.+?)```", text, re.DOTALL)


def _what_a_reader_has() -> dict[str, Any]:
    """A teacher, a student and a few images, by the names that the samples use."""
    torch.manual_seed(0)

    def network(width: int) -> nn.Module:
        def block(channels: int, features: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, features, 3, 2, 1), nn.BatchNorm2d(features), nn.ReLU()]

        stages = block(3, width) + block(width, 2 * width)
        return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3))

    labels = torch.arange(48) % 3
    pixels = (torch.rand(48, 3, 16, 16) * 60 + 60 * labels[:, None, None, None]).byte()
    images = pixels.float() / 255
    return {
        "teacher": network(8), "student": network(4), "images": images, "labels": labels,
        "loader": DataLoader(TensorDataset(images, labels), batch_size=16),
        "train": TensorDataset(pixels, labels), "test": TensorDataset(pixels[:30], labels[:30]),
        "student_logits": torch.randn(4, 3), "teacher_logits": torch.randn(4, 3),
    }  # fmt: skip


def test_the_tools_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for tool in re.findall(r"(?<![\w/.-])tools/(\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / "tools" / tool).exists() or (ROOT / "tools" / f"{tool}.py").exists(), f"{page.name}: {tool}"
