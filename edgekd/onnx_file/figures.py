"""How the forms of an ONNX file do: judged on the samples, timed in turns, and told as rows of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgekd import plugins
from edgekd.bench import accuracy, compare, conditions, latency, macs, memory, roofline
from edgekd.deploy import reference
from edgekd.measure import Examiner
from edgekd.onnx_file.feed import Feed, shown
from edgekd.onnx_file.notes import Notes
from edgekd.store import sha256_of
from edgekd.types import (
    Arrays,
    Backend,
    Comparison,
    Dataset,
    Estimate,
    Json,
    Latency,
    Parity,
    Part,
    Precision,
    Say,
    Session,
    Target,
    Task,
    Variant,
)


@dataclass(frozen=True, slots=True)
class Form:
    """One file: the float one, or one made of it."""

    id: str
    precision: Precision
    file: Path
    account: dict[str, Json]
    parity: Parity | None


def judged_by(first: np.ndarray, data: Dataset, output: str, notes: Notes) -> tuple[Task, np.ndarray]:
    """What the files are judged by, and what is right.

    Accuracy where the samples have labels and the first output is samples × classes; else the float file's own
    decisions are right; else, for outputs of another form, the cosine of a sample's outputs with the float file's.
    """
    task: Task = plugins.build("tasks", Part("classification"))
    if first.ndim == 2 and first.shape[1] > 1 and len(data.classes) == first.shape[1]:
        return task, accuracy.labels(data.test)
    if data.classes:
        notes.add(
            f"the labels were not used: there are {len(data.classes)} classes, and the output '{output}' is "
            f"{shown(first.shape)}"
        )
    if first.ndim == 2 and first.shape[1] > 1:
        notes.add("without labels that fit, what the float file decides is taken for right")
        return replace(task, metric="agreement with the float file"), task.decisions(first)
    notes.add(f"the output '{output}' is {shown(first.shape)}: files are judged by its cosine with the float file's")

    def cosines(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
        one, two = (side.reshape(len(side), -1).astype(np.float64) for side in (found, truth))
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
        same = (one == two).all(axis=1)
        return np.where(same, 1.0, (one * two).sum(axis=1) / np.where(norms == 0, 1.0, norms))

    return replace(
        task, metric="cosine with the float file", scores=cosines, metrics=lambda found, truth: {}, values=True,
        decisions=lambda found: found,
    ), first  # fmt: skip


def examiner(task: Task, truth: np.ndarray, first: np.ndarray, data: Dataset, say: Say) -> Examiner:
    """Holds files against the float file, whose first output is `first`."""
    scores = np.asarray(task.scores(first, truth), np.float64)
    return Examiner(data.test, truth, task, scores, task.decisions(first), say)


def outputs(path: Path, feeds: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """What a graph gives for batches, with ONNX Runtime's rewrites off."""
    return _answers(reference(path), feeds)


def _answers(session: Session, feeds: Iterable[Arrays]) -> dict[str, np.ndarray]:
    try:
        rows = [session(batch) for batch in feeds]
    finally:
        session.close()
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def measured(
    forms: Sequence[Form], target: Target, judge: Examiner, feed: Feed, output: str, *, threads: int, quick: bool
) -> tuple[list[Variant], tuple[Comparison, ...], tuple[str, ...]]:
    """A row for each file, comparisons of those that were timed in turns, and notes."""
    backend: Backend = plugins.build("backends", target.backend, where=f"targets/{target.name}.toml: backend")
    untimed = backend.available()
    if untimed is None and backend.engine is not None:
        untimed = f"{target.name} runs engines, which the board builds from these files"
    one = next(iter(feed.batches(judge.test, 1)))
    times: dict[str, Latency] = {}
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()
    if untimed is None:
        times, comparisons, notes = _timed(forms, backend, one, judge.say, threads=threads, quick=quick)
    rows = []
    for form in forms:
        session = reference(form.file) if untimed else backend.load(form.file, threads)
        runtime = session.runtime
        found = _answers(session, feed.batches(judge.test))[output]
        rows.append(_row(form, target, judge, found, runtime, times.get(form.id), untimed, one))
    return rows, comparisons, notes


def _timed(
    forms: Sequence[Form], backend: Backend, one: Arrays, say: Say, *, threads: int, quick: bool
) -> tuple[dict[str, Latency], tuple[Comparison, ...], tuple[str, ...]]:
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for form in forms:
            sessions[form.id] = backend.load(form.file, threads)
            stack.callback(sessions[form.id].close)
        timing = latency.measure(sessions, one, threads=threads, quick=quick, say=say)
    device = conditions.device_name()
    found = {
        name: latency.summarise(series, threads=threads, device=device, origin="host", power_mode=None)
        for name, series in timing.series_ns.items()
    }
    return found, compare.pairs(timing.series_ns), tuple(timing.notes)


def _row(
    form: Form, target: Target, judge: Examiner, outputs: np.ndarray, runtime: str, measured: Latency | None,
    untimed: str | None, one: Arrays,
) -> Variant:  # fmt: skip
    missing = {"energy_mj": "energy is read on boards with power sensors, not on this machine"}
    cost = macs.count(form.file)
    if cost.reason:
        missing["macs"] = cost.reason
    if untimed:
        missing |= {"latency_ms": untimed, "peak_memory_bytes": untimed}
    peak = None
    if not untimed:
        found = memory.peak_memory(target.backend, form.file, one, threads=1)
        peak = found.bytes
        if found.reason:
            missing["peak_memory_bytes"] = found.reason
    if form.parity is None:
        missing["parity"] = "it is the file that the others are held against"
    estimates: tuple[Estimate, ...] = ()
    if cost.macs is not None:
        moved = form.file.stat().st_size + cost.io_bytes
        estimates, without = roofline.estimates(cost.macs, moved, form.precision, target.devices)
        if without and not estimates:
            missing["estimates"] = "; ".join(without)
    return judge.row(
        outputs if np.isfinite(outputs).all() else "it gives values that are not finite", id=form.id, missing=missing,
        stage="onnx" if form.precision in ("fp32", "fp16") else "quantized", target=target.name,
        precision=form.precision, runtime=runtime, path=f"models/{form.id}.onnx", sha256=sha256_of(form.file),
        size_bytes=form.file.stat().st_size, parameters=cost.parameters, macs=cost.macs, parity=form.parity,
        latency_ms=measured, peak_memory_bytes=peak, estimates=estimates,
    )  # fmt: skip
