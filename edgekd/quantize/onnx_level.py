"""Quantization of an ONNX graph itself: of a user's file, and of models that pt2e cannot take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import torch
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData, create_calibrator, save_tensors_data
from torch import Tensor

from edgekd.errors import DataError, ModelError
from edgekd.graph.edit import preparing, tensors
from edgekd.graph.program import quiet
from edgekd.quantize.fake_quantizer import FakeQuantizer
from edgekd.quantize.histogram import Histogram
from edgekd.quantize.inside import inside
from edgekd.quantize.ladder import RANGES, Attempt, as_json, best_of
from edgekd.quantize.measured import Loss, compare, task_of
from edgekd.quantize.quantizer import LOWEST_SCALE, activations, narrow
from edgekd.quantize.ranges import METHODS
from edgekd.types import Arrays, Json, QuantizationRules, Task

Ranges: TypeAlias = "dict[str, tuple[np.float32, np.float32]]"  # value of the graph → its smallest and largest

_LAYERS = ("Conv", "Gemm", "MatMul")
_BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu", "Reshape", "Transpose")
_BATCHES_AT_ONCE = 8  # ranges of so many batches are held before they are merged
_HELD = 128  # samples that finer ranges come from, and that ranges are compared on


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


@dataclass(frozen=True, slots=True)
class Made:
    """A Q/DQ graph, and how it was made of a float graph."""

    graph: onnx.ModelProto
    layers: tuple[str, ...]  # nodes that were quantized
    left: dict[str, str]  # nodes that stay in float → why
    methods: list[Json]  # all that was tried, with figures, as `Ladder.to_json` has it
    samples: int
    held: Arrays  # the first of them, 128 at most


def quantize_onnx(
    model: onnx.ModelProto, feeds: Iterable[Arrays], rules: QuantizationRules, *, max_drop: float,
    task: Task | None = None,
) -> Made:  # fmt: skip
    """The Q/DQ form of a float graph.

    Ranges of values are tried from the cheapest on, until the drop is within `max_drop`, and the best are kept: from
    the smallest to the largest value of all samples, then by percentile and by squared error over every second one of
    the first 128 samples. The others of these 128 show what each is worth. The residual placement that TensorRT fuses
    best is beyond this quantizer; it quantizes what enters each layer.

    Args:
        feeds: batches as the graph takes them, read once; the first 128 samples are held.
        max_drop: part of the task's metric that may be lost against the float graph.
        task: what the first output is for; None: one class for each sample where it has such a form, else values.

    Raises:
        DataError: no calibration samples.
        ModelError: the graph has no layer that the rules let be quantized.
    """
    layers = [node for node in model.graph.node if node.op_type in _LAYERS]
    left = {node.name: why for node in layers if (why := _excluded(model, node, rules))}
    if len(left) == len(layers):
        raise ModelError("no layer of this model can be quantized", fix="deploy it in fp16 or fp32")
    types = (*_LAYERS, *_BETWEEN) if rules.quantize_outputs else _LAYERS
    watched = _Watched(iter(feeds))
    with quiet():
        ranges = _extremes(model, types, watched, symmetric=rules.activation_symmetric)
        ranging, held_out = _halves(watched.held)
        trial = _Trial(model, held_out, task)
        graphs: list[onnx.ModelProto] = []
        attempts: list[Attempt] = []
        seen: dict[str, Histogram] = {}
        for method in RANGES:
            start = time.perf_counter()
            if method != "minmax":
                seen = seen or _histograms(model, ranges, ranging)
                ranges = _ranges(seen, rules, method)
            graphs.append(_with_ranges(model, ranges, types, list(left), rules))
            loss = trial.loss(graphs[-1])
            attempts.append(Attempt((method,), time.perf_counter() - start, loss))
            if loss.within(max_drop):
                break
    done = tuple(node.name for node in layers if node.name not in left)
    return Made(
        graphs[best_of(attempts, max_drop)], done, left, as_json(attempts, max_drop), watched.count, watched.held
    )


def _with_ranges(
    model: onnx.ModelProto, ranges: Ranges, types: Sequence[str], left: Sequence[str], rules: QuantizationRules
) -> onnx.ModelProto:
    given, model = model, onnx.ModelProto()
    model.CopyFrom(given)  # the quantizer moves the weights of what it is given
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
    signed = rules.activation == "int8"
    with tempfile.TemporaryDirectory() as folder:
        written, cached = Path(folder) / "model.onnx", Path(folder) / "ranges.json"
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, ranges), cached)
        ort_quantization.quantize_static(
            model,
            written,
            None,
            calibration_cache_path=cached,
            quant_format=ort_quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(types),
            nodes_to_exclude=[*left, *preparing(model)],
            per_channel=rules.weight_per_channel,
            reduce_range=rules.weight_bits == 7,
            activation_type=ort_quantization.QuantType.QInt8 if signed else ort_quantization.QuantType.QUInt8,
            weight_type=ort_quantization.QuantType.QInt8,
            extra_options=options,
        )
        return onnx.load(written)


def _extremes(model: onnx.ModelProto, types: Sequence[str], feeds: Iterator[Arrays], *, symmetric: bool) -> Ranges:
    """The smallest and largest value of every tensor; of the batches only the ranges of a group are held.

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
    return {name: data.range_value for name, data in found.items()}


