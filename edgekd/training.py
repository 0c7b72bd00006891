"""The networks of a recipe, trained: teachers, assistants and the student, each a step of the store.

teacher ─► assistant ─► … ─► student        a chain; several teachers, and several tasks, end in one student
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd import data, distillation, export, models, plugins, qad, quantize
from edgekd.clock import Deadline
from edgekd.deploy import Calibration, Source
from edgekd.distillation import Lesson, Teacher
from edgekd.errors import ModelError, RecipeError, nearest
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.outcome import Layer, LayerPair, Matched
from edgekd.processes import here
from edgekd.recipe import PRUNED, Recipe, TaskSpec, TeacherSpec, loss_table, loss_term
from edgekd.store import Store, sha256_of
from edgekd.types import Artifact, Dataset, Json, LossTerm, ModelSpec, Part, Say, Task, Training

WEIGHTS = "weights.safetensors"
ANSWERS = "answers"  # folder of the store in which teachers' answers are kept


@dataclass(frozen=True, slots=True)
class Subject:
    """One task of the recipe with its data read."""

    spec: TaskSpec
    data: Dataset
    task: Task

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The losses that its student is distilled by."""
        return distillation.default_losses(self.task) if self.spec.losses is None else self.spec.losses


@dataclass(frozen=True, slots=True)
class School:
    """What training works with: the recipe, where builds and answers are kept, who is told."""

    recipe: Recipe
    subjects: tuple[Subject, ...]
    store: Store
    answers: Path
    opset: int | None  # that models are tried with before they are trained; None: they are not to be deployed
    say: Say
    deadline: Deadline = field(default_factory=Deadline)  # that optional steps ask whether they fit


def read(spec: TaskSpec, seed: int, source: str) -> Subject:
    """The data of a task, checked to hold what the task takes.

    Raises:
        DataError, PartError: it cannot be used.
    """
    prefix = f"{source}: task.{spec.head}." if spec.head else f"{source}: "
    task: Task = plugins.build("tasks", spec.task, where=f"{prefix}task")
    return Subject(spec, data.load(spec.data, seed, task=task, where=f"{prefix}data"), task)


def teachers(school: School, subject: Subject) -> tuple[Source, ...]:
    """The teachers of a task: the user's weights, checked and saved in our form, or trained on its labels first.

    Raises:
        RecipeError: assistants and several tasks, or tasks whose inputs differ.
    """
    _check(school)
    return tuple(_teacher(school, subject, spec) for spec in subject.spec.teachers)


def student(school: School, taught_by: Sequence[Sequence[Source]]) -> Source:
    """The student, distilled from the teachers of each task, through the assistants where there are any."""
    recipe, first = school.recipe, school.subjects[0]
    # Pairs in the recipe are of the student and the network just above it: an assistant has layers of its own. Nor is
    # an assistant ever deployed.
    losses = tuple(replace(term, pairs=None) for term in first.terms)
    between = replace(school, subjects=(replace(first, spec=replace(first.spec, losses=losses)),), opset=None)
    for assistant in recipe.assistants:
        epochs = recipe.distill.epochs if assistant.epochs is None else assistant.epochs
        taught_by = [[distilled(between, assistant.model, epochs, taught_by)]]
    return distilled(school, recipe.student, recipe.distill.epochs, taught_by)


def recovery(school: School, taught_by: Sequence[Source]) -> qad.Recovery | None:
    """Who teaches the quantized student of the one task where rounding costs too much; None: the recipe wants nobody.

    Assistants have done their work: the teachers are the recipe's own.
    """
    recipe, (subject,) = school.recipe, school.subjects
    if recipe.quantize.qad == "off":
        return None
    weights_of = _weights(subject, taught_by)
    return qad.Recovery(
        teachers=tuple(Teacher(s.network, w) for s, w in zip(taught_by, weights_of, strict=True)),
        artifacts=tuple(source.weights for source in taught_by), data=subject.data,
        held_out=Calibration(subject.data), task=subject.task,
        options=qad.options(recipe.distill, recipe.quantize.qad_epochs), augment=recipe.augment, seed=recipe.seed,
        answers=school.answers,
    )  # fmt: skip


def network(school: School, subject: Subject, spec: ModelSpec, trained: Artifact) -> Network:
    """A network of the recipe with the weights of an artifact, in eval mode."""
    built = _built(school, subject, replace(spec, weights=None))
    weights.load(trained.path / WEIGHTS, built.module)
    return built.eval()


def told(school: School, trained: Source) -> Training | None:
    """How the student of the one task was trained, for the report; None of a network that is no student."""
    if trained.weights.step != "student":
        return None
    meta, chain = _meta(trained), (school.recipe.task.teachers, school.recipe.assistants)
    teachers = meta.get("teachers", ())  # none, where no loss asks what a teacher says
    names = [tuple(each.model.name for each in specs) if teachers else () for specs in chain]
    asked, recalled = (sum(each.get(key, 0) for each in teachers) for key in ("asked", "recalled"))
    (losses,) = _losses(trained.weights).values()
    return Training(
        teachers=names[0], assistants=names[1], losses=losses, epochs=meta["epochs"], seconds=meta["train_s"],
        precision=meta["precision"], recalled=recalled / asked if asked else None,
    )  # fmt: skip


