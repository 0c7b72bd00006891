"""Write a bundle: the folder that an app embeds, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import edgekd
from edgekd import target as targets
from edgekd.bundle import golden, manifest, readme
from edgekd.bundle.manifest import File, Manifest, Model, Typing
from edgekd.errors import ModelError, StoreError
from edgekd.store import disk_error, sha256_of
from edgekd.types import Arrays, Json, Precision, Preprocessing, Target, Task, TensorSpec, Verdict

if TYPE_CHECKING:
    import onnx

_BOARD = ("__init__", "trtexec", "record", "engine", "build_8", "build_10", "build_11")  # runs on the board as it is


@dataclass(frozen=True, slots=True)
class Source:
    """An ONNX file to put into a bundle.

    typing: "strong" for TensorRT 10 and 11, "weak" for 8.x (fp32 weights, opset 17 at most), "any" elsewhere.
    """

    path: Path
    precision: Precision
    typing: Typing = "any"


def write(
    folder: Path,
    *,
    name: str,
    target: Target,
    models: Sequence[Source],
    samples: Arrays,
    labels: Sequence[str],
    preprocessing: Preprocessing | None,
    provenance: Mapping[str, Json],
    verdict: Verdict | None,
    task: Task | None = None,
    assets: Mapping[str, bytes] | None = None,
    threads: int = 1,
) -> Path:
    """Write the bundle of `target` into `folder`; an older bundle there is replaced when the new one is complete.

    Args:
        folder: bundles/<target>; it must not exist, be empty, or hold a bundle.
        name: of the run.
        target: says which runtime, and so which files the bundle gets.
        models: ONNX files; the first is what the bundle uses unless told otherwise. Their inputs and outputs agree.
        samples: a few real inputs by name, as the graph takes them, batch first: the golden samples. Their expected
            outputs are computed here, by each model on ONNX Runtime.
        labels: names of the classes, labels or values in the order of the output; empty where it has no names.
        preprocessing: of the one image input, None where inputs are no images. A graph that takes uint8 does it itself.
        provenance: artifact keys and versions. No paths of this machine.
        verdict: what the report said of the chosen model.
        task: what the output is; left out: a logit for each class.
        assets: files that an app needs to make inputs, by name, e.g. tokenizer.json.
        threads: of ONNX Runtime, for the golden outputs.

    Returns:
        `folder`.

    Raises:
        ModelError: a model cannot be read, or two of them differ in what they take or give.
        BackendError: a model does not run on the samples.
        StoreError: the disk is full, or `folder` holds something that is no bundle.
    """
    if not models:
        raise ModelError("a bundle needs at least one model", where=str(folder))
    _refuse_foreign(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        content = _describe(partial, name, target, models, samples, labels, preprocessing)
        content = replace(content, provenance=dict(provenance), verdict=verdict)
        if task is not None:
            content = replace(content, task=manifest.Task(task.name, task.labels))
        golden.write(partial / golden.NAME, _golden(partial, content.models, samples, target, threads))
        _write_programs(partial, target, apps=readme.has_apps(content))
        if labels:
            (partial / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        for asset, held in (assets or {}).items():
            (partial / Path(asset).name).write_bytes(held)
        (partial / "README.md").write_text(readme.render(replace(content, files=_list(partial))), encoding="utf-8")
        _finish(partial, replace(content, files=_list(partial)))
        _replace(partial, folder)
    except OSError as problem:
        raise disk_error(problem, folder) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _describe(
    partial: Path,
    name: str,
    target: Target,
    models: Sequence[Source],
    samples: Arrays,
    labels: Sequence[str],
    preprocessing: Preprocessing | None,
) -> Manifest:
    """Copy the models, and say what they are; the list of files is still empty."""
    listed = _write_models(partial, models)
    inputs, outputs = _signature([source.path for source in models])
    return Manifest(
        schema=manifest.SCHEMA,
        name=name,
        edgekd=edgekd.__version__,
        target=target.name,
        backend=target.backend.name,
        model=listed[0].path,
        models=tuple(listed),
        inputs=inputs,
        outputs=outputs,
        preprocessing=preprocessing,
        preprocessing_in_graph=preprocessing is not None and inputs[0].dtype == "uint8",
        labels=tuple(labels),
        golden=manifest.Golden(golden.NAME, len(next(iter(samples.values())))),
        verdict=None,
        provenance={},
        files=(),
    )


def _refuse_foreign(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StoreError("is in the way", where=str(folder), fix="remove it, or write the bundle elsewhere")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / manifest.NAME).is_file():
        raise StoreError("holds files that are no bundle", where=str(folder), fix="write the bundle elsewhere")


def _write_models(partial: Path, models: Sequence[Source]) -> list[Model]:
    import onnx

    listed: list[Model] = []
    for source in models:
        try:
            graph = onnx.load(str(source.path), load_external_data=False)
        except Exception as problem:  # protobuf's errors share no base class
            raise ModelError(f"no ONNX file: {problem}", where=str(source.path)) from problem
        if external_data(graph):
            raise ModelError("its weights are in another file", where=str(source.path), fix="export it as one file")
        opset = next(item.version for item in graph.opset_import if item.domain in ("", "ai.onnx"))
        suffix = f".opset{opset}" if source.typing == "weak" else ""
        path = f"model.{source.precision}{suffix}.onnx"
        if any(item.path == path for item in listed):
            raise ModelError(f"two models of the bundle would be called {path}", where=str(source.path))
        shutil.copyfile(source.path, partial / path)
        listed.append(Model(path, source.precision, source.typing, opset))
    return listed


def external_data(graph: onnx.ModelProto) -> bool:
    """Whether weights of the graph are kept in a file beside it."""
    import onnx

    return any(item.data_location == onnx.TensorProto.EXTERNAL for item in graph.graph.initializer)


def _signature(paths: Sequence[Path]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs, the same for every file."""
    found = [read_signature(path) for path in paths]
    for path, other in zip(paths, found, strict=True):
        if other != found[0]:
            raise ModelError(f"its inputs or outputs are not those of {paths[0].name}", where=str(path))
    return found[0]


