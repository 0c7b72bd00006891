"""For one target: weights → ONNX → its precisions → engine, each a checked artifact in the store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from edgekd import export, plugins, qad, quantize, recipe
from edgekd.backends.onnxruntime import fused
from edgekd.data.preprocessed import normalise
from edgekd.errors import EdgekdError, ModelError, ParityError, StoreError
from edgekd.graph import edit
from edgekd.models.network import Network
from edgekd.quantize import lint, state
from edgekd.store import Store
from edgekd.types import (
    Arrays,
    Artifact,
    Backend,
    Batch,
    Dataset,
    Json,
    Parity,
    Part,
    Precision,
    Say,
    Session,
    Stage,
    Target,
    Task,
)  # fmt: skip

MODEL = "model.onnx"
PARITY_SAMPLES = 64
CALIBRATION_BATCH = 32


@dataclass(frozen=True, slots=True)
class Source:
    """A network and the artifact that holds its weights."""

    network: Network
    weights: Artifact


@dataclass(frozen=True, slots=True)
class Graph:
    """One file for one target."""

    id: str  # student-int8
    stage: Stage
    precision: Precision
    artifact: Artifact
    file: Path
    onnx: Path  # the file itself, or the one that an engine was built from
    parity: Parity | None
    notes: tuple[str, ...]  # what its step has to say: layers left in float, a fallback


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is made for one target."""

    target: Target
    backend: Backend
    graphs: tuple[Graph, ...]  # the teacher's first
    legacy: Mapping[Precision, Path]  # files for older versions of the runtime
    unavailable: str | None  # why the target's toolchain cannot run here; None where it can
    notes: tuple[str, ...]  # what was left out and why, what runs in float, findings of the lint rules

    @property
    def typing(self) -> Literal["strong", "any"]:
        """How a toolchain must read the graphs: TensorRT 10 and 11 take every type as it stands in them."""
        return "strong" if self.target.quantization.lint == "tensorrt" else "any"


@dataclass(frozen=True, slots=True)
class Workshop:
    """What the steps work with: where builds go, and the samples they are checked and calibrated on."""

    store: Store
    data: Dataset
    preprocessing: bool  # the graph takes images as they are stored
    precisions: tuple[Precision, ...] | None  # that the recipe asks for; None: what the target allows
    say: Say
    quantize: recipe.Quantize = field(default_factory=recipe.Quantize)
    task: Task | None = None  # what the logits are for; None: one class for each sample
    recovery: qad.Recovery | None = None  # who teaches an int8 student that lost too much; None: nobody


@dataclass(frozen=True, slots=True)
class Calibration:
    """The calibration split as stored, batch by batch, as often as it is read."""

    data: Dataset

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self.data.calibration))
        parts = [order[i : i + CALIBRATION_BATCH] for i in range(0, len(order), CALIBRATION_BATCH)]
        yield from self.data.calibration.batches(parts)


def row_id(target: Target, graph: Graph) -> str:
    """The graph's id in the report, e.g. jetson/student-int8."""
    return f"{target.name}/{graph.id}"


def deploy(shop: Workshop, target: Target, teacher: Source, student: Source) -> Deployment:
    """Every graph of the teacher and the student for this target.

    A precision that the student cannot take is left out, and `notes` says why; without fp32 there is nothing to deploy.

    Raises:
        ModelError: a network cannot become ONNX.
        ParityError: its ONNX does not compute what it computes.
        BackendError: the target's toolchain is here and refuses the model.
    """
    backend: Backend = plugins.build("backends", target.backend, where=f"targets/{target.name}.toml: backend")
    unavailable = backend.available()
    for source in (teacher, student):
        source.network.cpu()
    notes: list[str] = []
    teacher_fp32 = _exported(shop, target, "teacher", teacher)
    student_fp32 = _exported(shop, target, "student", student)
    graphs = [teacher_fp32, student_fp32]
    plain_int8: Graph | None = None
    for precision in _precisions(shop, target, notes):
        try:
            if precision == "fp16":
                graphs.append(_halved(shop, student_fp32, student_fp32, student))
            if precision == "int8":
                plain_int8 = _quantized(shop, target, student_fp32, student)
                graphs.append(_halved(shop, plain_int8, student_fp32, student) if _typed(target) else plain_int8)
        except (ModelError, ParityError) as problem:
            notes.append(f"there is no student-{precision}: {problem}")
    graphs = _sound(target, graphs, notes)
    legacy = _legacy(shop, target, [student_fp32, plain_int8], student, notes)
    if backend.engine and unavailable is None:
        graphs += [_engine(shop, backend, backend.engine(), graph) for graph in graphs]
    notes += [note for graph in graphs for note in graph.notes]
    return Deployment(target, backend, tuple(graphs), legacy, unavailable, tuple(dict.fromkeys(notes)))


