"""Hard sigmoid and hard swish on integers: their clip is what an unsigned integer does at its ends anyway."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

UNIT = np.float32(1 / 255)  # a uint8 of this scale and zero point 0 spans [0, 1] and clips outside
# An x of zero, which many are, gives 127.5 steps: a tie, which the kernels of one runtime break differently, whichever
# way their last digits fall. With so little more all of them round up. (Measured: MobileNetV3-small on ONNX Runtime
# 1.32, fused or not: 3 % of the gates differed, and 19 of 512 decisions; 2 with it.)
OFF_THE_TIE = 1 + 2.0**-16


def integer_clips(graph: ir.Graph) -> None:
    """Give DQ → HardSigmoid | HardSwish → Q the form that ONNX Runtime runs on integers.

    hardsigmoid(x) = clip(x · α + β, 0, 1) is Add(DQ(x_q, α · x_scale), β) → Q(1/255, 0), where the Q does the
    clipping; hardswish(x) = x · hardsigmoid(x) with α = 1/6, β = 1/2 (Howard et al., ICCV 2019) multiplies by it.
    Both are then QLinearAdd and QLinearMul instead of three passes over float values.
    """
    for node in list(graph):
        if node.op_type not in {"HardSigmoid", "HardSwish"}:
            continue
        dq = node.inputs[0].producer() if node.inputs[0] is not None else None
        readers = {reader for reader, _ in node.outputs[0].uses()}
        if dq is None or dq.op_type != "DequantizeLinear" or not _unsigned(dq):
            continue
        if not readers or any(reader.op_type != "QuantizeLinear" or not _unsigned(reader) for reader in readers):
            continue
        if node.op_type == "HardSwish":
            _swish(node, dq, graph)
        elif len(readers) == 1:
            _sigmoid(node, dq, readers.pop(), graph)


def _sigmoid(node: ir.Node, dq: ir.Node, q: ir.Node, graph: ir.Graph) -> None:
    if _value(q.inputs[2]) != 0 or _value(q.inputs[1]) > UNIT * 1.001:
        return  # this Q does not clip at 0 and 1
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    q.replace_input_with(0, _line(node, dq, alpha, beta, graph).outputs[0])
    graph.remove(node, safe=True)


def _swish(node: ir.Node, dq: ir.Node, graph: ir.Graph) -> None:
    line = _line(node, dq, 1 / 6, 0.5, graph)
    unit, zero = _constant(node, "unit", np.array(UNIT)), _constant(node, "zero", np.array(0, dtype=np.uint8))
    clipped = _before(node, graph, "QuantizeLinear", [line.outputs[0], unit, zero], "clipped")
    gate = _before(node, graph, "DequantizeLinear", [clipped.outputs[0], unit, zero], "gate")
    product = _before(node, graph, "Mul", [dq.outputs[0], gate.outputs[0]], "product")
    ir.convenience.replace_all_uses_with(node.outputs[0], product.outputs[0])
    graph.remove(node, safe=True)


def _line(node: ir.Node, dq: ir.Node, alpha: float, beta: float, graph: ir.Graph) -> ir.Node:
    """α · x + β, where the factor only changes the scale of the dequantized x."""
    less = _constant(node, "scale", np.array(_value(dq.inputs[1]) * alpha, dtype=np.float32))
    scaled = _before(node, graph, "DequantizeLinear", [dq.inputs[0], less, dq.inputs[2]], "scaled")
    level = _constant(node, "level", np.array(255, dtype=np.uint8))
    step = _constant(node, "step", np.array(beta * OFF_THE_TIE / 255, dtype=np.float32))
    none = _constant(node, "none", np.array(0, dtype=np.uint8))
    offset = _before(node, graph, "DequantizeLinear", [level, step, none], "offset")
    return _before(node, graph, "Add", [scaled.outputs[0], offset.outputs[0]], "line")


def _before(node: ir.Node, graph: ir.Graph, op_type: str, inputs: list[ir.Value | None], suffix: str) -> ir.Node:
    made = ir.node(op_type, inputs)
    made.outputs[0].name = f"{node.outputs[0].name}.{suffix}"
    graph.insert_before(node, made)
    return made


def _constant(node: ir.Node, suffix: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=f"{node.outputs[0].name}.{suffix}", const_value=ir.tensor(array))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(())
    assert isinstance(node.graph, ir.Graph)
    node.graph.register_initializer(value)
    return value


def _value(value: ir.Value | None) -> float:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    assert constant is not None
    return float(constant.numpy())


def _unsigned(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].dtype == ir.DataType.UINT8
