"""Weight-only int8: the file holds int8 weights, everything is computed in float32.

A weight becomes Cast(int8) · scale, with a scale for each output channel, in front of its layer. ONNX Runtime and
TensorRT compute such a constant once, when they load the file. A DequantizeLinear says the same, but ONNX Runtime 1.32
does not fold it: behind one a Conv takes 1.5 times as long, a Gemm 2.4 times (measured, one thread), and a MatMul
becomes MatMulNBits, which rounds the activations too.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_ir as ir

from edgekd.errors import ModelError
from edgekd.graph.edit import strip
from edgekd.quantize.quantizer import LOWEST_SCALE

# Inputs that hold weights, by operator, and the axis along which each output has weights of its own.
LAYERS: dict[str, dict[int, int]] = {
    "Conv": {1: 0}, "ConvTranspose": {1: 1}, "Gemm": {1: 1}, "MatMul": {1: -1}, "Gather": {0: 0},
    "LSTM": {1: 1, 2: 1}, "GRU": {1: 1, 2: 1}, "RNN": {1: 1, 2: 1},
}  # fmt: skip
_LEAST_PER_SCALE = 8  # weights that share a scale: with fewer, the scales take more than the weights save
_LEAST = 256  # weights; a smaller tensor is not worth two more nodes
_FOLDED_BYTES = 1 << 31  # constants up to the largest that an ONNX file can hold are computed here


def weights_to_int8(
    model: onnx.ModelProto, *, only: Collection[str] = tuple(LAYERS)
) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, str]]:
    """The graph with its layers' weights as int8, what holds them, and what stays in float with the reason.

    w ≈ scale · q with q = round(w / scale) in [-127, 127], scale = max |w| / 127 of each output channel (of each row
    of a table that is looked up).

    Args:
        model: a float32 graph.
        only: operators whose weights are taken.

    Raises:
        ModelError: no weight of the graph can become int8.
    """
    edited = ir.from_proto(folded(model))
    done: list[str] = []
    left: dict[str, str] = {}
    for node in list(edited.graph):
        for index, axis in LAYERS.get(node.op_type, {}).items():
            if node.op_type not in only or index >= len(node.inputs):
                continue
            why = _one_weight(node, index, axis)
            if why is None:
                done.append(f"{node.name}.{index}")
            elif why:
                left[f"{node.name}.{index}"] = why
    if not done:
        told = "; ".join(f"{name}: {why}" for name, why in left.items()) or "it has no layer with weights"
        raise ModelError(f"no weight of this model can become int8 ({told})", fix="deploy it in fp32")
    return strip(ir.to_proto(edited)), tuple(done), left


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with what depends on constants alone computed: exporters reorder an LSTM's gates with Slice and Concat.

    What merely changes the type of integers (a weight that is int8 already) stays as it is.
    """
    import onnxscript.optimizer

    edited = ir.from_proto(model)
    onnxscript.optimizer.fold_constants(
        edited, input_size_limit=_FOLDED_BYTES, output_size_limit=_FOLDED_BYTES,
        should_fold=lambda node: False if node.op_type in {"Cast", "DequantizeLinear"} else None,
    )  # fmt: skip
    result: onnx.ModelProto = ir.to_proto(edited)
    return result


def _one_weight(node: ir.Node, index: int, axis: int) -> str | None:
    """None where the weight is int8 now, else why it is not; empty where there is no weight to speak of."""
    value = node.inputs[index]
    if value is None:
        return ""
    array = ir.convenience.get_const_tensor(value)
    if array is None:
        kept = value.producer()
        if kept is not None and kept.op_type == "Mul" and any(_is_int8(v) for v in kept.inputs):
            return None  # shared with a layer before it, which has made it int8
        return "" if node.op_type in {"Gather", "MatMul"} else "its weight is computed, not stored"
    full = np.asarray(array.numpy())
    if full.dtype != np.float32 or full.ndim < 2:
        return "" if full.dtype.kind in "iub" or full.ndim < 2 else f"its weights are {full.dtype}"
    if node.op_type == "Gemm" and _transposed(node):
        axis = 0
    channels = full.shape[axis]
    if full.size < _LEAST or full.size < _LEAST_PER_SCALE * channels:
        return f"{full.size} weights in {channels} channels: the scales would take what int8 saves"
    if not np.isfinite(full).all():
        return "a weight is not finite"
    _replace(node, value, full, axis % full.ndim)
    return None


def _transposed(node: ir.Node) -> bool:
    return "transB" in node.attributes and node.attributes["transB"].as_int() != 0


def _replace(node: ir.Node, value: ir.Value, full: np.ndarray, axis: int) -> None:
    """Every reader of the weight reads Cast(int8) · scale."""
    others = tuple(i for i in range(full.ndim) if i != axis)
    scale = np.maximum(np.abs(full).max(axis=others, keepdims=True) / 127, LOWEST_SCALE).astype(np.float32)
    levels = np.clip(np.rint(full / scale), -127, 127).astype(np.int8)
    name = value.name or f"{node.name}_weight"
    stored, scales = (_constant(node, f"{name}_{part}", array) for part, array in (("int8", levels), ("scale", scale)))
    cast = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)})
    product = ir.node("Mul", [cast.outputs[0], scales])
    for made in (cast, product):
        made.outputs[0].dtype, made.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(full.shape)
        made.outputs[0].name = f"{name}_{made.op_type.lower()}"
    assert isinstance(node.graph, ir.Graph)
    first = next(each for each in node.graph if each in {reader for reader, _ in value.uses()})
    node.graph.insert_before(first, [cast, product])
    ir.convenience.replace_all_uses_with(value, product.outputs[0])


def _is_int8(value: ir.Value | None) -> bool:
    cast = value.producer() if value is not None else None
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return source is not None and source.dtype == ir.DataType.INT8 and source.is_initializer()


def _constant(node: ir.Node, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    assert isinstance(node.graph, ir.Graph)
    node.graph.register_initializer(value)
    return value
