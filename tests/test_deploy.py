"""What `compress` makes for targets and data of other kinds: own toolchains, no images, no preprocessing, no int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import call

import edgekd

HEAD = """
name = "small"
[data]
{data}
[teacher]
model = "{teacher}"
{options}
[teacher.train]
epochs = 2
precision = "fp32"
{optimizer}
[student]
model = "{student}"
{options}
[distill]
epochs = 2
precision = "fp32"
{optimizer}
"""
DIGITS = {
    "data": 'name = "digits"',
    "teacher": "resnet8",
    "student": "resnet8",
    "options": "width = 4",
    "optimizer": "",
}

PARTS = '''
import shutil
import torch
from torch import nn
from edgekd import plugins
from edgekd.types import Backend, Part


def pretend(*, name: str = "pretend") -> Backend:
    """A FAKE toolchain for tests: its engine is the ONNX file under another name, run by ONNX Runtime."""
    runtime = plugins.build("backends", Part("onnxruntime"))

    def compile(model, precision, folder):
        engine = folder / f"model.{precision}.pretend"
        shutil.copy(model, engine)
        return engine

    return Backend("pretend", lambda: None, compile, runtime.load, engine=lambda: "pretend 1, gpu 0")


class Two(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.mix = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, classes))

    def forward(self, tokens, sensors):
        return self.mix(torch.cat([self.words(tokens).mean(1), sensors], 1))


def two(classes):
    return Two(classes)


class Wide(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, classes))
        self.register_buffer("large", torch.full((1, 1, 1, 1), 1e6))  # a weight beyond what float16 can hold

    def forward(self, x):
        return self.net(torch.nn.functional.conv2d(x, self.large) / 1e6)


def wide(classes):
    return Wide(classes)


class Spread(nn.Module):
    """A depthwise convolution: outer taps see only padding and are 1000 times the centre, so int8 has no step left."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Hardswish())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=8, dilation=8, groups=16)
        weight = torch.zeros(16, 1, 3, 3)
        weight[:, :, 1, 1], weight[:, :, 0, 0] = 1.0, 1000.0
        self.depthwise.weight = nn.Parameter(weight, requires_grad=False)
        self.head = nn.Linear(16 * 64, classes)

    def forward(self, x):
        return self.head(torch.nn.functional.hardswish(self.depthwise(self.stem(x))).flatten(1))


def spread(classes):
    return Spread(classes)
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts_of_test_deploy.py").write_text(PARTS)
    return tmp_path


def _compress(place: Path, recipe: str, *words: str) -> dict[str, Any]:
    (place / "edgekd.toml").write_text(recipe)
    assert call("compress", "--quick", "--max-drop", "100%", *words) == 0
    return dict(json.loads((place / "runs" / "small" / "report.json").read_text()))


def test_engines_of_a_toolchain_that_is_here_are_built_measured_and_chosen(place: Path) -> None:
    facts = (Path(__file__).parent.parent / "targets" / "jetson.toml").read_text().split("[[device]]")[0]
    line = next(line for line in facts.splitlines() if line.startswith("backend ="))
    facts = facts.replace(line, 'backend = { name = "parts_of_test_deploy:pretend" }').replace(
        'name = "jetson"', 'name = "mine"'
    )
    (place / "mine.toml").write_text(facts)
    report = _compress(place, HEAD.format(**DIGITS), "--target", "mine.toml")
    rows = {row["id"]: row for row in report["variants"]}
    engines = {name for name in rows if name.endswith("-engine")}
    assert engines == {
        f"mine/{name}-engine" for name in ("teacher-fp32", "student-fp32", "student-fp16", "student-int8")
    }
    for name in engines:
        assert rows[name]["latency_ms"]["p50"] > 0
    assert rows["mine/student-int8"]["latency_ms"] is None
    assert report["chosen"]["mine"] in engines
    assert (place / "runs" / "small" / rows[report["chosen"]["mine"]]["path"]).exists()
    assert (place / "runs" / "small" / "bundles" / "mine" / "edgekd.json").exists()


