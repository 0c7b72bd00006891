"""What a runtime would refuse or run slowly in a Q/DQ graph, found before the board does.

The TensorRT rules were read in the source of its ONNX parser (onnx-tensorrt 8.5-GA and 10.1-GA,
`QuantDequantLinearHelper`), its operator tables and the placement tests of TensorRT Model Optimizer. They prove that
the parser takes the graph, not that the builder fuses it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from edgekd.graph.edit import opset as opset_of
from edgekd.graph.edit import tensors
from edgekd.types import QuantizationRules

T = onnx.TensorProto
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_REFUSED = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"})
_FLOATS = frozenset({T.FLOAT, T.FLOAT16, T.BFLOAT16})
# Newest opset that a release's parser reads: docs/operators.md of onnx-tensorrt 8.2 to 10.1; of 10.9 and 10.13 by
# third-party guides only.
PARSER_OPSET = {(8, 2): 13, (8, 5): 17, (10, 0): 20, (10, 9): 22, (10, 13): 24}


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a graph breaks a rule: an error is refused by the runtime, a warning costs speed or accuracy."""

    rule: str
    node: str
    message: str
    severity: Literal["error", "warning"]

    def __str__(self) -> str:
        return f"{self.severity}: {self.node or 'graph'}: {self.message} [{self.rule}]"


@dataclass(frozen=True)
class Graph:
    """A model with what every rule asks of it."""

    model: onnx.ModelProto
    constants: dict[str, np.ndarray]
    maker: dict[str, onnx.NodeProto]
    readers: dict[str, list[onnx.NodeProto]]
    types: dict[str, int]  # ONNX element types
    opset: int  # the newest that may be used

    @property
    def nodes(self) -> Iterator[onnx.NodeProto]:
        return iter(self.model.graph.node)

    def qdq(self) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type in _QDQ)

    def made_by(self, value: str, *op_types: str) -> onnx.NodeProto | None:
        node = self.maker.get(value)
        return node if node is not None and node.op_type in op_types else None


Rule = Callable[[Graph], Iterator[Finding]]


def newest_opset(tensorrt: str) -> int:
    """The newest opset that a TensorRT release reads, e.g. 17 for "8.6.2"; what is older than 8.2 counts as 8.2."""
    major, minor = (int(part) for part in (*tensorrt.split("."), "0")[:2])
    known = [newest for release, newest in PARSER_OPSET.items() if release <= (major, minor)]
    return max(known, default=PARSER_OPSET[(8, 2)])


def check(path: Path, rules: QuantizationRules, opset: int) -> tuple[Finding, ...]:
    """Every place where the graph in `path` breaks a rule of the runtime that `rules.lint` names.

    Args:
        opset: the newest that the runtime's parser reads.
    """
    return check_model(onnx.load(path), rules, opset)


def check_model(model: onnx.ModelProto, rules: QuantizationRules, opset: int) -> tuple[Finding, ...]:
    """`check` of a model in memory."""
    try:
        graph = _graph(model, opset)
    except onnx.shape_inference.InferenceError as error:
        return (Finding("invalid_graph", "", str(error).splitlines()[0], "error"),)
    chosen = TENSORRT if rules.lint == "tensorrt" else ONNXRUNTIME
    return tuple(finding for rule in chosen for finding in rule(graph))


# ---------------------------------------------------------------- what TensorRT's parser refuses


def newer_opset(graph: Graph) -> Iterator[Finding]:
    """The parser knows no operators newer than its release."""
    used = opset_of(graph.model)
    if used > graph.opset:
        yield Finding("newer_opset", "", f"the graph is of opset {used}, the parser reads up to {graph.opset}", "error")


def unsupported_operator(graph: Graph) -> Iterator[Finding]:
    """Integer operators are unknown to TensorRT; it makes its own from Q/DQ."""
    for node in graph.nodes:
        if node.op_type in _REFUSED or node.op_type.startswith("QLinear") or node.domain == "com.microsoft":
            yield _error("unsupported_operator", node, f"{node.op_type} is not read; use Q/DQ nodes")


def quantized_type(graph: Graph) -> Iterator[Finding]:
    """Q/DQ work on int8: uint8 is refused, and a bias dequantized from int32 too."""
    for node in graph.qdq():
        value = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        kind = graph.types.get(value)
        if kind is not None and kind != T.INT8:
            name = T.DataType.Name(kind).lower()
            why = "keep the bias in float" if kind == T.INT32 else "quantize to int8"
            yield _error("quantized_type", node, f"{node.op_type} of {name}; {why}")


def explicit_zero_point(graph: Graph) -> Iterator[Finding]:
    """TensorRT 8 takes three inputs only; later releases read a missing one as int8 where ONNX says uint8."""
    for node in graph.qdq():
        if len(node.input) < 3 or not node.input[2]:
            yield _error("explicit_zero_point", node, f"{node.op_type} has no zero point; give it int8 zeros")


