"""Dynamic int8: weights are int8 in the file, and each layer quantizes its own input when it runs.

No calibration, and no clipping of what was not seen in it: for recurrent networks and transformers, whose layers are
large products with ranges that change from sample to sample. ONNX Runtime alone has the kernels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from onnxruntime import quantization as ort_quantization

from edgekd.errors import ModelError
from edgekd.graph.edit import strip, tensors
from edgekd.graph.program import quiet, reason
from edgekd.quantize.weights import folded, weights_to_int8

KINDS = (
    "MatMul",
    "Gemm",
    "LSTM",
)  # with an integer kernel that quantizes its input: MatMulInteger and DynamicQuantizeLSTM
_WITHOUT = {
    "GRU": "ONNX Runtime has no dynamic kernel for it; its weights are int8, it computes in float",
    "RNN": "ONNX Runtime has no dynamic kernel for it; its weights are int8, it computes in float",
    "Gather": "a table that is looked up, not multiplied; its rows are int8",
}
_MADE = ("MatMulInteger", "DynamicQuantizeLSTM")


def quantize_dynamic(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, str]]:
    """The graph with its products and LSTMs dynamic, what is so now, and what is not with the reason.

    Products of two activations and convolutions stay in float; tables and GRUs keep int8 weights and compute in float.
    Weights have 7 bits ([-64, 64]): kernels without VNNI add pairs of products in 16 bits, which
    255 · (64 + 64) just fits, so one file is right on every CPU.

    Raises:
        ModelError: nothing in the graph can be quantized so, or ONNX Runtime's quantizer refuses it.
    """
    plain = strip(folded(model))
    constants = tensors(plain.graph)
    left = {}
    for node in plain.graph.node:
        if node.op_type in KINDS and node.input[1] not in constants:
            left[node.name] = "a product of two activations" if node.op_type != "LSTM" else "its weights are computed"
        elif node.op_type in ("Conv", "ConvTranspose"):
            left[node.name] = "a convolution is faster in float than with a range found anew for each sample"
        elif node.op_type in _WITHOUT and (constants.keys() & set(node.input[:2])):
            left[node.name] = _WITHOUT[node.op_type]
    named = [node.name for node in plain.graph.node if node.op_type in KINDS and node.name not in left]
    if not named:
        raise ModelError("no layer of this model has a dynamic kernel", expected="MatMul, Gemm or LSTM with weights")
    with tempfile.TemporaryDirectory() as folder, quiet():
        written = Path(folder) / "model.onnx"
        try:
            ort_quantization.quantize_dynamic(
                plain, written, op_types_to_quantize=["MatMul", "LSTM"], per_channel=True, reduce_range=True,
                weight_type=ort_quantization.QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
        except Exception as error:  # onnxruntime's quantizer raises many kinds
            raise ModelError(f"ONNX Runtime cannot quantize it dynamically: {reason(error)}") from error
        made = onnx.load(written)
    done = sum(node.op_type in _MADE for node in made.graph.node)
    if done != len(named):
        raise ModelError(f"{done} of {len(named)} layers were quantized dynamically", expected=", ".join(named))
    rest = {node.op_type for node in made.graph.node} & {"Gather", "GRU", "RNN"}
    if rest:
        made = _weights_of(made, rest)
    return strip(made), tuple(named), left


def _weights_of(model: onnx.ModelProto, kinds: set[str]) -> onnx.ModelProto:
    try:
        return weights_to_int8(model, only=kinds)[0]
    except ModelError:  # all of them are small, or gather shapes and not rows of a table
        return model
