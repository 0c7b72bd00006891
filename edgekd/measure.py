"""The rows of the report: what each artifact of a run computes, weighs and takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgekd import distillation
from edgekd.bench import accuracy, compare, conditions, latency, macs, memory, roofline
from edgekd.data.preprocessed import PreprocessedSplit
from edgekd.deploy import Deployment, Graph, Source, Workshop, reference, row_id, samples
from edgekd.errors import DataError, ModelError, PartError
from edgekd.models.network import Network
from edgekd.recipe import TaskSpec
from edgekd.store import sha256_of
from edgekd.types import (
    Arrays,
    Backend,
    Comparison,
    Dataset,
    Estimate,
    Json,
    Latency,
    Say,
    Session,
    Split,
    Stage,
    Task,
    Variant,
)

_DENSE_BATCH = 8  # outputs with a grid are large
_NO_ENERGY = "energy is read on boards with power sensors, not on this machine"


@dataclass(frozen=True, slots=True)
class Examiner:
    """The test split with its labels and how the teacher does on it, which everything is held against."""

    test: Split
    truth: np.ndarray
    task: Task
    scores: NDArray[np.float64]  # the teacher's
    decisions: np.ndarray  # the teacher's
    say: Say

    def row(self, outputs: np.ndarray | str, *, id: str, missing: Mapping[str, str], **facts: object) -> Variant:
        """A variant with its metric, its drop, its agreement and other metrics; `facts` are its other fields.

        Where there are no outputs the reason stands in their place, and in the row.
        """
        if isinstance(outputs, str):
            reasons = dict(missing) | dict.fromkeys(("accuracy", "drop", "agreement"), outputs)
            return replace(_EMPTY, id=id, missing=reasons, **facts)  # type: ignore[arg-type]
        scores = _scores(self.task, outputs, self.truth)
        found = accuracy.mean(scores)
        self.say("measured", id=id, metric=self.task.metric, accuracy=found.value)
        agreement = None
        if self.task.values:
            missing = {**missing, "agreement": "values are near each other or not, but never the same: see the drop"}
        else:
            agreement = accuracy.agreement(self.decisions, self.task.decisions(outputs))
        known = {
            "accuracy": found,
            "drop": accuracy.drop(self.scores, scores),
            "agreement": agreement,
            "metrics": self.task.metrics(outputs, self.truth),
        }
        return replace(_EMPTY, id=id, missing=missing, **known, **facts)  # type: ignore[arg-type]


_EMPTY = Variant(
    id="", stage="student", target=None, precision="fp32", runtime=None, path=None, sha256=None, size_bytes=None,
    parameters=None, macs=None, accuracy=None, drop=None, agreement=None, parity=None, latency_ms=None,
    peak_memory_bytes=None, energy_mj=None, estimates=(), verdict=None,
)  # fmt: skip


def weights_rows(sources: Mapping[Stage, Source], shop: Workshop, task: Task) -> tuple[Examiner, list[Variant]]:
    """The teacher and the student as they are in PyTorch, and the examiner that holds others against the teacher.

    Raises:
        DataError: no test sample has anything to judge.
        PartError: the task's scores are not one number a sample.
    """
    test = shop.data.test
    truth = accuracy.labels(test)
    teacher = _outputs(sources["teacher"].network, test, task)
    examiner = Examiner(test, truth, task, _scores(task, teacher, truth), task.decisions(teacher), shop.say)
    rows = [
        # the same network may be both: then it is run once
        weights_row(examiner, stage, source, stage, teacher if source.network is sources["teacher"].network else None)
        for stage, source in sources.items()
    ]
    return examiner, rows


def weights_row(
    examiner: Examiner, stage: Stage, source: Source, name: str, outputs: np.ndarray | None = None
) -> Variant:
    """A network as it is in PyTorch; `outputs` are its own on the test split, where they are known already."""
    reason = "PyTorch is not what is deployed: see the rows of the targets"
    names = ("latency_ms", "size_bytes", "macs", "peak_memory_bytes", "energy_mj", "parity")
    return examiner.row(
        _outputs(source.network, examiner.test, examiner.task) if outputs is None else outputs,
        id=name,
        stage=stage,
        runtime=f"torch {version('torch').partition('+')[0]}",
        parameters=sum(p.numel() for p in source.network.module.parameters()),
        missing=dict.fromkeys(names, reason),
    )


class Taught(Protocol):
    """A task with its data, as a recipe names it."""

    @property
    def data(self) -> Dataset: ...

    @property
    def task(self) -> Task: ...

    @property
    def spec(self) -> TaskSpec: ...


def task_figures(subject: Taught, teachers: Sequence[Source], student: Network) -> dict[str, Json]:
    """How a student and its teachers do on the test split of one task; drop and agreement are against the first one.

    Args:
        subject: the task; its head is the student's output for it, None where it has but one.
        teachers: with one output each.
        student: a network in PyTorch.
    """
    test, task, head = subject.data.test, subject.task, subject.spec.head
    truth = accuracy.labels(test)
    outputs = [_outputs(source.network, test, task) for source in teachers]
    outputs.append(_outputs(student, test, task, head))
    scores = [_scores(task, each, truth) for each in outputs]
    figures: list[dict[str, Json]] = [
        {"accuracy": asdict(accuracy.mean(score)), "metrics": dict(task.metrics(each, truth))}
        for score, each in zip(scores, outputs, strict=True)
    ]
    last = figures[-1] | {"drop": asdict(accuracy.drop(scores[0], scores[-1]))}
    if not task.values:
        last["agreement"] = accuracy.agreement(task.decisions(outputs[0]), task.decisions(outputs[-1]))
    return {
        "task": task.name, "head": head, "data": subject.data.name, "metric": task.metric,
        "teachers": [*figures[:-1]], "student": last,
    }  # fmt: skip


def target_rows(
    examiner: Examiner, made: Deployment, sources: Mapping[Stage, Source], shop: Workshop, *, threads: int, quick: bool,
    known: Mapping[str, Variant] | None = None,
) -> tuple[list[Variant], tuple[Comparison, ...], tuple[str, ...]]:  # fmt: skip
    """Every graph of one target: its metric on the whole test split, latency in interleaved rounds, memory, bounds.

    Of a row that is `known` by its id the latency alone is measured anew.
    """
    target = made.target
    times, comparisons, notes = latencies(made, sources, shop, threads=threads, quick=quick)
    rows = []
    for graph in made.graphs:
        name = row_id(target, graph)
        if known and name in known:
            rows.append(replace(known[name], latency_ms=times.get(name)))
            continue
        source = sources["teacher" if graph.stage == "teacher" else "student"]
        session = _session(made, graph, threads=os.cpu_count() or 1)
        runtime = session.runtime
        try:
            outputs: np.ndarray | str = _predicted(session, _split(examiner.test, source, shop), examiner.task)
        except ModelError as problem:  # it fails on some sample: a row that says so, and no reason to lose the others
            outputs = str(problem)
        finally:
            session.close()
        rows.append(_row(examiner, made, graph, outputs, runtime, times.get(name), source, shop))
    return rows, comparisons, notes


def fastest(
    backend: Backend, files: Sequence[Path], source: Source, *, shop: Workshop, threads: int, quick: bool
) -> tuple[int, str]:
    """Which of several files of one network is the fastest, timed in turns; one that comes later only where it is
    faster for certain. Beside its index stands how that was found.
    """
    with ExitStack() as stack:
        sessions = {}
        for index, file in enumerate(files):
            session = backend.load(file, threads)
            stack.callback(session.close)
            sessions[str(index)] = session
        timing = latency.measure(sessions, _one_sample(source, shop), threads=threads, quick=quick, say=shop.say)
    best = 0
    for index in range(1, len(files)):
        found = compare.compare(str(index), timing.series_ns[str(index)], str(best), timing.series_ns[str(best)])
        best = index if found.verdict == "faster" else best
    medians = [float(np.median(series)) / 1e6 for series in timing.series_ns.values()]
    others = ", ".join(f"{median:.3g}" for index, median in enumerate(medians) if index != best)
    sets = f"of {len(files)} sets of layers in float that hold, "
    told = "it has the fewest, and none is faster" if best == 0 else "it is the fastest"
    return best, f"{sets}{told}: {medians[best]:.3g} ms against {others} ms"


def _row(
    examiner: Examiner, made: Deployment, graph: Graph, outputs: np.ndarray | str, runtime: str,
    measured: Latency | None, source: Source, shop: Workshop,
) -> Variant:  # fmt: skip
    target, name = made.target, row_id(made.target, graph)
    missing = {"energy_mj": _NO_ENERGY}
    cost = macs.count(graph.onnx)
    estimates: tuple[Estimate, ...] = ()
    if cost.macs is not None:
        moved = graph.onnx.stat().st_size + cost.io_bytes
        estimates, without = roofline.estimates(cost.macs, moved, graph.precision, target.devices)
        if without and not estimates:
            missing["estimates"] = "; ".join(without)
        board = [mode for device in target.devices for mode in device.modes]
        if measured is not None and len(board) == 1:  # else nobody knows which of them this machine is
            roofline.check(measured, roofline.bound(cost.macs, moved, graph.precision, board[0]), where=name)
    if cost.reason:
        missing["macs"] = cost.reason
    if measured is None:
        missing["latency_ms"] = _why_untimed(made, graph)
    peak, why = _memory(made, graph, source, shop)
    if why:
        missing["peak_memory_bytes"] = why
    if graph.parity is None:
        missing["parity"] = f"an engine is judged by its {examiner.task.metric}"
    return examiner.row(
        outputs, id=name, stage=graph.stage, target=target.name, precision=graph.precision,
        runtime=runtime, sha256=sha256_of(graph.file), size_bytes=graph.file.stat().st_size,
        parameters=cost.parameters, macs=cost.macs, parity=graph.parity,
        latency_ms=measured, peak_memory_bytes=peak, estimates=estimates, missing=missing,
    )  # fmt: skip


def _outputs(network: Network, test: Split, task: Task, head: str | None = None) -> np.ndarray:
    """What PyTorch gives for every sample: outputs, or decisions where the task is dense."""
    if not task.dense:
        return distillation.evaluate(network, test, head=head)
    return distillation.evaluate(network, test, head=head, keep=task.decisions, batch_size=_DENSE_BATCH)


def _predicted(session: Session, test: Split, task: Task) -> np.ndarray:
    if not task.dense:
        return accuracy.predict(session, test)
    return accuracy.predict(session, test, _DENSE_BATCH, dense=True, keep=task.decisions)


def _scores(task: Task, outputs: np.ndarray, truth: np.ndarray) -> NDArray[np.float64]:
    scores = np.asarray(task.scores(outputs, truth), np.float64)
    if scores.ndim != 1 or len(scores) > len(truth) or not np.isfinite(scores).all():
        raise PartError(
            f"its scores of {len(truth)} samples have the shape {scores.shape}, or are not finite",
            where=f"task {task.name}",
            expected="one finite number a sample",
        )
    if not len(scores):
        raise DataError("no test sample has anything to judge", where=f"task {task.name}")
    return scores


def _timed(made: Deployment, graph: Graph) -> bool:
    """Whether its time here says anything about the target: only on the target's own runtime."""
    return made.unavailable is None and (made.backend.engine is None or graph.file.suffix != ".onnx")


