"""Quantization of the ONNX graph itself, for models that pt2e cannot take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

from edgekd.errors import DataError, ModelError
from edgekd.graph.edit import preparing, tensors
from edgekd.graph.program import quiet
from edgekd.quantize.quantizer import LOWEST_SCALE, narrow
from edgekd.types import Arrays, QuantizationRules

_LAYERS = ("Conv", "Gemm", "MatMul")
_BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu", "Reshape", "Transpose")
_BATCHES_AT_ONCE = 8  # ranges of so many batches are held before they are merged


class _Reader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    """Hands batches on, a group of them at a time: it says that there are no more after each group."""

    def __init__(self, feeds: Iterator[Arrays]) -> None:
        self._feeds = feeds
        self._next = next(feeds, None)
        self._left = _BATCHES_AT_ONCE

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._next is None or not self._left:
            self._left = _BATCHES_AT_ONCE
            return None
        self._left -= 1
        feed, self._next = self._next, next(self._feeds, None)
        return dict(feed)

    @property
    def more(self) -> bool:
        """Whether a batch is left."""
        return self._next is not None


def quantize_onnx(
    model: onnx.ModelProto, feeds: Iterator[Arrays], rules: QuantizationRules
) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, str]]:
    """The Q/DQ form of a float graph, the nodes quantized, and those left in float with the reason.

    The residual placement that TensorRT fuses best is beyond this quantizer; it quantizes what enters each layer.

    Raises:
        ModelError: the graph has no layer that the rules let be quantized.
    """
    given, model = model, onnx.ModelProto()
    model.CopyFrom(given)  # the quantizer moves the weights of what it is given
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
    }
    with tempfile.TemporaryDirectory() as folder, quiet():
        written, ranges = Path(folder) / "model.onnx", Path(folder) / "ranges.json"
        _calibrate(model, types, feeds, symmetric=rules.activation_symmetric, path=ranges)
        ort_quantization.quantize_static(
            model,
            written,
            None,
            calibration_cache_path=ranges,
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


def _calibrate(
    model: onnx.ModelProto, types: tuple[str, ...], feeds: Iterator[Arrays], *, symmetric: bool, path: Path
) -> None:
    """Write the smallest and largest value of every tensor; of the batches only the ranges of a group are held.

    Not by the quantizer's own option for it: ONNX Runtime 1.32 with CalibMaxIntermediateOutputs forgets each full group
    without looking at it, and fails where there is no rest.
    """
    reader = _Reader(feeds)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        onnx.save(model, plain)
        calibrator = create_calibrator(
            plain, types, augmented_model_path=str(Path(folder) / "augmented.onnx"),
            extra_options={"symmetric": symmetric},
        )  # fmt: skip
        while reader.more:
            calibrator.collect_data(reader)
        found = calibrator.compute_data()
        if found is None:
            raise DataError("there are no calibration samples", expected="at least one batch of real inputs")
        save_tensors_data(found, path)


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