def matched(school: School, trained: Source) -> tuple[Matched, ...]:
    """The layers that the losses of each head compare, and those that were found beside them."""
    heads = {subject.spec.head or "student": subject.spec.head for subject in school.subjects}
    return tuple(
        Matched(heads[name], found["family"], tuple(map(_pair, found["pairs"])), tuple(found["notes"]))
        for name, found in _meta(trained).get("correspondence", {}).items()
    )


def resolved(school: School, trained: Source) -> Recipe:
    """The recipe with the losses and pairs of layers that its student was trained by."""
    found = _losses(trained.weights)
    tasks = tuple(
        replace(spec, losses=found.get(spec.head or "student") or spec.losses) for spec in school.recipe.tasks
    )
    return replace(school.recipe, tasks=tasks)


def _meta(trained: Source) -> dict[str, Any]:
    return dict(trained.weights.meta)


def _losses(trained: Artifact) -> dict[str, tuple[LossTerm, ...]]:
    """By head, "student" where it has but one."""
    meta: Any = trained.meta
    tables = meta.get("losses", {})
    return {head: tuple(loss_term(table, "loss") for table in found) for head, found in tables.items()}


def _pair(found: Mapping[str, Any]) -> LayerPair:
    student, teacher = (
        Layer(tap["path"], tap["channels"], tuple(tap["grid"]), tap["depth"])
        for tap in (found["student"], found["teacher"])
    )
    return LayerPair(student, teacher, found["loss"], found["weight"], found["cka"], found["projector"])


def _teacher(school: School, subject: Subject, spec: TeacherSpec) -> Source:
    model, recipe = spec.model, school.recipe
    options = _identity(school, [subject], model)
    if model.weights is not None:

        def take(work: Path) -> Mapping[str, Json]:
            weights.save(work / WEIGHTS, _built(school, subject, model).module, {})
            return {"source": "given"}

        made = school.store.step("weights", weights.VERSION, options, [], take)
        return Source(network(school, subject, model, made), made)

    def train(work: Path) -> Mapping[str, Json]:
        _rehearse(school, model)
        later_ones = [each.model for each in recipe.assistants]
        if recipe.student.name != PRUNED:  # which is this network, with fewer channels
            _rehearse(school, recipe.student)
            later_ones.append(recipe.student)
        for later in later_ones:
            _student(school, later)  # one that cannot be built is known before hours of training, too
        return distillation.train(
            _built(school, subject, model), subject.data, spec.train, recipe.augment,
            task=subject.task, seed=recipe.seed, work=work, say=school.say,
        )  # fmt: skip

    options |= {
        "task": _options("tasks", subject.spec.task), "train": asdict(spec.train),
        "augment": asdict(recipe.augment), "seed": recipe.seed,
    }  # fmt: skip
    made = school.store.step("teacher", distillation.VERSION, options, [], train, together=True)
    return Source(network(school, subject, model, made), made)


def distilled(
    school: School, spec: ModelSpec, epochs: int, taught_by: Sequence[Sequence[Source]], start: Source | None = None
) -> Source:
    """A student of these teachers; `taught_by` has a row for each task. It begins as `start`, where that is given."""
    recipe, subjects = school.recipe, school.subjects
    options = replace(recipe.distill, epochs=epochs)

    def begun() -> Network:
        return _student(school, spec) if start is None else copy.deepcopy(start.network)

    def build(work: Path) -> Mapping[str, Json]:
        _rehearse(school, spec, None if start is None else start.network)
        lessons = [
            Lesson(
                subject.data, subject.task,
                [Teacher(s.network, w) for s, w in zip(sources, _weights(subject, sources), strict=True)],
                subject.terms, subject.spec.head,
            )
            for subject, sources in zip(subjects, taught_by, strict=True)
        ]  # fmt: skip
        return distillation.distill_tasks(
            begun(), lessons, options, recipe.augment,
            seed=recipe.seed, work=work, cache=school.answers, say=school.say,
        )  # fmt: skip

    def identity(losses: Sequence[Sequence[LossTerm]]) -> dict[str, Json]:
        facts: list[Json] = [
            {
                "head": subject.spec.head, "task": _options("tasks", subject.spec.task),
                "weights": list[Json](_weights(subject, sources)), "losses": [loss_table(term) for term in terms],
            }
            for subject, sources, terms in zip(subjects, taught_by, losses, strict=True)
        ]  # fmt: skip
        return _identity(school, subjects, spec) | {
            "tasks": facts, "distill": _effective(asdict(options)), "augment": asdict(recipe.augment),
            "seed": recipe.seed,
        }  # fmt: skip

    parents = [source.weights for sources in taught_by for source in sources]
    parents += [] if start is None else [start.weights]
    asked = identity([subject.terms for subject in subjects])
    made = school.store.step("student", distillation.VERSION, asked, parents, build, together=True)
    # The recipe that a run leaves behind names the layers that were found: it finds the same student.
    named = _losses(made)
    resolved = identity([named[subject.spec.head or "student"] for subject in subjects])
    school.store.alias(made, distillation.VERSION, resolved, parents)
    built = _student(school, replace(spec, weights=None)) if start is None else begun()
    weights.load(made.path / WEIGHTS, built.module)
    return Source(built.eval(), made)


