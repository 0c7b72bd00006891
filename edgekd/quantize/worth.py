"""Whether a form of int8 is worth building for a graph: rules from its weights and activations alone."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx

from edgekd.graph.edit import tensors
from edgekd.quantize.dynamic import KINDS
from edgekd.quantize.weights import LAYERS, folded
from edgekd.types import Precision

VERSION = 1  # of weight-only and dynamic int8

# Weight-only int8 saves three quarters of the weights' bytes, and nothing else. From four times the activations on,
# weights are at least 80 % of what the model holds in memory, and nearly all of the file that an app downloads.
DOMINATE = 4.0
# Dynamic int8 makes products and LSTMs cheaper. Where they hold less than half of the layers' weights the rest (the
# convolutions) decides how long the model takes, and static int8 is what helps there.
LARGE_PART = 0.5


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a float32 graph is made of, for one sample; tables that are looked up are weights, but of no layer."""

    weight_bytes: int  # of all layers and tables
    activation_bytes: int  # of every value that an operator gives, where its size is known
    layer_bytes: int  # weights of the layers that compute
    dynamic_bytes: int  # those of layers that have a dynamic kernel


def sizes(model: onnx.ModelProto) -> Sizes:
    """The bytes of weights and activations of a float32 graph."""
    plain = folded(model)
    one_sample = onnx.ModelProto()
    one_sample.CopyFrom(plain)
    constants = tensors(plain.graph)
    for value in one_sample.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in constants and len(dims) and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    del one_sample.graph.value_info[:]
    for value in one_sample.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(one_sample, data_prop=True).graph
    known = {v.name: _bytes(v) for v in (*inferred.value_info, *inferred.output)}
    used: dict[str, set[str]] = {"all": set(), "layers": set(), "dynamic": set()}
    for node in plain.graph.node:
        held = {node.input[i] for i in LAYERS.get(node.op_type, ()) if i < len(node.input)} & constants.keys()
        used["all"] |= held
        used["layers"] |= held if node.op_type != "Gather" else set()
        used["dynamic"] |= held if node.op_type in KINDS else set()
    of = {kind: sum(constants[name].nbytes for name in names) for kind, names in used.items()}
    made = sum(known.get(value, 0) for node in plain.graph.node for value in node.output if value not in constants)
    return Sizes(of["all"], made, of["layers"], of["dynamic"])


def why_not(precision: Precision, model: onnx.ModelProto, left: Collection[str] = ()) -> str | None:
    """Why a form is not built unless it is asked for, or None where it is worth it.

    Weight-only int8: the weights are at least four times as large as the activations of a sample. Dynamic int8:
    products and LSTMs hold half of the layers' weights or more, and the graph has an LSTM, a product of activations
    (attention), or such a layer that static int8 left in float.

    Args:
        left: layers that static int8 left in float.
    """
    found = sizes(model)
    if precision == "w8" and found.weight_bytes < DOMINATE * found.activation_bytes:
        return (
            f"its weights ({_kb(found.weight_bytes)}) do not dominate: activations of a sample take "
            f"{_kb(found.activation_bytes)}, and only weights would be int8"
        )
    if precision == "dynamic":
        if not found.dynamic_bytes or found.dynamic_bytes < LARGE_PART * found.layer_bytes:
            share = found.dynamic_bytes / found.layer_bytes if found.layer_bytes else 0.0
            return f"products and LSTMs, which it makes faster, hold {share:.0%} of the layers' weights"
        constants = tensors(folded(model).graph)
        nodes = model.graph.node
        of_activations = any(
            node.op_type == "MatMul" and node.input[1] not in constants and node.input[0] not in constants
            for node in nodes
        )
        if not left and not of_activations and not any(node.op_type == "LSTM" for node in nodes):
            return "static int8 takes every layer of this model, and needs no ranges at run time"
    return None


def _bytes(value: onnx.ValueInfoProto) -> int:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        return 0
    width = int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).itemsize)
    return width * math.prod(int(dim.dim_value) for dim in kind.shape.dim)


def _kb(size: int) -> str:
    return f"{size / 1000:,.0f} kB"
