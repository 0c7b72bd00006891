"""An older dialect of ONNX: what a board's parser knows is fixed by its software, not by us."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgekd.errors import ModelError
from edgekd.graph.edit import opset, strip

_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
}  # fmt: skip
AXES_AS_INPUT = 18  # since this opset reductions take their axes as an input (ONNX changelog)
# Their meaning, not only their types, differs between versions in a way that no attribute shows.
_CHANGED = {"GridSample": 20, "GroupNormalization": 21}


def lower(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The same computation with the operators of opset `version`, for a parser that knows no newer ones.

    `onnx.version_converter` is not used: it has no way down for Pad, and refuses attributes that only repeat a
    default (onnx 1.23). Here an operator whose definition changed loses attributes that say no more than the default,
    reductions get their axes back as an attribute, Split its sizes, Gelu its formula; the checker then proves that
    each node is valid under the older definition.

    Raises:
        ModelError: an operator does not exist in that opset, or means something else there.
    """
    now = opset(model)
    if version >= now:
        return model
    typed = ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
    graph = typed.graph
    for node in list(graph.all_nodes()):
        if node.domain not in {"", "ai.onnx"}:
            continue
        _refuse_changed(node, version, now)
        if node.op_type in _REDUCTIONS and version < AXES_AS_INPUT:
            _axes_to_attribute(node, version)
        elif node.op_type == "Split" and version < 18 and "num_outputs" in node.attributes:
            _split_sizes(node, version)
        elif node.op_type == "Pad" and version < 18:
            _pad_all_axes(node, version)
        elif node.op_type == "Gelu" and version < 20:
            _gelu_formula(node, graph, version)
            continue
        elif node.op_type == "Reshape" and version < 14 and node.attributes.get_int("allowzero", 0) != 0:
            _reshape_without_zero(node, version)
        _drop_defaults(node, version, now)
    typed.opset_imports[""] = version
    result = strip(ir.to_proto(typed))
    try:
        onnx.checker.check_model(result, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _refusal(str(error).splitlines()[0], version) from error
    return result


def _refuse_changed(node: ir.Node, version: int, now: int) -> None:
    if version < _CHANGED.get(node.op_type, 0) <= now:
        raise _refusal(f"{node.op_type} means something else there", version)
    if not onnx.defs.has(node.op_type, "") or node.op_type == "Gelu":
        return
    try:
        onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError as error:
        raise _refusal(f"it has no {node.op_type}", version) from error


def _refusal(why: str, version: int) -> ModelError:
    return ModelError(
        f"the graph cannot be written in opset {version}: {why}",
        expected="operators that the older runtime knows",
        fix="choose a target with a newer runtime, or a model without that operator",
    )


def _drop_defaults(node: ir.Node, version: int, now: int) -> None:
    """Remove attributes that the older definition lacks, where they only repeat the newer one's default."""
    old, new = (onnx.defs.get_schema(node.op_type, number, "") for number in (version, now))
    if old.since_version == new.since_version:
        return
    for name, attribute in list(node.attributes.items()):
        if name in old.attributes:
            continue
        default = new.attributes[name].default_value
        given = onnx.helper.get_attribute_value(ir.to_proto(attribute))
        if default.type == onnx.AttributeProto.UNDEFINED:
            says_no_more = name == "output_dtype" and given == 0
        else:
            says_no_more = given == onnx.helper.get_attribute_value(default)
        if not says_no_more:
            raise _refusal(f"{node.op_type} has no '{name}' there", version)
        del node.attributes[name]


def _axes_to_attribute(node: ir.Node, version: int) -> None:
    if node.attributes.get_int("noop_with_empty_axes", 0):
        raise _refusal(f"{node.op_type} with noop_with_empty_axes", version)
    node.attributes.pop("noop_with_empty_axes", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = ir.convenience.get_const_tensor(node.inputs[1])
        if axes is None:
            raise _refusal(f"the axes of {node.op_type} are computed", version)
        node.attributes.add(ir.AttrInt64s("axes", [int(a) for a in axes.numpy()]))
    node.resize_inputs(1)


def _split_sizes(node: ir.Node, version: int) -> None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    axis = node.attributes.get_int("axis", 0)
    length = shape[axis] if shape is not None else None
    if not isinstance(length, int):
        raise _refusal("Split of a dimension whose size is not known", version)
    parts = node.attributes.get_int("num_outputs")
    size = -(-length // parts)
    sizes = [min(size, length - size * i) for i in range(parts)]
    del node.attributes["num_outputs"]
    node.resize_inputs(2)
    node.replace_input_with(1, _initializer(node, f"{node.outputs[0].name}_sizes", np.array(sizes, dtype=np.int64)))


def _pad_all_axes(node: ir.Node, version: int) -> None:
    if len(node.inputs) < 4 or node.inputs[3] is None:
        node.resize_inputs(min(len(node.inputs), 3))
        return
    data = node.inputs[0]
    pads, axes = (
        ir.convenience.get_const_tensor(v) if v is not None else None for v in (node.inputs[1], node.inputs[3])
    )
    if pads is None or axes is None or data is None or data.shape is None:
        raise _refusal("Pad of computed axes", version)
    rank, given = data.shape.rank(), pads.numpy()
    full = np.zeros(2 * rank, dtype=np.int64)
    for i, axis in enumerate(axes.numpy()):
        full[axis % rank], full[axis % rank + rank] = given[i], given[i + len(given) // 2]
    node.replace_input_with(1, _initializer(node, f"{node.outputs[0].name}_pads", full))
    node.resize_inputs(3)


def _reshape_without_zero(node: ir.Node, version: int) -> None:
    """A zero in the shape copies that dimension in the older form; where there is none the two agree."""
    shape = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if shape is None or 0 in shape.numpy():
        raise _refusal("Reshape to a dimension that may be zero", version)
    del node.attributes["allowzero"]


def _gelu_formula(node: ir.Node, graph: ir.Graph, version: int) -> None:
    """gelu(x) = x · ½ · (1 + erf(x / √2)) (Hendrycks and Gimpel, 2016)."""
    if node.attributes.get_string("approximate", "none") != "none":
        raise _refusal("Gelu of the tanh form", version)
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    numpy = np.float16 if x.dtype == ir.DataType.FLOAT16 else np.float32
    constants = {k: _initializer(node, f"{out.name}_{k}", np.array(v, dtype=numpy)) for k, v in
                 (("root", 2.0**0.5), ("one", 1.0), ("half", 0.5))}  # fmt: skip
    scaled = ir.node("Div", [x, constants["root"]])
    erf = ir.node("Erf", [scaled.outputs[0]])
    plus = ir.node("Add", [erf.outputs[0], constants["one"]])
    halved = ir.node("Mul", [x, constants["half"]])
    product = ir.node("Mul", [halved.outputs[0], plus.outputs[0]])
    for new in (scaled, erf, plus, halved, product):
        new.outputs[0].type, new.outputs[0].shape = out.type, out.shape
        graph.insert_before(node, new)
    for number, new in enumerate((scaled, erf, plus, halved)):
        new.outputs[0].name = f"{out.name}_gelu{number}"
    ir.convenience.replace_all_uses_with(out, product.outputs[0], replace_graph_outputs=True)
    product.outputs[0].name, out.name = out.name, f"{out.name}_old"
    graph.remove(node, safe=True)


def _initializer(node: ir.Node, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    assert isinstance(node.graph, ir.Graph)
    node.graph.register_initializer(value)
    return value