def _why_untimed(made: Deployment, graph: Graph) -> str:
    if made.unavailable is not None:
        return f"{made.unavailable}; run.py --bench in the bundle measures it on the board"
    return f"{made.backend.name} does not run the ONNX file itself; see its engine"


def _session(made: Deployment, graph: Graph, *, threads: int) -> Session:
    return made.backend.load(graph.file, threads) if _timed(made, graph) else reference(graph.file)


def latencies(
    made: Deployment, sources: Mapping[Stage, Source], shop: Workshop, *, threads: int, quick: bool,
    wanted: Callable[[Sequence[str]], Sequence[tuple[str, str]]] | None = None,
) -> tuple[dict[str, Latency], tuple[Comparison, ...], tuple[str, ...]]:  # fmt: skip
    """Each graph that can be timed here, all of them in the same interleaved rounds.

    Returns:
        By row id; of the pairs that `wanted` makes of the ids (None: of all) which one is faster; what disturbed it.
    """
    graphs = [graph for graph in made.graphs if _timed(made, graph)]
    if not graphs:
        return {}, (), ()
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for graph in graphs:
            session = made.backend.load(graph.file, threads)
            stack.callback(session.close)
            sessions[row_id(made.target, graph)] = session
        one = _one_sample(sources["student"], shop)
        before = conditions.clocks()
        timing = latency.measure(sessions, one, threads=threads, quick=quick, say=shop.say)
    figures = {
        name: latency.summarise(
            series, threads=threads, device=conditions.device_name(), origin="host", power_mode=None
        )
        for name, series in timing.series_ns.items()
    }
    for name, found in figures.items():
        shop.say("latency", id=name, p50=found.p50)
    pairs = None if wanted is None else wanted(list(timing.series_ns))
    changed = conditions.changes(before, conditions.clocks())
    return figures, compare.pairs(timing.series_ns, pairs), (*timing.notes, *changed)


def _one_sample(source: Source, shop: Workshop) -> Arrays:
    return samples(shop, source.network, 1)[1]


def _split(test: Split, source: Source, shop: Workshop) -> Split:
    preprocessing = source.network.preprocessing
    return test if shop.preprocessing or preprocessing is None else PreprocessedSplit(test, preprocessing)


def _memory(made: Deployment, graph: Graph, source: Source, shop: Workshop) -> tuple[int | None, str | None]:
    if not _timed(made, graph):
        return None, _why_untimed(made, graph)
    found = memory.peak_memory(made.target.backend, graph.file, _one_sample(source, shop), threads=1)
    return found.bytes, found.reason
