"""compress() and distill(): the order of the steps, and nothing else.

recipe ─► teacher, student, data ─► distill ─► export ─► quantize ─► compile ─► bench ─► report ─► bundle
          └──── shared by every target ─────┘  └──────────── for each target ──────────────────────────┘
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import edgekd
from edgekd import bundle, measure, report, training
from edgekd.bench import conditions
from edgekd.deploy import Deployment, Source, Workshop, deploy, row_id, samples
from edgekd.processes import here
from edgekd.recipe import Recipe, TaskSpec
from edgekd.store import Store, copy, write_text
from edgekd.training import School
from edgekd.types import Comparison, Dataset, Json, Report, Say, Stage, Target, Task, TrainOptions, Variant

GOLDEN_SAMPLES = 8
Trained: TypeAlias = "tuple[list[tuple[Source, ...]], Source]"  # the teachers of each task, and the student


@dataclass(frozen=True, slots=True)
class Run:
    """What every step needs; `timings_s` and `notes` are filled as the run goes on."""

    school: School
    timings_s: dict[str, float]
    notes: list[str]

    @property
    def recipe(self) -> Recipe:
        """What is being made."""
        return self.school.recipe

    @property
    def data(self) -> Dataset:
        """Of the one task that is deployed."""
        return self.school.subjects[0].data

    @property
    def task(self) -> Task:
        """What its outputs are."""
        return self.school.subjects[0].task

    @property
    def store(self) -> Store:
        """Where builds are kept."""
        return self.school.store

    @property
    def say(self) -> Say:
        """Who is told."""
        return self.school.say

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to `stage`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timings_s[stage] = round(self.timings_s.get(stage, 0.0) + time.perf_counter() - begun, 3)

    def note(self, text: str) -> None:
        """Something the reader of the report must know: a fallback, or what was not done here."""
        if text not in self.notes:
            self.notes.append(text)
            self.say("note", text=text)


def compress(
    recipe: Recipe, targets: Sequence[Target], out: Path, *, store: Path, threads: int, quick: bool, say: Say
) -> Report:
    """Do all that the recipe asks for, for each target, and leave report, models and bundles in `out`.

    Training is shared by the targets; what the store holds already is not built again.

    Args:
        recipe: what to make.
        targets: where it shall run.
        out: the run folder, which exists.
        store: the folder of finished builds.
        threads: that latency is measured with.
        quick: a tenth of the epochs and short measurements.
        say: told what happens.

    Raises:
        EdgekdError: the user's data, model, recipe or disk stands in the way; `out` holds no half-written file.
    """
    recipe.task  # noqa: B018  # one task at a time can be deployed
    run = _begin(recipe, targets[0].opset, store, quick, say)
    trained = _trained(run)
    return here().once(lambda: _compressed(run, trained, targets, out, threads=threads, quick=quick))


def distill(recipe: Recipe, out: Path, *, store: Path, quick: bool, say: Say) -> dict[str, Json]:
    """Train the teachers and the student of a recipe, and leave student.safetensors and distill.json in `out`.

    Returns:
        What distill.json holds: for each task its metric with the interval, for the teachers and the student, the
        drop and agreement against the first teacher; the pairs of layers that were compared; seconds and notes.

    Raises:
        EdgekdError: the user's data, model, recipe or disk stands in the way; `out` holds no half-written file.
    """
    run = _begin(recipe, None, store, quick, say)
    trained = _trained(run)
    return here().once(lambda: _judged(run, trained, out))


def _judged(run: Run, trained: Trained, out: Path) -> dict[str, Json]:
    """What `distill` gives and leaves."""
    teachers, student = trained
    with run.timed("accuracy"):
        tasks: list[Json] = [
            measure.task_figures(subject, found, student.network)
            for subject, found in zip(run.school.subjects, teachers, strict=True)
        ]
    copy(student.weights.path / training.WEIGHTS, out / "student.safetensors")
    write_text(out / "recipe.toml", training.resolved(run.school, student).to_toml(out))
    found: dict[str, Json] = {
        "schema": 1, "name": run.recipe.name, "tasks": tasks, "training": dict(student.weights.meta),
        "timings_s": dict(run.timings_s), "environment": conditions.environment(), "notes": list(run.notes),
    }  # fmt: skip
    write_text(out / "distill.json", json.dumps(found, indent=1) + "\n")
    return found


def distilled_text(found: dict[str, Json], out: Path) -> str:
    """What distill.json says, for people: a line for each task."""
    lines = []
    tasks: Any = found["tasks"]
    for task in tasks:
        student, teachers = task["student"], ", ".join(f"{each['accuracy']['value']:.4f}" for each in task["teachers"])
        low, high = student["accuracy"]["low"], student["accuracy"]["high"]
        name = f"{task['head']}: " if task["head"] else ""
        lines.append(
            f"{name}{task['metric']} {student['accuracy']['value']:.4f} ({low:.4f} to {high:.4f}), teacher {teachers}"
        )
    return "\n".join([*lines, f"{out / 'student.safetensors'}, {out / 'distill.json'}"])


def _compressed(
    run: Run, trained: Trained, targets: Sequence[Target], out: Path, *, threads: int, quick: bool
) -> Report:
    """All that comes after training."""
    (teachers,), student = trained
    sources: dict[Stage, Source] = {"teacher": teachers[0], "student": student}
    if len(teachers) > 1:
        run.note(f"the student has {len(teachers)} teachers; it is compared with the first of them")
    chosen = run.recipe.quantize
    shop = Workshop(
        run.store, run.data, run.recipe.export.preprocessing, chosen.precisions, run.say, chosen, run.task,
        training.recovery(run.school, teachers),
    )  # fmt: skip
    with run.timed("accuracy"):
        examiner, rows = measure.weights_rows(sources, shop, run.task)
    made: list[Deployment] = []
    comparisons: list[Comparison] = []
    for target in targets:
        with run.timed(f"deploy {target.name}"):
            made.append(deploy(shop, target, sources["teacher"], sources["student"]))
        with run.timed(f"bench {target.name}"):
            found, compared, told = measure.target_rows(examiner, made[-1], sources, shop, threads=threads, quick=quick)
        rows += found
        comparisons += compared
        for text in (*made[-1].notes, *told):
            run.note(f"{target.name}: {text}")
        if made[-1].unavailable is not None:
            run.note(f"{target.name}: no engine was built here. {made[-1].unavailable}")
    return _publish(run, made, rows, comparisons, sources, shop, out)


def _publish(
    run: Run, made: Sequence[Deployment], rows: Sequence[Variant], comparisons: Sequence[Comparison],
    sources: Mapping[Stage, Source], shop: Workshop, out: Path,
) -> Report:  # fmt: skip
    """Judge, choose, and leave everything in the run folder."""
    files = {row_id(each.target, graph): graph.file for each in made for graph in each.graphs}
    paths = {name: f"models/{name}{file.suffix}" for name, file in files.items()}
    rows = [replace(row, path=paths.get(row.id)) for row in rows]
    rows = [replace(row, verdict=report.judge(row, rows[0], run.recipe.budget, run.task.metric)) for row in rows]
    chosen = report.choose(rows, run.recipe.budget, comparisons)
    resolved = training.resolved(run.school, sources["student"]).to_toml(out)
    found = Report(
        schema=report.SCHEMA, name=run.recipe.name, teacher="teacher", variants=tuple(rows),
        chosen={each.target.name: chosen.get(each.target.name) for each in made}, budget=run.recipe.budget,
        environment=conditions.environment(), recipe_sha256=hashlib.sha256(resolved.encode()).hexdigest(),
        timings_s=run.timings_s, notes=tuple(run.notes), comparisons=tuple(comparisons), metric=run.task.metric,
        training=training.told(run.school, sources["student"]),
        correspondence=training.matched(run.school, sources["student"]),
    )  # fmt: skip
    for name, file in files.items():
        copy(file, out / paths[name])
    write_text(out / "recipe.toml", resolved)
    by_id = {row.id: row for row in rows}
    for each in made:
        _bundle(run, each, found.chosen[each.target.name], by_id, sources, shop, out / "bundles" / each.target.name)
    report.render(found, out)
    return found


def _bundle(
    run: Run, made: Deployment, chosen: str | None, rows: Mapping[str, Variant], sources: Mapping[Stage, Source],
    shop: Workshop, folder: Path,
) -> None:  # fmt: skip
    """The bundle of one target: the chosen model first; where none meets the budget, the one that loses least."""
    graphs = {row_id(made.target, graph): graph for graph in made.graphs if graph.stage != "teacher"}
    deployable = {name: graph for name, graph in graphs.items() if graph.file.suffix == ".onnx"}
    drops = {name: row.drop.value for name, row in rows.items() if name in deployable and row.drop is not None}
    first = chosen if chosen in deployable else min(drops, key=lambda name: (drops[name], name))
    others = [name for name in deployable if name != first and deployable[name].precision in made.target.precisions]
    kept = [first, *others] if made.backend.engine else [first]  # a board builds either precision and compares them
    models = [bundle.Source(deployable[name].file, deployable[name].precision, made.typing) for name in kept]
    models += [bundle.Source(file, precision, "weak") for precision, file in made.legacy.items()]
    _, golden = samples(shop, sources["student"].network, GOLDEN_SAMPLES)
    provenance: dict[str, Json] = {
        "edgekd": edgekd.__version__, "data": run.data.fingerprint, "teacher": sources["teacher"].weights.key,
        "student": sources["student"].weights.key, "models": {n: deployable[n].artifact.key for n in kept},
    }  # fmt: skip
    bundle.write(
        folder, name=run.recipe.name, target=made.target, models=models, samples=golden, labels=run.data.classes,
        preprocessing=sources["student"].network.preprocessing, provenance=provenance, verdict=rows[first].verdict,
        task=run.task, assets=run.data.assets,
    )  # fmt: skip


def _begin(recipe: Recipe, opset: int | None, store: Path, quick: bool, say: Say) -> Run:
    say = here().heard(say)
    if quick:
        recipe = _shorter(recipe)
    timings: dict[str, float] = {}
    begun = time.perf_counter()
    subjects = tuple(training.read(spec, recipe.seed, recipe.source) for spec in recipe.tasks)
    timings["data"] = round(time.perf_counter() - begun, 3)
    school = School(recipe, subjects, Store(store, say), store / training.ANSWERS, opset, say)
    run = Run(school, timings, [])
    for found in (subject.data for subject in subjects):
        sizes = {"train": len(found.train), "calibration": len(found.calibration), "test": len(found.test)}
        say("data", name=found.name, classes=len(found.classes), **sizes)
        for text in found.notes:
            run.note(f"data: {text}")
    if quick:
        run.note("--quick: a tenth of the epochs and short measurements; for trying out, not for deciding")
    return run


def _trained(run: Run) -> Trained:
    """The teachers of each task, and the student of them all."""
    school = run.school
    with run.timed("teacher"):
        teachers = [training.teachers(school, subject) for subject in school.subjects]
    with run.timed("distill"):
        student = training.student(school, teachers)
    return teachers, student


def _shorter(recipe: Recipe) -> Recipe:
    """A tenth of the epochs everywhere."""

    def tenth(options: TrainOptions) -> TrainOptions:
        return replace(options, epochs=max(1, options.epochs // 10))

    def task(spec: TaskSpec) -> TaskSpec:
        return replace(spec, teachers=tuple(replace(each, train=tenth(each.train)) for each in spec.teachers))

    assistants = tuple(
        replace(each, epochs=None if each.epochs is None else max(1, each.epochs // 10)) for each in recipe.assistants
    )
    tasks = tuple(task(spec) for spec in recipe.tasks)
    quantize = replace(recipe.quantize, qad_epochs=max(1, recipe.quantize.qad_epochs // 10))
    return replace(recipe, tasks=tasks, assistants=assistants, distill=tenth(recipe.distill), quantize=quantize)
