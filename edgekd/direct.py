"""edgekd.distill(), edgekd.prune() and edgekd.quantize_model(): modules in hand, without a recipe."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, bfloat16, nn

from edgekd import data as sources
from edgekd import distillation, models, plugins, pruning, store, toml
from edgekd.bench import accuracy
from edgekd.data.samples import Reading, wrapped
from edgekd.distillation import Teacher
from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.goals import Prune
from edgekd.models.network import Network
from edgekd.outcome import Pruning
from edgekd.recipe import Quantize, loss_terms
from edgekd.types import (
    Arrays,
    Augment,
    Dataset,
    Interval,
    Json,
    LossTerm,
    ModelSpec,
    Parity,
    Part,
    Precision,
    Preprocessing,
    QuantizationMethod,
    Say,
    Target,
    Task,
    TensorSpec,
    TrainOptions,
)

Inputs: TypeAlias = "Tensor | Sequence[Tensor] | Mapping[str, Tensor]"  # what a module takes


@dataclass(frozen=True, slots=True)
class Distilled:
    """How a distillation ended: the student in eval mode, and how it and its first teacher do on the test split."""

    student: nn.Module
    metric: str  # what the figures are: "accuracy"
    accuracy: Interval
    teacher_accuracy: Interval
    drop: Interval  # paired on the same samples
    training: Mapping[str, Json]  # epochs, seconds, losses with the pairs of layers they compared


def distill(
    teacher: nn.Module | Sequence[nn.Module],
    student: nn.Module,
    data: Any,
    *,
    losses: str | Sequence[str | Mapping[str, Any] | LossTerm] | None = None,
    task: str | Task = "classification",
    augment: Augment | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    say: Say | None = None,
    **options: Any,
) -> Distilled:
    """Train a student on what its teacher (or the mean of several) says, with edgekd's own loop.

        result = edgekd.distill(teacher, student, (train, test), losses=["kd", "srd"], epochs=30)

    The student is trained in place. Images reach both modules as batch × channels × height × width, normalised by
    mean and std; other inputs as the data has them. One's own loop is served by `edgekd.Distiller` instead.

    Args:
        data: a map-style torch Dataset, a (train, test) pair of them, {"train": …, "test": …}, a Dataset of edgekd, or
            a table as a recipe has it: {"name": "imagefolder", "path": "photos"}.
        losses: names, or tables as a recipe has them; None: "auto" alone for classes, else the task's own.
        task: "classification", "segmentation", "multilabel", "regression", or a Task.
        mean, std: of images, of values in [0, 1], one a channel; None: ImageNet's for RGB.
        out: folder for weights.safetensors and the checkpoint that a killed training goes on from; None: neither.
        cache: folder of teachers' answers, for this training and later ones; None: they are not kept.
        say: told what happens.
        options: of training, as [distill] has them: epochs, batch_size, optimizer, learning_rate, views, …

    Raises:
        EdgekdError: the data, a module, a loss or an option does not fit; it says what, where and how to mend it.
    """
    built: Task = plugins.build("tasks", Part(task)) if isinstance(task, str) else task
    training = toml.read(TrainOptions, options, "options of distill()")
    found = _data(data, built, seed)
    spec = ModelSpec("student", mean=_tuple(mean), std=_tuple(std))
    pupil = _network(student, spec, found, built)
    modules = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    spec = ModelSpec("teacher", mean=spec.mean, std=spec.std)
    teachers = [Teacher(_network(module, spec, found, built)) for module in modules]
    terms = distillation.default_losses(built) if losses is None else loss_terms(losses)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as scratch:
        work = store.make_folder(Path(scratch) if out is None else Path(out))
        meta = distillation.distill(
            pupil, teachers, found, terms, training, augment or Augment(), task=built, seed=seed, work=work,
            cache=None if cache is None else store.make_folder(Path(cache)), say=say or _silent,
        )  # fmt: skip
    truth = accuracy.labels(found.test)
    scores = [built.scores(distillation.evaluate(each, found.test), truth) for each in (teachers[0].network, pupil)]
    return Distilled(
        student, built.metric, accuracy.mean(scores[1]), accuracy.mean(scores[0]), accuracy.drop(*scores), meta
    )


@dataclass(frozen=True, slots=True)
class Pruned:
    """A network with channels cut out: the module in eval mode, and the account of it."""

    module: nn.Module
    account: Pruning


def prune(
    module: nn.Module,
    example_inputs: Inputs,
    *,
    batches: Iterable[Inputs] | None = None,
    loss: Callable[[nn.Module], Tensor] | None = None,
    timer: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> Pruned:
    """Cut the least important channels out of a copy of a module, once; for a training loop of one's own.

        made = edgekd.prune(model, images, macs=0.7, round_to=8)
        distiller = edgekd.Distiller(model, made.module, images, losses=["kd", "hint"])

    The result knows which channels it has kept, so that losses between layers compare it with the module it came from
    channel by channel, however long it is trained.

    Args:
        example_inputs: some samples as the module takes them, batch first; by name in the order of its arguments.
        batches: training samples to estimate the statistics of batch normalisation from, as example_inputs are; None:
            the old ones stay.
        loss: of a module on some samples, for importance = "taylor".
        timer: milliseconds that a module takes, for a goal of latency_ms.
        seed: of importance = "random".
        out: folder for weights.safetensors and shapes.json, which `edgekd.pruning.restore` reads.
        options: as [prune] has them: one of macs, parameters, size_bytes and latency_ms; importance, global_ranking,
            round_to, ignore.

    Raises:
        RecipeError: an option is unknown, or there is not one goal.
        ModelError: the module cannot be traced, nothing in it can be cut, or the goal is out of reach.
    """
    asked = toml.read(Prune, options, "options of prune()")
    where = "options of prune()"
    if len(asked.goals) != 1:
        given = ", ".join(asked.goals) or "none"
        raise RecipeError(f"goals: {given}", where=where, expected="one of macs, parameters, size_bytes, latency_ms")
    measure, goal = asked.goal
    inputs = _tuple_of(example_inputs)
    if measure == "latency_ms" and timer is None:
        raise RecipeError("latency_ms needs a timer", where=where, fix="give timer=, milliseconds that a module takes")
    module = copy.deepcopy(module).eval()
    macs, count = pruning.cost.macs(module, inputs), pruning.cost.parameters(module)
    goal *= {"macs": macs, "parameters": count}.get(measure, 1)

    def gradients(probe: nn.Module) -> None:
        if loss is None:
            raise RecipeError("'taylor' ranks by gradients", where=where, fix="give loss=, of a module on some samples")
        loss(probe).backward()  # type: ignore[no-untyped-call]

    made = pruning.prune(
        module, inputs, measure, goal, asked, seed=seed, round_to=asked.round_to or 1, gradients=gradients,
        timer=timer, batches=None if batches is None else lambda: map(_tuple_of, batches),
    )  # fmt: skip
    if out is not None:
        pruning.write(made, store.make_folder(Path(out)))
    account = Pruning(
        measure=measure, goal=goal, before=made.before, after=made.after, importance=asked.importance,
        round_to=asked.round_to or 1, rounds=1, macs_before=macs,
        macs_after=pruning.cost.macs(made.module, inputs), parameters_before=count,
        parameters_after=pruning.cost.parameters(made.module), layers=made.layers, left_alone=made.left_alone,
    )  # fmt: skip
    return Pruned(made.module, account)


def _tuple_of(inputs: Inputs) -> tuple[Tensor, ...]:
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A file, and how it was made: `parity` is with the float graph, on the first calibration samples."""

    path: Path
    precision: Precision
    parity: Parity
    account: Mapping[str, Json]  # what was quantized and what stays in float, by layer; a fallback with its reason


