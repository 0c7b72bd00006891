"""What a user can get wrong: exit 2, one paragraph that says what and where, and nothing half-written."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from disk import mount
from PIL import Image
from safetensors.torch import save_file

RECIPE = """
name = "own"
[data]
name = "imagefolder"
path = "images"
[teacher]
model = "resnet8"
width = 4
{teacher}
[teacher.train]
epochs = 1
precision = "fp32"
[student]
model = "resnet8"
width = 4
{student}
[distill]
epochs = 1
precision = "fp32"
"""


def _images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 24, split: str = "") -> None:
    random = np.random.default_rng(0)
    for name in classes:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{i:03}.png")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    _images(tmp_path / "images")
    _recipe(tmp_path)
    return tmp_path


def _recipe(place: Path, *, teacher: str = "", student: str = "", more: str = "") -> None:
    (place / "edgekd.toml").write_text(RECIPE.format(teacher=teacher, student=student) + more)


def _refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What stderr says of a run that must end with exit 2; the message is one paragraph and nothing is half-written."""
    code = call("compress", *words)
    told = capsys.readouterr().err
    assert code == 2, told
    problem = told[told.rindex("edgekd: ") :]
    assert "Traceback" not in told
    assert len(problem.strip().splitlines()) == 1
    for folder in (Path("runs"), Path(".edgekd")):
        left = [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ""]
        assert set(left) <= {"log.jsonl"} | {
            name for name in left if folder.name == ".edgekd" and "partial" not in name
        }
    assert not list(Path("runs").rglob("*.html"))
    assert not list(Path("runs").rglob("*.onnx"))
    return problem


def test_a_corrupt_image_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = place / "images" / "cat" / "003.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert "003.png" in _refused(capsys)


def test_missing_data_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "images").rename(place / "image")
    told = _refused(capsys)
    assert "images" in told
    assert "did you mean" in told


def test_an_empty_class_folder_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "images" / "bird").mkdir()
    assert "bird" in _refused(capsys)


def test_a_class_only_in_test_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "images").rename(place / "old")
    _images(place / "images", split="train")
    _images(place / "images", ("cat", "dog", "bird"), 4, split="test")
    assert "bird" in _refused(capsys)


def test_a_checkpoint_of_another_architecture_is_explained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"backbone.weight": torch.zeros(3)}, place / "other.safetensors")
    _recipe(place, teacher='weights = "other.safetensors"')
    told = _refused(capsys)
    assert "missing" in told
    assert "backbone.weight" in told


def test_weights_that_are_missing_name_their_neighbour(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(3)}, place / "teacher.safetensors")
    _recipe(place, teacher='weights = "techer.safetensors"')
    assert "did you mean 'teacher.safetensors'" in _refused(capsys)


def test_a_pickle_that_runs_code_is_refused_and_not_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (Path("ran"),))  # type: ignore[return-value]

    with zipfile.ZipFile(place / "bomb.pth", "w") as archive:  # as torch.save lays it out
        archive.writestr("bomb/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("bomb/version", "3\n")
    _recipe(place, teacher='weights = "bomb.pth"')
    assert "code" in _refused(capsys)
    assert not (place / "ran").exists()


def test_nan_weights_are_refused_by_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgekd.models.resnet import resnet8
    from edgekd.types import TensorSpec

    inputs = (TensorSpec("image", "uint8", ("batch", 16, 16, 3)),)
    state = {key: value.contiguous() for key, value in resnet8(2, inputs, width=4).state_dict().items()}
    state["linear.weight"] = torch.full_like(state["linear.weight"], float("nan"))
    save_file(state, place / "nan.safetensors")
    _recipe(place, teacher='weights = "nan.safetensors"')
    told = _refused(capsys)
    assert "linear.weight" in told


def test_a_teacher_of_another_number_of_classes_is_explained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgekd.models.resnet import resnet8
    from edgekd.types import TensorSpec

    inputs = (TensorSpec("image", "uint8", ("batch", 16, 16, 3)),)
    save_file(resnet8(5, inputs, width=4).state_dict(), place / "five.safetensors")
    _recipe(place, teacher='weights = "five.safetensors"')
    told = _refused(capsys)
    assert "5" in told
    assert "2" in told
    assert "class" in told


def test_an_unknown_key_and_an_unknown_target_name_the_nearest(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'jetson'" in _refused(capsys, "--target", "jetsn")
    _recipe(place, more="epohs = 3\n")
    told = _refused(capsys)
    assert "edgekd.toml: distill: unknown key 'epohs'" in told
    assert "did you mean 'epochs'" in told


def test_a_budget_that_is_no_quantity_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-latency" in _refused(capsys, "--max-latency", "5 parsecs")


def test_a_model_that_gives_no_logits_is_refused_before_training(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "own_model.py").write_text(
        "import torch\ndef build(classes): return torch.nn.Sequential(torch.nn.Flatten(0), torch.nn.LazyLinear(3))\n"
    )
    recipe = (place / "edgekd.toml").read_text().replace('model = "resnet8"\nwidth = 4', 'model = "own_model:build"')
    (place / "edgekd.toml").write_text(recipe)
    assert "own_model:build" in _refused(capsys)


def test_a_file_where_the_run_folder_should_be_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "out").write_text("")
    assert "a file stands where a folder is needed" in _refused(capsys, "--out", "out")


def test_a_read_only_run_folder_is_told(place: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mount("-o", "remount,ro", str(small_disk)).returncode == 0
    told = _refused(capsys, "--out", str(small_disk / "run"))
    assert "the file system is read-only" in told
    assert "--out" in told
    told = _refused(capsys, "--store", str(small_disk / "store"))
    assert "the file system is read-only" in told


@pytest.mark.parametrize("option", ["--store", "--out"])
def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_when_there_is_room(
    place: Path, small_disk: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("compress", "--quick", option, str(small_disk / "there"))
    assert call(*words) == 2
    told = capsys.readouterr().err
    assert "the disk is full" in told
    assert "Traceback" not in told
    assert not list(place.rglob("*.html"))
    assert not [path for path in small_disk.rglob("*.partial") if path.is_file()]
    assert mount("-o", "remount,size=100m", str(small_disk)).returncode == 0
    assert call(*words) in {0, 3}
    assert list(place.rglob("report.html"))