def zero_point(graph: Graph) -> Iterator[Finding]:
    """Symmetric quantization only: constant zeros, as many as there are scales."""
    for node in graph.qdq():
        if len(node.input) < 3 or not node.input[2]:
            continue
        zeros, scale = graph.constants.get(node.input[2]), graph.constants.get(node.input[1])
        if zeros is None:
            yield _error("zero_point", node, "the zero point is computed, not constant")
        elif zeros.any():
            yield _error("zero_point", node, f"the zero point is {int(zeros[zeros != 0].flat[0])}, not 0")
        elif scale is not None and zeros.size != scale.size:
            yield _error("zero_point", node, f"{zeros.size} zero points for {scale.size} scales")


def positive_scale(graph: Graph) -> Iterator[Finding]:
    """Scales are constant, finite and above zero."""
    for node in graph.qdq():
        scale = graph.constants.get(node.input[1])
        if scale is None:
            yield _error("positive_scale", node, "the scale is computed, not constant")
        elif bad := int((~np.isfinite(scale) | (scale <= 0)).sum()):
            yield _error("positive_scale", node, f"{bad} scales are not finite and above 0")


def weights_only_per_channel(graph: Graph) -> Iterator[Finding]:
    """More than one scale only where the data is a constant."""
    for node in graph.qdq():
        scale = graph.constants.get(node.input[1])
        if scale is not None and scale.size > 1 and _weight(graph, node) is None:
            yield _error("weights_only_per_channel", node, f"{scale.size} scales for an activation; it takes one")


def channel_axis(graph: Graph) -> Iterator[Finding]:
    """Per-channel scales lie along the output channels; without the attribute TensorRT reads axis 0, ONNX axis 1."""
    for node in graph.qdq():
        scale, weight = graph.constants.get(node.input[1]), _weight(graph, node)
        if scale is None or scale.size == 1 or weight is None:
            continue
        axis = _attribute(node, "axis", None)
        if axis is None:
            yield _error("channel_axis", node, "per-channel scales without an axis")
            continue
        if not -weight.ndim <= axis < weight.ndim or weight.shape[axis] != scale.size:
            yield _error("channel_axis", node, f"{scale.size} scales along axis {axis} of {weight.shape}")
            continue
        for reader in _readers(graph, node):
            wanted = _output_axis(reader, weight.ndim)
            if wanted is not None and axis % weight.ndim != wanted:
                yield _error(
                    "channel_axis", node, f"axis {axis}; the output channels of {reader.op_type} are axis {wanted}"
                )


def byte_only_cast(graph: Graph) -> Iterator[Finding]:
    """uint8 may be a network's input or output, and only a Cast may touch it."""
    inputs = {i.name for i in graph.model.graph.input}
    outputs = {o.name for o in graph.model.graph.output}
    for node in graph.nodes:
        if node.op_type in _QDQ:
            continue  # quantized_type tells
        for value in node.input:
            if graph.types.get(value) == T.UINT8 and not (node.op_type == "Cast" and value in inputs):
                yield _error("byte_only_cast", node, f"{node.op_type} reads uint8; put a Cast behind the input")
        for value in node.output:
            if graph.types.get(value) == T.UINT8 and not (node.op_type == "Cast" and value in outputs):
                yield _error("byte_only_cast", node, f"{node.op_type} writes uint8 inside the network")


def float_types_agree(graph: Graph) -> Iterator[Finding]:
    """In a strongly typed network nothing is cast silently: scale and data, weight and bias have one float type."""
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear":
            values = list(node.input[:2])
        elif node.op_type in _LAYERS | {"Add", "Sub", "Mul", "Div", "Concat"}:
            values = list(node.input)
        else:
            continue
        kinds = {graph.types[v] for v in values if graph.types.get(v) in _FLOATS}
        if len(kinds) > 1:
            names = " and ".join(sorted(T.DataType.Name(kind).lower() for kind in kinds))
            yield _error("float_types_agree", node, f"{node.op_type} mixes {names}")


# ---------------------------------------------------------------- what costs speed or accuracy


def shared_pair(graph: Graph) -> Iterator[Finding]:
    """A value read by many is quantized once: two pairs with scales of their own cannot be fused into its maker."""
    for value, readers in graph.readers.items():
        pairs = [r for r in readers if r.op_type == "QuantizeLinear" and r.input[0] == value]
        if len(pairs) > 1:
            yield _warning("shared_pair", pairs[1], f"{value} is quantized {len(pairs)} times; share one Q/DQ pair")
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear":
            twins = [r for r in graph.readers.get(node.output[0], []) if r.op_type == "DequantizeLinear"]
            if len(twins) > 1:
                yield _warning("shared_pair", node, f"{len(twins)} DequantizeLinear nodes read it; share one")


