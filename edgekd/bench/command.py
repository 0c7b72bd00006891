"""`edgekd bench`: measure models on this machine, several in turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from edgekd import plugins
from edgekd.bench import conditions, macs, memory
from edgekd.bench.compare import pairs
from edgekd.bench.latency import measure, summarise
from edgekd.errors import BackendError, ModelError
from edgekd.types import Backend, Comparison, Json, Latency, Part, Say, Session, TensorSpec

MANIFEST = "edgekd.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """One model's figures; what is None has its reason in `missing`."""

    id: str
    runtime: str
    size_bytes: int
    parameters: int | None
    macs: int | None
    latency_ms: Latency
    peak_memory_bytes: int | None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What `edgekd bench` tells."""

    models: tuple[Measured, ...]
    comparisons: tuple[Comparison, ...]
    environment: dict[str, Json]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data for --json."""
        return asdict(self)

    def as_text(self) -> str:
        """A table for a terminal, then what was compared and what was not as it should be."""
        head = ("model", "p50 ms", "95 % interval", "p90", "p99", "size", "MACs", "peak memory")
        rows = [head, *(_row(model) for model in self.models)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for found in self.comparisons:
            ratio = found.ratio
            lines.append(
                f"{found.candidate} against {found.baseline}: {ratio.value:.3f} of its time "
                f"[{ratio.low:.3f}, {ratio.high:.3f}], {found.verdict}"
            )
        reasons = {f"no {key}: {why}" for model in self.models for key, why in model.missing.items()}
        return "\n".join([*lines, *(f"note: {text}" for text in (*self.notes, *sorted(reasons)))])


@dataclass(frozen=True, slots=True)
class _Source:
    id: str
    file: Path
    backend: Part


def bench(models: Sequence[Path], *, threads: int, quick: bool, say: Say) -> Result:
    """Latency, memory and cost of each model on one random sample, measured in turns; each later one against the first.

    Args:
        models: .onnx files, bundles, or run folders (which stand for all their bundles).
        threads: for every model.
        quick: 50 runs and 0.5 s each instead of 200 and 2 s.
        say: told what happens.

    Raises:
        ModelError: no such model, or models that take different inputs.
        BackendError: the runtime of a bundle is not installed here, or refuses the model.
    """
    sources = _unique([source for path in models for source in _sources(path)])
    notes: list[str] = []
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for source in sources:
            sessions[source.id] = stack.enter_context(closing(_load(source, threads)))
        sample = _sample(sessions)
        before = conditions.clocks()
        timing = measure(sessions, sample, threads=threads, quick=quick, say=say)
        notes += [*timing.notes, *conditions.changes(before, conditions.clocks())]
        runtimes = {name: session.runtime for name, session in sessions.items()}
    device = conditions.device_name()
    found = []
    for source in sources:
        times = timing.series_ns[source.id]
        latency = summarise(times, threads=threads, device=device, origin="host", power_mode=None)
        say("latency", id=source.id, p50=latency.p50)
        found.append(_measured(source, runtimes[source.id], latency, sample, threads))
    first = sources[0].id
    compared = pairs(timing.series_ns, [(source.id, first) for source in sources[1:]])
    return Result(tuple(found), compared, conditions.environment(), tuple(notes))


def _measured(source: _Source, runtime: str, latency: Latency, sample: dict[str, Any], threads: int) -> Measured:
    missing: dict[str, str] = {}
    parameters = count = None
    if source.file.suffix == ".onnx":
        cost = macs.count(source.file)
        parameters, count = cost.parameters, cost.macs
        if cost.reason:
            missing["macs"] = cost.reason
    else:
        missing |= dict.fromkeys(("parameters", "macs"), "counted in ONNX files only")
    peak = memory.peak_memory(source.backend, source.file, sample, threads=threads)
    if peak.reason:
        missing["peak_memory_bytes"] = peak.reason
    size = source.file.stat().st_size
    return Measured(source.id, runtime, size, parameters, count, latency, peak.bytes, missing)


def _sources(path: Path) -> list[_Source]:
    if path.is_file() and path.suffix == ".onnx":
        return [_Source(path.name, path, Part("onnxruntime"))]
    if (path / MANIFEST).is_file():
        return [_bundle(path)]
    bundles = sorted(file.parent for file in (path / "bundles").glob(f"*/{MANIFEST}"))
    if bundles:
        return [_bundle(folder) for folder in bundles]
    what = "is no model" if path.exists() else "does not exist"
    raise ModelError(what, where=str(path), expected="an .onnx file, a bundle or a run folder")


def _bundle(folder: Path) -> _Source:
    where = str(folder / MANIFEST)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        model, backend = str(manifest["model"]), str(manifest["backend"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ModelError(f"cannot be read: {problem!r}", where=where, expected="the manifest of a bundle") from problem
    inside = PurePosixPath(model)
    if inside.is_absolute() or ".." in inside.parts or "\\" in model or not (folder / inside).is_file():
        raise ModelError(f"there is no model '{model}' in the bundle", where=where)
    return _Source(f"{folder.name}/{model}", folder / inside, Part(backend))


def _unique(sources: list[_Source]) -> list[_Source]:
    """Files of the same name are told apart by their folders."""
    by_file = list({source.file.resolve(): source for source in sources}.values())
    names = [source.id for source in by_file]
    return [
        _Source(str(source.file), source.file, source.backend) if names.count(source.id) > 1 else source
        for source in by_file
    ]


def _load(source: _Source, threads: int) -> Session:
    backend: Backend = plugins.build("backends", source.backend, where=source.id)
    refused = backend.available()
    if refused:
        raise BackendError(refused, where=source.id, fix="measure it on the board, with run.py --bench of the bundle")
    return backend.load(source.file, threads)


def _sample(sessions: dict[str, Session]) -> dict[str, Any]:
    """One random sample that every session takes."""
    name, first = next(iter(sessions.items()))
    for other, session in sessions.items():
        if _signature(session.inputs) != _signature(first.inputs):
            raise ModelError(
                f"it takes {_signature(session.inputs)}, but {name} takes {_signature(first.inputs)}",
                where=other,
                fix="measure models with different inputs one at a time",
            )
    random = np.random.default_rng(0)
    return {spec.name: _random(spec, random, name) for spec in first.inputs}


def _signature(inputs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {[*spec.shape[1:]]}" for spec in inputs)


def _random(spec: TensorSpec, random: np.random.Generator, where: str) -> Any:
    inner = [dim for dim in spec.shape[1:] if isinstance(dim, int)]
    if len(inner) != len(spec.shape) - 1:
        raise ModelError(
            f"input '{spec.name}' has no fixed size: {spec.shape}",
            where=where,
            fix="export it with fixed dimensions but for the batch",
        )
    batch = spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 1
    shape = (batch, *inner)
    if spec.dtype == "uint8":
        return random.integers(0, 256, shape, dtype=np.uint8)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return random.standard_normal(shape).astype(spec.dtype)
    return random.integers(0, 2, shape).astype(spec.dtype)  # 0 and 1 are valid token ids and masks alike


def _row(model: Measured) -> tuple[str, ...]:
    latency = model.latency_ms
    peak = f"{model.peak_memory_bytes / 1e6:.1f} MB" if model.peak_memory_bytes is not None else "—"
    return (
        model.id,
        f"{latency.p50:.3f}",
        f"[{latency.low:.3f}, {latency.high:.3f}]",
        f"{latency.p90:.3f}",
        f"{latency.p99:.3f}",
        f"{model.size_bytes / 1e6:.2f} MB",
        f"{model.macs / 1e6:.2f} M" if model.macs is not None else "—",
        peak,
    )