def quantize_model(
    model: nn.Module | str | Path,
    calibration: Iterable[Any],
    path: str | Path,
    *,
    target: str = "host",
    precision: Precision = "int8",
    task: str | Task | None = None,
    method: str | Sequence[QuantizationMethod] = "auto",
    max_drop: float = 0.005,
    float_layers: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    say: Say | None = None,
) -> QuantizedModel:
    """Write a trained model as a quantized ONNX file for a target.

        edgekd.quantize_model(module, [batch for batch, _ in loader], "model-int8.onnx")

    The model stays as it is; the file is there whole, or not at all.

    Args:
        model: a module, or the path of a float32 ONNX file, which is quantized as ONNX.
        calibration: batches of real inputs: an array or tensor, or several by name (of a module: in the order of its
            arguments). Read one after the other as often as needed; an iterator, which cannot be, is held in memory.
        path: of the file to write; its folder is made.
        precision: "int8" (static, calibrated), "w8" (int8 weights alone), "dynamic", "fp16" or "fp32".
        task: what the output is for: the name of a task, or one; None: "classification" for an output of several
            columns, "regression" for any other.
        method: of int8, of a module: "auto" tries the cheapest first, or what to do whatever comes of it.
        max_drop: of int8: part of the task's metric that may be lost, as far as calibration samples tell.
        float_layers: of int8, of a module: paths of layers, or of modules around them, that stay in float.
        mean, std: of a module that takes images, where batches are uint8, batch × height × width × channels: the
            graph then takes bytes and normalises them. Left out: the graph takes what the module takes.

    Raises:
        EdgekdError: the model, a batch or the target does not fit; it says what, where and how to mend it.
    """
    from edgekd import onnx_file
    from edgekd import target as targets

    wanted = targets.load(target)
    if precision not in (*wanted.precisions, "fp32"):
        raise ModelError(f"{target} takes no {precision}", where="precision", expected=", ".join(wanted.precisions))
    batches = _Batches(list(calibration) if iter(calibration) is calibration else calibration)
    if next(iter(batches), None) is None:
        raise DataError("there are no calibration samples", where="calibration", expected="at least one batch")
    options = {"method": method if isinstance(method, str) else [*method], "max_drop": max_drop}
    asked = toml.read(Quantize, options | {"float_layers": [*float_layers]}, "quantize_model()")
    judged: Task | None = plugins.build("tasks", Part(task)) if isinstance(task, str) else task
    store.make_folder(Path(path).absolute().parent)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        written = Path(folder) / "written.onnx"
        if isinstance(model, nn.Module):
            network = _normalising(model, next(iter(batches)), mean, std)
            account, parity = _module_form(network, batches, wanted, precision, asked, judged, written, say or _silent)
        else:
            _without(mean=mean, std=std, float_layers=float_layers or None, where=str(model))
            account, parity = onnx_file.of_batches(
                Path(model), batches, wanted, precision, written, Path(folder), task=judged, max_drop=max_drop
            )
        store.copy(written, Path(path))
    return QuantizedModel(Path(path), precision, parity, account)


