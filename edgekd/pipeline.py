"""compress() and distill(): the order of the steps, and nothing else.

recipe ─► teacher, student, data ─► distill ─► export ─► quantize ─► compile ─► bench ─► report ─► bundle
          └──── shared by every target ─────┘  └──────────── for each target ──────────────────────────┘
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import edgekd
from edgekd import bundle, measure, report, rounds, training
from edgekd.bench import conditions
from edgekd.clock import Deadline
from edgekd.deploy import Deployment, Source, Workshop, deploy, row_id, samples
from edgekd.outcome import Pruning, Search
from edgekd.processes import here
from edgekd.recipe import Recipe, TaskSpec
from edgekd.report.account import account_of
from edgekd.report.story import remains
from edgekd.rounds import Outcome
from edgekd.store import Store, copy, write_text
from edgekd.training import School
from edgekd.types import Comparison, Dataset, Json, Report, Say, Stage, Target, Task, TrainOptions, Variant

GOLDEN_SAMPLES = 8
TIMING_S = 3.0  # that timing a model at full length takes, warming up included


@dataclass(frozen=True, slots=True)
class Trained:
    """The teachers of each task, the student, and how it was pruned, where it was cut out of a teacher."""

    teachers: list[tuple[Source, ...]]
    student: Source
    pruned: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What every step needs; `timings_s` and `notes` are filled as the run goes on."""

    school: School
    timings_s: dict[str, float]
    notes: list[str]

    @property
    def deadline(self) -> Deadline:
        """When it should have ended."""
        return self.school.deadline

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


@dataclass(frozen=True, slots=True)
class Entrant:
    """A student with all that was made of it, for each target."""

    school: School
    trained: Trained
    made: tuple[Deployment, ...]

    @property
    def sources(self) -> dict[Stage, Source]:
        """The teacher that it is held against, and itself."""
        return sources_of(self.trained)