def test_inputs_that_are_no_image_several_and_named(place: Path) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (400, 7))
    sensors = random.normal(size=(400, 6)).astype(np.float32)
    y = (sensors[:, 0] > 0).astype(np.int64) + (tokens[:, 0] > 40)
    np.savez(place / "data.npz", x_tokens=tokens, x_sensors=sensors, y=y)
    recipe = HEAD.format(
        data='name = "npz"\npath = "data.npz"', teacher="parts_of_test_deploy:two", student="parts_of_test_deploy:two",
        options="", optimizer='optimizer = "adamw"\nlearning_rate = 0.01',
    )  # fmt: skip
    report = _compress(place, recipe, "--target", "host")
    rows = {row["id"]: row for row in report["variants"]}
    assert rows["host/student-int8"]["parity"]["cosine"] > 0.9
    graph = onnx.load(place / "runs" / "small" / rows["host/student-int8"]["path"]).graph
    assert len(graph.input) == 2
    model = edgekd.load(place / "runs" / "small" / "bundles" / "host")
    given = {spec.name: np.zeros([2, *map(int, spec.shape[1:])], spec.dtype) for spec in model.inputs}
    assert model(given)["logits"].shape == (2, 3)


def test_preprocessing_may_stay_outside_the_graph(place: Path) -> None:
    report = _compress(place, HEAD.format(**DIGITS) + "[export]\npreprocessing = false\n", "--target", "host")
    rows = {row["id"]: row for row in report["variants"]}
    assert rows["student"]["accuracy"]["value"] == rows["host/student-fp32"]["accuracy"]["value"]
    graph = onnx.load(place / "runs" / "small" / rows["host/student-int8"]["path"]).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    answer = edgekd.load(place / "runs" / "small" / "bundles" / "host")(np.zeros((8, 8, 1), np.uint8))
    assert answer.label in {str(i) for i in range(10)}


def test_a_precision_that_the_model_cannot_take_is_left_out_and_told(place: Path) -> None:
    values = DIGITS | {"student": "parts_of_test_deploy:wide", "teacher": "parts_of_test_deploy:wide", "options": ""}
    report = _compress(place, HEAD.format(**values), "--target", "jetson")
    names = {row["id"] for row in report["variants"]}
    assert "jetson/student-fp32" in names
    assert "jetson/student-fp16" not in names
    assert any("there is no student-fp16" in note for note in report["notes"])


def test_a_precision_that_the_target_does_not_take_is_told(place: Path) -> None:
    recipe = HEAD.format(**DIGITS) + '[quantize]\nprecisions = ["fp16", "int8"]\n'
    report = _compress(place, recipe, "--target", "host")
    assert {row["id"] for row in report["variants"] if row["target"]} == {
        "host/teacher-fp32", "host/student-fp32", "host/student-int8",
    }  # fmt: skip
    assert any("fp16 is asked for" in note for note in report["notes"])


SPREAD = DIGITS | {
    "teacher": "parts_of_test_deploy:spread", "student": "parts_of_test_deploy:spread", "options": "",
    "optimizer": 'optimizer = "adamw"\nlearning_rate = 0.01\nema_decay = 0.0',
}  # fmt: skip


def test_where_int8_loses_too_much_the_layer_that_does_it_is_left_in_float(place: Path) -> None:
    recipe = HEAD.format(**SPREAD) + '[quantize]\nqad = "off"\n'
    report = _compress(place, recipe, "--target", "host", "--target", "jetson")
    rows = {row["id"]: row for row in report["variants"]}
    found = {one["target"]: one for one in report["sensitivity"]}
    assert set(found) == {"host", "jetson"}
    for target, one in found.items():
        plain, mixed = rows[f"{target}/student-int8"], rows[f"{target}/student-int8-mixed"]
        assert (one["variant"], one["mixed"], one["float_layers"]) == (plain["id"], mixed["id"], ["depthwise"])
        assert max(one["layers"], key=lambda row: row["divergence"])["layer"] == "depthwise"
        assert one["remaining"] <= 0.005 < one["whole"]
        assert plain["accuracy"]["value"] < 0.5 < mixed["accuracy"]["value"]
        assert mixed["precision"] == "int8"
        assert any("student-int8-mixed has depthwise in float" in note for note in report["notes"])
    assert report["chosen"]["host"] != "host/student-int8"
    manifest = json.loads((place / "runs" / "small" / "bundles" / "jetson" / "edgekd.json").read_text())
    names = [model["path"] for model in manifest["models"]]
    assert len(names) == len(set(names)), "of two int8 models the one that loses less"
    for text in ("report.html", "report.md"):
        shown = (place / "runs" / "small" / text).read_text()
        assert "The worst is depthwise" in shown
    # A second run finds all of it in the store, and shows the same.
    assert _compress(place, recipe, "--target", "host")["sensitivity"] == [found["host"]]
    # Where it may be distilled while it rounds it is, from the same start, and both are shown.
    report = _compress(place, HEAD.format(**SPREAD), "--target", "host")
    taught = {row["id"]: row for row in report["variants"]}
    assert taught["host/student-int8"]["accuracy"]["value"] > rows["host/student-int8"]["accuracy"]["value"] + 0.1
    assert "host/student-int8-mixed" in taught
    assert any("quantization-aware distillation" in note and note.endswith("kept") for note in report["notes"])


