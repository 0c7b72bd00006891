"""What is done to an ONNX graph after it was written: traces removed, names given, bytes the same every time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edgekd.errors import ModelError

PRODUCER = "edgekd"
# Names of the inputs that are usually initializers, by operator and position.
_SLOTS: dict[str, tuple[str, ...]] = {
    "Conv": ("x", "weight", "bias"),
    "ConvTranspose": ("x", "weight", "bias"),
    "Gemm": ("x", "weight", "bias"),
    "QuantizeLinear": ("x", "scale", "zero_point"),
    "DequantizeLinear": ("x", "scale", "zero_point"),
    "LayerNormalization": ("x", "weight", "bias"),
    "BatchNormalization": ("x", "weight", "bias", "mean", "variance"),
}

_PREPARING = {"Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Sub", "Mul", "Div", "Add"}
_PREPARING_CONSTANT = 4096  # elements; per-channel means and deviations are far below


def strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without traces of the machine that wrote it, with short names counted in graph order.

    Documentation strings, metadata, stack traces, value infos and the producer's fields go from the model, its graphs,
    functions, nodes, values and initializers. Only inputs and outputs keep their names. The same computation gives the
    same bytes, whatever the exporter called things.
    """
    own = onnx.ModelProto()
    own.CopyFrom(model)  # renaming a value of the intermediate form renames the tensor that it was read from, too
    cleaned = ir.from_proto(own)
    passes.InlinePass()(cleaned)
    passes.RemoveUnusedNodesPass()(cleaned)
    passes.DeduplicateInitializersPass()(cleaned)
    passes.ClearMetadataAndDocStringPass()(cleaned)
    _rename(cleaned.graph)
    proto: onnx.ModelProto = ir.to_proto(cleaned)
    written = onnx.ModelProto()
    written.producer_name = PRODUCER
    for opset in sorted(proto.opset_import, key=lambda o: o.domain):
        if opset.domain in {"", *(node.domain for node in proto.graph.node)}:
            written.opset_import.add(domain=opset.domain, version=opset.version)
    written.ir_version = _ir_version(written, proto.ir_version)
    written.graph.CopyFrom(proto.graph)
    _bare(written.graph)
    return written


def save(model: onnx.ModelProto, path: Path) -> None:
    """Check the model as ONNX's own checker does, with shapes, and write it; equal models give equal bytes.

    Raises:
        ModelError: the checker refuses it.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the ONNX graph is not valid: {str(error).splitlines()[0]}", where=path.name) from error
    path.write_bytes(model.SerializeToString(deterministic=True))


def cast_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """Move the cast of an integer image in front of the operators that only rearrange it.

    TensorRT takes uint8 as a network input, but a Cast must be the first to read it (onnx-tensorrt, operators.md).
    """
    graph = (edited := ir.from_proto(model)).graph
    for source in graph.inputs:
        if source.dtype != ir.DataType.UINT8:
            continue
        chain: list[ir.Node] = []
        value: ir.Value = source
        while True:
            readers = [node for node, _ in value.uses() if node.op_type != "Shape"]
            if len(readers) != 1:
                break
            chain.append(readers[0])
            if readers[0].op_type not in {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}:
                break
            value = readers[0].outputs[0]
        alone = len(chain) == len(source.uses()) == 1
        if not chain or chain[-1].op_type != "Cast" or alone or chain[-1].outputs[0].is_graph_output():
            continue
        cast, moved = chain[-1], chain[:-1]
        lifted = ir.node("Cast", [source], attributes={"to": cast.attributes.get_int("to")})
        lifted.outputs[0].name = f"{source.name}_cast"
        lifted.outputs[0].type, lifted.outputs[0].shape = cast.outputs[0].type, source.shape
        for node, index in list(source.uses()):
            if node is not lifted:
                node.replace_input_with(index, lifted.outputs[0])
        graph.insert_before(graph[0], lifted)
        for node in moved:
            node.outputs[0].type = cast.outputs[0].type
        ir.convenience.replace_all_uses_with(cast.outputs[0], (moved[-1] if moved else lifted).outputs[0])
        graph.remove(cast, safe=True)
    result: onnx.ModelProto = ir.to_proto(edited)
    return result


def tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Every constant of the graph by name: initializers and Constant nodes."""
    found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = onnx.numpy_helper.to_array(attribute.t)
    return found


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators that the model uses."""
    return next(int(o.version) for o in model.opset_import if o.domain in {"", "ai.onnx"})


def preparing(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the nodes that turn a stored uint8 image into normalised numbers, before the network proper."""
    known = {i.name for i in model.graph.input if i.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    constants = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    names: list[str] = []
    for node in model.graph.node:
        data = [name for name in node.input if name and name not in constants]
        small = all(constants.get(name, 0) <= _PREPARING_CONSTANT for name in node.input)
        if node.op_type in _PREPARING and data and known.issuperset(data) and small:
            names.append(node.name)
            known.update(node.output)
    return tuple(names)


def _rename(graph: ir.Graph) -> None:
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    counts: dict[str, int] = {}

    def fresh(stem: str) -> str:
        while True:
            counts[stem] = counts.get(stem, -1) + 1
            name = f"{stem}_{counts[stem]}"
            if name not in taken:
                taken.add(name)
                return name

    constants: list[ir.Value] = []
    for node in graph.all_nodes():  # subgraphs too, in their order
        node.name = fresh(node.op_type.lower())
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value not in constants:
                constants.append(value)
                value.metadata_props["name"] = f"{node.name}.{_slot(node.op_type, index)}"
        if node.outputs and not node.outputs[0].is_graph_output():
            node.outputs[0].name = node.name
        for index, value in enumerate(node.outputs[1:], start=1):
            if not value.is_graph_output() and value.name:
                value.name = f"{node.name}.out{index}"  # an initializer may be called {node.name}.{index}
    unused = [value for value in graph.initializers.values() if value not in constants]
    for value in unused:
        if not value.is_graph_output():
            del graph.initializers[value.name or ""]
    for number, value in enumerate(constants):  # two rounds: a new name may be another's old one
        value.name = f"\0{number}"
    for value in constants:
        value.name = value.metadata_props.pop("name")
    ordered = [value for value in constants if value.graph is graph]
    kept = [value for value in graph.initializers.values() if value not in constants]
    graph.initializers.clear()
    for value in (*ordered, *kept):
        graph.initializers.add(value)


def _slot(op_type: str, index: int) -> str:
    slots = _SLOTS.get(op_type, ())
    return slots[index] if index < len(slots) else str(index)


def _bare(graph: onnx.GraphProto) -> None:
    graph.name = PRODUCER
    for field in ("doc_string", "value_info", "metadata_props", "quantization_annotation"):
        graph.ClearField(field)
    for item in _messages(graph):
        for field in ("doc_string", "metadata_props"):
            item.ClearField(field)
    for node in graph.node:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for subgraph in (attribute.g, *attribute.graphs):
                if subgraph.node:
                    _bare(subgraph)


def _messages(
    graph: onnx.GraphProto,
) -> Iterable[onnx.NodeProto | onnx.ValueInfoProto | onnx.TensorProto]:
    yield from graph.node
    yield from graph.initializer
    yield from graph.input
    yield from graph.output


def _ir_version(model: onnx.ModelProto, fallback: int) -> int:
    """The oldest file format that can hold these opsets: an old runtime on a board reads no newer one."""
    try:
        return int(onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True))
    except ValueError:  # an opset newer than this onnx knows
        return fallback
