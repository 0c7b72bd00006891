"""The backend `tensorrt` with fakes of the bindings and of the CUDA runtime: our own code, nothing of NVIDIA's."""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_fakes
import tiny_onnx
from bundles import host_bundle

from edgekd import plugins
from edgekd.backends._tensorrt import engine as engines
from edgekd.backends._tensorrt import record
from edgekd.backends.onnxruntime import onnxruntime
from edgekd.backends.tensorrt import available, mistyped, tensorrt
from edgekd.bundle.load import load
from edgekd.errors import BackendError, ModelError
from edgekd.types import Part

KINDS: tuple[tiny_onnx.Kind, ...] = ("fp32", "fp16", "int8")


@pytest.fixture(scope="session")
def cuda_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tensorrt_fakes.cudart(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, cuda_folder: Path) -> Iterator[Callable[[str], None]]:
    """Install the fake bindings of a version."""
    library = ctypes.CDLL(str(cuda_folder / "libcudart.so"))
    library.cudaGetErrorString.restype = ctypes.c_char_p
    monkeypatch.setattr(engines, "_load_cudart", lambda: library)
    monkeypatch.syspath_prepend(str(tensorrt_fakes.bindings(cuda_folder)))

    def install(version: str) -> None:
        monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)
        sys.modules.pop("tensorrt", None)
        importlib.import_module("tensorrt")

    real = sys.modules.pop("tensorrt", None)
    yield install
    sys.modules.pop("tensorrt", None)  # no fake may be left for the tests of other files
    if real is not None:
        sys.modules["tensorrt"] = real


def test_found_by_name() -> None:
    backend = plugins.build("backends", Part("tensorrt", {"workspace_bytes": 1 << 20, "max_batch": 4}))
    assert backend.name == "tensorrt"


def test_without_bindings_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "bindings are not on this machine" in str(available())
    with pytest.raises(BackendError, match="bindings"):
        tensorrt().compile(tiny_onnx.classifier(tmp_path / "m.onnx"), "fp32", tmp_path / "out")
    with pytest.raises(BackendError, match="bindings"):
        tensorrt().load(tmp_path / "m.engine", 1)


def test_without_a_gpu_it_says_so(fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake("10.3.0")
    monkeypatch.setenv("FAKE_GPUS", "0")
    assert "no NVIDIA GPU" in str(available())


def test_without_a_cuda_runtime_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", _no_library)
    with pytest.raises(RuntimeError, match="libcudart"):
        engines.Cuda()


def _no_library(name: str) -> None:
    raise OSError(name)


@pytest.mark.parametrize("version", ["8.4.1", "12.0.0"])
def test_other_versions_are_refused(fake: Callable[[str], None], version: str) -> None:
    fake(version)
    assert version.rsplit(".", 1)[0] in str(available())


@pytest.mark.parametrize("version", ["8.5.2", "8.6.1", "10.3.0", "10.16.1.11", "11.4.0.106"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_run(fake: Callable[[str], None], tmp_path: Path, version: str, kind: tiny_onnx.Kind) -> None:
    fake(version)
    assert available() is None
    weak = version.startswith("8")
    source = tiny_onnx.classifier(tmp_path / "m.onnx", "fp32" if weak and kind == "fp16" else kind)
    engine = tensorrt(workspace_bytes=123, max_batch=4).compile(source, kind, tmp_path / "out")
    note = json.loads(engine.read_bytes())
    assert note["pools"] == {"WORKSPACE": 123}
    assert note["max"] == {"image": [4, 8, 8, 3]}
    assert note["flags"] == ({"fp32": [], "fp16": ["FP16"], "int8": ["FP16", "INT8"]}[kind] if weak else [])
    assert note["network_flags"] == {"8": 1, "10": 2, "11": 0}[version.split(".")[0]]
    written = record.read(str(engine))
    assert written["tensorrt"] == version
    assert written["sm"] == "8.7"
    assert written["precision"] == kind
    images = tiny_onnx.images(10)  # more than the engine takes at once
    with_engine = tensorrt().load(engine, 1)
    reference = onnxruntime().load(source, 1)
    np.testing.assert_allclose(
        with_engine({"image": images})["logits"], reference({"image": images})["logits"], atol=1e-5
    )
    assert with_engine.inputs == reference.inputs
    assert with_engine.runtime == f"tensorrt {version}"
    with_engine.close()


def test_the_timing_cache_is_used_again(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("10.3.0")
    source = tiny_onnx.classifier(tmp_path / "m.onnx")
    for _ in range(3):
        tensorrt().compile(source, "fp32", tmp_path / "out")
    assert (tmp_path / "out" / "timing.10.3.0.sm8.7.cache").read_bytes() == b"+++"


def test_an_engine_of_another_version_is_refused_before_it_is_read(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("10.3.0")
    engine = tensorrt().compile(tiny_onnx.classifier(tmp_path / "m.onnx"), "fp32", tmp_path)
    fake("10.16.1.11")
    with pytest.raises(BackendError, match=r"built by TensorRT 10\.3\.0, and this is TensorRT 10\.16\.1\.11"):
        tensorrt().load(engine, 1)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("sm", "9.0", "compute capability 9.0"),
        ("device", "NVIDIA Jetson AGX Orin", "built on NVIDIA Jetson AGX Orin"),
        ("engine_sha256", "0" * 64, "changed or copied over"),
        ("schema", 2, "schema"),
    ],
)
def test_an_engine_of_another_device_is_refused(
    fake: Callable[[str], None], tmp_path: Path, key: str, value: object, reason: str
) -> None:
    fake("10.3.0")
    engine = tensorrt().compile(tiny_onnx.classifier(tmp_path / "m.onnx"), "fp32", tmp_path)
    path = Path(record.path_of(str(engine)))
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BackendError, match=reason) as raised:
        tensorrt().load(engine, 1)
    assert "build it again" in str(raised.value).lower()


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "not json"])
def test_an_engine_without_a_sound_record_is_refused(
    fake: Callable[[str], None], tmp_path: Path, content: str | None
) -> None:
    fake("10.3.0")
    engine = tensorrt().compile(tiny_onnx.classifier(tmp_path / "m.onnx"), "fp32", tmp_path)
    path = Path(record.path_of(str(engine)))
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(BackendError, match=r"record|beside"):
        tensorrt().load(engine, 1)


