"""The Q/DQ graph as its runtime wants it: pairs shared, weights laid out, biases and pools in integer form."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edgekd.graph.edit import preparing
from edgekd.quantize.clips import integer_clips
from edgekd.types import QuantizationRules

_LARGEST_BIAS = 2.0**30  # half of int32, so that adding the convolution's sum cannot overflow


def finish(model: onnx.ModelProto, rules: QuantizationRules) -> onnx.ModelProto:
    """Rewrite an exported Q/DQ graph without changing what it computes, beyond the rounding of biases.

    Transposes of stored weights are done here, equal Q/DQ pairs become one, spatial means become
    GlobalAveragePool. Where the runtime works on integers between operators, data movement leaves the floats
    (Q → DQ → Slice → Q becomes Q → Slice), hard sigmoids and swishes become sums and products of integers, and biases
    int32 of scale x_scale · weight_scale.
    """
    edited = ir.from_proto(model)
    graph = edited.graph
    for node in list(graph):
        if node.op_type == "Transpose":
            _transpose_stored(node)
    passes.CommonSubexpressionEliminationPass()(edited)
    for node in list(graph):
        if node.op_type == "ReduceMean":
            _pool(node, graph)
    if rules.quantize_outputs:
        for node in list(graph):
            if node.op_type in {"Slice", "Pad"}:
                _move_integers(node, graph)
        integer_clips(graph)
        _normalise_at_once(edited)
    if rules.quantize_bias:
        for node in list(graph):
            if node.op_type in {"Conv", "Gemm"} and len(node.inputs) == 3 and node.inputs[2] is not None:
                _integer_bias(node, graph)
    passes.RemoveUnusedNodesPass()(edited)
    result: onnx.ModelProto = ir.to_proto(edited)
    return result


def _transpose_stored(node: ir.Node) -> None:
    """DQ(w) → Transpose becomes DQ(wᵀ), with the axis moved along."""
    dq = _made_by(node.inputs[0], "DequantizeLinear")
    if dq is None or dq.inputs[0] is None or not dq.inputs[0].is_initializer() or len(dq.outputs[0].uses()) != 1:
        return
    weight = _array(dq.inputs[0])
    order = list(node.attributes.get_ints("perm", tuple(reversed(range(weight.ndim)))))
    turned = _initializer(node, f"{node.outputs[0].name}_stored", np.ascontiguousarray(weight.transpose(order)))
    dq.replace_input_with(0, turned)
    if _array(dq.inputs[1]).ndim:
        axis = dq.attributes.get_int("axis", 1) % weight.ndim
        dq.attributes.add(ir.AttrInt64("axis", order.index(axis)))
    dq.outputs[0].shape = turned.shape
    ir.convenience.replace_all_uses_with(node.outputs[0], dq.outputs[0])
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)


def _pool(node: ir.Node, graph: ir.Graph) -> None:
    """A mean over height and width is the pool that runtimes have an integer kernel for."""
    data, out = node.inputs[0], node.outputs[0]
    if data is None or _made_by(data, "DequantizeLinear") is None or data.shape is None or data.shape.rank() != 4:
        return
    axes = [int(a) % 4 for a in _array(node.inputs[1])] if len(node.inputs) > 1 else []
    if sorted(axes) != [2, 3]:
        return
    pool = ir.node("GlobalAveragePool", [data])
    pool.outputs[0].name, pool.outputs[0].type = f"{out.name}_pool", out.type
    pool.outputs[0].shape = ir.Shape([data.shape[0], data.shape[1], 1, 1])
    graph.insert_before(node, pool)
    if node.attributes.get_int("keepdims", 1):
        ir.convenience.replace_all_uses_with(out, pool.outputs[0], replace_graph_outputs=True)
    else:
        _flatten_behind(node, pool, graph)
    graph.remove(node, safe=True)


def _flatten_behind(node: ir.Node, pool: ir.Node, graph: ir.Graph) -> None:
    """Flatten after the Q that follows, if one does: the pool must see its Q to run on integers."""
    out, anchor, kept = node.outputs[0], node, pool.outputs[0]
    readers = [reader for reader, _ in out.uses()]
    if len(readers) == 1 and readers[0].op_type == "QuantizeLinear":
        anchor, out = readers[0], readers[0].outputs[0]
        anchor.replace_input_with(0, kept)
        kept = out
    flat = ir.node("Flatten", [kept], attributes={"axis": 1})
    flat.outputs[0].name, flat.outputs[0].type = f"{out.name}_flat", out.type
    for reader, index in list(out.uses()):
        reader.replace_input_with(index, flat.outputs[0])
    flat.replace_input_with(0, kept)
    graph.insert_after(anchor, flat)


def _move_integers(node: ir.Node, graph: ir.Graph) -> None:
    """DQ → move → Q of the same scale becomes the move of the integers themselves; padding pads with the zero point."""
    dq = _made_by(node.inputs[0], "DequantizeLinear")
    readers = [reader for reader, _ in node.outputs[0].uses()]
    if dq is None or len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return
    q = readers[0]
    if any(not np.array_equal(_array(dq.inputs[i]), _array(q.inputs[i])) for i in (1, 2)):
        return
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, q.inputs[2])
    node.replace_input_with(0, dq.inputs[0])
    node.outputs[0].type = q.outputs[0].type
    ir.convenience.replace_all_uses_with(q.outputs[0], node.outputs[0])
    graph.remove(q, safe=True)


def _normalise_at_once(model: ir.Model) -> None:
    """x · scale + offset of an image in front of the first Q becomes one BatchNormalization of mean 0 and variance 1.

    ONNX Runtime moves the transposition of the image behind its normalisation, for the sake of integer convolutions,
    and then multiplies along a last dimension of 3, which takes longer than the convolutions of a small network
    (measured: 2.5 of 5.7 ms for MobileNetV3-small at 224 pixels). It does not move one past a BatchNormalization.
    """
    graph = model.graph
    names = set(preparing(ir.to_proto(model)))
    for add in [node for node in graph if node.op_type == "Add" and node.name in names]:
        mul = _made_by(add.inputs[0], "Mul")
        if mul is None or mul.name not in names or mul.inputs[0] is None or len(mul.outputs[0].uses()) != 1:
            continue
        constants = [value for value in (mul.inputs[1], add.inputs[1]) if value is not None and value.is_initializer()]
        if len(constants) != 2 or any(_array(v).ndim != 4 or _array(v).shape[1] != _array(v).size for v in constants):
            continue
        scale, offset = (_array(value).reshape(-1) for value in constants)
        if scale.shape != offset.shape:
            continue
        name = add.outputs[0].name
        parts = [scale, offset, np.zeros_like(scale), np.ones_like(scale)]
        inputs = [mul.inputs[0], *(_initializer(add, f"{name}_{i}", part) for i, part in enumerate(parts))]
        norm = ir.node("BatchNormalization", inputs, attributes={"epsilon": 0.0})
        norm.outputs[0].name, norm.outputs[0].type = f"{name}_normalised", add.outputs[0].type
        norm.outputs[0].shape = add.outputs[0].shape
        graph.insert_before(add, norm)
        ir.convenience.replace_all_uses_with(add.outputs[0], norm.outputs[0])
        graph.remove([add, mul], safe=True)


def _integer_bias(node: ir.Node, graph: ir.Graph) -> None:
    """bias ≈ round(bias / (x_scale · weight_scale)) as int32 (Jacob et al., CVPR 2018, eq. 11)."""
    x, w = _made_by(node.inputs[0], "DequantizeLinear"), _made_by(node.inputs[1], "DequantizeLinear")
    bias = node.inputs[2]
    if x is None or w is None or bias is None or not bias.is_initializer():
        return
    floats = _array(bias).astype(np.float64)
    x_scale = _array(x.inputs[1]).astype(np.float64)
    w_scale = np.broadcast_to(_array(w.inputs[1]), floats.shape).astype(np.float64)
    least = np.abs(floats) / (_LARGEST_BIAS * x_scale)
    if _array(w.inputs[1]).ndim and (least > w_scale).any():
        w_scale = _coarser_weights(w, np.maximum(least, w_scale))
    scale = (x_scale * w_scale).astype(np.float32)
    scale = scale if _array(w.inputs[1]).ndim else scale[:1].reshape(())
    integers = np.clip(np.rint(floats / scale), -_LARGEST_BIAS, _LARGEST_BIAS).astype(np.int32)
    name = node.outputs[0].name
    parts = [integers, scale, np.zeros(scale.shape, dtype=np.int32)]
    inputs = [_initializer(node, f"{name}_bias_{i}", part) for i, part in enumerate(parts)]
    dq = ir.node("DequantizeLinear", inputs, attributes={"axis": 0} if scale.ndim else {})
    dq.outputs[0].name, dq.outputs[0].dtype, dq.outputs[0].shape = f"{name}_bias", ir.DataType.FLOAT, bias.shape
    graph.insert_before(node, dq)
    node.replace_input_with(2, dq.outputs[0])


def _coarser_weights(dq: ir.Node, scales: np.ndarray) -> np.ndarray:
    """Raise the scale of channels so dead that their bias would not fit int32; their few levels are requantized."""
    weight, old = _array(dq.inputs[0]), _array(dq.inputs[1]).astype(np.float64)
    new = scales.astype(np.float32)
    shape = [1] * weight.ndim
    axis = dq.attributes.get_int("axis", 1) % weight.ndim
    shape[axis] = -1
    levels = np.rint(weight * old.reshape(shape) / new.reshape(shape)).astype(np.int8)
    name = dq.outputs[0].name
    dq.replace_input_with(0, _initializer(dq, f"{name}_levels", levels))
    dq.replace_input_with(1, _initializer(dq, f"{name}_scales", new))
    return new.astype(np.float64)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _array(value: ir.Value | None) -> np.ndarray:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    assert constant is not None, f"{value} is not a constant"
    return np.asarray(constant.numpy())


def _initializer(node: ir.Node, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    assert isinstance(node.graph, ir.Graph)
    node.graph.register_initializer(value)
    return value
