"""`edgekd quantize model.onnx`: an ONNX file that has no PyTorch source, quantized as ONNX, checked and measured.

Float file and int8 files are held against each other on the same samples: by accuracy where the samples' labels fit
the model's output, else by what they decide, else by the cosine of their outputs.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import version_converter

import edgekd
from edgekd import export, quantize, report
from edgekd.bench import conditions
from edgekd.data.unlabelled import samples as read_samples
from edgekd.errors import EdgekdError, ModelError, ParityError
from edgekd.graph import given
from edgekd.graph.edit import cast_first, save, strip
from edgekd.graph.edit import opset as opset_of
from edgekd.graph.opset import lower
from edgekd.graph.program import quiet, reason
from edgekd.onnx_file.feed import Feed, check_batch, feeding, layout, signature, split
from edgekd.onnx_file.figures import Form, examiner, judged_by, measured, outputs
from edgekd.onnx_file.notes import Notes
from edgekd.quantize import lint, saturation, worth
from edgekd.quantize.dynamic import quantize_dynamic
from edgekd.quantize.onnx_level import quantize_onnx
from edgekd.quantize.qdq import finish
from edgekd.quantize.weights import weights_to_int8
from edgekd.report.account import account_of
from edgekd.store import copy, sha256_of, write_text
from edgekd.types import (
    Arrays,
    Budget,
    Comparison,
    Dataset,
    Json,
    Parity,
    Precision,
    Report,
    Say,
    Target,
    Task,
    TensorSpec,
    Variant,
)

PARITY_SAMPLES = 64
ONNX_LEVEL = "quantized as ONNX: there is no PyTorch source, so nothing was trained, equalised or corrected"
SHORT = "--quick: short measurements; for trying out, not for deciding"


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gives."""

    model: Path
    data: Path
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    precisions: tuple[Precision, ...] | None = None  # None: what the target allows and is worth it
    budget: Budget = field(default_factory=Budget)
    seed: int = 0


def quantize_file(user: Given, targets: Sequence[Target], out: Path, *, threads: int, quick: bool, say: Say) -> Report:
    """Quantize an ONNX file for each target and leave models, report and quantize.json in `out`.

    Raises:
        ModelError: it is no float32 ONNX file that can be read, or takes other inputs than the samples are.
        DataError: the samples cannot be read.
    """
    plain = given.read(user.model)
    inputs, (first, *_) = signature(plain)
    data = _data(user, inputs)
    feed = feeding(inputs, data, user.mean, user.std, where=str(user.model))
    notes = Notes(say)
    notes.add(*(f"data: {text}" for text in data.notes), *[SHORT] * quick, ONNX_LEVEL)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        work = Path(folder)
        fp32 = work / "fp32.onnx"
        save(plain, fp32)
        expected = outputs(fp32, list(feed.batches(data.test)))[first.name]
        task, truth = judged_by(expected, data, first.name, notes)
        judge = examiner(task, truth, expected, data, say)
        rows: list[Variant] = []
        comparisons: list[Comparison] = []
        forms: list[Form] = []
        for target in targets:
            found = _forms(user, plain, fp32, target, feed, data, task, work, notes, say)
            made, compared, told = measured(found, target, judge, feed, first.name, threads=threads, quick=quick)
            rows, comparisons, forms = rows + made, [*comparisons, *compared], forms + found
            notes.add(*told)
        rows.insert(0, replace(rows[0], id="teacher", stage="teacher", target=None, path=None))
        result = _report(user, rows, comparisons, [target.name for target in targets], task, notes.texts, quick)
        for form in forms:
            copy(form.file, out / f"models/{form.id}.onnx")
    report.render(result, out)
    account = account_of(result, {form.id: form.account for form in forms}, "onnx")
    write_text(out / "quantize.json", json.dumps(account, indent=1) + "\n")
    return result


def quantized(
    model: onnx.ModelProto, precision: Precision, target: Target, feeds: Iterable[Arrays], path: Path,
    task: Task | None = None, max_drop: float = quantize.MAX_DROP,
) -> dict[str, Json]:  # fmt: skip
    """Write one form of a float32 graph to `path`.

    Args:
        model: as `given.read` gives it.
        feeds: batches to calibrate with, as the graph takes them; the first of them are what sums are looked at with.
        task: of int8: what the first output is for; None: that follows from its form.
        max_drop: of int8: part of the task's metric that may be lost.

    Returns:
        An account: `quantizer`, `quantized` (nodes), `float` (node → why), `samples`, `methods`, `relieved`, `nodes`.

    Raises:
        DataError: int8 is asked for, and there are no calibration samples.
        ModelError: the graph has no such form.
    """
    rules = target.quantization
    if precision == "fp32":
        save(model, path)
        return {"quantizer": None}
    if precision == "fp16":
        return {"quantizer": None} | _halved(model, path)
    if precision in ("w8", "dynamic"):
        small, done, left = (weights_to_int8 if precision == "w8" else quantize_dynamic)(model)
        save(small, path)
        return {"quantizer": f"onnx, {precision}", "quantized": list(done), "float": dict(left)}
    try:
        made = quantize_onnx(model, feeds, rules, max_drop=max_drop, task=task)
    except EdgekdError:
        raise
    except Exception as problem:  # onnxruntime's quantizer raises many kinds
        raise ModelError(f"it cannot be quantized: {reason(problem)}", fix="deploy it in float") from problem
    with quiet():
        graph = strip(cast_first(finish(made.graph, rules)))
    account: dict[str, Json] = {
        "quantizer": "onnxruntime", "quantized": list(made.layers), "float": dict(made.left), "samples": made.samples,
        "methods": made.methods,
    }  # fmt: skip
    if (
        rules.lint == "tensorrt" and "fp16" in target.precisions
    ):  # what int8 leaves in float would run in fp32 otherwise
        return account | _halved(graph, path)
    save(graph, path)
    if rules.sums_16_bit:
        account |= saturation.relieve(path, made.held)
    return account