def compress(
    recipe: Recipe, targets: Sequence[Target], out: Path, *, store: Path, threads: int, quick: bool, say: Say,
    deadline: Deadline | None = None,
) -> Report:  # fmt: skip
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
        deadline: when the run should have ended; optional steps that do not fit are left out, and the report says so.

    Raises:
        EdgekdError: the user's data, model, recipe or disk stands in the way; `out` holds no half-written file.
    """
    recipe.task  # noqa: B018  # one task at a time can be deployed
    run = begin(recipe, targets[0].opset, store, quick, say, deadline)
    trained = student(run, run.school, teachers(run), targets)
    return here().once(lambda: _compressed(run, trained, targets, out, threads=threads, quick=quick))


def quantize(
    recipe: Recipe, targets: Sequence[Target], out: Path, *, store: Path, threads: int, quick: bool, say: Say
) -> Report:
    """Quantize the model of [teacher] for each target, without a student, and leave what `compress` leaves in `out`.

    In the report it is the teacher as it is in float, and the student in every form that can be deployed; beside it
    quantize.json says how each form was made.

    Raises:
        EdgekdError: the user's data, model, recipe or disk stands in the way; `out` holds no half-written file.
    """
    recipe.task  # noqa: B018  # one task at a time can be deployed
    run = begin(recipe, targets[0].opset, store, quick, say)
    run.note("no student was distilled: here it is the model of [teacher] itself, in the forms that can be deployed")
    taught_by = teachers(run)
    trained = Trained(taught_by, taught_by[0][0])
    return here().once(lambda: _compressed(run, trained, targets, out, threads=threads, quick=quick, alone=True))


def distill(
    recipe: Recipe, out: Path, *, store: Path, quick: bool, say: Say, targets: Sequence[Target] = (),
    name: str = "distill.json",
) -> dict[str, Json]:  # fmt: skip
    """Train the teachers and the student of a recipe, and leave student.safetensors and distill.json in `out`.

    Of a student that is cut out of its teacher student.shapes.json says how its layers differ (`pruning.restore`).

    Args:
        targets: whose kernels decide on what widths are rounded to, in pruning.
        name: of the file that tells about it.

    Returns:
        What distill.json holds: for each task its metric with the interval, for the teachers and the student, the
        drop and agreement against the first teacher; the pairs of layers that were compared; how it was pruned;
        seconds and notes.

    Raises:
        EdgekdError: the user's data, model, recipe or disk stands in the way; `out` holds no half-written file.
    """
    run = begin(recipe, None, store, quick, say)
    trained = student(run, run.school, teachers(run), targets)
    return here().once(lambda: _judged(run, trained, out, name))


def _judged(run: Run, trained: Trained, out: Path, name: str) -> dict[str, Json]:
    """What `distill` gives and leaves."""
    taught_by, distilled, pruned = trained.teachers, trained.student, trained.pruned
    with run.timed("accuracy"):
        tasks: list[Json] = [
            measure.task_figures(subject, found, distilled.network)
            for subject, found in zip(run.school.subjects, taught_by, strict=True)
        ]
    copy(distilled.weights.path / training.WEIGHTS, out / "student.safetensors")
    if pruned is not None:
        copy(pruned.cut.weights.path / rounds.SHAPES, out / "student.shapes.json")
    write_text(out / "recipe.toml", training.resolved(run.school, distilled).to_toml(out))
    found: dict[str, Json] = {
        "schema": 1, "name": run.recipe.name, "tasks": tasks, "training": dict(distilled.weights.meta),
        "timings_s": dict(run.timings_s), "environment": conditions.environment(), "notes": list(run.notes),
    }  # fmt: skip
    if pruned is not None:
        found["pruning"] = asdict(pruned.account)
    write_text(out / name, json.dumps(found, indent=1) + "\n")
    return found


def distilled_text(found: dict[str, Json], out: Path, name: str = "distill.json") -> str:
    """What distill.json says, for people: a line for each task."""
    lines = []
    tasks: Any = found["tasks"]
    for task in tasks:
        student, teachers = task["student"], ", ".join(f"{each['accuracy']['value']:.4f}" for each in task["teachers"])
        low, high = student["accuracy"]["low"], student["accuracy"]["high"]
        head = f"{task['head']}: " if task["head"] else ""
        lines.append(
            f"{head}{task['metric']} {student['accuracy']['value']:.4f} ({low:.4f} to {high:.4f}), teacher {teachers}"
        )
    cut: Any = found.get("pruning")
    if cut:
        lines.append(remains(Pruning(**cut)))
    return "\n".join([*lines, f"{out / 'student.safetensors'}, {out / name}"])


def _compressed(
    run: Run, trained: Trained, targets: Sequence[Target], out: Path, *, threads: int, quick: bool, alone: bool = False
) -> Report:
    """All that comes after training; `alone`: of one model, with an account of its forms."""
    sources, shop = sources_of(trained), workshop(run, trained.teachers[0])
    timed = partial(measure.fastest, shop=shop, threads=threads, quick=quick)
    with run.timed("accuracy"):
        examiner, rows = measure.weights_rows(sources, shop, run.task)
    if (doubt := measure.guessing(examiner)) is not None:
        run.note(doubt)
    made: list[Deployment] = []
    comparisons: list[Comparison] = []
    for target in targets:
        with run.timed(f"deploy {target.name}"):
            made.append(deploy(shop, target, sources["teacher"], sources["student"], timed))
        with run.timed(f"bench {target.name}"):
            short = quick or is_short(run, len(made[-1].graphs))
            found, compared, told = measure.target_rows(examiner, made[-1], sources, shop, threads=threads, quick=short)
        rows += found
        comparisons += compared
        for text in (*made[-1].notes, *told):
            run.note(f"{target.name}: {text}")
    command = f"{'quantize' if alone else 'compress'} recipe.toml"
    told_of = publish(run, [Entrant(run.school, trained, tuple(made))], rows, comparisons, shop, out, command=command)
    if alone:
        accounts = {row_id(each.target, graph): graph.artifact.meta for each in made for graph in each.graphs}
        write_text(out / "quantize.json", json.dumps(account_of(told_of, accounts, "pytorch"), indent=1) + "\n")
    return told_of


def sources_of(trained: Trained) -> dict[Stage, Source]:
    """The teacher of the one task that a student is held against, the student, and what it was cut down to first."""
    found: dict[Stage, Source] = {"teacher": trained.teachers[0][0], "student": trained.student}
    return found if trained.pruned is None else found | {"pruned": trained.pruned.cut}


def workshop(run: Run, taught_by: Sequence[Source]) -> Workshop:
    """What the steps after training work with; `taught_by` are the teachers of the one task."""
    recipe = run.recipe
    return Workshop(
        run.store, run.data, recipe.export.preprocessing, recipe.quantize.precisions, run.say, run.deadline,
        recipe.quantize, run.task, training.recovery(run.school, taught_by),
    )  # fmt: skip


def is_short(run: Run, models: int) -> bool:
    """Whether so many models must be timed as shortly as with --quick, since the time budget is used up."""
    return not run.deadline.fits("timing at full length; short measurements instead", models * TIMING_S)


def publish(
    run: Run, entrants: Sequence[Entrant], rows: Sequence[Variant], comparisons: Sequence[Comparison], shop: Workshop,
    out: Path, *, search: Search | None = None, command: str = "compress recipe.toml",
) -> Report:  # fmt: skip
    """Judge, choose, and leave everything in the run folder.

    Args:
        run: what was made, with the notes and timings so far.
        entrants: the students whose files are kept and may be bundled; the first is told of where nothing is chosen.
        rows: the teacher first; those of students that are no entrants are told of, and have no files.
        comparisons: of latencies.
        shop: that the graphs are from.
        out: the run folder.
        search: what was tried, where there was a search.
    """
    files = {row_id(m.target, g): g.file for each in entrants for m in each.made for g in m.graphs}
    paths = {name: f"models/{name}{file.suffix}" for name, file in files.items()}
    rows = [replace(row, path=paths.get(row.id)) for row in rows]
    rows = [replace(row, verdict=report.judge(row, rows[0], run.recipe.budget, run.task.metric)) for row in rows]
    chosen = report.choose(rows, run.recipe.budget, comparisons)
    targets = [made.target.name for made in entrants[0].made]
    told_of = _owner(entrants, chosen.get(targets[0]))
    of, made_of = told_of.school, told_of.trained.student
    resolved = training.resolved(of, made_of).to_toml(out)
    kept = resolved if search is None else run.recipe.to_toml(out)
    for made in entrants[0].made:
        if made.unavailable is not None:
            run.note(f"{made.target.name}: no engine was built here. {made.unavailable}")
    if len(run.recipe.task.teachers) > 1:
        count = len(run.recipe.task.teachers)
        run.note(f"the student has {count} teachers; it is compared with the first of them")
    matched = training.matched(of, made_of)
    for text in (*run.deadline.notes(), *(note for each in matched if not each.pairs for note in each.notes)):
        run.note(text)
    found = report.concluded(Report(
        schema=report.SCHEMA, name=run.recipe.name, teacher="teacher", variants=tuple(rows),
        chosen={name: chosen.get(name) for name in targets}, budget=run.recipe.budget,
        environment=conditions.environment(), recipe_sha256=hashlib.sha256(kept.encode()).hexdigest(),
        timings_s=run.timings_s, notes=tuple(run.notes), comparisons=tuple(comparisons), metric=run.task.metric,
        training=training.told(of, made_of), search=search,
        correspondence=tuple(each for each in matched if each.pairs),
        command=command, pruning=told_of.trained.pruned.account if told_of.trained.pruned is not None else None,
        sensitivity=tuple(each.sensitivity for each in told_of.made if each.sensitivity is not None),
    ))  # fmt: skip
    for name, file in files.items():
        copy(file, out / paths[name])
    write_text(out / "recipe.toml", kept)
    if search is not None:
        write_text(out / "chosen.toml", resolved)
    for at, name in enumerate(targets):
        near = found.nearest.get(name)
        owner = _owner(entrants, found.chosen[name] or (near.variant if near else None))
        _bundle(run, owner, at, found, shop, out / "bundles" / name)
    report.render(found, out)
    return found


def _owner(entrants: Sequence[Entrant], variant: str | None) -> Entrant:
    """The student that a variant is of; the first one, where it is of none of them."""
    for each in entrants:
        if any(row_id(made.target, graph) == variant for made in each.made for graph in made.graphs):
            return each
    return entrants[0]


def _bundle(run: Run, owner: Entrant, at: int, found: Report, shop: Workshop, folder: Path) -> None:
    """The bundle of one target: the chosen model first; where none meets the budget, the one that misses it least."""
    made, sources = owner.made[at], owner.sources
    rows = {row.id: row for row in found.variants}
    graphs = {row_id(made.target, graph): graph for graph in made.graphs if graph.stage != "teacher"}
    deployable = {name: graph for name, graph in graphs.items() if graph.file.suffix == ".onnx"}
    drops = {name: row.drop.value for name, row in rows.items() if name in deployable and row.drop is not None}
    near = found.nearest.get(made.target.name)
    wanted = (found.chosen[made.target.name], near.variant if near else None)
    first = next((name for name in wanted if name in deployable), None)
    least = sorted(drops, key=lambda name: (drops[name], name))  # of several in one precision, what loses least
    first = first or least[0]
    others = {deployable[name].precision: name for name in reversed(least)}
    others = {precision: name for precision, name in others.items() if precision in made.target.precisions}
    others.pop(deployable[first].precision, None)
    # a board builds either precision and compares them
    kept = [first, *(name for name in deployable if name in others.values())] if made.backend.engine else [first]
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


def begin(
    recipe: Recipe, opset: int | None, store: Path, quick: bool, say: Say, deadline: Deadline | None = None
) -> Run:
    """A run with its data read and its store open; nothing is trained yet."""
    say = here().heard(say)
    if quick:
        recipe = _shorter(recipe)
    timings: dict[str, float] = {}
    begun = time.perf_counter()
    subjects = tuple(training.read(spec, recipe.seed, recipe.source) for spec in recipe.tasks)
    timings["data"] = round(time.perf_counter() - begun, 3)
    school = School(recipe, subjects, Store(store, say), store / training.ANSWERS, opset, say, deadline or Deadline())
    run = Run(school, timings, [])
    for found in (subject.data for subject in subjects):
        sizes = {"train": len(found.train), "calibration": len(found.calibration), "test": len(found.test)}
        say("data", name=found.name, classes=len(found.classes), **sizes)
        for text in found.notes:
            run.note(f"data: {text}")
    if quick:
        run.note("--quick: a tenth of the epochs and short measurements; for trying out, not for deciding")
    return run


def teachers(run: Run) -> list[tuple[Source, ...]]:
    """The teachers of each task."""
    with run.timed("teacher"):
        return [training.teachers(run.school, subject) for subject in run.school.subjects]


def student(run: Run, school: School, taught_by: list[tuple[Source, ...]], targets: Sequence[Target]) -> Trained:
    """The student of all tasks, as the school's recipe has it: distilled, or cut out of its teacher and distilled."""
    if school.recipe.prune is None:
        with run.timed("distill"):
            return Trained(taught_by, training.student(school, taught_by))
    with run.timed("prune and distill"):
        pruned = rounds.student(school, taught_by, targets)
    for text in pruned.notes:
        run.note(text)
    return Trained(taught_by, pruned.student, pruned)


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
    prune = recipe.prune and replace(recipe.prune, epochs=max(1, recipe.prune.epochs // 10))
    quantize = replace(recipe.quantize, qad_epochs=max(1, recipe.quantize.qad_epochs // 10))
    return replace(
        recipe, tasks=tasks, assistants=assistants, distill=tenth(recipe.distill), prune=prune, quantize=quantize
    )
