"""What an int8 graph loses on CPUs whose kernels add pairs of products in 16 bits, told without such a CPU.

x86 without VNNI multiplies uint8 activations by int8 weights with `vpmaddubsw`: of each pair of neighbours
x₁ · w₁ + x₂ · w₂ is clipped to [-32768, 32767] before it is added up in 32 bits (Intel, Intrinsics Guide). ONNX
Runtime's AVX2 kernels do so, its VNNI kernels do not, and those of depthwise convolutions on neither: `clipped_sums`
gives bit by bit what ONNX Runtime 1.32 gives on an emulated CPU without VNNI (benchmarks/vnni.py). Its session option
for such CPUs, `session.x64quantprecision`, fails to load graphs whose layers share a zero point, as ours do.

Since x ≤ 255 nothing can be clipped where no two weights of one sign of an output channel add up to more than 128:
255 · 128 = 32640. Where real samples show that clipping matters, a layer's weights are scaled down to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgekd.graph.edit import save, strip, tensors
from edgekd.quantize.inside import inside
from edgekd.types import Arrays, Json

MOST = 128  # two weights of one sign together
LOWEST, HIGHEST = -(2**15), 2**15 - 1
# Root mean square of a uniform rounding error, in steps (1 / √12): what a layer's own output is rounded by anyway.
ROUNDING = 0.29
_POSITIONS = 128  # of a layer's output, that are looked at
_SAMPLES = 16  # of which the values inside the graph are held
_CLIPS = {"Relu", "Clip", "LeakyRelu"}


@dataclass(frozen=True, slots=True)
class Loss:
    """What clipping does to one layer on real samples: parts of its pairs, and its output's error in steps."""

    clipped: float  # pairs, in [0, 1]
    steps: float  # root mean square error of the output, in steps of its quantization

    @property
    def matters(self) -> bool:
        """Whether it is as large as the rounding of the output."""
        return self.steps >= ROUNDING


@dataclass(frozen=True, slots=True)
class _Layer:
    node: onnx.NodeProto
    data: str  # the uint8 value that it reads
    zero: int
    scale: float  # of the data
    weight: NDArray[np.int8]  # outputs × inputs a group × kernel
    scales: NDArray[np.float64]  # of the weight, one an output
    step: float | None  # of the output, None where it stays float


def relieve(path: Path, given: Arrays) -> dict[str, Json]:
    """Make the graph in `path` right on CPUs that add up in 16 bits: layers where clipping matters get less range.

    Args:
        path: a Q/DQ graph, written anew where a layer of it is changed.
        given: real samples as it takes them.

    Returns:
        `relieved`: layer → its error in steps before, and `clipped`: layer → the same, where it is too small to matter.
    """
    changed: dict[str, Json] = {}
    while True:  # what is changed gives other values to the layers behind it
        found = losses(path, given)
        worst = [name for name, loss in found.items() if loss.matters]
        if not worst:
            break
        changed |= {name: round(found[name].steps, 3) for name in worst}
        save(strip(relieved(onnx.load(path), worst)), path)
    return {"relieved": changed, "clipped": {n: round(loss.steps, 3) for n, loss in found.items() if loss.steps > 0}}