def test_what_tensorrt_refuses_to_deserialise_or_build(
    fake: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("10.3.0")
    source = tiny_onnx.classifier(tmp_path / "m.onnx")
    engine = tmp_path / "x.engine"
    engine.write_bytes(b"damaged")
    record.write(str(engine), tensorrt="10.3.0", sm="8.7", precision="fp32", onnx=str(source))
    with pytest.raises(BackendError, match="refuses the engine"):
        tensorrt().load(engine, 1)
    monkeypatch.setenv("FAKE_TRTEXEC", "fail")
    with pytest.raises(BackendError, match="could not build"):
        tensorrt().compile(source, "fp32", tmp_path)


def test_wrong_inputs_and_too_little_memory(
    fake: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("10.3.0")
    session = tensorrt().load(tensorrt().compile(tiny_onnx.classifier(tmp_path / "m.onnx"), "fp32", tmp_path), 1)
    with pytest.raises(BackendError, match="takes image, not photo"):
        session({"photo": tiny_onnx.images(1)})
    with pytest.raises(BackendError, match="float32, expected uint8"):
        session({"image": tiny_onnx.images(1).astype(np.float32)})
    with pytest.raises(BackendError, match="at most"):
        session({"image": np.zeros((1, 9, 9, 3), np.uint8)})
    monkeypatch.setenv("FAKE_GPU_BYTES", "10")
    with pytest.raises(BackendError, match="cudaMalloc failed: out of memory"):
        session({"image": tiny_onnx.images(1)})


def test_a_graph_of_another_precision_is_refused(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("10.3.0")
    graphs = {kind: tiny_onnx.classifier(tmp_path / f"{kind}.onnx", kind) for kind in KINDS}
    for asked in KINDS:
        for kind, path in graphs.items():
            reason = mistyped(onnx.load(path), asked, typed=True)
            assert (reason is None) == (asked == kind), (asked, kind)
    assert mistyped(onnx.load(graphs["fp32"]), "fp16", typed=False) is None  # TensorRT 8: a builder flag
    with pytest.raises(BackendError, match="strongly typed engine would be fp32"):
        tensorrt().compile(graphs["fp32"], "fp16", tmp_path)


def test_dynamic_dimensions_beside_the_batch_are_refused(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("10.3.0")
    model = onnx.load(tiny_onnx.classifier(tmp_path / "m.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    onnx.save(model, tmp_path / "d.onnx")
    with pytest.raises(BackendError, match="dynamic dimension beside the batch"):
        tensorrt().compile(tmp_path / "d.onnx", "fp32", tmp_path)
    assert not list(tmp_path.glob("*.engine"))


def test_a_bundle_with_an_engine_is_opened_on_tensorrt(fake: Callable[[str], None], tmp_path: Path) -> None:
    fake("10.3.0")
    bundle = host_bundle(tmp_path / "host")
    tensorrt().compile(bundle / "model.int8.onnx", "int8", bundle / "engine")
    image = tiny_onnx.images(1)[0]
    with_engine, plain = load(bundle), load(bundle, runtime="onnxruntime")
    assert with_engine.runtime == "tensorrt 10.3.0"
    assert plain.runtime.startswith("onnxruntime")
    assert with_engine(image).label == plain(image).label
    assert load(bundle, model="model.fp32.onnx").runtime.startswith("onnxruntime")
    engine = bundle / "engine" / "model.int8.engine"
    assert load(engine).runtime == load(bundle, model="engine/model.int8.engine").runtime == "tensorrt 10.3.0"
    Path(record.path_of(str(engine))).write_text("{}")
    with pytest.raises(ModelError, match="record"):
        load(bundle)


def test_it_does_not_import_torch() -> None:
    import subprocess

    program = "import sys, edgekd.backends.tensorrt, edgekd.bundle, edgekd.bundle.load; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.jetson
def test_on_a_real_board(tmp_path: Path) -> None:
    reason = available()
    if reason:
        pytest.skip(reason)
    source = tiny_onnx.classifier(tmp_path / "m.onnx", "fp16", opset=19)
    session = tensorrt().load(tensorrt().compile(source, "fp16", tmp_path), 1)
    images = tiny_onnx.images(10)
    expected = onnxruntime().load(source, 1)({"image": images})["logits"]
    np.testing.assert_allclose(session({"image": images})["logits"], expected, atol=0.03 * np.abs(expected).max())
