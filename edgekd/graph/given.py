"""An ONNX file that the user brings: read with care, and made into the plain float32 graph that ours start from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from edgekd.errors import ModelError, nearest
from edgekd.graph.edit import opset, strip
from edgekd.graph.program import quiet, reason

OLDEST_OPSET = 13  # the first with a scale for each channel (DequantizeLinear, ONNX changelog)
_QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "MatMulNBits",
    "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "QGemm", "QAttention",
}  # fmt: skip
_FLOATS = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "double",
}


def read(path: Path) -> onnx.ModelProto:
    """The float32 model in an ONNX file, with constants folded, and batch normalisation in the convolution before it.

    Only inputs and outputs keep their names.

    Raises:
        ModelError: no such file, not ONNX, its weights are elsewhere and missing, it is quantized already, of another
            float type, of an opset below 13, or ONNX Runtime refuses it.
    """
    model = _loaded(path)
    where = str(path)
    if opset(model) < OLDEST_OPSET:
        raise ModelError(
            f"it is of opset {opset(model)}", where=where, expected=f"{OLDEST_OPSET} or newer",
            fix="export it again for a newer opset, or convert it with onnx.version_converter",
        )  # fmt: skip
    kinds = {node.op_type for node in model.graph.node}
    kinds |= {node.op_type for function in model.functions for node in function.node}
    quantized = sorted(kind for kind in kinds if kind in _QUANTIZED or kind.startswith("QLinear"))
    if quantized:
        raise ModelError(
            f"it is quantized already: it holds {', '.join(quantized)}", where=where, expected="a float32 model",
            fix="quantize the model that it was made from; `edgekd bench` measures this one as it is",
        )  # fmt: skip
    weights = [t for t in model.graph.initializer if int(np.prod(t.dims)) > 1]
    other = sorted({_FLOATS[t.data_type] for t in weights if t.data_type in _FLOATS})
    if other:
        raise ModelError(f"its weights are {' and '.join(other)}", where=where, expected="float32", fix="export it so")
    return _plain(model, where)


def _loaded(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.onnx")] if path.parent.is_dir() else []
        raise ModelError("there is no such file", where=str(path), nearest=nearest(path.name, siblings))
    try:
        model = onnx.load(path, load_external_data=False)
        opset(model)
    except (OSError, ValueError, StopIteration) as problem:
        raise ModelError("not an ONNX file", where=str(path)) from problem
    except Exception as problem:  # protobuf's DecodeError derives from Exception alone
        if type(problem).__name__ != "DecodeError":
            raise
        raise ModelError("not an ONNX file", where=str(path)) from problem
    if not model.graph.node:
        raise ModelError("not an ONNX file, or an empty one", where=str(path))
    elsewhere = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    missing = sorted(name for name in elsewhere if not (path.parent / name).is_file())
    if missing:
        raise ModelError(
            f"its weights are in {', '.join(missing)}, which is not there", where=str(path),
            fix="put that file beside it, or export the model as one file",
        )  # fmt: skip
    try:
        return onnx.load(path) if elsewhere else model
    except (OSError, ValueError, onnx.checker.ValidationError) as problem:
        raise ModelError(f"its weights cannot be read: {reason(problem)}", where=str(path)) from problem


def _plain(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """What ONNX Runtime's basic rewrites make of it: standard operators only, whatever the processor."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        given, written = Path(folder) / "given.onnx", Path(folder) / "plain.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(written)
        options.log_severity_level = 4
        try:
            onnx.save(model, given)
            ort.InferenceSession(str(given), options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # ONNX Runtime's exceptions share no base class
            raise ModelError(f"ONNX Runtime refuses it: {reason(problem)}", where=where) from problem
        return strip(onnx.load(written))