def read_signature(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX file, read from the graph."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {item.name for item in graph.initializer}

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        tensor = value.type.tensor_type
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        sizes: list[int | str] = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"dim{axis}"
            for axis, dim in enumerate(tensor.shape.dim)
        ]
        return TensorSpec(value.name, dtype, tuple(sizes))

    return tuple(spec(item) for item in graph.input if item.name not in weights), tuple(map(spec, graph.output))


def _golden(partial: Path, listed: Sequence[Model], samples: Arrays, target: Target, threads: int) -> golden.Golden:
    expected = {model.path: golden.compute(partial / model.path, samples, threads) for model in listed}
    allowed = {}
    for model in listed:
        # TensorRT 8 builds fp16 engines from the fp32 file, and their outputs are held against that file's.
        weak_fp32 = target.backend.name == "tensorrt" and model.typing == "weak" and model.precision == "fp32"
        allowed[model.path] = golden.tolerance(expected[model.path], "fp16" if weak_fp32 else model.precision)
    return golden.Golden(samples, expected, allowed)


def _write_programs(partial: Path, target: Target, *, apps: bool) -> None:
    """Copy what runs on the device: run.py, the app samples, and for TensorRT the build recipe."""
    templates = targets.folder()
    shutil.copy(templates / "runner" / "run.py", partial / "run.py")
    if apps:
        shutil.copytree(templates / "app", partial / "app", ignore=shutil.ignore_patterns("__pycache__"))
    if target.backend.name == "tensorrt":
        for file in ("build.sh", "build_engine.py"):
            shutil.copy(templates / "board" / file, partial / file)
        (partial / "board").mkdir()
        here = Path(__file__).resolve().parent.parent / "backends" / "_tensorrt"
        for stem in _BOARD:
            shutil.copyfile(here / f"{stem}.py", partial / "board" / f"{stem}.py")


def _list(partial: Path) -> tuple[File, ...]:
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    return tuple(File(path.relative_to(partial).as_posix(), sha256_of(path), path.stat().st_size) for path in paths)


def _finish(partial: Path, content: Manifest) -> None:
    """Write the manifest, last of all, through to the disk."""
    with (partial / manifest.NAME).open("w", encoding="utf-8", newline="\n") as file:
        file.write(manifest.text(content))
        file.flush()
        os.fsync(file.fileno())


def _replace(partial: Path, folder: Path) -> None:
    """Put the finished folder in place; one that holds files cannot be renamed over, so the old one steps aside."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.replace(old)
    try:
        partial.replace(folder)
    except OSError:
        if old.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
