"""Quantization of an ONNX graph itself: every sample counts, and ranges are the cheapest that hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
from onnx import TensorProto, helper, numpy_helper
from rules import HOST, RULES

from edgekd.errors import DataError
from edgekd.graph.edit import strip, tensors
from edgekd.quantize.inside import inside
from edgekd.quantize.onnx_level import quantize_onnx
from edgekd.quantize.qdq import finish
from edgekd.types import QuantizationRules


def outputs(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    rows = inside(model, ["logits"], {"image": images}, TensorProto.FLOAT)
    return np.concatenate([row["logits"] for row in rows])


@pytest.mark.parametrize("batches", [1, 8, 9, 16])
def test_every_batch_counts_in_the_ranges_of_onnx_level_quantization(tmp_path: Path, batches: int) -> None:
    """One batch of many has the largest values: whichever it is, the scale of the input shows it."""
    model = onnx.load(tiny_onnx.classifier(tmp_path / "fp32.onnx", raw=False))
    for largest in sorted({0, batches // 2, batches - 1}):
        feeds = [{"image": np.full((2, 3, 8, 8), 25.5 if at == largest else 1.0, np.float32)} for at in range(batches)]
        made = quantize_onnx(strip(model), iter(feeds), HOST, max_drop=1.0)
        assert len(made.layers) == 2
        first = next(node for node in made.graph.graph.node if node.op_type == "QuantizeLinear")
        assert float(tensors(made.graph.graph)[first.input[1]]) == pytest.approx(0.1)
        assert made.samples == 2 * batches


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("largest", [1.0, 1000.0], ids=["even", "rare and large"])
def test_ranges_of_onnx_level_quantization_are_the_cheapest_that_hold(
    rules: QuantizationRules, largest: float, tmp_path: Path
) -> None:
    """One pixel of all samples is huge: min-max ranges have no levels left for the others."""
    model = onnx.load(tiny_onnx.classifier(tmp_path / "fp32.onnx", raw=False))
    for side in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[side].dim_param = f"side{side}"
    random = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        colours = random.normal(size=(count, 3, 1, 1))
        return (colours + 0.1 * random.normal(size=(count, 3, 32, 32))).astype(np.float32)

    given = images(128)
    given[0, 0, 0, 0] = largest
    feeds = ({"image": given[at : at + 16]} for at in range(0, len(given), 16))
    made = quantize_onnx(strip(model), feeds, rules, max_drop=0.005)
    tried: list[Any] = made.methods
    kept = next(one for one in tried if one["kept"])
    assert made.samples == 128
    assert all(one["samples"] == 64 for one in tried)
    if largest == 1.0:
        assert [one["methods"] for one in tried] == [["minmax"]]
        return
    assert [one["methods"] for one in tried[:2]] == [["minmax"], ["percentile"]]
    assert tried[0]["expected_drop"] > 0.005 >= kept["expected_drop"]
    assert kept["sqnr_db"] > tried[0]["sqnr_db"] + 10
    fresh = images(64)
    found, wanted = (outputs(each, fresh) for each in (made.graph, strip(model)))
    assert float((found.argmax(1) == wanted.argmax(1)).mean()) > 0.95


def test_values_are_ranged_as_values(tmp_path: Path) -> None:
    """An output of one number a sample decides nothing, so that every decision would be kept by any range."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["hidden"]), helper.make_node("Gemm", ["hidden", "v"], ["y"])]
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(64, 32)), "v": random.normal(size=(32, 1))}
    graph = helper.make_graph(
        nodes, "value", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    given = random.normal(size=(64, 64)).astype(np.float32)
    tried: list[Any] = quantize_onnx(model, [{"x": given}], HOST, max_drop=0.0).methods
    assert [one["methods"] for one in tried] == [["minmax"], ["percentile"], ["mse"]]
    assert [one["changed"] for one in tried] == [None] * 3
    assert all(0 < one["expected_drop"] < 0.01 for one in tried)
    alone: list[Any] = quantize_onnx(model, [{"x": given[:1]}], HOST, max_drop=0.0).methods
    assert {one["samples"] for one in alone} == {1}


def test_onnx_level_quantization_without_samples_is_refused(tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx.classifier(tmp_path / "fp32.onnx", raw=False))
    with pytest.raises(DataError, match="no calibration samples"):
        quantize_onnx(strip(model), iter(()), HOST, max_drop=1.0)


def test_hard_swishes_become_integer_operators(tmp_path: Path) -> None:
    """ONNX Runtime's quantizer names constants after the value they belong to, and so does what is done after it."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("HardSwish", ["conv"], ["swish"]),
        helper.make_node("Conv", ["swish", "v"], ["logits"]),
    ]
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(16, 3, 1, 1)), "v": random.normal(size=(4, 16, 1, 1))}
    graph = helper.make_graph(
        nodes, "swish", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4, 4, 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    given = random.normal(size=(32, 3, 4, 4)).astype(np.float32)
    made = finish(quantize_onnx(model, [{"x": given}], HOST, max_drop=1.0).graph, HOST)
    assert [node.op_type for node in made.graph.node if node.op_type in {"HardSwish", "Mul"}] == ["Mul"]
    found, wanted = (
        np.concatenate([row["logits"] for row in inside(each, ["logits"], {"x": given}, TensorProto.FLOAT)])
        for each in (made, model)
    )
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