def of_batches(
    given_path: Path, batches: Iterable[Arrays], target: Target, precision: Precision, path: Path, work: Path, *,
    task: Task | None = None, max_drop: float = quantize.MAX_DROP,
) -> tuple[dict[str, Json], Parity]:  # fmt: skip
    """One form of a user's ONNX file, written to `path`, with its account and its parity with the float graph.

    Args:
        batches: as the graph takes them; a single input may have any name. Read twice, one after the other.
        work: an empty folder.

    Raises:
        ModelError: it is no float32 ONNX file that can be read, has no such form, or takes other inputs.
    """
    plain = given.read(given_path)
    inputs, _ = signature(plain)
    check_batch(inputs, str(given_path))
    named = _Named(batches, inputs, str(given_path))
    save(_of_opset(plain, target), work / "fp32.onnx")
    return of_graph(work / "fp32.onnx", named, target, precision, path, task=task, max_drop=max_drop)


def of_graph(
    fp32: Path, batches: Iterable[Arrays], target: Target, precision: Precision, path: Path, *,
    task: Task | None = None, max_drop: float = quantize.MAX_DROP,
) -> tuple[dict[str, Json], Parity]:  # fmt: skip
    """One form of a plain float32 graph, written to `path`, with its account and its parity with it."""
    inputs, _ = signature(onnx.load(fp32))
    feeds = (one for batch in batches for one in split(batch, inputs))
    account = quantized(onnx.load(fp32), precision, target, feeds, path, task, max_drop)
    first = [next(split(next(iter(batches)), inputs))]
    return account, export.parity(outputs(fp32, first), outputs(path, first))


def checked(
    fp32: Path, batch: Arrays, target: Target, path: Path, account: dict[str, Json]
) -> tuple[dict[str, Json], Parity]:
    """The int8 graph of a module in `path`, made right for sums in 16 bits where the target has them, and its parity.

    Args:
        batch: samples as stored, as the graphs take them.
    """
    inputs, _ = signature(onnx.load(fp32))
    feeds = list(split(batch, inputs))
    if target.quantization.sums_16_bit:
        account |= saturation.relieve(path, {key: np.concatenate([f[key] for f in feeds]) for key in feeds[0]})
    return account, export.parity(outputs(fp32, feeds), outputs(path, feeds))


def task_of(fp32: Path) -> Task:
    """What the first output of a graph is for, as far as its form tells."""
    return quantize.task_of(signature(onnx.load(fp32))[1][0].shape)


@dataclass(frozen=True, slots=True)
class _Named:
    """Batches with the names that the graph's inputs have."""

    batches: Iterable[Arrays]
    inputs: Sequence[TensorSpec]
    where: str

    def __iter__(self) -> Iterator[Arrays]:
        for batch in self.batches:
            yield _named(batch, self.inputs, self.where)


def _named(batch: Arrays, inputs: Sequence[TensorSpec], where: str) -> dict[str, np.ndarray]:
    names = [spec.name for spec in inputs]
    if len(names) == len(batch) == 1:
        return {names[0]: next(iter(batch.values()))}
    if sorted(names) != sorted(batch):
        raise ModelError(f"it takes {', '.join(names)}, a batch has {', '.join(batch)}", where=where)
    return dict(batch)


def _halved(model: onnx.ModelProto, path: Path) -> dict[str, Json]:
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "float.onnx")
        return export.to_fp16(Path(folder) / "float.onnx", path)


