"""Quantization-aware distillation: a student that rounding costs too much is taught again, rounding as it will run.

It starts from what post-training quantization came to, on the same simulated graph, from the same teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import distillation, plugins, quantize
from edgekd.distillation import Teacher
from edgekd.distillation.objective import of_features
from edgekd.errors import DataError, ParityError
from edgekd.graph.edit import save
from edgekd.graph.program import Program, capture, graph_inputs
from edgekd.models.network import Network
from edgekd.quantize import state
from edgekd.quantize.measured import Loss, measure
from edgekd.quantize.simulation import Inputs
from edgekd.quantize.student import Rounded
from edgekd.recipe import AUTO, loss_table, loss_term
from edgekd.types import (
    Artifact,
    Augment,
    Batch,
    Dataset,
    Json,
    LossTerm,
    QuantizationRules,
    Say,
    Session,
    Task,
    TrainOptions,
)

VERSION = 1
LEARNING_RATE = 0.1  # of AdamW at its peak, in steps of a weight's grid (`Rounded`); found by benchmarks/qad.py
MAX_APART = 0.001  # of the metric, between the simulated network and its graph: a tenth of a point
_WEIGHTS = "weights.safetensors"  # that training leaves; the simulation holds them too


@dataclass(frozen=True, slots=True)
class Recovery:
    """Who teaches a quantized student, on what, and how long."""

    teachers: tuple[Teacher, ...]
    artifacts: tuple[Artifact, ...]  # that hold the teachers' weights
    data: Dataset
    held_out: Iterable[Batch]  # of the data, in no training; read as often as it is asked for
    task: Task
    options: TrainOptions  # as `options` gives them
    augment: Augment
    seed: int
    answers: Path | None  # where teachers' answers are kept


def options(asked: TrainOptions, epochs: int) -> TrainOptions:
    """The options of a student's training, made those of a short one that starts from a trained network.

    AdamW without decay, since weights are counted in steps of their grids; batches, views and the teacher's precision
    stay, so that answers of the teacher that are kept already are used again.
    """
    return replace(
        asked, epochs=epochs, optimizer="adamw", learning_rate=LEARNING_RATE, weight_decay=0.0, schedule="onecycle",
        compile="off",
    )  # fmt: skip


def terms(trained: Artifact, task: Task) -> tuple[LossTerm, ...]:
    """The losses that a student was trained by, without those of layers, which a captured graph has no names for.

    Where none is left, the task's own.
    """
    meta: Any = trained.meta
    found = [loss_term(table, "loss") for table in meta.get("losses", {}).get("student", ())]
    return _of_outputs(found) or _of_outputs(task.losses)


def _of_outputs(losses: Sequence[LossTerm]) -> tuple[LossTerm, ...]:
    return tuple(term for term in losses if term.part.name != AUTO and not of_features(_bound(term)))


def _bound(term: LossTerm) -> Callable[..., Any]:
    return plugins.bind("losses", term.part, where="loss")


def identity(recovery: Recovery, losses: Sequence[LossTerm]) -> dict[str, Json]:
    """What a training depends on besides the quantized student it starts from and its teachers."""
    asked = asdict(recovery.options)
    return {
        "losses": [loss_table(term) for term in losses], "weights": [each.weight for each in recovery.teachers],
        "options": asked | {"cache_gb": bool(asked["cache_gb"])}, "augment": asdict(recovery.augment),
        "seed": recovery.seed, "task": recovery.task.name, "data": recovery.data.fingerprint,
    }  # fmt: skip


def train(
    student: Network, start: Path, rules: QuantizationRules, recovery: Recovery, losses: Sequence[LossTerm],
    *, preprocessing: bool, work: Path, say: Say,
) -> dict[str, Json]:  # fmt: skip
    """Distil the simulated student from `start` on; `work` gets the simulation that comes of it.

    What a killed training left in `work` is gone on from, to the bit.

    Args:
        student: in float; it is not changed.
        start: the simulation that post-training quantization came to, as `state.save` wrote it.
        losses: of outputs alone.
        preprocessing: whether the graph takes samples as stored.

    Returns:
        As `distillation.distill`, and `before` and `after`: what is lost on the samples held out, with `kept`: whether
        it is less than before.

    Raises:
        ModelError: the graph takes one sample at a time, or nothing of it is quantized.
        EdgekdError: the training diverges.
    """
    simulation = state.load(_captured(student, recovery, preprocessing), rules, start)
    rounded = Rounded(simulation)
    pupil = Network(rounded, student.inputs, None if preprocessing else student.preprocessing)
    before = measure(simulation, _samples(student, recovery, preprocessing), recovery.task)
    meta = distillation.distill(
        pupil, recovery.teachers, recovery.data, losses, recovery.options, recovery.augment, task=recovery.task,
        seed=recovery.seed, work=work, cache=recovery.answers, say=_renamed(say),
    )  # fmt: skip
    rounded.write_back()
    after = measure(simulation, _samples(student, recovery, preprocessing), recovery.task)
    state.save(simulation, work / state.FILE)
    (work / _WEIGHTS).unlink()
    return meta | {
        "precision": "fp32", "precision_reason": "bf16 has fewer digits than the grids of int8",
        "before": before.to_json(), "after": after.to_json(), "kept": better(after, before),
    }  # fmt: skip


def better(one: Loss, other: Loss) -> bool:
    """Whether less is lost: of the metric on labels, where so many samples can tell; else what is to be expected."""
    if one.drop is not None and other.drop is not None:
        error = max(one.drop_error or 0.0, other.drop_error or 0.0)
        if abs(one.drop - other.drop) > error:
            return one.drop < other.drop
    return one.expected_drop < other.expected_drop


def write(
    student: Network, file: Path, rules: QuantizationRules, recovery: Recovery, load: Callable[[Path], Session],
    *, preprocessing: bool, opset: int, path: Path,
) -> dict[str, Json]:  # fmt: skip
    """Write the simulation in `file` as an ONNX graph to `path`, and see on held-out samples that the two are one.

    Args:
        load: opens a graph on a runtime that computes as the graph says.

    Returns:
        As `quantize.write`, and `simulated`: how far the graph is from the simulation.

    Raises:
        ParityError: the metric of the two differs by more than a tenth of a point, and by more than one sample.
    """
    program = _captured(student, recovery, preprocessing)
    simulation = state.load(program, rules, file)
    model, meta = quantize.write(simulation, opset)
    save(model, path)
    session = load(path)
    names = [spec.name for spec in program.inputs]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    largest = 0.0
    try:
        for inputs, labels in _samples(student, recovery, preprocessing):
            wanted = simulation.logits(inputs, quantized=True).numpy()
            (found,) = session({name: value.numpy() for name, value in zip(names, inputs, strict=True)}).values()
            largest = max(largest, float(np.abs(wanted - found).max()))
            pairs.append((recovery.task.scores(wanted, labels), recovery.task.scores(found, labels)))
    finally:
        session.close()
    simulated, graph = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    count, apart = len(simulated), abs(float(simulated.mean() - graph.mean()))
    if not apart <= max(MAX_APART, 1 / count):
        means = f"{graph.mean():.4f} of the graph, {simulated.mean():.4f} of the simulated network"
        raise ParityError(
            f"{recovery.task.metric} is {means}",
            where=path.name,
            expected=f"a difference of at most {MAX_APART}, or of one sample of {count}",
        )
    told: dict[str, Json] = {
        "samples": count, "simulated": float(simulated.mean()), "graph": float(graph.mean()), "max_abs": largest,
    }  # fmt: skip
    return meta | {"simulated": told}


def told(meta: Mapping[str, Any], metric: str) -> str:
    """What it took and what it brought, as a sentence of the report; `meta` is what `train` gave."""
    before, after = meta["before"], meta["after"]
    figures = f"expected drop {after['expected_drop']:.2%}, {before['expected_drop']:.2%} without it"
    if before["drop"] is not None and after["drop"] is not None:
        measured = f"{after['drop']:.2%} ± {after['drop_error']:.2%} of {metric}, {before['drop']:.2%} without it"
        figures += f"; measured {measured}"
    return (
        f"quantization-aware distillation ({meta['epochs']} epochs, {meta['train_s']:.0f} s) against the float "
        f"student, on {after['samples']} samples held out: {figures}: {'kept' if meta['kept'] else 'not kept'}"
    )


def _captured(student: Network, recovery: Recovery, preprocessing: bool) -> Program:
    first = next(iter(recovery.held_out), None)
    if first is None:
        raise DataError("there are no calibration samples", expected="at least one batch of real inputs")
    args, specs = graph_inputs(student, first.inputs, preprocessing=preprocessing)
    return capture(student, args, specs, preprocessing=preprocessing)


def _samples(student: Network, recovery: Recovery, preprocessing: bool) -> Iterator[tuple[Inputs, np.ndarray]]:
    """Held-out samples as the graph takes them, with their labels."""
    for batch in recovery.held_out:
        yield graph_inputs(student, batch.inputs, preprocessing=preprocessing)[0], batch.labels


def _renamed(say: Say) -> Say:
    """What the training tells is told of this step."""

    def heard(event: str, /, **fields: Json) -> None:
        say(event, **(fields | {"step": "qad"} if fields.get("step") == "distill" else fields))

    return heard
