"""Which values of a network become integers: a pt2e Quantizer built from a target's rules."""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from edgekd.graph.program import quiet
from edgekd.quantize.fake_quantizer import FakeQuantizer
from edgekd.types import QuantizationRules

with quiet():  # its import logs about enums of its own
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        QuantizationSpecBase,
        Quantizer,
        SharedQuantizationSpec,
    )

aten = torch.ops.aten
CONV = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
LINEAR = {aten.linear.default}
CLIP = {aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default}
ADD = {aten.add.Tensor, aten.add_.Tensor}
ELEMENTWISE = ADD | {aten.mul.Tensor, aten.mul_.Tensor}
PRODUCT = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.scaled_dot_product_attention.default}
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
POOL = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}
MOVE = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.max_pool2d.default,
    aten.pad.default, aten.constant_pad_nd.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default,
}  # fmt: skip
# Float functions of one value: what follows them is still inside the quantized part of the network.
FLOAT = CLIP | {
    aten.hardswish.default, aten.hardswish_.default, aten.hardsigmoid.default, aten.hardsigmoid_.default,
    aten.silu.default, aten.silu_.default, aten.sigmoid.default, aten.sigmoid_.default, aten.gelu.default,
    aten.leaky_relu.default, aten.leaky_relu_.default, aten.elu.default, aten.mish.default, aten.tanh.default,
}  # fmt: skip
# Below this a scale cannot be told from zero in float16, and an all-zero channel would have none at all.
LOWEST_SCALE = 2.0**-18


class RulesQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates a captured graph as the rules say and remembers what it did, by layer.

    With `quantize_outputs` every value between quantized operators becomes an integer, which is what ONNX Runtime
    needs to run QLinear kernels. Without it only what enters a convolution, linear layer or average pool does, and
    the branch that skips a convolution where the two are added: that is what TensorRT fuses (NVIDIA,
    tools/pytorch-quantization; rules tested in TensorRT Model Optimizer).

    Args:
        keep_float: layers that stay in float, by their path in the user's model or that of a module around them.
    """

    def __init__(self, rules: QuantizationRules, keep_float: Container[str] = ()) -> None:
        self.rules = rules
        self.keep_float = keep_float
        self.quantized: list[str] = []
        self.left: dict[str, str] = {}  # layer → why it stays in float
        self._integer: set[Node] = set()  # values that are integers between operators
        self._inside: set[Node] = set()  # values that descend from a quantized convolution, element by element

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.op != "call_function" or node in self._integer:
                continue
            if node.target in CONV | TRANSPOSED | LINEAR:
                self._layer(model, node)
            elif node.target in RECURRENT:
                self.left[layer_name(node)] = "a recurrent layer"
            elif node.target is aten.einsum.default:
                self.left[layer_name(node)] = "a product by einsum"
            elif node.target in PRODUCT and len(node.all_input_nodes) > 1:
                stored = any(each.op == "get_attr" for each in node.all_input_nodes)
                self.left[layer_name(node)] = (
                    "a product with a weight that is read elsewhere too" if stored else "a product of two activations"
                )
            elif self.rules.quantize_outputs:
                self._between(node)
            elif node.target in ADD:
                self._residual(node)
            elif node.target in POOL and _spatial(node) and node.args[0] in self._inside:
                _annotate(node, {node.args[0]: self._activation()}, None)
            if node.target in FLOAT | MOVE | POOL | ELEMENTWISE and any(
                i in self._inside for i in node.all_input_nodes
            ):
                self._inside.add(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what the rules exclude was left in float."""

    def _layer(self, model: GraphModule, node: Node) -> None:
        name = layer_name(node)
        why = self._excluded(model, node) or ("chosen to stay in float" if within(name, self.keep_float) else "")
        if why:
            self.left[name] = why
            return
        data, weight = node.args[0], node.args[1]
        assert isinstance(data, Node)
        assert isinstance(weight, Node)
        axis = 1 if node.target in TRANSPOSED else 0
        _annotate(node, {data: self._activation(), weight: self._weight(axis)}, None)
        self.quantized.append(name)
        tail = _fused(node, CLIP) or node
        # A linear layer may give float: attention and logits want it. Behind a clip the runtime would fuse the two in
        # float before it looks for integers, so there the clip gives them.
        if node.target not in LINEAR or tail is not node:
            self._inside |= {node, tail}
            if self.rules.quantize_outputs:
                self._emit(node, tail)

    def _excluded(self, model: GraphModule, node: Node) -> str:
        """Why a layer cannot or should not be quantized; empty where it can."""
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.op != "get_attr" or not isinstance(weight.target, str):
            return "its weight is computed, not stored"
        if node.target in TRANSPOSED and self.rules.quantize_outputs:
            return "the runtime has no integer kernel for transposed convolution"
        if node.target in TRANSPOSED and _argument(node, 6, 1) != 1:
            return "grouped transposed convolution has no channel axis to quantize along"
        shape = tuple(operator.attrgetter(weight.target)(model).shape)
        if node.target in LINEAR:
            return narrow(shape, self.rules.min_channels)
        transposed = node.target in TRANSPOSED
        return narrow(shape, self.rules.min_channels, groups=_argument(node, 6, 1), transposed=transposed)

    def _emit(self, node: Node, tail: Node) -> None:
        """Quantize the output of `node`, after the clip that the runtime fuses into it."""
        if tail is node:
            node.meta.setdefault("quantization_annotation", QuantizationAnnotation(_annotated=True))
            node.meta["quantization_annotation"].output_qspec = self._activation()
        else:
            _annotate(tail, {}, self._activation())
        self._integer |= {node, tail}
        self._inside |= {node, tail}

    def _between(self, node: Node) -> None:
        """ONNX Runtime: operators between the layers work on integers where all they read descends from one."""
        inputs = list(node.all_input_nodes)
        if node.target in ELEMENTWISE and len(inputs) == 2 and all(n in self._inside for n in inputs):
            _annotate(node, dict.fromkeys(inputs, self._activation()), None)
            self._emit(node, _fused(node, CLIP) or node)
        elif node.target in POOL and _spatial(node) and inputs[0] in self._inside:
            _annotate(node, {inputs[0]: self._activation()}, None)
            self._emit(node, node)
        elif node.target is aten.cat.default and all(n in self._inside for n in inputs):
            _annotate(node, dict.fromkeys(inputs, self._activation()), None)
            self._emit(node, node)
        elif node.target in MOVE and inputs[0] in self._integer and _keeps_zero(node):
            edge = (inputs[0], node)
            _annotate(node, {inputs[0]: self._activation()}, SharedQuantizationSpec(edge))
            self._integer.add(node)

    def _residual(self, node: Node) -> None:
        """TensorRT adds a convolution's output and the branch around it in one kernel, if only the latter is int8."""
        inputs = [n for n in node.args[:2] if isinstance(n, Node)]
        ready = [n for n in inputs if n.target in CONV and _quantized(n) and len(n.users) == 1]
        if len(inputs) != 2 or not ready:
            return
        main = max(ready, key=_depth)  # of two convolutions the shorter path is the shortcut
        branch = inputs[0] if inputs[1] is main else inputs[1]
        if branch in self._inside or branch.target in CONV:
            _annotate(node, {branch: self._activation()}, None)

    def _activation(self) -> QuantizationSpecBase:
        made = FakeQuantizer.with_args(lowest_scale=LOWEST_SCALE)
        return QuantizationSpec(observer_or_fake_quant_ctr=made, **activations(self.rules))

    def _weight(self, axis: int) -> QuantizationSpecBase:
        whole = not self.rules.weight_per_channel
        channels = None if whole else axis
        largest = 127 if self.rules.weight_bits == 8 else 64  # 255 · (64 + 64) fits 16 bits: `saturation.py`
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=FakeQuantizer.with_args(lowest_scale=LOWEST_SCALE, ch_axis=channels),
            quant_min=-largest,  # not -128: -128 · -128 overflows 16-bit sums of old kernels; symmetry wants it unused
            quant_max=largest,
            qscheme=torch.per_tensor_symmetric if whole else torch.per_channel_symmetric,
            ch_axis=channels,
        )


