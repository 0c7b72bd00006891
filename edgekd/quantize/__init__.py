"""Post-training quantization: a calibrated network becomes an ONNX graph with Q/DQ nodes in the target's format.

The exported program is quantized in PyTorch (torchao's pt2e flow) so that one quantizer serves every runtime.
What pt2e cannot take is quantized as ONNX instead (`fallback.py`), and `fallback` in the result says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx
from torch import Tensor

from edgekd.errors import DataError, EdgekdError, ModelError, RecipeError, nearest
from edgekd.graph.edit import cast_first, save, strip
from edgekd.graph.opset import lower
from edgekd.graph.program import Program, capture, graph_inputs, reason, recapture, to_onnx
from edgekd.quantize import state
from edgekd.quantize.examination import examine
from edgekd.quantize.ladder import SECONDS, Ladder, holds, told
from edgekd.quantize.measured import task_of
from edgekd.quantize.onnx_level import quantize_onnx
from edgekd.quantize.qdq import finish
from edgekd.quantize.quantizer import within
from edgekd.quantize.samples import Halves, Stored
from edgekd.quantize.simulation import Simulation, names_of_layers
from edgekd.types import Arrays, Batch, Json, QuantizationMethod, QuantizationRules, Say, Task

if TYPE_CHECKING:
    from edgekd.models.network import Network

__all__ = ["MAX_DROP", "SECONDS", "VERSION", "check_layers", "holds", "quantize", "task_of", "told", "write"]

VERSION = 5
MAX_DROP = 0.005  # half a point


def quantize(
    network: Network,
    calibration: Iterable[Arrays | Batch],
    rules: QuantizationRules,
    *,
    opset: int,
    preprocessing: bool,
    path: Path,
    say: Say,
    method: Literal["auto"] | Sequence[QuantizationMethod] = "auto",
    max_drop: float = MAX_DROP,
    float_layers: Sequence[str] = (),
    task: Task | None = None,
    sensitivity: bool = False,
    mixed: bool = False,
    keep: Path | None = None,
    seconds: float = SECONDS,
) -> dict[str, Json]:
    """Calibrate `network`, quantize it as `rules` say and write the Q/DQ graph to `path`.

    Every second calibration sample gives ranges and corrections, the others show what they are worth: methods are
    tried from the cheapest on, until the drop is within `max_drop`, and the best is kept (`Ladder`). Batches are read
    one after the other and nothing of them is kept but a bounded number of samples, so memory does not grow with their
    number. Preprocessing stays in float in front of the first Q.

    Args:
        calibration: batches of samples as stored, by input name, read more than once; where they are `Batch`es, their
            labels are used to measure the drop, and for nothing else.
        opset: of the graph; below 18 it is exported for 18 and lowered.
        preprocessing: whether the graph takes samples as stored, or normalised float32.
        method: auto, or what to do whatever comes of it.
        max_drop: part of the task's metric that may be lost against the float network.
        float_layers: paths of layers, or of modules around them, that stay in float.
        task: what the logits are for; None: one class for each sample.
        sensitivity: measure what each layer costs alone.
        mixed: where the drop is more than `max_drop`, look for the fewest layers that must stay in float; this graph
            has them in integers still.
        keep: where the simulation is written, for what goes on from it (`state.load`); not where there is a fallback.
        seconds: from which on no further layer's rounding is learned.

    Returns:
        `quantizer` (pt2e or onnxruntime), `fallback` (why not pt2e, or None), `quantized` (layers), `float` (layer →
        why it stays in float), `samples`, `methods` (all that was tried, with figures), `static_batch` (why the batch
        is fixed, or None), `nodes` (count by type); where it was asked for `sensitivity` (a row for each layer) and
        `mixed` (sets of layers, see `mixed.Found`; None: there was no need).

    Raises:
        DataError: no calibration samples.
        RecipeError: `float_layers` names no layer of the network.
        ModelError: the model can be exported neither way.
    """
    network.eval()
    stored = Stored(calibration)
    first = next(iter(stored), None)
    if first is None or not len(next(iter(first.values()))):
        raise DataError("there are no calibration samples", expected="at least one batch of real inputs")
    args, specs = graph_inputs(network, first, preprocessing=preprocessing)
    program = capture(network, args, specs, preprocessing=preprocessing)
    if program.why_static is not None:
        say("static batch", step="quantize", reason=program.why_static)
    try:
        _named(program, float_layers)
        simulation = Simulation(program, rules, float_layers)
        samples = Halves(network, calibration, preprocessing, program.why_static is not None)
        ladder = Ladder(simulation, samples, max_drop=max_drop, task=task)
        if method == "auto":
            ladder.climb(say, seconds=seconds)
        else:
            ladder.apply(method, seconds=seconds)
        if not simulation.quantized:
            raise ModelError("it finds no layer that it can quantize")
        model, meta = write(simulation, opset)
        meta |= {"samples": ladder.samples_used, "methods": ladder.to_json()}
        if sensitivity:
            meta |= examine(ladder, mixed=mixed, say=say)
        if keep is not None:
            state.save(simulation, keep)
    except (DataError, RecipeError, MemoryError):
        raise
    except Exception as error:  # whatever torch or torchao raise on a graph they do not know
        why = reason(error)
        say("fallback", step="quantize", reason=f"quantized as ONNX, because pt2e could not: {why}")
        model, meta = _as_onnx(
            network, program, stored, rules, opset=opset, preprocessing=preprocessing, max_drop=max_drop, task=task
        )
        ignored = ["float_layers"] * bool(float_layers) + ["method"] * (method != "auto")
        meta["fallback"] = why + (f"; {' and '.join(ignored)} cannot be heeded there" if ignored else "")
    save(model, path)
    meta["static_batch"] = program.why_static
    meta["nodes"] = dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
    return meta


def write(simulation: Simulation, opset: int) -> tuple[onnx.ModelProto, dict[str, Json]]:
    """The simulated network as an ONNX graph, and what was done to it."""
    program = recapture(simulation.convert(), simulation.program)
    model = finish(to_onnx(program, opset), simulation.rules)
    meta: dict[str, Json] = {
        "quantizer": "pt2e",
        "fallback": None,
        "quantized": list(simulation.quantized),
        "float": dict(simulation.left),
    }
    return strip(lower(cast_first(model), opset)), meta


def check_layers(network: Network, samples: Arrays, float_layers: Sequence[str], *, preprocessing: bool) -> None:
    """Look before anything is trained whether a network has the layers that are to stay in float.

    Raises:
        RecipeError: `float_layers` names no layer of the network.
    """
    args, specs = graph_inputs(network, samples, preprocessing=preprocessing)
    _named(capture(network, args, specs, preprocessing=preprocessing), float_layers)


def _named(program: Program, float_layers: Sequence[str]) -> None:
    names = names_of_layers(program)
    for path in float_layers:
        if not any(within(name, {path}) for name in names):
            raise RecipeError(
                f"the network has no layer '{path}'", where="quantize.float_layers", nearest=nearest(path, names)
            )


def _as_onnx(
    network: Network,
    program: Program,
    calibration: Iterable[Arrays],
    rules: QuantizationRules,
    *,
    opset: int,
    preprocessing: bool,
    max_drop: float,
    task: Task | None,
) -> tuple[onnx.ModelProto, dict[str, Json]]:
    names = [spec.name for spec in program.inputs]

    def feeds() -> Iterator[Arrays]:
        for batch in _batches(network, calibration, preprocessing, one_by_one=program.why_static is not None):
            yield {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}

    plain = strip(to_onnx(program, opset))
    try:
        made = quantize_onnx(plain, feeds(), rules, max_drop=max_drop, task=task)
    except EdgekdError:
        raise
    except Exception as error:  # onnxruntime's quantizer raises many kinds
        raise ModelError(f"the model cannot be quantized: {reason(error)}", fix="deploy it in fp16 or fp32") from error
    meta: dict[str, Json] = {
        "quantizer": "onnxruntime",
        "quantized": list(made.layers),
        "float": dict(made.left),
        "samples": made.samples,
        "methods": made.methods,
    }
    return strip(lower(cast_first(finish(made.graph, rules)), opset)), meta


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
