"""Quantization of the ONNX graph itself, for models that pt2e cannot take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime import quantization as ort_quantization

from edgekd.errors import ModelError
from edgekd.graph.edit import preparing, tensors
from edgekd.graph.program import quiet
from edgekd.quantize.quantizer import LOWEST_SCALE, narrow
from edgekd.types import Arrays, QuantizationRules

_LAYERS = ("Conv", "Gemm", "MatMul")
_BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu", "Reshape", "Transpose")
_BATCHES_AT_ONCE = 8  # ranges of so many batches are held before they are merged


class _Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    """Hands batches on, one at a time."""

    def __init__(self, feeds: Iterator[Arrays]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


def quantize_onnx(
    model: onnx.ModelProto, feeds: Iterator[Arrays], rules: QuantizationRules
) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, str]]:
    """The Q/DQ form of a float graph, the nodes quantized, and those left in float with the reason.

    The residual placement that TensorRT fuses best is beyond this quantizer; it quantizes what enters each layer.

    Raises:
        ModelError: the graph has no layer that the rules let be quantized.
    """
    layers = [node for node in model.graph.node if node.op_type in _LAYERS]
    left = {node.name: why for node in layers if (why := _excluded(model, node, rules))}
    if len(left) == len(layers):
        raise ModelError("no layer of this model can be quantized", fix="deploy it in fp16 or fp32")
    types = (*_LAYERS, *_BETWEEN) if rules.quantize_outputs else _LAYERS
    signed = rules.activation == "int8"
    options = {
        "ActivationSymmetric": rules.activation_symmetric,
        "WeightSymmetric": True,
        "QuantizeBias": rules.quantize_bias,
        "QDQDisableWeightAdjustForInt32Bias": not rules.quantize_bias,
        "OpTypesToExcludeOutputQuantization": [] if rules.quantize_outputs else list(_LAYERS),
        "MatMulConstBOnly": True,
        "QDQOpTypePerChannelSupportToAxis": {"Conv": 0, "MatMul": 1, "Gemm": 0},
        "MinimumRealRange": LOWEST_SCALE * 255,
        "CalibMaxIntermediateOutputs": _BATCHES_AT_ONCE,
    }
    with tempfile.TemporaryDirectory() as folder, quiet():
        written = Path(folder) / "model.onnx"
        ort_quantization.quantize_static(
            model,
            written,
            _Reader(feeds),
            quant_format=ort_quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(types),
            nodes_to_exclude=[*left, *preparing(model)],
            per_channel=rules.weight_per_channel,
            reduce_range=rules.weight_bits == 7,
            activation_type=ort_quantization.QuantType.QInt8 if signed else ort_quantization.QuantType.QUInt8,
            weight_type=ort_quantization.QuantType.QInt8,
            extra_options=options,
        )
        quantized = onnx.load(written)
    return quantized, tuple(node.name for node in layers if node.name not in left), left


def _excluded(model: onnx.ModelProto, node: onnx.NodeProto, rules: QuantizationRules) -> str:
    """Why a node stays in float; empty where it is quantized."""
    weight = tensors(model.graph).get(node.input[1])
    if weight is None:
        return "a product of two activations"
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv":
        return narrow(weight.shape, rules.min_channels, groups=attributes.get("group", 1))
    outs_first = weight.shape if attributes.get("transB") else weight.shape[::-1]
    return narrow(outs_first[-2:] if attributes.get("transB") else outs_first[:2], rules.min_channels)