def narrow(shape: Sequence[int], least: int, *, groups: int = 1, transposed: bool = False) -> str:
    """Why a layer of this weight shape is too narrow for integer kernels; empty where it is not.

    The rule of NVIDIA's Model Optimizer (onnx/quantization/graph_utils.py) for 16 channels: a dense convolution may
    be narrower if its kernel is square, one side divides by 8 and the other reaches the limit; a grouped one if its
    outputs divide by 8 and its kernel is 3 or more each way. `shape` is outputs × inputs a group × kernel.
    """
    if least <= 0:
        return ""
    outs, ins, kernel = shape[0], shape[1] * groups, shape[2:]
    if not kernel:
        return f"{ins} → {outs} features, fewer than {least}" if min(ins, outs) < least else ""
    if transposed:
        outs, ins = ins, outs
    if groups > 1:
        fits = outs % 8 == 0 and min(kernel) >= 3
    elif min(ins, outs) >= least:
        fits = True
    else:
        fits = (outs % 8 == 0 or ins % 8 == 0) and max(outs, ins) >= least and len(set(kernel)) == 1
    return (
        "" if fits else f"{ins} → {outs} channels in {groups} groups, kernel {'×'.join(map(str, kernel))}: too narrow"
    )


def activations(rules: QuantizationRules) -> dict[str, Any]:
    """The integers that values between layers become, and how: arguments of a `FakeQuantizer`."""
    signed = rules.activation == "int8"
    return {
        "dtype": torch.int8 if signed else torch.uint8,
        "quant_min": -128 if signed else 0,
        "quant_max": 127 if signed else 255,
        "qscheme": torch.per_tensor_symmetric if rules.activation_symmetric else torch.per_tensor_affine,
    }


def layer_name(node: Node) -> str:
    """The path of the user's submodule that made this node, or the node's own name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    name = paths[-1] if paths else ""
    name = "" if name == "inner" else name.removeprefix("inner.")  # of the module that `capture` traces
    return name or node.name


def within(name: str, paths: Container[str]) -> bool:
    """Is a layer of this path, or a module around it, among the paths?"""
    steps = name.split(".")
    return any(".".join(steps[: i + 1]) in paths for i in range(len(steps)))


def _annotate(node: Node, inputs: dict[Any, QuantizationSpecBase], output: QuantizationSpecBase | None) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(
        input_qspec_map=inputs, output_qspec=output, _annotated=True
    )


def _quantized(node: Node) -> bool:
    return "quantization_annotation" in node.meta


def _fused(node: Node, kinds: Container[Any]) -> Node | None:
    """The clip behind `node` if it is the only reader."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in kinds else None


def _spatial(node: Node) -> bool:
    """Is this pool an average over height and width of an image?"""
    value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
    if value is None or value.dim() != 4:
        return False
    if node.target is aten.mean.dim:
        return sorted(d % 4 for d in node.args[1]) == [2, 3]  # type: ignore[union-attr, operator]
    if node.target is aten.adaptive_avg_pool2d.default:
        return math.prod(node.args[1]) == 1  # type: ignore[arg-type]
    return True


def _keeps_zero(node: Node) -> bool:
    """Padding stays exact only if it pads with zero."""
    if node.target is aten.pad.default:
        return (_argument(node, 2, "constant") == "constant") and not _argument(node, 3, None)
    if node.target is aten.constant_pad_nd.default:
        return not _argument(node, 2, 0)
    return True


def _argument(node: Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _depth(node: Node) -> int:
    """Length of the longest path from an input to `node`."""
    depth: dict[Node, int] = {}
    for other in node.graph.nodes:
        depth[other] = 1 + max((depth[i] for i in other.all_input_nodes), default=0)
        if other is node:
            break
    return depth[node]
