"""For one target: weights → ONNX → its precisions → engine, each a checked artifact in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekd import plugins
from edgekd.backends.onnxruntime import fused
from edgekd.bench import conditions
from edgekd.deploy import int8
from edgekd.deploy.graphs import (
    Calibration,
    Graph,
    Source,
    Workshop,
    engine,
    exported,
    form,
    halved,
    lowered,
    reference,
    row_id,
    samples,
)
from edgekd.errors import ModelError, ParityError
from edgekd.quantize import lint
from edgekd.types import Backend, Precision, Sensitivity, Target

__all__ = [
    "Calibration", "Deployment", "Graph", "Source", "Workshop", "deploy", "reference", "row_id", "samples",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is made for one target."""

    target: Target
    backend: Backend
    graphs: tuple[Graph, ...]  # the teacher's first
    legacy: Mapping[Precision, Path]  # files for older versions of the runtime
    unavailable: str | None  # why the target's toolchain cannot run here; None where it can
    notes: tuple[str, ...]  # what was left out and why, what runs in float, findings of the lint rules
    sensitivity: Sensitivity | None = None  # of the layers of int8

    @property
    def typing(self) -> Literal["strong", "any"]:
        """How a toolchain must read the graphs: TensorRT 10 and 11 take every type as it stands in them."""
        return "strong" if self.target.quantization.lint == "tensorrt" else "any"


def deploy(
    shop: Workshop, target: Target, teacher: Source, student: Source, timed: int8.Timed | None = None
) -> Deployment:
    """Every graph of the teacher and the student for this target.

    A precision that the student cannot take is left out, and `notes` says why; without fp32 there is nothing to deploy.

    Args:
        timed: tells which of several files is the fastest; None: the one with the fewest multiply-accumulates in float.

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
    teacher_fp32 = exported(shop, target, "teacher", teacher)
    student_fp32 = exported(shop, target, "student", student)
    graphs, found = [teacher_fp32, student_fp32], int8.Int8()
    for precision in _precisions(shop, target, notes):
        try:
            if precision == "fp16":
                graphs.append(halved(shop, student_fp32, student_fp32, student))
            if precision == "int8":
                found = int8.made(shop, target, backend, student_fp32, student, timed if unavailable is None else None)
                graphs += found.ready
            if precision in ("w8", "dynamic"):
                other = form(shop, student_fp32, precision, student, found.plain, notes)
                graphs += [] if other is None else [other]
        except (ModelError, ParityError) as problem:
            notes.append(f"there is no student-{precision}: {problem}")
    graphs = _sound(target, graphs, notes)
    legacy = _legacy(shop, target, [student_fp32, found.for_older_runtimes], student, notes)
    if backend.engine and unavailable is None:
        graphs += [engine(shop, backend, backend.engine(), graph) for graph in graphs]
    notes += [note for graph in graphs for note in graph.notes]
    slow = conditions.without_vnni() if target.quantization.sums_16_bit else None
    notes += [slow] if slow else []
    return Deployment(
        target, backend, tuple(graphs), legacy, unavailable, tuple(dict.fromkeys(notes)), found.sensitivity
    )


def _precisions(shop: Workshop, target: Target, notes: list[str]) -> list[Precision]:
    asked = shop.precisions if shop.precisions is not None else target.precisions
    refused = [precision for precision in asked if precision not in target.precisions]
    if refused:
        notes.append(f"{', '.join(refused)} is asked for, but this target takes {', '.join(target.precisions)}")
    return [precision for precision in asked if precision in target.precisions]


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
        if graph.precision in ("int8", "dynamic") and target.backend.name == "onnxruntime":
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
            file = lowered(shop, target.legacy_opset, graph, student)
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