def residual_branch(graph: Graph) -> Iterator[Finding]:
    """Where a quantized convolution's output is added to a branch, exactly the branch is quantized."""
    for node in graph.nodes:
        if node.op_type != "Add" or any(v in graph.constants for v in node.input):
            continue
        direct = [v for v in node.input if _integer_conv(graph, graph.maker.get(v))]
        dequantized = [v for v in node.input if graph.made_by(v, "DequantizeLinear")]
        behind = [v for v in dequantized if _integer_conv(graph, _before_pair(graph, v))]
        if direct and not dequantized:
            yield _warning("residual_branch", node, "the branch added to a convolution is not quantized")
        elif len(dequantized) == 2 and behind:
            yield _warning("residual_branch", node, "both sides are quantized; leave the convolution's in float")


def weight_range(graph: Graph) -> Iterator[Finding]:
    """-128 has no positive counterpart: symmetric weights do not use it."""
    for node in graph.qdq():
        weight = _weight(graph, node)
        if weight is not None and weight.dtype == np.int8 and (weight == -128).any():
            yield _warning("weight_range", node, f"{int((weight == -128).sum())} weights are -128; use [-127, 127]")


# ---------------------------------------------------------------- ONNX Runtime


def float_layer(graph: Graph) -> Iterator[Finding]:
    """A layer with quantized weights runs on integers only if its input is quantized too, and a Conv's output."""
    for node in graph.nodes:
        if node.op_type not in {"Conv", "Gemm", "MatMul"} or not graph.made_by(node.input[1], "DequantizeLinear"):
            continue
        if not graph.made_by(node.input[0], "DequantizeLinear"):
            yield _warning("float_layer", node, f"the input of {node.op_type} is not quantized: it runs in float")
        elif node.op_type == "Conv" and not _quantized_after(graph, node):
            yield _warning("float_layer", node, "the output of Conv is not quantized: it runs in float")


TENSORRT: tuple[Rule, ...] = (
    newer_opset, unsupported_operator, quantized_type, explicit_zero_point, zero_point, positive_scale,
    weights_only_per_channel, channel_axis, byte_only_cast, float_types_agree, shared_pair, residual_branch,
    weight_range,
)  # fmt: skip
ONNXRUNTIME: tuple[Rule, ...] = (newer_opset, positive_scale, weight_range, float_layer)


def _graph(model: onnx.ModelProto, opset: int) -> Graph:
    inferred = onnx.shape_inference.infer_shapes(model).graph  # not strict: what it cannot type, a rule may explain
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for value in node.input:
            readers[value].append(node)
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.output, *inferred.value_info)}
    constants = tensors(model.graph)
    types |= {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in constants.items()}
    maker = {value: node for node in model.graph.node for value in node.output}
    return Graph(model, constants, maker, dict(readers), {k: v for k, v in types.items() if v}, opset)


def _error(rule: str, node: onnx.NodeProto, message: str) -> Finding:
    return Finding(rule, node.name or node.output[0], message, "error")


def _warning(rule: str, node: onnx.NodeProto, message: str) -> Finding:
    return Finding(rule, node.name or node.output[0], message, "warning")


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _weight(graph: Graph, node: onnx.NodeProto) -> np.ndarray | None:
    """The constant that a Q/DQ node rests on, or None."""
    made = graph.made_by(node.input[0], "QuantizeLinear")
    return graph.constants.get(made.input[0] if made is not None else node.input[0])


def _readers(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The layers that read a weight behind this Q or DQ."""
    readers = graph.readers.get(node.output[0], [])
    behind = [r for d in readers if d.op_type == "DequantizeLinear" for r in graph.readers.get(d.output[0], [])]
    return [r for r in (*readers, *behind) if r.op_type in _LAYERS]


def _output_axis(reader: onnx.NodeProto, rank: int) -> int | None:
    if reader.op_type == "Conv":
        return 0
    if reader.op_type == "ConvTranspose":
        return 1
    if reader.op_type == "Gemm":
        return 0 if _attribute(reader, "transB", 0) else 1
    return rank - 1 if reader.op_type == "MatMul" else None


def _integer_conv(graph: Graph, node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "Conv" and graph.made_by(node.input[0], "DequantizeLinear") is not None


def _before_pair(graph: Graph, value: str) -> onnx.NodeProto | None:
    dq = graph.made_by(value, "DequantizeLinear")
    q = graph.made_by(dq.input[0], "QuantizeLinear") if dq is not None else None
    return graph.maker.get(q.input[0]) if q is not None and len(graph.readers[q.output[0]]) == 1 else None


def _quantized_after(graph: Graph, node: onnx.NodeProto) -> bool:
    """Does a Q read this output, directly or behind a clip?"""
    readers = graph.readers.get(node.output[0], [])
    if len(readers) == 1 and readers[0].op_type in {"Relu", "Clip", "LeakyRelu"}:
        readers = graph.readers.get(readers[0].output[0], [])
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