def _weights(subject: Subject, sources: Sequence[Source]) -> list[float]:
    """What each teacher's word counts; an assistant's is the only one."""
    given = [spec.weight for spec in subject.spec.teachers]
    return given if len(given) == len(sources) else [1.0] * len(sources)


def _effective(options: dict[str, Json]) -> dict[str, Json]:
    """Another limit of disk makes the same student; but answers that are kept at all are rounded to float16."""
    return options | {"cache_gb": bool(options["cache_gb"])}


def _options(kind: str, part: Part) -> dict[str, Json]:
    return {"name": part.name} | plugins.defaults(kind, part)


def _identity(school: School, subjects: Sequence[Subject], spec: ModelSpec) -> dict[str, Json]:
    """What a network's weights depend on besides training: never a path, so that another folder gives the same key."""
    kept = asdict(replace(spec, weights=None))
    if spec.weights is not None:
        kept["weights"] = _content(spec.weights)
    if "pretrained" in spec.options:
        kept["options"] = dict(spec.options) | {"pretrained": _content(str(spec.options["pretrained"]))}
    return kept | {"data": [subject.data.fingerprint for subject in subjects]}


def _content(path: str) -> str:
    if not Path(path).is_file():
        neighbours = [file.name for file in Path(path).parent.glob("*")] if Path(path).parent.is_dir() else []
        raise ModelError("no such file of weights", where=path, nearest=nearest(Path(path).name, neighbours))
    return sha256_of(Path(path))


def _check(school: School) -> None:
    """Assistants are of one task alone, and all tasks of one student give it the same inputs."""
    first = school.subjects[0]
    if school.recipe.assistants and first.spec.head is not None:
        raise RecipeError(
            "assistants stand between one teacher and one student",
            where=f"{school.recipe.source}: distill.assistants",
            fix="leave them out, or distil each task by itself",
        )
    for subject in school.subjects[1:]:
        if subject.data.inputs != first.data.inputs or subject.data.images != first.data.images:
            raise RecipeError(
                f"the inputs of '{subject.spec.head}' are {subject.data.inputs}",
                where=f"{school.recipe.source}: task",
                expected=f"{first.data.inputs}, as '{first.spec.head}' has them: one student takes them all",
            )
        if subject.data.assets != first.data.assets:
            raise RecipeError(
                f"'{subject.spec.head}' makes its inputs otherwise than '{first.spec.head}': by another tokenizer",
                where=f"{school.recipe.source}: task",
                fix="give the data of every task the same corpus, or the same tokenizer",
            )


def _rehearse(school: School, spec: ModelSpec, network: Network | None = None) -> None:
    """Export the network untrained: a model that cannot become ONNX is known before hours of training, not after."""
    opset = school.opset
    if opset is None:
        return
    (subject,) = school.subjects
    stored = next(iter(subject.data.calibration.batches([np.arange(1)]))).inputs

    def exported() -> None:
        preprocessing = school.recipe.export.preprocessing
        tried = network or _built(school, subject, replace(spec, weights=None))
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder) / "rehearsal.onnx"
            export.export(tried, stored, opset=opset, preprocessing=preprocessing, path=path)
        if spec == school.recipe.student and (float_layers := school.recipe.quantize.float_layers):
            quantize.check_layers(tried, stored, float_layers, preprocessing=preprocessing)

    here().once(exported)


def _built(school: School, subject: Subject, spec: ModelSpec) -> Network:
    """A network with one output, for one task."""
    torch.manual_seed(school.recipe.seed)
    of = subject.data
    return models.build(spec, classes=len(of.classes), inputs=of.inputs, images=of.images, dense=subject.task.dense)


def _student(school: School, spec: ModelSpec) -> Network:
    """A network for every task of the recipe: with an output for each head where the recipe names heads."""
    first = school.subjects[0]
    if first.spec.head is None:
        return _built(school, first, spec)
    torch.manual_seed(school.recipe.seed)
    heads = {str(subject.spec.head): len(subject.data.classes) for subject in school.subjects}
    dense = {str(subject.spec.head) for subject in school.subjects if subject.task.dense}
    return models.build(spec, classes=heads, inputs=first.data.inputs, images=first.data.images, dense=dense)
