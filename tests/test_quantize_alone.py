"""`edgekd quantize`: a recipe's model as it is, and ONNX files without PyTorch source, good ones and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
from command_line import call
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import edgekd
from edgekd.backends.onnxruntime import fused, onnxruntime
from edgekd.data.unlabelled import samples
from edgekd.errors import DataError, ModelError
from edgekd.graph import given
from edgekd.graph.edit import tensors

ALONE = """
name = "small"
[data]
name = "digits"
[teacher]
model = "resnet8"
width = 4
[teacher.train]
epochs = 10
precision = "fp32"
threads = 1
[budget]
max_accuracy_drop = 1.0
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labelled(place: Path, model: Path, count: int = 120, *, flip: int = 0) -> Path:
    """Images with the classes that the model gives them, some of them with the next one."""
    images = tiny_onnx.images(count)
    session = onnxruntime().load(model, 1)
    y = session({"image": images})["logits"].argmax(1)
    session.close()
    y[:4] = range(4)
    y[:flip] = (y[:flip] + 1) % 4
    np.savez(place / "data.npz", x=images, y=y, classes=np.array(tiny_onnx.LABELS))
    return place / "data.npz"


def told(place: Path, name: str = "model") -> dict[str, Any]:
    return dict(json.loads((place / "runs" / name / "quantize.json").read_text()))


def forms(place: Path, name: str = "model") -> dict[str, dict[str, Any]]:
    return {form["id"]: form for form in told(place, name)["forms"]}


