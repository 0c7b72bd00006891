"""The files of one network for one target: weights → ONNX → a precision → engine, each a checked artifact."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgekd import export, plugins, qad, quantize, recipe
from edgekd.clock import Deadline
from edgekd.data.preprocessed import normalise
from edgekd.errors import ParityError
from edgekd.graph import edit
from edgekd.models.network import Network
from edgekd.quantize import worth
from edgekd.quantize.dynamic import quantize_dynamic
from edgekd.quantize.weights import weights_to_int8
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
class Workshop:
    """What the steps work with: where builds go, and the samples they are checked and calibrated on."""

    store: Store
    data: Dataset
    preprocessing: bool  # the graph takes images as they are stored
    precisions: tuple[Precision, ...] | None  # that the recipe asks for; None: what the target allows
    say: Say
    deadline: Deadline = field(default_factory=Deadline)  # that optional steps ask whether they fit
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


def typed(target: Target) -> bool:
    """TensorRT types its engine as the graph is typed: what int8 leaves in float would run in fp32 otherwise."""
    return target.quantization.lint == "tensorrt" and "fp16" in target.precisions


def exported(shop: Workshop, target: Target, name: str, source: Source) -> Graph:
    """The float32 graph of a network, shown to compute what the network does."""

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
    return as_graph(f"{name}-fp32", "teacher" if name == "teacher" else "onnx", "fp32", made)


def halved(shop: Workshop, graph: Graph, before: Graph, source: Source) -> Graph:
    """The graph with float16 where it has float32; parity is told against `before`, the float32 graph."""

    def build(work: Path) -> Mapping[str, Json]:
        meta = export.to_fp16(graph.file, work / MODEL)
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        # Among quantized values a float16 rounding moves some by a whole step: held to int8's measure.
        _checked(work / MODEL, given, outputs_of(graph.file, given), "int8" if graph.precision == "int8" else "fp16")
        return meta | parity(outputs_of(before.file, given), outputs_of(work / MODEL, given), graph.id)

    made = shop.store.step("fp16", export.VERSION, {}, [graph.artifact, before.artifact], build)
    if graph.precision == "int8":
        return replace(as_graph(graph.id, "quantized", "int8", made), notes=graph.notes)
    return as_graph("student-fp16", "onnx", "fp16", made)


def form(
    shop: Workshop, before: Graph, precision: Precision, source: Source, static: Graph | None, notes: list[str]
) -> Graph | None:
    """Weight-only or dynamic int8 of the float graph; None, with a note, where it is not worth it and was not asked."""
    left: Any = static.artifact.meta.get("float", {}) if static is not None else {}
    why = None if shop.precisions is not None else worth.why_not(precision, onnx.load(before.file), left)
    if why is not None:
        notes.append(f"there is no student-{precision}: {why}")
        return None
    rewrite = weights_to_int8 if precision == "w8" else quantize_dynamic

    def build(work: Path) -> Mapping[str, Json]:
        model, done, kept = rewrite(onnx.load(before.file))
        edit.save(model, work / MODEL)
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        meta: dict[str, Json] = {"quantized": list(done), "float": dict(kept)}
        return meta | parity(outputs_of(before.file, given), outputs_of(work / MODEL, given), f"student-{precision}")

    made = shop.store.step(precision, worth.VERSION, {}, [before.artifact], build)
    return as_graph(f"student-{precision}", "quantized", precision, made)


def lowered(shop: Workshop, opset: int, graph: Graph, source: Source) -> Path:
    """The same graph in an older opset."""

    def build(work: Path) -> Mapping[str, Json]:
        edit.save(export.to_opset(onnx.load(graph.file), opset), work / MODEL)
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        return _checked(work / MODEL, given, outputs_of(graph.file, given), graph.precision)

    return shop.store.step("opset", export.VERSION, {"opset": opset}, [graph.artifact], build).path / MODEL


def engine(shop: Workshop, backend: Backend, built_for: str, graph: Graph) -> Graph:
    """What the target's toolchain makes of a graph."""

    def build(work: Path) -> Mapping[str, Json]:
        return {"file": backend.compile(graph.file, graph.precision, work).name}

    made = shop.store.step("engine", 1, {"backend": backend.name, "built_for": built_for}, [graph.artifact], build)
    stage: Stage = "teacher" if graph.stage == "teacher" else "engine"
    file = made.path / str(made.meta["file"])
    return Graph(f"{graph.id}-engine", stage, graph.precision, made, file, graph.file, None, ())


def _checked(path: Path, given: Arrays, expected: Arrays, precision: Precision) -> dict[str, Json]:
    found = export.check_parity(expected, outputs_of(path, given), precision, where=path.name)
    return {"parity": asdict(found)}


def parity(expected: Arrays, found: Arrays, where: str) -> dict[str, Json]:
    """How far apart they are, for an artifact's meta; refused only where values are not finite."""
    if not all(np.isfinite(array).all() for array in found.values()):
        raise ParityError("it gives values that are not finite on real samples", where=where)
    return {"parity": asdict(export.parity(expected, found))}


def outputs_of(path: Path, given: Arrays) -> Arrays:
    """What a graph gives for samples, whether it takes many at once or one."""
    session = reference(path)
    try:
        if all(isinstance(spec.shape[0], str) for spec in session.inputs):
            return session(given)
        count = len(next(iter(given.values())))
        rows = [session({name: array[i : i + 1] for name, array in given.items()}) for i in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    finally:
        session.close()


def as_graph(name: str, stage: Stage, precision: Precision, made: Artifact) -> Graph:
    """A finished artifact as one file of the deployment, with what its step has to say."""
    meta: Any = made.meta
    notes = []
    if meta.get("fallback"):
        notes.append(f"{name} is quantized by ONNX Runtime, because the PyTorch quantizer refused: {meta['fallback']}")
    if meta.get("not_examined"):
        what = "neither what each costs nor which had better stay in float"
        notes.append(f"the layers of {name} could not be examined, {what}: {meta['not_examined']}")
    if meta.get("static_batch"):
        notes.append(f"{name} takes one sample at a time: {meta['static_batch']}")
    if meta.get("relieved"):
        told = ", ".join(f"{layer} ({steps:g} steps)" for layer, steps in meta["relieved"].items())
        notes.append(f"{name} has less range of weights where CPUs without VNNI would clip sums: {told}")
    if meta.get("float") and precision != "int8":
        counted = Counter(meta["float"].values())
        kept = ", ".join(f"{count} × ({why})" for why, count in sorted(counted.items()))
        notes.append(f"{name} keeps in float: {kept}")
    elif meta.get("float"):
        kept = ", ".join(f"{layer} ({why})" for layer, why in sorted(meta["float"].items()))
        notes.append(f"{name} keeps in float: {kept}")
    if precision == "int8" and meta.get("methods"):
        notes.append(f"{name}: {quantize.told(meta['methods'])}")
    file = made.path / MODEL
    return Graph(name, stage, precision, made, file, file, Parity(**meta["parity"]), tuple(notes))