def relieved(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The graph with the weights of these layers small enough that no pair of products can be clipped.

    Of an output channel whose two largest weights of a sign add up to more than 128, levels become
    round(q · f) and the scale becomes scale / f, with f = 127 / (that sum): a bit less, at the most. An int32 bias,
    whose scale is data scale · weight scale, is rounded anew.
    """
    edited = ir.from_proto(model)
    for node in [each for each in edited.graph if each.name in names]:
        weight = _own(node, 1)
        axis = 0 if node.op_type == "Conv" or _transposed(node) else 1
        levels = np.moveaxis(_array(weight.inputs[0]).astype(np.float64), axis, 0)
        flat = np.sort(levels.reshape(len(levels), -1), axis=1)
        largest = np.maximum(np.maximum(flat[:, -2:], 0).sum(1), -np.minimum(flat[:, :2], 0).sum(1))
        factor = np.where(largest > MOST, (MOST - 1) / np.maximum(largest, 1), 1.0)
        shape = [-1] + [1] * (levels.ndim - 1)
        smaller = np.rint(levels * factor.reshape(shape)).astype(np.int8)
        scale = _array(weight.inputs[1])
        larger = (np.broadcast_to(scale, factor.shape) / factor).astype(np.float32)
        zero = np.zeros(len(factor), np.int8)
        weight.attributes.add(ir.AttrInt64("axis", axis))
        _give(weight, [np.ascontiguousarray(np.moveaxis(smaller, 0, axis)), larger, zero])
        bias = node.inputs[2].producer() if len(node.inputs) > 2 and node.inputs[2] is not None else None
        if bias is not None and bias.op_type == "DequantizeLinear":
            bias = _own(node, 2)
            old = np.broadcast_to(_array(bias.inputs[1]), factor.shape)
            integers = np.rint(_array(bias.inputs[0]).astype(np.float64) * factor).astype(np.int32)
            bias.attributes.add(ir.AttrInt64("axis", 0))
            _give(bias, [integers, (old / factor).astype(np.float32), np.zeros(len(factor), np.int32)])
    result: onnx.ModelProto = ir.to_proto(edited)
    return result


def _transposed(node: ir.Node) -> bool:
    return "transB" in node.attributes and node.attributes["transB"].as_int() != 0


def _give(dq: ir.Node, arrays: Sequence[np.ndarray]) -> None:
    """New integers, scales and zero points."""
    for index, array in enumerate(arrays):
        dq.replace_input_with(index, _constant(dq, str(index), array))


def _own(node: ir.Node, index: int) -> ir.Node:
    """The DequantizeLinear of an input, copied where another layer reads it too."""
    value = node.inputs[index]
    dq = value.producer() if value is not None else None
    assert dq is not None
    assert value is not None
    assert isinstance(node.graph, ir.Graph)
    if len(value.uses()) == 1:
        return dq
    copy = ir.node(dq.op_type, list(dq.inputs), attributes=dict(dq.attributes))
    copy.outputs[0].name, copy.outputs[0].type = f"{node.name}_{index}_own", value.type
    copy.outputs[0].shape = value.shape
    node.graph.insert_before(node, copy)
    node.replace_input_with(index, copy.outputs[0])
    return copy


def _array(value: ir.Value | None) -> np.ndarray:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    assert constant is not None
    return np.asarray(constant.numpy())


def _constant(node: ir.Node, suffix: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=f"{node.outputs[0].name}_{suffix}_relieved", const_value=ir.tensor(array))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    assert isinstance(node.graph, ir.Graph)
    node.graph.register_initializer(value)
    return value


def exposed(model: onnx.ModelProto) -> tuple[str, ...]:
    """Layers of a Q/DQ graph in which a pair of products may be clipped, whatever order the kernel reads them in."""
    return tuple(layer.node.name for layer in _layers(model) if not fits(layer.weight))


def fits(weight: NDArray[np.int8]) -> bool:
    """Whether no two weights of one sign of an output channel (first dimension) add up to more than 128."""
    flat = weight.reshape(len(weight), -1).astype(np.int64)
    if flat.shape[1] == 1:
        return True
    ordered = np.partition(flat, (0, 1, flat.shape[1] - 2, flat.shape[1] - 1), axis=1) if flat.shape[1] > 2 else flat
    most = np.maximum(ordered[:, -2:], 0).sum(1)
    least = np.minimum(ordered[:, :2], 0).sum(1)
    return bool((most <= MOST).all() and (least >= -MOST).all())


def clipped_sums(x: NDArray[np.uint8], weight: NDArray[np.int8]) -> tuple[NDArray[np.int64], float]:
    """Rows of activations × outputs' weights as such a kernel adds them up, and the part of the pairs it clips.

    Args:
        x: rows × inner dimension, neighbours in the kernel's order.
        weight: outputs × inner dimension.
    """
    odd = x.shape[1] % 2
    left, right = (np.pad(a, ((0, 0), (0, odd))).astype(np.int32) for a in (x, weight))
    total = np.zeros((len(left), len(right)), np.int64)
    count = 0
    for start in range(0, left.shape[1], 2):
        pair = left[:, start, None] * right[None, :, start] + left[:, start + 1, None] * right[None, :, start + 1]
        within = np.clip(pair, LOWEST, HIGHEST)
        count += int((within != pair).sum())
        total += within
    return total, count / max(1, total.size * left.shape[1] // 2)


def losses(path: Path, given: Arrays, *, seed: int = 0) -> dict[str, Loss]:
    """What each exposed layer of a Q/DQ graph would lose on these samples, at random places of its output.

    Args:
        path: the graph, of uint8 activations and int8 weights.
        given: samples as it takes them.

    Raises:
        BackendError: ONNX Runtime refuses the graph.
    """
    model = onnx.load(path)
    layers = [layer for layer in _layers(model) if not fits(layer.weight)]
    if not layers:
        return {}
    values = _values(model, {layer.data for layer in layers}, given)
    return {layer.node.name: _loss(layer, values[layer.data], np.random.default_rng(seed)) for layer in layers}


def _loss(layer: _Layer, data: np.ndarray, random: np.random.Generator) -> Loss:
    error: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    parts: list[float] = []
    for rows, weight, scales in _rows(layer, data, random):
        exact = rows.astype(np.int64) @ weight.T.astype(np.int64)
        sums, part = clipped_sums(rows, weight)
        error.append(((sums - exact) * scales * layer.scale).ravel())
        outputs.append(((exact - layer.zero * weight.sum(1, dtype=np.int64)) * scales * layer.scale).ravel())
        parts.append(part)
    whole = np.concatenate(outputs)
    step = layer.step or max(float(np.ptp(whole)) / 255, 1e-12)
    return Loss(float(np.mean(parts)), float(np.sqrt(np.mean(np.concatenate(error) ** 2))) / step)


def _rows(
    layer: _Layer, data: np.ndarray, random: np.random.Generator
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float64]]]:
    """What the kernel multiplies, for each group of channels: rows of activations, and weights in the same order."""
    if layer.node.op_type != "Conv":
        rows = data.reshape(-1, data.shape[-1])
        chosen = random.choice(len(rows), min(_POSITIONS, len(rows)), replace=False)
        yield rows[chosen], layer.weight.reshape(len(layer.weight), -1), layer.scales
        return
    windows = _windows(layer, data, random)  # positions × channels × kernel
    groups = data.shape[1] // layer.weight.shape[1]
    share = len(layer.weight) // groups
    for group in range(groups):
        width = layer.weight.shape[1]
        taken = windows[:, group * width : (group + 1) * width]
        weight = layer.weight[group * share : (group + 1) * share]
        # Kernels read channels last: neighbours are channels of one place in the kernel.
        rows = np.moveaxis(taken, 1, -1).reshape(len(taken), -1)
        yield rows, np.moveaxis(weight, 1, -1).reshape(share, -1), layer.scales[group * share : (group + 1) * share]


def _windows(layer: _Layer, data: np.ndarray, random: np.random.Generator) -> np.ndarray:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in layer.node.attribute}
    kernel = layer.weight.shape[2:]
    strides = attributes.get("strides", [1] * len(kernel))
    dilations = attributes.get("dilations", [1] * len(kernel))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = attributes.get("pads", [0] * 2 * len(kernel))
    if attributes.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        pads = [(span - 1) // 2 for span in spans] + [span // 2 for span in spans]
    around = [(0, 0), (0, 0), *zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)]
    padded = np.pad(data, around, constant_values=layer.zero)
    counts = [(n - span) // s + 1 for n, span, s in zip(padded.shape[2:], spans, strides, strict=True)]
    found = []
    for _ in range(_POSITIONS):
        at = [int(random.integers(count)) * s for count, s in zip(counts, strides, strict=True)]
        place = tuple(slice(a, a + span, d) for a, span, d in zip(at, spans, dilations, strict=True))
        found.append(padded[int(random.integers(len(padded)))][(slice(None), *place)])
    return np.stack(found)


def _values(model: onnx.ModelProto, names: set[str], given: Arrays) -> Mapping[str, np.ndarray]:
    """Values inside the graph for the first samples."""
    few = {name: array[:_SAMPLES] for name, array in given.items()}
    rows = list(inside(model, names, few, onnx.TensorProto.UINT8))
    return {name: np.concatenate([row[name] for row in rows]) for name in names}


def _layers(model: onnx.ModelProto) -> Iterator[_Layer]:
    constants = tensors(model.graph)
    maker = {value: node for node in model.graph.node for value in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    for node in model.graph.node:
        if node.op_type not in {"Conv", "Gemm", "MatMul"}:
            continue
        x, w = (maker.get(value) for value in node.input[:2])
        if x is None or w is None or {x.op_type, w.op_type} != {"DequantizeLinear"}:
            continue
        if node.op_type == "Conv" and _depthwise(node, constants.get(w.input[0])):
            continue
        weight, zero = constants.get(w.input[0]), constants.get(x.input[2]) if len(x.input) > 2 else None
        if weight is None or weight.dtype != np.int8 or zero is None or zero.dtype != np.uint8:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "Conv" and not attributes.get("transB"):
            if weight.ndim != 2:
                continue
            weight = weight.T
        scales = np.broadcast_to(constants[w.input[1]].astype(np.float64), (len(weight),))
        yield _Layer(
            node, x.input[0], int(zero), float(constants[x.input[1]]), weight, scales, _step(node, readers, constants)
        )


def _depthwise(node: onnx.NodeProto, weight: np.ndarray | None) -> bool:
    """Its kernels add up in 32 bits."""
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    return weight is not None and weight.shape[1] == 1 and groups == len(weight) > 1


def _step(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], constants: Mapping[str, np.ndarray]
) -> float | None:
    """The scale of the Q behind a layer, or behind the clip that is fused into it."""
    behind = readers.get(node.output[0], [])
    if len(behind) == 1 and behind[0].op_type in _CLIPS:
        behind = readers.get(behind[0].output[0], [])
    scale = constants.get(behind[0].input[1]) if behind and behind[0].op_type == "QuantizeLinear" else None
    return None if scale is None else float(scale)