def _precisions(shop: Workshop, target: Target, notes: list[str]) -> list[Precision]:
    asked = shop.precisions if shop.precisions is not None else target.precisions
    refused = [precision for precision in asked if precision not in target.precisions]
    if refused:
        notes.append(f"{', '.join(refused)} is asked for, but this target takes {', '.join(target.precisions)}")
    return [precision for precision in asked if precision in target.precisions]


def _typed(target: Target) -> bool:
    """TensorRT types its engine as the graph is typed: what int8 leaves in float would run in fp32 otherwise."""
    return target.quantization.lint == "tensorrt" and "fp16" in target.precisions


def _sound(target: Target, graphs: list[Graph], notes: list[str]) -> list[Graph]:
    """The graphs that the target's runtime takes; what its rules say of the others, and warnings, go to `notes`."""
    kept = []
    for graph in graphs:
        found = lint.check(graph.file, target.quantization, target.opset)
        notes += [f"{graph.id}: {finding}" for finding in found]
        refused = any(finding.severity == "error" for finding in found)
        if refused and graph.stage not in ("teacher", "onnx"):
            notes.append(f"{graph.id} is left out: {target.backend.name} would refuse it")
        else:
            kept.append(graph)
        if graph.precision == "int8" and target.backend.name == "onnxruntime":
            floats = fused(graph.file)["float"]
            if floats:
                told = ", ".join(f"{count} {name}" for name, count in floats.items())
                notes.append(f"{graph.id}: ONNX Runtime computes in float: {told}")
    return kept


def _legacy(
    shop: Workshop, target: Target, graphs: Sequence[Graph | None], student: Source, notes: list[str]
) -> dict[Precision, Path]:
    """The graphs in an older opset, for older versions of the runtime, where they can be said in it."""
    if target.legacy_opset is None:
        return {}
    made: dict[Precision, Path] = {}
    for graph in graphs:
        if graph is None:
            continue
        name = f"{graph.id} for opset {target.legacy_opset} (older runtimes)"
        try:
            file = _lowered(shop, target.legacy_opset, graph, student)
        except (ModelError, ParityError) as problem:
            notes.append(f"there is no {name}: {problem}")
            continue
        found = lint.check(file, target.quantization, target.legacy_opset)
        notes += [f"{name}: {finding}" for finding in found]
        if any(finding.severity == "error" for finding in found):
            notes.append(f"{name} is left out: {target.backend.name} would refuse it")
        else:
            made[graph.precision] = file
    return made


def reference(file: Path, threads: int = 0) -> Session:
    """The graph on ONNX Runtime with its rewrites off: what the graph says, bit by bit, whatever will run it later."""
    backend: Backend = plugins.build("backends", Part("onnxruntime", {"optimizations": False}))
    return backend.load(file, threads or os.cpu_count() or 1)


def samples(shop: Workshop, network: Network, count: int) -> tuple[Arrays, Arrays]:
    """The first `count` calibration samples: as stored, and as the network's graph takes them."""
    order = np.arange(min(count, len(shop.data.calibration)))
    stored = next(iter(shop.data.calibration.batches([order]))).inputs
    if shop.preprocessing or network.preprocessing is None:
        return stored, stored
    return stored, normalise(stored, network.preprocessing)