def test_a_file_with_labelled_samples_is_judged_by_its_accuracy(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = labelled(place, tiny_onnx.classifier(place / "model.onnx"), flip=30)
    words = ("quantize", "model.onnx", "--data", str(data), "--quick", "--json", "--max-drop", "50%")
    assert call(*words, "--precision", "int8", "--precision", "w8") == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    rows = {row["id"]: row for row in report["variants"]}
    assert set(rows) == {"teacher", "host/model-fp32", "host/model-int8", "host/model-w8"}
    assert all(f"note      {note}\n" in said.err for note in report["notes"])
    assert any(note.startswith("--quick: short measurements") for note in report["notes"])
    assert "quantize  host/model-int8\nquantized host/model-int8: cosine with the float file 0.99" in said.err
    assert report["metric"] == "accuracy"
    made_by = "quantize model.onnx --data data.npz --precision int8 --precision w8 --max-drop 0.5 --quick"
    assert report["command"] == made_by
    assert f"edgekd {made_by} --target host" in (place / "runs/model/report.html").read_text()
    assert call(*report["command"].split(), "-o", "again") == 0, "as it stands"
    assert rows["host/model-fp32"]["accuracy"]["value"] < 1
    assert rows["host/model-int8"]["parity"]["cosine"] > 0.99
    assert rows["host/model-int8"]["latency_ms"]["n"] >= 50
    assert any("as ONNX: there is no PyTorch source" in note for note in report["notes"])
    assert {(c["candidate"], c["baseline"]) for c in report["comparisons"]} >= {("host/model-int8", "host/model-fp32")}
    made = place / "runs" / "model" / rows["host/model-int8"]["path"]
    assert "QLinearConv" in fused(made)["nodes"]
    assert fused(made)["float"] == {}
    account = told(place)
    assert (account["source"], account["chosen"]) == ("onnx", report["chosen"])
    assert forms(place)["host/model-int8"]["account"]["quantizer"] == "onnxruntime"
    assert forms(place)["host/model-int8"]["account"]["samples"] > 0
    assert (place / "runs" / "model" / "report.html").exists()
    session = edgekd.load(made)
    assert session({"image": tiny_onnx.images(2)})["logits"].shape == (2, 4)


def test_a_budget_that_nothing_meets_is_exit_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = labelled(place, tiny_onnx.classifier(place / "model.onnx"))
    assert call("quantize", "model.onnx", "--data", str(data), "--quick", "--max-size", "1kB") == 3
    assert told(place)["chosen"] == {"host": None}
    assert forms(place)["host/model-int8"]["verdict"]["status"] == "missed"
    said = capsys.readouterr().err
    assert "Deploy nothing on host yet." in said
    assert "Nearest: model-fp32" in said
    assert "it would fit with --max-size" in said


def test_forms_that_are_not_worth_it_are_told_and_not_built(place: Path) -> None:
    np.savez(place / "data.npz", x=tiny_onnx.images(40))
    tiny_onnx.classifier(place / "model.onnx")
    assert call("quantize", "model.onnx", "--data", "data.npz", "--quick", "--max-drop", "100%") == 0
    assert set(forms(place)) == {"host/model-fp32", "host/model-int8"}
    notes = told(place)["notes"]
    assert told(place)["metric"] == "agreement with the float file"
    for form in ("model-w8: its weights", "model-dynamic: products and LSTMs"):
        assert any(form in note for note in notes)
    assert any("no labels" in note for note in notes)


def test_images_in_one_folder_are_normalised_for_a_float_graph(place: Path) -> None:
    tiny_onnx.classifier(place / "model.onnx", raw=False)
    (place / "photos").mkdir()
    for at, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (25, 12, 10, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(place / "photos" / f"{at}.png")
    words = ("quantize", "model.onnx", "--data", "photos", "--quick", "--max-drop", "100%", "--precision", "int8")
    assert call(*words) == 2
    assert call(*words, "--mean", "0.5", "--std", "0.25,0.25,0.25") == 0
    assert forms(place)["host/model-int8"]["account"]["samples"] == 20
    assert forms(place)["host/model-int8"]["accuracy"]["n"] == 5
    held = tensors(onnx.load(place / "runs/model/models/host/model-int8.onnx").graph)
    scales = [float(a) for a in held.values() if a.dtype == np.float32 and a.ndim == 0]
    assert any(scale == pytest.approx(4 / 255, rel=0.1) for scale in scales), "values from −2 to 2 in 255 steps"


def test_a_jetson_file_is_typed_and_not_timed(place: Path) -> None:
    np.savez(place / "data.npz", x=tiny_onnx.images(20))
    tiny_onnx.classifier(place / "model.onnx", opset=17)
    assert call("quantize", "model.onnx", "--data", "data.npz", "--target", "jetson", "--quick") == 0
    found = forms(place)
    assert set(found) == {"jetson/model-fp32", "jetson/model-fp16", "jetson/model-int8"}
    assert all(form["latency_ms"] is None for form in found.values())
    model = onnx.load(place / "runs/model/models/jetson/model-int8.onnx")
    assert model.opset_import[0].version == 19
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert TensorProto.INT8 in kinds
    assert TensorProto.UINT8 not in kinds
    assert TensorProto.FLOAT16 in kinds


def test_an_output_of_another_form_is_judged_by_its_cosine(place: Path) -> None:
    np.savez(place / "data.npz", x=tiny_onnx.images(20))
    tiny_onnx.segmenter(place / "model.onnx")
    words = ("quantize", "model.onnx", "--data", "data.npz", "--quick", "--max-drop", "100%", "--precision", "int8")
    assert call(*words) == 0
    assert told(place)["metric"] == "cosine with the float file"
    assert 0.9 < forms(place)["host/model-int8"]["accuracy"]["value"] <= 1


def test_several_named_inputs_that_are_no_images(place: Path) -> None:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("ReduceMean", ["rows", "axes"], ["mean"], keepdims=0),
        helper.make_node("Concat", ["mean", "sensors"], ["all"], axis=1),
        helper.make_node("MatMul", ["all", "w"], ["logits"]),
    ]
    held: dict[str, np.ndarray] = {
        "table": random.normal(size=(60, 32)).astype(np.float32), "axes": np.array([1], np.int64),
        "w": random.normal(size=(36, 16)).astype(np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "two",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 5]),
         helper.make_tensor_value_info("sensors", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 16])],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), place / "model.onnx")
    sensors = random.normal(size=(30, 4)).astype(np.float32)
    np.savez(place / "data.npz", ids=random.integers(0, 60, (30, 5)), sensors=sensors)
    words = ("quantize", "model.onnx", "--data", "data.npz", "--quick", "--max-drop", "100%")
    assert call(*words, *(part for name in ("int8", "w8", "dynamic") for part in ("--precision", name))) == 0
    found = forms(place)
    assert set(found) == {f"host/model-{name}" for name in ("fp32", "int8", "w8", "dynamic")}
    assert all(form["parity"]["cosine"] > 0.99 for name, form in found.items() if name != "host/model-fp32")
    assert found["host/model-w8"]["size_bytes"] < 0.6 * found["host/model-fp32"]["size_bytes"]
    np.savez(place / "data.npz", ids=np.zeros((9, 5), np.int64), other=sensors[:9])
    assert call(*words) == 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("text", "not an ONNX file"),
        ("missing", "there is no such file"),
        ("opset", "it is of opset 12; expected 13 or newer"),
        ("int8", "it is quantized already: it holds DequantizeLinear, QuantizeLinear"),
        ("fp16", "its weights are float16; expected float32"),
        ("external", "its weights are in model.data, which is not there"),
        ("refused", "ONNX Runtime refuses it"),
    ],
)
def test_a_file_that_cannot_be_quantized_says_why(tmp_path: Path, spoil: str, says: str) -> None:
    path = tmp_path / "model.onnx"
    if spoil == "text":
        path.write_text("this is no protobuf of a model")
    elif spoil in ("int8", "fp16"):
        tiny_onnx.classifier(path, spoil)  # type: ignore[arg-type]
    elif spoil == "external":
        tiny_onnx.classifier(path)
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.data", size_threshold=0)
        (tmp_path / "model.data").unlink()
    elif spoil == "refused":
        model = onnx.load(tiny_onnx.classifier(path))
        model.graph.node[3].domain = "of.somebody"
        onnx.save(model, path)
    elif spoil == "opset":
        model = onnx.load(tiny_onnx.classifier(path))
        model.opset_import[0].version = 12
        onnx.save(model, path)
    with pytest.raises(ModelError) as found:
        given.read(path)
    assert says in str(found.value)