def _of_opset(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """The graph as the target's parser reads it; ONNX Runtime reads any, and TensorRT those of the target's opset.

    Raises:
        ModelError: it cannot be said in that opset.
    """
    if target.quantization.lint != "tensorrt" or opset_of(model) == target.opset:
        return model
    if opset_of(model) > target.opset:
        return lower(model, target.opset)
    try:
        with quiet():
            return strip(version_converter.convert_version(model, target.opset))
    except Exception as problem:  # its converter raises many kinds
        raise ModelError(f"it cannot be written in opset {target.opset}: {reason(problem)}") from problem


def _forms(
    user: Given, plain: onnx.ModelProto, fp32: Path, target: Target, feed: Feed, data: Dataset, task: Task,
    work: Path, notes: Notes, say: Say,
) -> list[Form]:  # fmt: skip
    """The float file and what becomes of it for one target."""
    rules = target.quantization
    asked = user.precisions or target.precisions
    refused = [precision for precision in asked if precision not in target.precisions]
    if refused:
        notes.add(f"{target.name}: {', '.join(refused)} is asked for, it takes {', '.join(target.precisions)}")
    forms = [Form(f"{target.name}/model-fp32", "fp32", fp32, {"quantizer": None}, None)]
    few = list(feed.batches(data.calibration, PARITY_SAMPLES))
    before = outputs(fp32, few)
    left: dict[str, Json] = {}
    for precision in [each for each in asked if each in target.precisions and each != "fp32"]:
        name = f"{target.name}/model-{precision}"
        why = None if user.precisions else worth.why_not(precision, plain, left)
        if why is not None:
            notes.add(f"there is no {name}: {why}")
            continue
        say("quantizing", id=name)
        path = work / f"{target.name}-{precision}.onnx"
        try:
            there = _of_opset(plain, target)
            account = quantized(there, precision, target, feed.batches(data.calibration), path, task)
            parity = export.parity(before, outputs(path, few))
        except (ModelError, ParityError) as problem:
            notes.add(f"there is no {name}: {problem}")
            continue
        if precision == "int8" and isinstance(account["float"], dict):
            left = account["float"]
        findings = lint.check(path, rules, opset_of(there) if rules.lint == "onnxruntime" else target.opset)
        notes.add(*(f"{name}: {finding}" for finding in findings))
        if any(finding.severity == "error" for finding in findings):
            notes.add(f"{name} is left out: {target.backend.name} would refuse it")
            continue
        say("quantized", id=name, cosine=parity.cosine)
        forms.append(Form(name, precision, path, account, parity))
        notes.add(*_told(forms[-1]))
    return forms


def _data(user: Given, inputs: Sequence[TensorSpec]) -> Dataset:
    size = channels = None
    if len(inputs) == 1 and len(inputs[0].shape) == 4:
        order = layout(inputs[0])
        _, *sides = inputs[0].shape
        height, width, count = sides if order == "NHWC" else (sides[1], sides[2], sides[0])
        size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        channels = count if isinstance(count, int) else None
    return read_samples(user.data, size=size, channels=channels, seed=user.seed)


def _told(form: Form) -> list[str]:
    account: Any = form.account
    told = []
    if account.get("methods"):
        told.append(f"{form.id}: {quantize.told(account['methods'])}")
    if account.get("relieved"):
        layers = ", ".join(f"{layer} ({steps:g} steps)" for layer, steps in account["relieved"].items())
        told.append(f"{form.id} has less range of weights where CPUs without VNNI would clip sums: {layers}")
    if account.get("float"):
        counted = Counter(account["float"].values())
        told.append(f"{form.id} keeps in float: " + ", ".join(f"{n} × ({why})" for why, n in sorted(counted.items())))
    return told


def _report(
    user: Given, rows: Sequence[Variant], comparisons: Sequence[Comparison], targets: Sequence[str], task: Task,
    notes: Sequence[str], quick: bool,
) -> Report:  # fmt: skip
    judged = [replace(row, verdict=report.judge(row, rows[0], user.budget, task.metric)) for row in rows]
    chosen = report.choose(judged, user.budget, comparisons)
    asked = json.dumps(
        {"edgekd": edgekd.__version__, "model": sha256_of(user.model), "mean": user.mean, "std": user.std,
         "precisions": user.precisions, "budget": asdict(user.budget), "seed": user.seed}, sort_keys=True,
    )  # fmt: skip
    return report.concluded(Report(
        schema=report.SCHEMA, name=user.model.stem, teacher="teacher", variants=tuple(judged),
        chosen={name: chosen.get(name) for name in targets}, budget=user.budget,
        environment=conditions.environment(), recipe_sha256=hashlib.sha256(asked.encode()).hexdigest(),
        timings_s={}, notes=tuple(notes), comparisons=tuple(comparisons), metric=task.metric,
        command=_command(user, quick),
    ))  # fmt: skip


def _command(user: Given, quick: bool) -> str:
    """The words that make the report again, but for its targets."""
    words = ["quantize", user.model.name, "--data", user.data.name]
    for option, values in (("--mean", user.mean), ("--std", user.std)):
        words += [] if values is None else [option, ",".join(f"{value:g}" for value in values)]
    for precision in user.precisions or ():
        words += ["--precision", precision]
    budget = user.budget
    limits = (
        ("--max-drop", budget.max_accuracy_drop, ""), ("--max-latency", budget.max_latency_ms, "ms"),
        ("--max-size", budget.max_size_bytes, "B"), ("--max-memory", budget.max_memory_bytes, "B"),
    )  # fmt: skip
    for option, limit, unit in limits:
        words += [] if limit is None else [option, f"{limit:.12g}{unit}"]
    words += ["--seed", str(user.seed)] if user.seed else []
    return shlex.join([*words, *["--quick"] * quick])