def _exported(shop: Workshop, target: Target, name: str, source: Source) -> Graph:
    def build(work: Path) -> Mapping[str, Json]:
        stored, given = samples(shop, source.network, PARITY_SAMPLES)
        path = work / MODEL
        meta = export.export(
            source.network, stored, opset=target.opset, preprocessing=shop.preprocessing, path=path, say=shop.say
        )
        with torch.inference_mode():
            expected = source.network(*(torch.from_numpy(np.ascontiguousarray(x)) for x in stored.values()))
        return meta | _checked(path, given, {"logits": expected.numpy()}, "fp32")

    options = {"opset": target.opset, "preprocessing": shop.preprocessing}
    made = shop.store.step("onnx", export.VERSION, options, [source.weights], build)
    return _graph(f"{name}-fp32", "teacher" if name == "teacher" else "onnx", "fp32", made)


def _halved(shop: Workshop, graph: Graph, before: Graph, source: Source) -> Graph:
    """The graph with float16 where it has float32; parity is told against `before`, the float32 graph."""

    def build(work: Path) -> Mapping[str, Json]:
        meta = export.to_fp16(graph.file, work / MODEL)
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        # Among quantized values a float16 rounding moves some by a whole step: held to int8's measure.
        _checked(work / MODEL, given, _run(graph.file, given), "int8" if graph.precision == "int8" else "fp16")
        return meta | _parity(_run(before.file, given), _run(work / MODEL, given), graph.id)

    made = shop.store.step("fp16", export.VERSION, {}, [graph.artifact, before.artifact], build)
    if graph.precision == "int8":
        return replace(_graph(graph.id, "quantized", "int8", made), notes=graph.notes)
    return _graph("student-fp16", "onnx", "fp16", made)


def _quantized(shop: Workshop, target: Target, before: Graph, source: Source) -> Graph:
    def build(work: Path) -> Mapping[str, Json]:
        path = work / MODEL
        meta = quantize.quantize(
            source.network, Calibration(shop.data), target.quantization,
            opset=target.opset, preprocessing=shop.preprocessing, path=path, say=shop.say, task=shop.task,
            method=shop.quantize.method, max_drop=shop.quantize.max_drop, float_layers=shop.quantize.float_layers,
            keep=work / state.FILE,
        )  # fmt: skip
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        # Not refused here however large: whether int8 is good enough is what its accuracy on the test split says.
        return meta | _parity(_run(before.file, given), _run(path, given), "student-int8")

    options = {
        "rules": asdict(target.quantization), "opset": target.opset, "preprocessing": shop.preprocessing,
        "calibration": shop.data.fingerprint, "method": shop.quantize.method, "max_drop": shop.quantize.max_drop,
        "float_layers": shop.quantize.float_layers, "task": None if shop.task is None else shop.task.name,
    }  # fmt: skip
    made = shop.store.step("int8", quantize.VERSION, options, [source.weights], build)
    graph = _graph("student-int8", "quantized", "int8", made)
    if shop.recovery is None or quantize.holds(made.meta):
        return graph
    try:
        return _recovered(shop, shop.recovery, target, graph, before, source)
    except StoreError:
        raise
    except EdgekdError as problem:  # of a network that cannot be trained so, or a training that diverges
        why = f"{graph.id} lost more than max_drop, and quantization-aware distillation could not be done: {problem}"
        return replace(graph, notes=(*graph.notes, why))