def test_layers_that_could_not_be_examined_are_told_by_every_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    with monkeypatch.context() as patched:
        patched.setattr("edgekd.quantize.sensitivity.analyse", refuse)
        reports = [_compress(place, HEAD.format(**DIGITS), "--target", "host")]
    reports.append(_compress(place, HEAD.format(**DIGITS), "--target", "host"))  # finds it in the store
    for report in reports:
        assert report["sensitivity"] == []
        (note,) = [note for note in report["notes"] if "could not be examined" in note]
        assert note.startswith("host: the layers of student-int8 could not be examined")
        assert note.endswith(": no such operator")


def test_mixed_precision_can_be_turned_off(place: Path) -> None:
    recipe = HEAD.format(**SPREAD) + '[quantize]\nmixed = "off"\nmethod = ["minmax"]\n'
    report = _compress(place, recipe, "--target", "host")
    assert "host/student-int8-mixed" not in {row["id"] for row in report["variants"]}
    (found,) = report["sensitivity"]
    assert found["mixed"] is None
    assert found["notes"] == []


def test_what_int8_leaves_in_float_and_how_it_was_come_to_is_told(place: Path) -> None:
    own = '[quantize]\nmethod = ["mse", "bias"]\nfloat_layers = ["conv1"]\n'
    report = _compress(place, HEAD.format(**DIGITS) + own, "--target", "host")
    told = [note for note in report["notes"] if "student-int8" in note]
    assert any("keeps in float: conv1 (chosen to stay in float)" in note for note in told)
    assert any("kept: mse + bias: expected drop" in note and "measured" in note for note in told)
    assert 'method = [\n    "mse",\n    "bias",\n]' in (place / "runs" / "small" / "recipe.toml").read_text()


def test_a_layer_that_is_not_there_is_refused_before_anything_is_trained(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "edgekd.toml").write_text(HEAD.format(**DIGITS) + '[quantize]\nfloat_layers = ["con1"]\n')
    code = call("compress", "--target", "host")
    assert code == 2
    assert "the network has no layer 'con1'" in capsys.readouterr().err
    assert not list(place.glob(".edgekd/teacher-*/weights.safetensors"))


def test_forms_that_are_asked_for_are_built_and_others_are_told(place: Path) -> None:
    report = _compress(place, HEAD.format(**DIGITS), "--target", "host")
    notes = [note for note in report["notes"] if "there is no student-" in note]
    assert len(notes) == 2
    assert any("student-w8: its weights" in note and "do not dominate" in note for note in notes)
    assert any("student-dynamic: products and LSTMs, which it makes faster, hold" in note for note in notes)
    relieved = [note for note in report["notes"] if "CPUs without VNNI would clip sums" in note]
    assert len(relieved) <= 1
    recipe = HEAD.format(**DIGITS) + '[quantize]\nprecisions = ["w8", "dynamic"]\n'
    report = _compress(place, recipe, "--target", "host")
    rows = {row["id"]: row for row in report["variants"]}
    assert {"host/student-w8", "host/student-dynamic"} < set(rows)
    assert "host/student-int8" not in rows
    assert rows["host/student-w8"]["size_bytes"] < rows["host/student-fp32"]["size_bytes"]
    assert rows["host/student-w8"]["parity"]["cosine"] > 0.999
    assert rows["host/student-w8"]["parameters"] == rows["host/student-fp32"]["parameters"]