def _without(*, where: str, **given: object) -> None:
    """Raise ModelError where an option is given that is for modules."""
    told = [name for name, value in given.items() if value is not None]
    if told:
        raise ModelError(f"{', '.join(told)}: for modules, not for an ONNX file", where=where, fix="leave them out")


def _normalising(
    module: nn.Module, first: Arrays, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Network:
    """A copy of the module on the CPU, behind the normalisation of images where that is asked for."""
    others = {str(each.dtype).removeprefix("torch.") for each in module.parameters() if each.is_floating_point()}
    if others - {"float32"}:
        raise ModelError(
            f"its weights are {', '.join(sorted(others))}", where=type(module).__name__,
            expected="float32, of which every other form is made", fix="give module.float() and float32 batches",
        )  # fmt: skip
    specs = tuple(TensorSpec(name, str(array.dtype), ("batch", *array.shape[1:])) for name, array in first.items())
    preprocessing = None
    if mean is not None and std is not None:
        if len(specs) != 1 or specs[0].dtype != "uint8" or len(specs[0].shape) != 4:
            told = ", ".join(f"'{spec.name}' {spec.dtype} {spec.shape}" for spec in specs)
            raise ModelError(f"batches are {told}", where="mean and std", expected="one uint8 input, channels last")
        models.check_levels(mean, std, where="mean and std")
        preprocessing = Preprocessing((first[specs[0].name].shape[1:3]), tuple(mean), tuple(std))
    return Network(copy.deepcopy(module).eval(), specs, preprocessing).cpu()


def _module_form(
    network: Network, batches: _Batches, target: Target, precision: Precision, asked: Quantize, task: Task | None,
    path: Path, say: Say,
) -> tuple[dict[str, Json], Parity]:  # fmt: skip
    """The quantized graph of a module; int8 in PyTorch, other forms of its float graph."""
    from edgekd import export, onnx_file, quantize

    first, fp32 = next(iter(batches)), path.with_name("fp32.onnx")
    opset, inside = target.opset, network.preprocessing is not None
    static = export.export(network, first, opset=opset, preprocessing=inside, path=fp32, say=say)
    if precision != "int8":
        return onnx_file.of_graph(fp32, batches, target, precision, path)
    meta = quantize.quantize(
        network, batches, target.quantization, opset=opset, preprocessing=inside, path=path, say=say,
        method=asked.method, max_drop=asked.max_drop, float_layers=asked.float_layers,
        task=task or onnx_file.task_of(fp32),
    )  # fmt: skip
    return onnx_file.checked(fp32, first, target, path, meta | static)


@dataclass(frozen=True, slots=True)
class _Batches:
    """Batches by name, made as they are read."""

    given: Iterable[Any]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self.given:
            named = batch if isinstance(batch, Mapping) else {"x": batch}
            yield {str(name): _array(str(name), value) for name, value in named.items()}


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, Tensor) and value.dtype == bfloat16:
        raise DataError(f"'{name}' is bfloat16", where="calibration", expected="float32, as the module takes it")
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def _data(data: Any, task: Task, seed: int) -> Dataset:
    if isinstance(data, Mapping) and isinstance(data.get("name"), str):
        return sources.load(Part(data["name"], {k: v for k, v in data.items() if k != "name"}), seed, task)
    found = data if isinstance(data, Dataset) else wrapped(data, "data", Reading(seed, labels=task.labels))
    task.check(found)
    return found


def _network(module: nn.Module, spec: ModelSpec, data: Dataset, task: Task) -> Network:
    return models.adopted(
        module, spec, classes=len(data.classes), inputs=data.inputs, images=data.images, dense=task.dense
    )


def _tuple(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, values))


def _silent(event: str, /, **fields: Json) -> None:
    """Nobody is told."""