def test_weights_beside_the_file_are_read_and_the_result_is_one_file(place: Path) -> None:
    path = tiny_onnx.classifier(place / "model.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.data", size_threshold=0)
    np.savez(place / "data.npz", x=tiny_onnx.images(10))
    assert call("quantize", "model.onnx", "--data", "data.npz", "--quick", "--max-drop", "100%") == 0
    made = onnx.load(place / "runs/model/models/host/model-int8.onnx", load_external_data=False)
    assert not any(t.data_location == TensorProto.EXTERNAL for t in made.graph.initializer)


def test_normalisation_behind_a_convolution_is_taken_in(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    held = {"w": random.normal(size=(8, 3, 3, 3)), "g": random.uniform(0.5, 2, 8), "b": random.normal(size=8)}
    held |= {"m": random.normal(size=8), "v": random.uniform(0.5, 2, 8)}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("BatchNormalization", ["c", *"gbmv"], ["y"])],
        "bn", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 4, 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in held.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    assert [node.op_type for node in given.read(tmp_path / "m.onnx").graph.node] == ["Conv"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("model.onnx",), "an .onnx file is quantized with samples of yours"),
        (("model.pt",), "neither a recipe nor an .onnx file"),
        (("model.onnx", "--data", "nothing.npz"), "no such file"),
        (("model.onnx", "--data", "grey.npz"), "takes 3 channels (NHWC), the images have 1"),
        (("model.onnx", "--data", "empty.npz"), "there are no calibration samples"),
        (("model.onnx", "--data", "large.npz"), "its input 'image' is uint8 batch×8×8×3, a sample is uint8 1×9×9×3"),
        (("model.onnx", "--data", "good.npz", "--mean", "0.5"), "it takes bytes and normalises them itself"),
        (("float.onnx", "--data", "good.npz"), "it is not said how images are normalised"),
        (("float.onnx", "--data", "good.npz", "--mean", "0,0", "--std", "1"), "--mean has 2 values; expected 1 or 3"),
        (("float.onnx", "--data", "good.npz", "--mean", "0", "--std", "0"), "values of std above 0"),
        (("float.onnx", "--data", "good.npz", "--mean", "123,117,104", "--std", "58,57,57"), "Divide them by 255"),
        (("float.onnx", "--data", "good.npz", "--mean", "a", "--std", "1"), "'a' is no list of numbers"),
        (("model.onnx", "--data", "good.npz", "--precision", "int4"), "'int4' is no precision"),
        (("recipe.toml", "--data", "good.npz"), "--data is for an .onnx file"),
    ],
)
def test_what_does_not_fit_is_exit_2(
    place: Path, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_onnx.classifier(place / "model.onnx")
    tiny_onnx.classifier(place / "float.onnx", raw=False)
    images = tiny_onnx.images(10)
    np.savez(place / "good.npz", x=images)
    np.savez(place / "grey.npz", x=images[..., :1])
    np.savez(place / "large.npz", x=np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0))))
    np.savez(place / "empty.npz", x=images[:0])
    assert call("quantize", *words, "--quick") == 2
    assert says in capsys.readouterr().err