def _histograms(model: onnx.ModelProto, names: Iterable[str], given: Arrays) -> dict[str, Histogram]:
    seen = {name: Histogram(counting=True) for name in names}
    for sample in inside(model, seen, given, onnx.TensorProto.FLOAT):
        for name, values in sample.items():
            seen[name].add(torch.from_numpy(values))
    return seen


def _ranges(seen: Mapping[str, Histogram], rules: QuantizationRules, method: str) -> Ranges:
    """Of what was seen; as ONNX Runtime's own calibration gives them, symmetric where the integers are."""
    form = FakeQuantizer(lowest_scale=LOWEST_SCALE, **activations(rules))
    found = {}
    for name, histogram in seen.items():
        if not histogram.counts.any():  # a value of no elements
            found[name] = (np.float32(0), np.float32(0))
            continue
        low, high = (float(end) for end in METHODS[method](histogram, form))
        if form.symmetric:
            low, high = -max(-low, high), max(-low, high)
        found[name] = (np.float32(low), np.float32(high))
    return found


class _Watched:
    """Batches passed on, of which the samples are counted and the first are held."""

    def __init__(self, feeds: Iterator[Arrays]) -> None:
        self._feeds = feeds
        self._held: list[Arrays] = []
        self.count = 0

    def __iter__(self) -> Iterator[Arrays]:
        return self

    def __next__(self) -> Arrays:
        batch = next(self._feeds)
        if self.count < _HELD:
            self._held.append({name: array[: _HELD - self.count] for name, array in batch.items()})
        self.count += len(next(iter(batch.values())))
        return batch

    @property
    def held(self) -> Arrays:
        """The first samples."""
        return {name: np.concatenate([batch[name] for batch in self._held]) for name in self._held[0]}


def _halves(given: Arrays) -> tuple[Arrays, Arrays]:
    """Every second sample, and the others; a single sample is both."""
    even, odd = ({name: array[at::2] for name, array in given.items()} for at in (0, 1))
    return even, odd if len(next(iter(odd.values()))) else even


class _Trial:
    """What a form of a graph is worth: its first output held against the float graph's on samples held out."""

    def __init__(self, model: onnx.ModelProto, given: Arrays, task: Task | None) -> None:
        self._given = given
        self._output = model.graph.output[0].name
        self._wanted = self._outputs(model)
        self._task = task or task_of(self._wanted.shape)

    def loss(self, made: onnx.ModelProto) -> Loss:
        return compare([(self._wanted, self._outputs(made), None)], self._task)

    def _outputs(self, model: onnx.ModelProto) -> Tensor:
        rows = [row[self._output] for row in inside(model, [self._output], self._given, onnx.TensorProto.FLOAT)]
        return torch.from_numpy(np.concatenate(rows))


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
