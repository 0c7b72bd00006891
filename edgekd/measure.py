"""The rows of the report: what each artifact of a run computes, weighs and takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from edgekd import distill
from edgekd.bench import accuracy, compare, conditions, latency, macs, memory, roofline
from edgekd.data.preprocessed import PreprocessedSplit
from edgekd.deploy import Deployment, Graph, Source, Workshop, reference, row_id, samples
from edgekd.errors import ModelError
from edgekd.store import sha256_of
from edgekd.types import Arrays, Comparison, Estimate, Latency, Say, Session, Split, Stage, Variant

Logits = NDArray[np.float32]
_NO_ENERGY = "energy is read on boards with power sensors, not on this machine"


@dataclass(frozen=True, slots=True)
class Examiner:
    """The test split with its labels and the teacher's answers, which everything is held against."""

    test: Split
    truth: NDArray[np.int64]
    teacher: Logits
    say: Say

    def row(self, logits: Logits | str, *, id: str, missing: Mapping[str, str], **facts: object) -> Variant:
        """A variant with its accuracy, its drop and its agreement; `facts` are its other fields.

        Where there are no logits the reason stands in their place, and in the row.
        """
        if isinstance(logits, str):
            reasons = dict(missing) | dict.fromkeys(("accuracy", "drop", "agreement"), logits)
            return replace(_EMPTY, id=id, missing=reasons, **facts)  # type: ignore[arg-type]
        found = accuracy.accuracy(logits, self.truth)
        self.say("measured", id=id, accuracy=found.value)
        known = {
            "accuracy": found,
            "drop": accuracy.drop(self.teacher, logits, self.truth),
            "agreement": accuracy.agreement(self.teacher, logits),
        }
        return replace(_EMPTY, id=id, missing=missing, **known, **facts)  # type: ignore[arg-type]


_EMPTY = Variant(
    id="", stage="student", target=None, precision="fp32", runtime=None, path=None, sha256=None, size_bytes=None,
    parameters=None, macs=None, accuracy=None, drop=None, agreement=None, parity=None, latency_ms=None,
    peak_memory_bytes=None, energy_mj=None, estimates=(), verdict=None,
)  # fmt: skip


def weights_rows(sources: Mapping[Stage, Source], shop: Workshop) -> tuple[Examiner, list[Variant]]:
    """The teacher and the student as they are in PyTorch, and the examiner that holds others against the teacher."""
    test = shop.data.test
    truth = accuracy.labels(test)
    logits = {stage: distill.evaluate(source.network, test) for stage, source in sources.items()}
    examiner = Examiner(test, truth, logits["teacher"], shop.say)
    rows = []
    for stage, source in sources.items():
        reason = "PyTorch is not what is deployed: see the rows of the targets"
        names = ("latency_ms", "size_bytes", "macs", "peak_memory_bytes", "energy_mj", "parity")
        rows.append(
            examiner.row(
                logits[stage],
                id=stage,
                stage=stage,
                runtime=f"torch {version('torch').partition('+')[0]}",
                parameters=sum(p.numel() for p in source.network.module.parameters()),
                missing=dict.fromkeys(names, reason),
            )
        )
    return examiner, rows


def target_rows(
    examiner: Examiner, made: Deployment, sources: Mapping[Stage, Source], shop: Workshop, *, threads: int, quick: bool
) -> tuple[list[Variant], tuple[Comparison, ...], tuple[str, ...]]:
    """Every graph of one target: accuracy on the whole test split, latency in interleaved rounds, memory, estimates."""
    target = made.target
    times, comparisons, notes = _latencies(made, sources, shop, threads=threads, quick=quick)
    rows = []
    for graph in made.graphs:
        source = sources["teacher" if graph.stage == "teacher" else "student"]
        session = _session(made, graph, threads=os.cpu_count() or 1)
        runtime = session.runtime
        try:
            logits: Logits | str = accuracy.predict(session, _split(examiner.test, source, shop))
        except ModelError as problem:  # it fails on some sample: a row that says so, and no reason to lose the others
            logits = str(problem)
        finally:
            session.close()
        rows.append(_row(examiner, made, graph, logits, runtime, times.get(row_id(target, graph)), source, shop))
    return rows, comparisons, notes


def _row(
    examiner: Examiner, made: Deployment, graph: Graph, logits: Logits | str, runtime: str, measured: Latency | None,
    source: Source, shop: Workshop,
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
        missing["parity"] = "an engine is judged by its accuracy"
    return examiner.row(
        logits, id=name, stage=graph.stage, target=target.name, precision=graph.precision,
        runtime=runtime, sha256=sha256_of(graph.file), size_bytes=graph.file.stat().st_size,
        parameters=cost.parameters, macs=cost.macs, parity=graph.parity,
        latency_ms=measured, peak_memory_bytes=peak, estimates=estimates, missing=missing,
    )  # fmt: skip


def _timed(made: Deployment, graph: Graph) -> bool:
    """Whether its time here says anything about the target: only on the target's own runtime."""
    return made.unavailable is None and (made.backend.engine is None or graph.file.suffix != ".onnx")


def _why_untimed(made: Deployment, graph: Graph) -> str:
    if made.unavailable is not None:
        return f"{made.unavailable}; run.py --bench in the bundle measures it on the board"
    return f"{made.backend.name} does not run the ONNX file itself; see its engine"


def _session(made: Deployment, graph: Graph, *, threads: int) -> Session:
    return made.backend.load(graph.file, threads) if _timed(made, graph) else reference(graph.file)


def _latencies(
    made: Deployment, sources: Mapping[Stage, Source], shop: Workshop, *, threads: int, quick: bool
) -> tuple[dict[str, Latency], tuple[Comparison, ...], tuple[str, ...]]:
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
    changed = conditions.changes(before, conditions.clocks())
    return figures, compare.pairs(timing.series_ns), (*timing.notes, *changed)


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