def test_the_model_of_a_recipe_is_quantized_without_a_student(place: Path) -> None:
    (place / "recipe.toml").write_text(ALONE)
    words = ("quantize", "recipe.toml", "--quick", "--precision", "int8", "--precision", "dynamic")
    assert call(*words) == 0
    account = told(place, "small-quantized")
    assert account["source"] == "pytorch"
    found = forms(place, "small-quantized")
    assert set(found) == {
        f"host/{name}" for name in ("teacher-fp32", "student-fp32", "student-int8", "student-dynamic")
    }
    assert found["host/student-int8"]["account"]["quantizer"] == "pt2e"
    assert found["host/student-int8"]["drop"] is not None
    report = json.loads((place / "runs/small-quantized/report.json").read_text())
    assert report["training"] is None
    assert report["command"] == "quantize recipe.toml"
    assert any("no student was distilled" in note for note in report["notes"])
    assert edgekd.load(place / "runs/small-quantized/bundles/host")(np.zeros((8, 8, 1), np.uint8)).label in set(
        "0123456789"
    )
    logged = [json.loads(line) for line in (place / "runs/small-quantized/log.jsonl").read_text().splitlines()]
    assert not any(line.get("step") == "distill" for line in logged)


def test_a_recipe_without_student_is_for_quantize_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "recipe.toml").write_text(ALONE)
    assert call("compress", "recipe.toml", "--quick") == 2
    assert "'student' is missing" in capsys.readouterr().err


def test_samples_without_labels_are_divided_and_bounded(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", x=np.zeros((1000, 3), np.float32))
    data = samples(tmp_path / "many.npz", size=None, channels=None, seed=0)
    assert (len(data.calibration), len(data.test)) == (512, 128)
    np.savez(tmp_path / "few.npz", x=np.zeros((3, 3)))
    data = samples(tmp_path / "few.npz", size=None, channels=None, seed=0)
    assert (len(data.calibration), len(data.test)) == (3, 3)
    assert any("also what is compared on" in note for note in data.notes)
    assert data.inputs[0].dtype == "float32"
    np.savez(tmp_path / "odd.npz", x=np.zeros((3, 3)), z=np.zeros((4, 3)))
    with pytest.raises(DataError, match="as many samples each"):
        samples(tmp_path / "odd.npz", size=None, channels=None, seed=0)
