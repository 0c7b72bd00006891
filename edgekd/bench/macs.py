"""Multiply-accumulates and parameters of an ONNX file, for one sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edgekd.errors import ModelError

if TYPE_CHECKING:
    import onnx

Shape: TypeAlias = "tuple[int, ...] | None"

# Where an operator has its data and its weight: the float form, the integer forms, and those of ONNX Runtime.
_CONV = {"Conv": (0, 1), "FusedConv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3)}
_GEMM = {"Gemm": (0, 1), "QGemm": (0, 3)}
_MATMUL = {"MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}
# Operators that hold most of the work where they occur, and whose work is not counted here: better none than too few.
_UNCOUNTED = {
    "Einsum",
    "LSTM",
    "GRU",
    "RNN",
    "DynamicQuantizeLSTM",
    "Attention",
    "MultiHeadAttention",
    "DeformConv",
    "If",
    "Loop",
    "Scan",
}
# Inputs that hold weights, by operator; running statistics of a normalisation are no parameters.
_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "Conv": (1, 2), "FusedConv": (1, 2), "ConvTranspose": (1, 2), "ConvInteger": (1,), "QLinearConv": (3, 8),
    "Gemm": (0, 1, 2), "QGemm": (0, 3, 6), "MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3),
    "BatchNormalization": (1, 2), "InstanceNormalization": (1, 2), "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2), "RMSNormalization": (1,), "PRelu": (1,), "Gather": (0,),
    "LSTM": (1, 2, 3), "GRU": (1, 2, 3), "RNN": (1, 2, 3), "DynamicQuantizeLSTM": (1, 2, 3),
}  # fmt: skip
# Element-wise operators: their constants are weights (a bias, a position embedding, a layer scale) behind the first
# operator that has weights of its own, and normalise the input before it.
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div"}
# A weight may reach its operator through these, and through Concat; what counts is the constant at the far end.
_THROUGH = {
    "DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "Slice", "Split", "Gather", "Expand", "Tile", "Pad",
}  # fmt: skip
_NO_WEIGHTS = (7, 9)  # int64 and bool, of onnx.TensorProto


@dataclass(frozen=True, slots=True)
class Cost:
    """What one sample costs. `macs` is None where the graph holds work that is not counted, with the reason."""

    macs: int | None
    parameters: int  # elements of weights and biases as they are in the file (batch normalisation already folded in)
    io_bytes: int  # inputs and outputs of the graph
    reason: str | None


def count(path: Path) -> Cost:
    """MACs of Conv, ConvTranspose, Gemm and MatMul, in float, Q/DQ and integer form, and the parameters.

    Conv: output elements × input channels of a group × kernel area. ConvTranspose: the same with input elements and
    output channels. Gemm and MatMul: output elements × inner dimension. Element-wise work is not counted, as usual.

    Raises:
        ModelError: no ONNX file.
    """
    import onnx
    import onnx.inliner
    import onnx.shape_inference

    try:
        model = onnx.load(path, load_external_data=False)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        _one_sample(model.graph)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    except (OSError, ValueError, RuntimeError) as problem:
        raise ModelError(f"cannot be read as ONNX: {problem}", where=str(path)) from problem
    except Exception as problem:  # protobuf's DecodeError derives from Exception alone
        if type(problem).__name__ != "DecodeError":
            raise
        raise ModelError("not an ONNX file", where=str(path)) from problem
    graph = model.graph
    shapes = _shapes(graph)
    uncounted = sorted({node.op_type for node in graph.node} & _UNCOUNTED)
    reason = f"the operations of {', '.join(uncounted)} are not counted" if uncounted else None
    macs = None
    if not uncounted:
        try:
            macs = sum(_macs(node, shapes) for node in graph.node)
        except _UnknownShape as unknown:
            reason = str(unknown)
    return Cost(macs=macs, parameters=_parameters(graph), io_bytes=_io_bytes(graph), reason=reason)


def _one_sample(graph: onnx.GraphProto) -> None:
    """Set the first dimension of every input to 1 where it is symbolic, and forget inferred shapes of another batch."""
    constants = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in constants and len(dims) and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            known = all(dim.HasField("dim_value") for dim in kind.shape.dim)
            shapes.setdefault(value.name, tuple(dim.dim_value for dim in kind.shape.dim) if known else None)
    _fill_quantized(graph, shapes)
    return shapes


def _fill_quantized(graph: onnx.GraphProto, shapes: dict[str, Shape]) -> None:
    """Shapes behind ONNX Runtime's own operators, which the inference of ONNX does not know."""
    same = {"QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu"}
    for node in graph.node:
        if node.op_type in same and shapes.get(node.output[0]) is None:
            shapes[node.output[0]] = shapes.get(node.input[0])


