"""Cost of graphs, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.bench.macs import count
from edgekd.errors import ModelError


class Graph:
    """Builds a small ONNX file node by node."""

    def __init__(self, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.input = helper.make_tensor_value_info("x", dtype, shape)
        self.at = "x"

    def constant(self, shape: Sequence[int], dtype: Any = np.float32, value: Any = None) -> str:
        """An initializer."""
        name = f"c{len(self.constants)}"
        values = np.zeros(shape, dtype) if value is None else np.asarray(value, dtype)
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node on `inputs`; "" stands for the value before it."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [i or self.at for i in inputs], [name], name=name, **attributes))
        self.at = name
        return name

    def conv(self, width: int, to: int, stride: int = 1, kernel: int = 3, group: int = 1, weight: str = "") -> str:
        """A padded convolution with a bias."""
        weight = weight or self.constant((to, width // group, kernel, kernel))
        pad = [kernel // 2] * 4
        return self.add("Conv", "", weight, self.constant((to,)), strides=[stride] * 2, pads=pad, group=group)

    def save(self, path: Path, dtype: int = TensorProto.FLOAT) -> Path:
        """Write the file; the output's shape is left to inference."""
        out = helper.make_tensor_value_info(self.at, dtype, None)
        graph = helper.make_graph(self.nodes, "g", [self.input], [out], self.constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
        return path


def resnet20(shape: Sequence[int | str]) -> Graph:
    """CIFAR's ResNet-20 with projections, batch normalisation folded away."""
    g = Graph(shape)
    g.conv(3, 16)
    width = 16
    for to in (16, 32, 64):
        for block in range(3):
            stride, start = (2 if to > 16 and block == 0 else 1), g.at
            g.conv(width, to, stride)
            g.add("Relu", "")
            body = g.conv(to, to)
            if stride == 2:
                g.at = start
                start = g.conv(width, to, 2, kernel=1)
            g.add("Add", body, start)
            g.add("Relu", "")
            width = to
    g.add("GlobalAveragePool", "")
    g.add("Flatten", "")
    g.add("Gemm", "", g.constant((10, 64)), g.constant((10,)), transB=1)
    return g


@pytest.mark.parametrize("batch", ["batch", 1])
def test_resnet20_by_hand(tmp_path: Path, batch: int | str) -> None:
    cost = count(resnet20([batch, 3, 32, 32]).save(tmp_path / "m.onnx"))
    # 27·16·32² + 6·144·16·32² + (144·32 + 5·288·32)·16² + (288·64 + 5·576·64)·8² + 16·32·16² + 32·64·8² + 640
    assert cost.macs == 40_813_184
    # convolutions 270 256 with projections, their biases 784, the classifier 650
    assert cost.parameters == 271_690
    assert cost.reason is None
    assert cost.io_bytes == 4 * (3 * 32 * 32 + 10)


def test_groups_and_transposed_convolutions(tmp_path: Path) -> None:
    g = Graph(["n", 8, 10, 10])
    g.conv(8, 8, group=8)  # 100 · 8 · 9
    g.add("ConvTranspose", "", g.constant((8, 4, 2, 2)), strides=[2, 2])  # 8 · 100 · 4 · 4
    assert count(g.save(tmp_path / "m.onnx")).macs == 7_200 + 12_800


def test_matmul_broadcasts_and_counts_its_bias(tmp_path: Path) -> None:
    g = Graph(["n", 5, 6])
    g.add("MatMul", "", g.constant((6, 7)))  # 5·6·7
    g.add("Add", "", g.constant((7,)))
    left = g.at
    g.add("Transpose", left, perm=[0, 2, 1])
    g.add("MatMul", left, g.at)  # 5·7·5, no parameters
    cost = count(g.save(tmp_path / "m.onnx"))
    assert cost.macs == 210 + 175
    assert cost.parameters == 42 + 7


def test_normalising_the_input_is_no_parameter_and_scalars_are_none(tmp_path: Path) -> None:
    g = Graph(["n", 3, 8, 8])
    g.add("Sub", "", g.constant((1, 3, 1, 1)))
    g.add("Div", "", g.constant((1, 3, 1, 1), value=np.ones((1, 3, 1, 1))))
    g.conv(3, 4)
    g.add("Add", "", g.constant((), value=3.0))
    assert count(g.save(tmp_path / "m.onnx")).parameters == 3 * 4 * 9 + 4


def quantized(g: Graph, at: str) -> str:
    """QuantizeLinear and DequantizeLinear on a value."""
    scale, zero = g.constant((), value=0.1), g.constant((), np.uint8)
    return g.add("DequantizeLinear", g.add("QuantizeLinear", at, scale, zero), scale, zero)


def test_q_dq_form_counts_as_the_float_form(tmp_path: Path) -> None:
    g = Graph(["n", 3, 8, 8])
    x = quantized(g, "x")
    scale, zero = g.constant((4,), value=np.ones(4)), g.constant((4,), np.int8)
    weight = g.add("DequantizeLinear", g.constant((4, 3, 3, 3), np.int8), scale, zero, axis=0)
    bias = g.add("DequantizeLinear", g.constant((4,), np.int32), scale)
    g.add("Conv", x, weight, bias, pads=[1, 1, 1, 1])
    g.at = quantized(g, g.at)
    cost = count(g.save(tmp_path / "m.onnx"))
    assert cost.macs == 64 * 4 * 27
    assert cost.parameters == 108 + 4, "scales and zero points are no parameters"


def test_integer_operators_count_too(tmp_path: Path) -> None:
    g = Graph(["n", 3, 8, 8], TensorProto.UINT8)
    s, z, w = g.constant((), value=1.0), g.constant((), np.uint8), g.constant((4, 3, 3, 3), np.int8)
    zw = g.constant((), np.int8)
    g.add("QLinearConv", "", s, z, w, s, zw, s, z, g.constant((4,), np.int32))
    cost = count(g.save(tmp_path / "m.onnx", TensorProto.UINT8))
    assert (cost.macs, cost.parameters) == (36 * 4 * 27, 108 + 4)


def test_work_that_is_not_counted_gives_none_with_a_reason(tmp_path: Path) -> None:
    g = Graph(["n", 4, 4])
    g.add("Einsum", "", "", equation="nij,njk->nik")
    cost = count(g.save(tmp_path / "m.onnx"))
    assert cost.macs is None
    assert cost.reason == "the operations of Einsum are not counted"


def test_weights_of_recurrent_layers_are_counted_however_they_are_cut_and_joined(tmp_path: Path) -> None:
    """As torch exports a GRU: the gates of one stored tensor for each direction are cut apart and put in order."""
    g = Graph([7, "n", 12])
    axis, ends = g.constant((1,), np.int64), [g.constant((1,), np.int64, [at]) for at in (0, 24, 48, 72)]
    joined = []
    for width in (12, 24):
        both = []
        for _ in ("forward", "backward"):
            stored = g.constant((72, width))
            gates = [g.add("Slice", stored, ends[at], ends[at + 1], axis) for at in range(3)]
            both.append(g.add("Unsqueeze", g.add("Concat", gates[1], gates[0], gates[2], axis=0), axis))
        joined.append(g.add("Concat", *both, axis=0))
    g.add("GRU", "x", *joined, g.constant((2, 144)), hidden_size=24, direction="bidirectional")
    assert count(g.save(tmp_path / "m.onnx")).parameters == 2 * (72 * 12 + 72 * 24 + 144)


def test_tokens_and_positions_are_parameters_and_shapes_are_none(tmp_path: Path) -> None:
    g = Graph(["n", 8, 6])
    x = g.add("MatMul", "", g.constant((6, 4)))
    x = g.add("Concat", g.add("Expand", g.constant((1, 1, 4)), g.constant((3,), np.int64, [1, 1, 4])), x, axis=1)
    zero, nine, axis = (g.constant((1,), np.int64, [at]) for at in (0, 9, 1))
    x = g.add("Add", x, g.add("Slice", g.constant((1, 50, 4)), zero, nine, axis))
    shape = g.add("Mul", g.add("Shape", x), g.constant((3,), np.int64, [1, 1, 1]))
    g.add("Reshape", x, shape)
    assert count(g.save(tmp_path / "m.onnx")).parameters == 24 + 4 + 200


def test_what_cannot_be_counted_is_said_and_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    g = Graph(["n", 3, "height", "width"])
    g.conv(3, 4)
    cost = count(g.save(tmp_path / "m.onnx"))
    assert cost.macs is None
    assert cost.reason == "the shape of 'v0' at Conv 'v0' cannot be inferred"
    assert cost.parameters > 0
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ModelError):
        count(tmp_path / "text.onnx")
    with pytest.raises(ModelError):
        count(tmp_path / "absent.onnx")
