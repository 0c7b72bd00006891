"""Post-training quantization: a calibrated network becomes an ONNX graph with Q/DQ nodes in the target's format.

The exported program is quantized in PyTorch (torchao's pt2e flow) so that one quantizer serves every runtime.
What pt2e cannot take is quantized as ONNX instead (`fallback.py`), and `fallback` in the result says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from torch import Tensor

from edgekd.errors import DataError, EdgekdError, ModelError
from edgekd.graph.edit import cast_first, save, strip
from edgekd.graph.opset import lower
from edgekd.graph.program import Program, capture, graph_inputs, reason, recapture, to_onnx
from edgekd.quantize.fallback import quantize_onnx
from edgekd.quantize.qdq import finish
from edgekd.quantize.ranges import set_activations, set_weights
from edgekd.quantize.simulation import Simulation
from edgekd.types import Arrays, Json, QuantizationRules, Say

if TYPE_CHECKING:
    from edgekd.models.network import Network

VERSION = 1


def quantize(
    network: Network,
    calibration: Iterable[Arrays],
    rules: QuantizationRules,
    *,
    opset: int,
    preprocessing: bool,
    path: Path,
    say: Say,
) -> dict[str, Json]:
    """Calibrate `network`, quantize it as `rules` say and write the Q/DQ graph to `path`.

    Ranges are the smallest and largest values seen; batches are read one after the other and nothing of them is
    kept, so memory does not grow with their number. Preprocessing stays in float in front of the first Q.

    Args:
        calibration: batches of samples as stored, by input name; read more than once where a fallback needs it.
        opset: of the graph; below 18 it is exported for 18 and lowered.
        preprocessing: whether the graph takes samples as stored, or normalised float32.

    Returns:
        `quantizer` (pt2e or onnxruntime), `fallback` (why not pt2e, or None), `quantized` (layers), `float` (layer →
        why it stays in float), `samples`, `static_batch` (why the batch is fixed, or None), `nodes` (count by type).

    Raises:
        DataError: no calibration samples.
        ModelError: the model can be exported neither way.
    """
    network.eval()
    first = next(iter(calibration), None)
    if first is None or not len(next(iter(first.values()))):
        raise DataError("there are no calibration samples", expected="at least one batch of real inputs")
    args, specs = graph_inputs(network, first, preprocessing=preprocessing)
    program = capture(network, args, specs, preprocessing=preprocessing)
    if program.why_static is not None:
        say("static batch", step="quantize", reason=program.why_static)
    try:
        model, meta = _pt2e(network, program, calibration, rules, opset=opset, preprocessing=preprocessing)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # whatever torch or torchao raise on a graph they do not know
        why = reason(error)
        say("fallback", step="quantize", reason=f"quantized as ONNX, because pt2e could not: {why}")
        model, meta = _as_onnx(network, program, calibration, rules, opset=opset, preprocessing=preprocessing)
        meta["fallback"] = why
    save(model, path)
    meta["static_batch"] = program.why_static
    meta["nodes"] = dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
    return meta


def _pt2e(
    network: Network,
    program: Program,
    calibration: Iterable[Arrays],
    rules: QuantizationRules,
    *,
    opset: int,
    preprocessing: bool,
) -> tuple[onnx.ModelProto, dict[str, Json]]:
    simulation = Simulation(program, rules)
    static = program.why_static is not None
    samples = simulation.observe(_batches(network, calibration, preprocessing, one_by_one=static))
    set_activations(simulation, "minmax")
    set_weights(simulation, "minmax")
    model = finish(to_onnx(recapture(simulation.convert(), program), opset), rules)
    left: dict[str, Json] = dict(simulation.left)
    meta: dict[str, Json] = {
        "quantizer": "pt2e",
        "fallback": None,
        "quantized": list(simulation.quantized),
        "float": left,
        "samples": samples,
    }
    return strip(lower(cast_first(model), opset)), meta


def _as_onnx(
    network: Network,
    program: Program,
    calibration: Iterable[Arrays],
    rules: QuantizationRules,
    *,
    opset: int,
    preprocessing: bool,
) -> tuple[onnx.ModelProto, dict[str, Json]]:
    if iter(calibration) is calibration:
        raise ModelError(
            "the model needs the fallback quantizer, which reads the calibration samples again",
            expected="calibration that can be read twice, such as a list",
        )
    names = [spec.name for spec in program.inputs]
    count = 0

    def feeds() -> Iterator[Arrays]:
        nonlocal count
        for batch in _batches(network, calibration, preprocessing, one_by_one=program.why_static is not None):
            count += len(batch[0])
            yield {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}

    plain = strip(to_onnx(program, opset))
    try:
        model, quantized, left = quantize_onnx(plain, feeds(), rules)
    except EdgekdError:
        raise
    except Exception as error:  # onnxruntime's quantizer raises many kinds
        raise ModelError(f"the model cannot be quantized: {reason(error)}", fix="deploy it in fp16 or fp32") from error
    meta: dict[str, Json] = {
        "quantizer": "onnxruntime",
        "quantized": list(quantized),
        "float": dict(left),
        "samples": count,
    }
    return strip(lower(cast_first(finish(model, rules)), opset)), meta


def _batches(
    network: Network, calibration: Iterable[Arrays], preprocessing: bool, *, one_by_one: bool
) -> Iterator[tuple[Tensor, ...]]:
    """What the graph takes, batch by batch, or sample by sample for a graph of a fixed batch."""
    for batch in calibration:
        args, _ = graph_inputs(network, batch, preprocessing=preprocessing)
        if one_by_one:
            yield from (tuple(arg[i : i + 1] for arg in args) for i in range(len(args[0])))
        elif len(args[0]):
            yield args