def _macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    op = node.op_type
    if op in _CONV:
        weight = _known(node, node.input[_CONV[op][1]], shapes)
        return _product(_known(node, node.output[0], shapes)) * _product(weight[1:])
    if op == "ConvTranspose":
        weight = _known(node, node.input[1], shapes)
        return _product(_known(node, node.input[0], shapes)) * _product(weight[1:])
    if op in _GEMM:
        data = _known(node, node.input[_GEMM[op][0]], shapes)
        weight = _known(node, node.input[_GEMM[op][1]], shapes)
        rows, inner = data[::-1] if _attribute(node, "transA") else data
        return rows * inner * (weight[0] if _attribute(node, "transB") else weight[1])
    if op in _MATMUL:
        left = _known(node, node.input[_MATMUL[op][0]], shapes)
        right = _known(node, node.input[_MATMUL[op][1]], shapes)
        return _matmul(left, right)
    return 0


def _matmul(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Both as numpy.matmul takes them: leading dimensions are broadcast."""
    left = (1, *left) if len(left) == 1 else left
    right = (*right, 1) if len(right) == 1 else right
    depth = max(len(left), len(right)) - 2
    batch_left = (1,) * (depth - len(left) + 2) + left[:-2]
    batch_right = (1,) * (depth - len(right) + 2) + right[:-2]
    stack = _product(max(a, b) for a, b in zip(batch_left, batch_right, strict=True))
    return stack * left[-2] * left[-1] * right[-1]


class _UnknownShape(Exception):
    """A layer cannot be counted; the text says which."""


def _known(node: onnx.NodeProto, value: str, shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    shape = shapes.get(value)
    if shape is None:
        raise _UnknownShape(f"the shape of '{value}' at {node.op_type} '{node.name}' cannot be inferred")
    return shape


def _parameters(graph: onnx.GraphProto) -> int:
    """Elements of all constants that serve as weights, each counted once."""
    sizes = _sizes(graph)
    origins = _origins(graph, sizes)
    used: set[str] = set()
    learned: set[str] = set()  # values that come out of an operator with weights
    for node in graph.node:
        positions = _WEIGHTS.get(node.op_type, ())
        own = {one for i in positions if i < len(node.input) for one in origins.get(node.input[i], ())}
        if node.op_type in _ELEMENTWISE and any(name in learned for name in node.input):
            own = {one for name in node.input for one in origins.get(name, ()) if sizes[one] > 1}
        used |= own
        if own or (node.op_type != "Shape" and any(name in learned for name in node.input)):
            learned.update(node.output)
    return sum(sizes[name] for name in used)


def _sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """Elements of each constant that can be a weight: indices, shapes and masks are none."""
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            held[node.output[0]] = node.attribute[0].t
    return {name: _product(tensor.dims) for name, tensor in held.items() if tensor.data_type not in _NO_WEIGHTS}


def _origins(graph: onnx.GraphProto, stored: Iterable[str]) -> dict[str, set[str]]:
    """Value → the stored tensors whose numbers it holds, moved about or in another form."""
    made_by = {name: node for node in graph.node for name in node.output}
    found = {name: {name} for name in stored}
    for node in graph.node:
        if node.op_type == "Concat":
            moved = set().union(*(found.get(name, ()) for name in node.input))
        elif node.op_type in _THROUGH or _scaled(node, made_by):
            moved = found.get(node.input[0], set())
        else:
            continue
        found.update(dict.fromkeys(node.output, moved))
    return found


def _scaled(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    """Cast(int8) · scale, which weight-only int8 has in the place of a weight."""
    return node.op_type == "Mul" and node.input[0] in made_by and made_by[node.input[0]].op_type == "Cast"


def _io_bytes(graph: onnx.GraphProto) -> int:
    import onnx

    constants = {tensor.name for tensor in graph.initializer}
    total = 0
    for value in (*(value for value in graph.input if value.name not in constants), *graph.output):
        kind = value.type.tensor_type
        width = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        total += width * _product(max(dim.dim_value, 1) for dim in kind.shape.dim)
    return total


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _product(dims: Iterable[int]) -> int:
    return math.prod(dims)
