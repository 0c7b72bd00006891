"""Weight-only and dynamic int8: what is int8 in the file, what the runtime makes of it, and when it is worth it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekd import bundle, models, target
from edgekd.backends.onnxruntime import fused, onnxruntime
from edgekd.bench import macs
from edgekd.errors import ModelError
from edgekd.export import export
from edgekd.graph.edit import save, strip, tensors
from edgekd.quantize import worth
from edgekd.quantize.dynamic import quantize_dynamic
from edgekd.quantize.onnx_level import quantize_onnx
from edgekd.quantize.weights import weights_to_int8
from edgekd.types import Arrays, ModelSpec, Precision, TensorSpec

IDS = (TensorSpec("ids", "int64", ("batch", 12), 100), TensorSpec("mask", "bool", ("batch", 12)))


def texts(count: int = 4) -> Arrays:
    random = np.random.default_rng(0)
    mask = np.arange(12)[None] < random.integers(3, 13, (count, 1))
    return {"ids": random.integers(1, 100, (count, 12)), "mask": mask}


def exported(name: str, path: Path) -> onnx.ModelProto:
    torch.manual_seed(0)
    options = {"width": 32} | ({"depth": 2} if name == "transformer" else {"embedding": 16})
    network = models.build(ModelSpec(name, options), classes=3, inputs=IDS, images=False)
    export(network, texts(), opset=18, preprocessing=True, path=path)
    return onnx.load(path)


@pytest.fixture(scope="module", params=["lstm", "gru", "transformer"])
def floats(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param) / "fp32.onnx"
    exported(request.param, path)
    return request.param, path


def run(path: Path, given: Arrays) -> np.ndarray:
    session = onnxruntime().load(path, 1)
    try:
        return session(given)["logits"]
    finally:
        session.close()


def one_layer(op: str, weight: np.ndarray, shape: list[int | str], **attributes: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["w", "x"] if op == "Gather" else ["x", "w"], ["logits"], name="layer", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.INT64 if op == "Gather" else TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None] * len(shape) + [None] * (op == "Gather"))],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize(
    ("op", "shape", "axis", "given", "attributes"),
    [
        ("Conv", (8, 4, 3, 3), 0, ["b", 4, 6, 6], {}),
        ("ConvTranspose", (8, 4, 3, 3), 1, ["b", 8, 6, 6], {}),
        ("Gemm", (16, 24), 1, ["b", 16], {}),
        ("Gemm", (24, 16), 0, ["b", 16], {"transB": 1}),
        ("MatMul", (16, 24), 1, ["b", 5, 16], {}),
        ("Gather", (40, 16), 0, ["b", 5], {}),
    ],
)
def test_each_output_channel_has_a_scale_of_its_own(
    op: str, shape: tuple[int, ...], axis: int, given: list[int | str], attributes: dict[str, Any], tmp_path: Path
) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight *= np.logspace(-2, 2, shape[axis], dtype=np.float32).reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    made, done, left = weights_to_int8(one_layer(op, weight, given, **attributes))
    assert (len(done), left) == (1, {})
    save(made, tmp_path / "w8.onnx")
    held = tensors(made.graph)
    (levels,) = (a for a in held.values() if a.dtype == np.int8)
    (scale,) = (a for a in held.values() if a.dtype == np.float32)
    assert scale.size == shape[axis]
    assert np.abs(levels).max() == 127
    assert (np.abs(levels * scale - weight) <= scale * 0.501).all()
    assert set(fused(tmp_path / "w8.onnx")["nodes"]) <= {op, "FusedConv", "ReorderInput", "ReorderOutput"}, "folded"


def test_w8_is_a_quarter_of_the_file_and_computes_nearly_the_same(floats: tuple[str, Path], tmp_path: Path) -> None:
    name, path = floats
    made, done, _ = weights_to_int8(onnx.load(path))
    save(made, tmp_path / "w8.onnx")
    size = sum(a.nbytes for a in tensors(made.graph).values())
    before = sum(a.nbytes for a in tensors(onnx.load(path).graph).values())
    assert size < 0.4 * before
    assert len(done) == {"lstm": 3, "gru": 3, "transformer": 9}[name]  # the classifier of 3 × 32 is too small
    expected, found = run(path, texts()), run(tmp_path / "w8.onnx", texts())
    assert np.abs(expected - found).max() < 0.05 * np.abs(expected).max()
    there = fused(tmp_path / "w8.onnx")["nodes"]
    assert there.get("LSTM", 0) + there.get("GRU", 0) == (name != "transformer")
    assert not {"DequantizeLinear", "MatMulNBits"} & set(there)
    one, other = macs.count(path), macs.count(tmp_path / "w8.onnx")
    if name == "transformer":
        assert one.parameters == other.parameters
        assert one.macs == other.macs


def test_a_table_that_is_the_output_layer_too_is_stored_once(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["w", "x"], ["rows"]),
        helper.make_node("Gemm", ["rows", "w"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "tied", [helper.make_tensor_value_info("x", TensorProto.INT64, ["b"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 50])], [numpy_helper.from_array(table, "w")],
    )  # fmt: skip
    made, done, _ = weights_to_int8(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    assert len(done) == 2
    assert sorted(a.nbytes for a in tensors(made.graph).values()) == [200, 800]


def test_a_model_without_large_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="36 weights in 4 channels"):
        weights_to_int8(one_layer("Conv", np.zeros((4, 1, 3, 3), np.float32), ["b", 1, 6, 6]))
    with pytest.raises(ModelError, match="no layer of this model has a dynamic kernel"):
        quantize_dynamic(one_layer("Conv", np.zeros((16, 8, 3, 3), np.float32), ["b", 8, 6, 6]))


def test_a_weight_that_is_not_finite_stays_as_it_is() -> None:
    weight = np.ones((32, 32), np.float32)
    weight[0, 0] = np.inf
    with pytest.raises(ModelError, match="not finite"):
        weights_to_int8(one_layer("Gemm", weight, ["b", 32]))


def test_dynamic_int8_has_integer_kernels_and_seven_bit_weights(floats: tuple[str, Path], tmp_path: Path) -> None:
    name, path = floats
    made, done, left = quantize_dynamic(onnx.load(path))
    save(made, tmp_path / "dynamic.onnx")
    there = fused(tmp_path / "dynamic.onnx")["nodes"]
    assert there.get("DynamicQuantizeLSTM", 0) == (name == "lstm")
    assert there["DynamicQuantizeMatMul"] == {"lstm": 1, "gru": 1, "transformer": 9}[name]
    assert len(done) == sum(there.get(kind, 0) for kind in ("DynamicQuantizeLSTM", "DynamicQuantizeMatMul"))
    reasons = Counter(left.values())
    assert any("looked up" in why for why in reasons)
    assert any("no dynamic kernel" in why for why in reasons) == (name == "gru")
    assert reasons["a product of two activations"] == (4 if name == "transformer" else 0)
    held = {key: a for key, a in tensors(made.graph).items() if a.dtype == np.int8 and a.any()}
    products = [a for key, a in held.items() if key.startswith(("matmulinteger", "dynamicquantizelstm"))]
    assert len(products) == {"lstm": 3, "gru": 1, "transformer": 9}[name]
    assert max(np.abs(a.astype(int)).max() for a in products) in (63, 64)
    expected, found = run(path, texts()), run(tmp_path / "dynamic.onnx", texts())
    assert np.abs(expected - found).max() < 0.1 * np.abs(expected).max()
    one, other = macs.count(path), macs.count(tmp_path / "dynamic.onnx")
    assert abs(one.parameters - other.parameters) <= one.parameters * 0.05


def test_a_convolution_keeps_its_floats_in_dynamic_int8(tmp_path: Path) -> None:
    floats = tiny_onnx.classifier(tmp_path / "fp32.onnx")
    made, done, left = quantize_dynamic(onnx.load(floats))
    assert len(done) == 1
    assert list(left) == ["conv_0"]
    assert Counter(node.op_type for node in made.graph.node)["Conv"] == 1


def test_what_is_worth_building() -> None:
    random = np.random.default_rng(0)

    def of(op: str, shape: tuple[int, ...], given: list[int | str], **attributes: Any) -> onnx.ModelProto:
        return one_layer(op, random.normal(size=shape).astype(np.float32), given, **attributes)

    wide = of("Gemm", (64, 64), ["b", 64])  # 16384 bytes of weights, 256 of activations
    image = of("Conv", (8, 8, 3, 3), ["b", 8, 16, 16])
    assert worth.sizes(wide) == worth.Sizes(64 * 64 * 4, 64 * 4, 64 * 64 * 4, 64 * 64 * 4)
    assert worth.sizes(image) == worth.Sizes(8 * 8 * 9 * 4, 8 * 14 * 14 * 4, 8 * 8 * 9 * 4, 0)
    assert worth.why_not("w8", wide) is None
    assert "do not dominate" in str(worth.why_not("w8", image))
    assert "hold 0%" in str(worth.why_not("dynamic", image))
    assert "static int8 takes every layer" in str(worth.why_not("dynamic", wide))
    assert worth.why_not("dynamic", wide, left=["fc"]) is None
    assert worth.why_not("int8", image) is None
    at_the_limit = of("MatMul", (16, 4), ["b", 4, 16])  # 256 bytes of weights, 64 of activations
    assert worth.why_not("w8", at_the_limit) is None
    assert worth.why_not("w8", of("MatMul", (16, 4), ["b", 5, 16])) is not None
    rows = of("Gather", (100, 16), ["b", 5])
    assert worth.sizes(rows).layer_bytes == 0
    assert "hold 0%" in str(worth.why_not("dynamic", rows))


def test_recurrent_networks_and_transformers_get_what_helps_them(floats: tuple[str, Path]) -> None:
    name, path = floats
    model = onnx.load(path)
    assert (worth.why_not("dynamic", model) is None) == (name != "gru")
    if name != "transformer":  # this one is small, and its sequences make activations as large
        assert worth.why_not("w8", model) is None


def test_a_graph_is_read_and_not_changed(tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx.classifier(tmp_path / "fp32.onnx", raw=False))
    before = model.SerializeToString()
    feeds = [{"image": np.ones((2, 3, 8, 8), np.float32)}]
    quantize_onnx(strip(model), iter(feeds), target.load("host").quantization, max_drop=0.0)
    weights_to_int8(model)
    quantize_dynamic(model)
    worth.sizes(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("precision", ["w8", "dynamic"])
def test_a_bundle_of_each_form_is_sound(floats: tuple[str, Path], tmp_path: Path, precision: Precision) -> None:
    made, _, _ = (weights_to_int8 if precision == "w8" else quantize_dynamic)(onnx.load(floats[1]))
    save(made, tmp_path / "model.onnx")
    bundle.write(
        tmp_path / "host", name="texts", target=target.load("host"),
        models=[bundle.Source(tmp_path / "model.onnx", precision)], samples=texts(), labels=("a", "b", "c"),
        preprocessing=None, provenance={}, verdict=None,
    )  # fmt: skip
    found = bundle.verify(tmp_path / "host")
    assert (found.sound, found.findings) == (True, ())
    assert (tmp_path / "host" / f"model.{precision}.onnx").exists()
    done = subprocess.run(
        [sys.executable, "run.py", "--selftest"], cwd=tmp_path / "host", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