def _recovered(
    shop: Workshop, recovery: qad.Recovery, target: Target, graph: Graph, before: Graph, source: Source
) -> Graph:
    """The int8 student distilled anew, where that helps; else `graph`, as it is. Either says what was found."""
    start, rules = graph.artifact.path / state.FILE, target.quantization
    if not start.exists():
        raise ModelError("it was quantized as ONNX, where nothing can be trained")
    losses = qad.terms(source.weights, recovery.task)

    def train(work: Path) -> Mapping[str, Json]:
        return qad.train(
            source.network, start, rules, recovery, losses, preprocessing=shop.preprocessing, work=work, say=shop.say
        )

    parents = [graph.artifact, source.weights, *recovery.artifacts]
    trained = shop.store.step("qad", qad.VERSION, qad.identity(recovery, losses), parents, train)
    notes = (*graph.notes, f"{graph.id}: {qad.told(trained.meta, recovery.task.metric)}")
    if not trained.meta["kept"]:
        return replace(graph, notes=notes)

    def write(work: Path) -> Mapping[str, Json]:
        path = work / MODEL
        meta = qad.write(
            source.network, trained.path / state.FILE, rules, recovery, reference,
            preprocessing=shop.preprocessing, opset=target.opset, path=path,
        )  # fmt: skip
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        return meta | _parity(_run(before.file, given), _run(path, given), graph.id)

    options = {"opset": target.opset, "preprocessing": shop.preprocessing}
    made = shop.store.step("int8", quantize.VERSION, options, [trained, source.weights], write)
    return replace(_graph(graph.id, "quantized", "int8", made), notes=notes)


def _lowered(shop: Workshop, opset: int, graph: Graph, source: Source) -> Path:
    def build(work: Path) -> Mapping[str, Json]:
        edit.save(export.to_opset(onnx.load(graph.file), opset), work / MODEL)
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        return _checked(work / MODEL, given, _run(graph.file, given), graph.precision)

    return shop.store.step("opset", export.VERSION, {"opset": opset}, [graph.artifact], build).path / MODEL


def _engine(shop: Workshop, backend: Backend, built_for: str, graph: Graph) -> Graph:
    def build(work: Path) -> Mapping[str, Json]:
        return {"file": backend.compile(graph.file, graph.precision, work).name}

    made = shop.store.step("engine", 1, {"backend": backend.name, "built_for": built_for}, [graph.artifact], build)
    stage: Stage = "teacher" if graph.stage == "teacher" else "engine"
    file = made.path / str(made.meta["file"])
    return Graph(f"{graph.id}-engine", stage, graph.precision, made, file, graph.file, None, ())


def _checked(path: Path, given: Arrays, expected: Arrays, precision: Precision) -> dict[str, Json]:
    found = export.check_parity(expected, _run(path, given), precision, where=path.name)
    return {"parity": asdict(found)}


def _parity(expected: Arrays, found: Arrays, where: str) -> dict[str, Json]:
    if not all(np.isfinite(array).all() for array in found.values()):
        raise ParityError("it gives values that are not finite on real samples", where=where)
    return {"parity": asdict(export.parity(expected, found))}


def _run(path: Path, given: Arrays) -> Arrays:
    session = reference(path)
    try:
        if all(isinstance(spec.shape[0], str) for spec in session.inputs):
            return session(given)
        count = len(next(iter(given.values())))
        rows = [session({name: array[i : i + 1] for name, array in given.items()}) for i in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    finally:
        session.close()


def _graph(name: str, stage: Stage, precision: Precision, made: Artifact) -> Graph:
    meta: Any = made.meta
    notes = []
    if meta.get("fallback"):
        notes.append(f"{name} is quantized by ONNX Runtime, because the PyTorch quantizer refused: {meta['fallback']}")
    if meta.get("static_batch"):
        notes.append(f"{name} takes one sample at a time: {meta['static_batch']}")
    if precision == "int8" and meta.get("float"):
        kept = ", ".join(f"{layer} ({why})" for layer, why in sorted(meta["float"].items()))
        notes.append(f"{name} keeps in float: {kept}")
    if precision == "int8" and meta.get("methods"):
        notes.append(f"{name}: {quantize.told(meta['methods'])}")
    file = made.path / MODEL
    return Graph(name, stage, precision, made, file, file, Parity(**meta["parity"]), tuple(notes))
