"""A float32 graph becomes a strongly typed float16 graph: every cast is in the file, the runtime chooses nothing."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir

from edgekd.errors import ModelError
from edgekd.graph.edit import opset, preparing, strip
from edgekd.types import Json

LARGEST = 65504.0  # the largest finite float16 (IEEE 754-2019, binary16)
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_QDQ = {"QuantizeLinear", "DequantizeLinear"}


def halve(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Json]]:
    """The graph in float16 between its inputs and outputs, which keep their types, and an account of what was lost.

    What prepares an image (cast, rearrange, normalise) stays in float32, as does every operator that has no float16
    form in the model's opset, and every input that ONNX fixes to float32 (the scales of Resize). Constants beyond
    ±65504 that are not weights (attention masks) are clamped; `clamped` counts them and `flushed` the weights that
    became zero.

    Raises:
        ModelError: a weight does not fit float16, a scale vanishes in it, the graph has Q/DQ nodes below opset 19
            (their scales can only be float32 there) or of uint8, or it has branches or loops.
    """
    version = opset(model)
    if version < 19 and any(node.op_type in _QDQ for node in model.graph.node):
        raise ModelError(
            f"Q/DQ nodes of opset {version} cannot have float16 scales",
            expected="opset 19 or newer",
            fix="export the quantized graph for opset 19, or build it weakly typed with fp16 allowed",
        )
    if any(t.data_type == onnx.TensorProto.UINT8 and t.name in _zero_points(model) for t in model.graph.initializer):
        raise ModelError(
            "a uint8 Q/DQ graph has no float16 form that runs right",  # ONNX Runtime 1.32 folds its clips wrongly
            expected="int8 Q/DQ nodes, as TensorRT takes them",
            fix="use this graph with its float32 scales",
        )
    typed = ir.from_proto(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True))
    if any(
        a.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS} for n in typed.graph for a in n.attributes.values()
    ):
        raise ModelError("a graph with branches or loops cannot be converted to float16", expected="a plain graph")
    work = _Halving(typed.graph, version, frozenset(preparing(model)))
    for node in list(typed.graph):
        work.convert(node)
    work.finish()
    proto: onnx.ModelProto = ir.to_proto(typed)
    account: dict[str, Json] = {
        "clamped": work.clamped,
        "flushed": work.flushed,
        "float32_nodes": [*sorted(work.float32_nodes)],
    }
    return strip(proto), account


class _Halving:
    """One conversion under way."""

    def __init__(self, graph: ir.Graph, version: int, prepared: frozenset[str]) -> None:
        self.graph, self.version = graph, version
        self.clamped = self.flushed = 0
        self.float32_nodes: set[str] = set()
        self._was_float = {
            v for n in graph for v in (*n.inputs, *n.outputs) if v is not None and v.dtype == ir.DataType.FLOAT
        }
        self._was_float |= {v for v in graph.outputs if v.dtype == ir.DataType.FLOAT}
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._preparing = prepared

    def convert(self, node: ir.Node) -> None:
        inputs, outputs = self._types(node)
        if node.name in self._preparing or inputs is None:
            inputs, outputs = [ir.DataType.FLOAT] * len(node.inputs), [ir.DataType.FLOAT] * len(node.outputs)
            if node.name not in self._preparing:
                self.float32_nodes.add(node.op_type)
        for index, value in enumerate(node.inputs):
            if value in self._was_float and value is not None:
                node.replace_input_with(index, self._as(value, inputs[index], node, index))
        for index, value in enumerate(node.outputs):
            if value in self._was_float:
                value.dtype = outputs[index]
        if outputs and outputs[0] == ir.DataType.FLOAT16 and node.outputs[0] in self._was_float:
            self._attributes(node)

    def finish(self) -> None:
        """Cast what leaves the graph back to float32, under the name it had."""
        for index, value in enumerate(self.graph.outputs):
            if value in self._was_float and value.dtype == ir.DataType.FLOAT16:
                cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
                cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
                cast.outputs[0].name, value.name = value.name, f"{value.name}_half"
                self.graph.append(cast)
                self.graph.outputs[index] = cast.outputs[0]

    def _types(self, node: ir.Node) -> tuple[list[ir.DataType] | None, list[ir.DataType]]:
        """The float type of each input and output in float16 form; None where the operator has no such form."""
        schema = _schema(node.op_type, node.domain, self.version)
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        found: list[list[ir.DataType]] = []
        for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
            types: list[ir.DataType] = []
            for index, value in enumerate(values):
                text = formal[min(index, len(formal) - 1)].type_str
                if value in self._was_float and text in allowed and "tensor(float16)" not in allowed[text]:
                    return None, []
                types.append(ir.DataType.FLOAT16 if text in allowed else ir.DataType.FLOAT)
            found.append(types)
        return found[0], found[1]

    def _as(self, value: ir.Value, wanted: ir.DataType, node: ir.Node, index: int) -> ir.Value:
        if value.dtype == wanted and not (value.is_initializer() and (value, ir.DataType.FLOAT16) in self._cast):
            return value
        known = self._cast.get((value, wanted))
        if known is not None:
            return known
        if value.is_initializer() and wanted == ir.DataType.FLOAT16:
            made = self._constant(value, node, index)
        elif value.is_initializer():
            return value
        else:
            cast = ir.node("Cast", [value], attributes={"to": int(wanted)})
            made = cast.outputs[0]
            made.name, made.dtype, made.shape = f"{value.name}_{wanted.name.lower()}", wanted, value.shape
            self.graph.insert_before(node, cast)
        self._cast[(value, wanted)] = made
        return made

    def _constant(self, value: ir.Value, node: ir.Node, index: int) -> ir.Value:
        assert value.const_value is not None
        full = np.asarray(value.const_value.numpy(), dtype=np.float32)
        half = self._half(full, node, index)
        made = ir.Value(name=f"{value.name}_half", const_value=ir.tensor(half))
        made.dtype, made.shape = ir.DataType.FLOAT16, value.shape
        self.graph.register_initializer(made)
        return made

    def _half(self, full: np.ndarray, node: ir.Node, index: int) -> np.ndarray:
        beyond = np.isfinite(full) & (np.abs(full) > LARGEST)
        is_scale = node.op_type in _QDQ and index == 1
        if beyond.any() and (is_scale or (node.op_type in _WEIGHTED and index == 1)):
            raise ModelError(
                f"{int(beyond.sum())} {'scales' if is_scale else 'weights'} of {node.name} exceed {LARGEST:g},"
                " the largest float16",
                expected="finite weights of usual size",
                fix="keep this model in fp32, or train it with weight decay",
            )
        half = np.clip(full, -LARGEST, LARGEST, out=full.copy(), where=np.isfinite(full)).astype(np.float16)
        lost = (half == 0) & (full != 0)
        if is_scale and lost.any():
            raise ModelError(
                f"{int(lost.sum())} scales of {node.name} are zero in float16", expected="scales above 6e-8"
            )
        self.clamped += int(beyond.sum())
        self.flushed += int(lost.sum())
        return half

    def _attributes(self, node: ir.Node) -> None:
        """Types and constants that a node carries itself."""
        for name in ("to", "dtype", "output_dtype"):
            if name in node.attributes and node.attributes.get_int(name) == int(ir.DataType.FLOAT):
                node.attributes.add(ir.AttrInt64(name, int(ir.DataType.FLOAT16)))
        if node.op_type in {"Constant", "ConstantOfShape"} and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            half = self._half(np.asarray(tensor.numpy(), dtype=np.float32), node, 0)
            node.attributes.add(ir.AttrTensor("value", ir.tensor(half)))


def _zero_points(model: onnx.ModelProto) -> set[str]:
    return {node.input[2] for node in model.graph.node if node.op_type in _QDQ and len(node.input) > 2}


@functools.cache
def _schema(op_type: str, domain: str, version: int) -> onnx.defs.OpSchema:
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError as error:
        raise ModelError(
            f"operator {domain or 'ai.onnx'}.{op_type} is not of the ONNX standard, its float16 form is unknown"
        ) from error
