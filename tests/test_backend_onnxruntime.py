"""ONNX Runtime as a backend: named arrays in and out, threads as asked, errors as one paragraph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgekd.backends.onnxruntime import fused, onnxruntime
from edgekd.errors import BackendError
from edgekd.types import TensorSpec

TEXT = """<ir_version: 9, opset_import: ["" : 17]>
g (float[batch,4] x) => (float[batch,4] logits) <float[4] b = {1,2,3,4}>
{ t = Add(x, b)
  logits = Relu(t) }"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


def test_a_session_knows_its_signature_and_computes(model: Path) -> None:
    session = onnxruntime().load(model, 1)
    assert session.inputs == (TensorSpec("x", "float32", ("batch", 4)),)
    assert session.outputs == (TensorSpec("logits", "float32", ("batch", 4)),)
    assert session.runtime.startswith("onnxruntime ")
    for rows in (1, 3):
        out = session({"x": np.full((rows, 4), -2.0, dtype=np.float32)})
        assert np.array_equal(out["logits"], np.tile(np.array([0, 0, 1, 2], np.float32), (rows, 1)))
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session({"x": np.zeros((1, 4), np.float32)})


def test_settings_are_chosen_and_recorded(model: Path) -> None:
    session = onnxruntime(spin=True, optimizations=False).load(model, 2)
    assert session.settings == {  # type: ignore[attr-defined]
        "provider": "CPUExecutionProvider",
        "threads": 2,
        "spin": True,
        "optimizations": False,
    }
    options = session._session.get_session_options()  # type: ignore[attr-defined]
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert session._session.get_providers() == ["CPUExecutionProvider"]  # type: ignore[attr-defined]


def test_compile_hands_the_portable_file_on(model: Path, tmp_path: Path) -> None:
    backend = onnxruntime()
    assert backend.available() is None
    made = backend.compile(model, "fp32", tmp_path / "out")
    assert made.read_bytes() == model.read_bytes()
    assert made.parent == tmp_path / "out"


def test_wrong_inputs_are_named(model: Path) -> None:
    session = onnxruntime().load(model, 1)
    for inputs in (
        {"y": np.zeros((1, 4), np.float32)},
        {"x": np.zeros((1, 4), np.float64)},
        {"x": np.zeros((1, 5), np.float32)},
    ):
        with pytest.raises(BackendError, match="x: float32") as problem:
            session(inputs)
        assert len(str(problem.value)) < 500


def test_a_file_that_is_no_model_is_refused_shortly(tmp_path: Path) -> None:
    backend = onnxruntime()
    with pytest.raises(BackendError, match="no such file"):
        backend.load(tmp_path / "absent.onnx", 1)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(BackendError, match="refuses the model") as problem:
        backend.load(tmp_path / "broken.onnx", 1)
    assert "ONNXRuntimeError" not in str(problem.value)
    with pytest.raises(BackendError, match="1 or more"):
        backend.load(tmp_path / "broken.onnx", 0)


def test_an_operator_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(onnx.parser.parse_model(TEXT.replace("Relu", "Unheard")).SerializeToString())
    with pytest.raises(BackendError, match="Unheard"):
        onnxruntime().load(path, 1)


QUANTIZED = """<ir_version: 9, opset_import: ["" : 19]>
g (float[batch,2,4,4] x) => (float[batch,2,4,4] y)
<float s = {0.1}, uint8 z = {ZERO}, int8[2,2,1,1] w = {1,-2,3,4}, float[2] ws = {0.1,0.2}, int8[2] wz = {0,0}>
{ q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  wd = DequantizeLinear<axis = 0>(w, ws, wz)
  c = Conv(d, wd)
  OUT }"""


def test_fused_tells_integer_layers_from_float_ones(tmp_path: Path) -> None:
    whole = QUANTIZED.replace("ZERO", "3").replace("OUT", "o = QuantizeLinear(c, s, z)\n y = DequantizeLinear(o, s, z)")
    half = QUANTIZED.replace("ZERO", "3").replace("OUT", "y = Tanh(c)")
    results = []
    for number, text in enumerate((whole, half)):
        path = tmp_path / f"{number}.onnx"
        onnx.save(onnx.parser.parse_model(text), path)
        results.append(fused(path))
    assert results[0]["integer"] == {"QLinearConv": 1}
    assert results[0]["float"] == {}
    assert sum(results[1]["float"].values()) == 1
    assert results[1]["integer"] == {}


def test_the_backend_does_not_import_torch() -> None:
    code = (
        "import sys; from edgekd.backends.onnxruntime import onnxruntime; onnxruntime().available();"
        " print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
