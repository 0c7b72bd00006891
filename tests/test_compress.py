"""The main job on small real data: one run shared by the tests that look at what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from command_line import call, run

from edgekd import cli, report
from edgekd.store import sha256_of

RECIPE = """
name = "small"
[data]
name = "digits"
[teacher]
model = "resnet8"
[teacher.train]
epochs = 4
precision = "fp32"
[student]
model = "resnet8"
width = 8
[distill]
epochs = 3
precision = "fp32"
[budget]
max_accuracy_drop = 0.9
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with spaces in its name in which `compress` ran for two targets."""
    place = tmp_path_factory.mktemp("a folder")
    (place / "edgekd.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        code = call("compress", "--target", "host", "--target", "jetson", "--target", "host", "--seed", "1")
    assert code == 0
    return place


@pytest.fixture
def out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder / "runs" / "small"


@pytest.fixture
def document(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text()))


def test_the_run_folder_holds_what_the_contract_says(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    assert names == {"report.html", "report.md", "report.json", "recipe.toml", "log.jsonl", "models", "bundles"}
    assert {path.name for path in (out / "bundles").iterdir()} == {"host", "jetson"}
    assert not [path for path in out.rglob("*") if "partial" in path.name]


def test_the_report_fits_its_schema_and_its_files(out: Path, document: dict[str, Any]) -> None:
    jsonschema.validate(document, report.schema())
    rows = {row["id"]: row for row in document["variants"]}
    assert set(rows) == {
        "teacher", "student", "host/teacher-fp32", "host/student-fp32", "host/student-int8",
        "jetson/teacher-fp32", "jetson/student-fp32", "jetson/student-fp16", "jetson/student-int8",
    }  # fmt: skip
    may_be_empty = {"target", "path", "sha256", "parity", "verdict", "estimates", "candidate"}
    for row in rows.values():
        if row["path"]:
            assert sha256_of(out / row["path"]) == row["sha256"]
            assert (out / row["path"]).stat().st_size == row["size_bytes"]
        for key, value in row.items():
            explained = key in row["missing"] or key in may_be_empty
            assert value is not None or explained, f"{row['id']}: {key} is null without a reason"


def test_accuracy_is_measured_after_every_stage_on_the_whole_test_split(document: dict[str, Any]) -> None:
    assert {row["accuracy"]["n"] for row in document["variants"]} == {359}
    rows = {row["id"]: row for row in document["variants"]}
    for part in ("teacher", "student"):
        assert rows[part]["accuracy"]["value"] == rows[f"host/{part}-fp32"]["accuracy"]["value"]
    assert rows["student"]["accuracy"]["value"] > 0.5


def test_latency_is_told_for_host_and_nowhere_else(document: dict[str, Any]) -> None:
    for row in document["variants"]:
        if row["target"] == "host":
            assert row["latency_ms"]["n"] >= 200
            assert row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]
        else:
            assert row["latency_ms"] is None
            assert row["missing"]["latency_ms"]
    assert any("no engine was built here" in note for note in document["notes"])


def test_jetson_rows_have_a_lower_bound_for_its_boards(document: dict[str, Any]) -> None:
    (row,) = (row for row in document["variants"] if row["id"] == "jetson/student-int8")
    boards = {estimate["device"] for estimate in row["estimates"]}
    assert "orin-nano-8gb-super" in boards
    assert all(estimate["predicted_ms"] is None and estimate["lower_bound_ms"] > 0 for estimate in row["estimates"])


def test_no_trace_of_this_machine_is_in_what_is_shipped(out: Path, folder: Path) -> None:
    import getpass
    import socket

    marks = [str(folder), str(Path.home()), str(Path(__file__).parent.parent), socket.gethostname(), sys.prefix]
    marks = [mark for mark in (*marks, f"/{getpass.getuser()}/") if len(mark) > 4]  # a short one is in any file
    for path in [*(out / "bundles").rglob("*"), *(out / "models").rglob("*"), out / "recipe.toml"]:
        if path.is_file():
            content = path.read_bytes()
            assert not [mark for mark in marks if mark.encode() in content], path


def test_int8_of_host_is_whole_and_smaller(out: Path) -> None:
    from edgekd.backends.onnxruntime import fused

    found = fused(out / "models" / "host" / "student-int8.onnx")
    assert found["float"] == {}
    assert sum(found["integer"].values()) >= 10
    graph = onnx.load(out / "models" / "host" / "student-int8.onnx").graph
    assert [i.name for i in graph.input] == ["image"]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_every_bundle_verifies_and_tests_itself(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("host", "jetson"):
        code, told, _ = run(capsys, "bundle", "verify", str(out / "bundles" / target), "--json")
        assert code == 0
        assert json.loads(told)["sound"] is True
        command = [sys.executable, "run.py", "--selftest", "--runtime", "onnxruntime"]
        done = subprocess.run(command, cwd=out / "bundles" / target, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_load_opens_the_bundle_the_model_and_the_run_alike(out: Path) -> None:
    import edgekd

    image = np.zeros((8, 8, 1), dtype=np.uint8)
    answers = [edgekd.load(path)(image) for path in (out, out / "bundles" / "host")]
    assert all(str(answer) == str(answers[0]) for answer in answers)


def test_a_second_run_builds_nothing_and_gives_the_same_files(
    out: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, shown = run(capsys, "compress", "--target", "host", "--seed", "1", "--json", "-o", "again", "-v")
    assert code == 0
    assert "building" not in shown
    again = json.loads(told)
    rows = {row["id"]: row["sha256"] for row in document["variants"]}
    assert all(rows[row["id"]] == row["sha256"] for row in again["variants"])


def test_the_resolved_recipe_reruns_the_run(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, shown = run(capsys, "compress", str(out / "recipe.toml"), "-o", "rerun", "-v")
    assert code == 0
    assert "building" not in shown


def test_report_judges_again_against_another_budget(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((out / "report.json").read_text())["budget"]
    code, told, shown = run(capsys, "report", str(out), "--max-size", "1kB", "--json")
    assert code == cli.NO_VARIANT
    assert json.loads(told)["chosen"] == {"host": None, "jetson": None}
    assert "size" in shown
    code, told, _ = run(capsys, "report", str(out), "--json")
    assert code == 0, "the last limit does not stick"
    assert json.loads(told)["budget"] == before
    code, told, _ = run(capsys, "report", str(out), "--max-size", "4MB", "--json")
    assert code == 0
    assert set(json.loads(told)["chosen"].values()) <= {row["id"] for row in json.loads(told)["variants"]}


def test_a_budget_that_nothing_meets_is_exit_3_with_everything_written(
    folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, shown = run(capsys, "compress", "--seed", "1", "--max-size", "1kB", "-o", "tight")
    assert code == cli.NO_VARIANT
    assert (folder / "tight" / "bundles" / "host" / "edgekd.json").exists()
    manifest = json.loads((folder / "tight" / "bundles" / "host" / "edgekd.json").read_text())
    assert manifest["verdict"]["status"] == "missed"
    assert "size" in shown


def test_bench_measures_several_models_in_turns(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = out / "models" / "host"
    code, told, _ = run(
        capsys, "bench", str(models / "student-int8.onnx"), str(models / "teacher-fp32.onnx"), "--quick", "--json"
    )
    assert code == 0
    measured = json.loads(told)
    assert [model["latency_ms"]["n"] >= 50 for model in measured["models"]] == [True, True]
    assert measured["comparisons"][0]["verdict"] in {"faster", "same", "slower", "cannot tell"}


def test_doctor_and_targets_tell_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = run(capsys, "doctor", "--json")
    assert code == 0
    assert json.loads(told)["targets"]["host"] is None
    code, told, _ = run(capsys, "targets")
    assert code == 0
    assert "jetson" in told
    code, told, _ = run(capsys, "targets", "jetson", "--json")
    assert json.loads(told)[0]["backend"]["name"] == "tensorrt"


def test_quick_is_said_in_the_report(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = run(capsys, "compress", "--quick", "--json", "-o", "quick", "--max-drop", "100%")
    assert code == 0
    assert any("--quick" in note for note in json.loads(told)["notes"])
