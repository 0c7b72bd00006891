"""One candidate of a search: trained, exported, measured, and what is remembered of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from edgekd import measure, pipeline, plugins, report
from edgekd.deploy import Graph, Source, Workshop, deploy
from edgekd.measure import Examiner
from edgekd.outcome import Nearest
from edgekd.pipeline import Entrant, Run, Trained
from edgekd.recipe import SearchPlan
from edgekd.search.space import Space, changed, trained_for
from edgekd.training import School
from edgekd.types import Backend, Json, Target, Variant


@dataclass(frozen=True, slots=True)
class Lab:
    """What candidates are made and measured with. `teacher` is filled as its rows become known."""

    run: Run
    targets: Sequence[Target]
    taught_by: list[tuple[Source, ...]]
    examiner: Examiner | None  # None in a process that measures nothing, since the first one does
    space: Space
    plan: SearchPlan
    threads: int
    quick: bool
    teacher: dict[str, Variant] = field(default_factory=dict)  # its rows by id

    @property
    def shop(self) -> Workshop:
        """What the steps after training work with."""
        return pipeline.workshop(self.run, self.taught_by[0])


@dataclass(frozen=True, slots=True)
class Found:
    """What is remembered of a candidate: all that the report needs, but no files."""

    name: str
    options: Mapping[str, float]
    epochs: int
    seconds: float
    rows: tuple[Variant, ...]  # the weights, then each target's
    teacher_ms: Mapping[str, float]  # target → median of the teacher in the same rounds
    notes: Mapping[str, tuple[str, ...]]  # by target

    def to_json(self) -> dict[str, Json]:
        """For the storage."""
        made: dict[str, Json] = asdict(self)
        return made

    @staticmethod
    def of_json(found: Mapping[str, Any]) -> Found:
        """What `to_json` has made."""
        return _adapter().validate_python(dict(found))


@cache
def _adapter() -> TypeAdapter[Found]:
    return TypeAdapter(Found)


def name_of(lab: Lab, at: int, epochs: int | None) -> str:
    """The candidate in ids; one that is not trained in full says so: w12-5epochs."""
    full = lab.run.recipe.distill.epochs
    short = epochs is not None and epochs < full
    return lab.space.name(at) + (f"-{epochs}epochs" if short else "")


def trained(lab: Lab, at: int, epochs: int | None) -> tuple[School, Trained]:
    """The student of a candidate, trained by all processes, or from the store."""
    recipe = trained_for(changed(lab.run.recipe, lab.space, at), epochs)
    school = replace(lab.run.school, recipe=recipe)
    return school, pipeline.student(lab.run, school, lab.taught_by, lab.targets)


def entrant(lab: Lab, name: str, school: School, made: Trained) -> Entrant:
    """All that is made of a student for each target, under ids of its own."""
    sources = pipeline.sources_of(made)
    deployed = []
    for target in lab.targets:
        with lab.run.timed(f"deploy {target.name}"):
            found = deploy(lab.shop, target, sources["teacher"], sources["student"])
        deployed.append(replace(found, graphs=tuple(_own(graph, name) for graph in found.graphs)))
    return Entrant(school, made, tuple(deployed))


def _own(graph: Graph, name: str) -> Graph:
    return graph if graph.stage == "teacher" else replace(graph, id=f"{name}/{graph.id}")


def examined(lab: Lab, at: int, school: School, made: Trained, begun_s: float) -> Found:
    """Every row of a candidate, its latency in short rounds of its own together with the teacher."""
    assert lab.examiner is not None
    name = name_of(lab, at, school.recipe.distill.epochs)
    whole = entrant(lab, name, school, made)
    rows = [
        replace(measure.weights_row(lab.examiner, stage, source, f"{name}/{stage}"), candidate=name)
        for stage, source in whole.sources.items()
        if stage != "teacher"
    ]
    teacher_ms, notes = {}, {}
    for deployment in whole.made:
        target = deployment.target.name
        with lab.run.timed(f"bench {target}"):
            found, _, told = measure.target_rows(
                lab.examiner, deployment, whole.sources, lab.shop, threads=lab.threads, quick=True, known=lab.teacher
            )
        for row in found:
            if row.stage == "teacher":
                lab.teacher.setdefault(row.id, row)
                if row.latency_ms is not None:
                    teacher_ms[target] = row.latency_ms.p50
            else:
                rows.append(_of(row, name))
        notes[target] = tuple(dict.fromkeys([*deployment.notes, *told]))
    return Found(
        name, lab.space.options(at), school.recipe.distill.epochs, round(time.monotonic() - begun_s, 3), tuple(rows),
        teacher_ms, notes,
    )  # fmt: skip


def _of(row: Variant, name: str) -> Variant:
    """A row of a candidate, timed in its own rounds."""
    latency = None if row.latency_ms is None else replace(row.latency_ms, rounds=name)
    return replace(row, candidate=name, latency_ms=latency)


def best(lab: Lab, rows: Sequence[Variant], target: str) -> Variant | None:
    """The variant that stands for a candidate: its choice on a target, else what comes nearest to the budget."""
    budget, metric = lab.run.recipe.budget, lab.run.task.metric
    teacher = replace(rows[0], id="")  # none of these is the teacher
    chosen = report.choose(rows, budget).get(target)
    near: dict[str, Nearest] = report.nearest(rows, teacher, budget, {target: chosen}, metric)
    wanted = chosen or (near[target].variant if target in near else None)
    return next((row for row in rows if row.id == wanted), None)


def objectives(target: Target) -> tuple[str, ...]:
    """What a search makes small on a target: its latency where it can be measured here, else what there is to compute.

    Raises:
        PartError: the target names a backend that does not exist.
    """
    backend: Backend = plugins.build("backends", target.backend, where=f"targets/{target.name}.toml: backend")
    return ("drop", "latency_ms" if backend.available() is None else "macs", "size_bytes")


def goals(found: Found, variant: Variant, axes: Sequence[str]) -> list[float] | None:
    """The objectives of a candidate; a latency as a part of the teacher's in the same rounds. None: one is missing."""
    values = []
    for axis in axes:
        value = report.figure(variant, axis)
        if axis == "latency_ms" and value is not None:
            teacher = found.teacher_ms.get(str(variant.target))
            value = value / teacher if teacher else None
        if value is None or not math.isfinite(value):
            return None
        values.append(value)
    return values


def beyond(lab: Lab, variant: Variant) -> dict[str, float]:
    """By how much a variant passes each limit of the budget, as a part of it; 0 where it is not known to."""
    verdict = report.judge(variant, replace(variant, id=""), lab.run.recipe.budget, lab.run.task.metric)
    return {limit.name: limit.excess for limit in verdict.limits}


def contenders(found: Sequence[Found], target: str, also: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The candidates on the front of a target, and those that a short timing may have kept off it.

    Latencies of different rounds are held against each other as parts of the teacher's in the same rounds. One that
    is beaten by less than a tenth in latency may belong to the front, too.
    """
    rows = []
    for each in found:
        teacher = each.teacher_ms.get(target)
        for row in report.deployable(each.rows, target):
            if row.latency_ms is not None and teacher:
                latency = replace(row.latency_ms, p50=row.latency_ms.p50 / teacher, rounds=None)
                row = replace(row, latency_ms=latency)
            rows.append(row)
    exact = report.front(rows, target, also)
    on = [row for name in exact.variants for row in rows if row.id == name]
    near = [row for row in rows if row.id not in exact.variants and _may_be(row, rows, exact.axes)]
    names = [list(dict.fromkeys(str(row.candidate) for row in part)) for part in (on, near)]
    return names[0], [name for name in names[1] if name not in names[0]]


_SLACK = 1.1  # a short measurement may be wrong by so much


def _may_be(row: Variant, rows: Sequence[Variant], axes: tuple[str, ...]) -> bool:
    """Whether no other one beats it even when its own latency is taken to be a tenth lower."""
    own = [report.figure(row, axis) for axis in axes]
    if None in own or "latency_ms" not in axes:
        return False
    place = axes.index("latency_ms")
    less = [(value or 0.0) / (_SLACK if at == place else 1.0) for at, value in enumerate(own)]
    for other in rows:
        theirs = [report.figure(other, axis) for axis in axes]
        if other.id != row.id and None not in theirs:
            pairs = list(zip(theirs, less, strict=True))
            if all((a or 0.0) <= b for a, b in pairs) and any((a or 0.0) < b for a, b in pairs):
                return False
    return True


def merged_notes(found: Sequence[Found]) -> list[str]:
    """The notes of all candidates, each once, with whom it is about."""
    of: dict[tuple[str, str], list[str]] = {}
    for each in found:
        for target, notes in each.notes.items():
            for note in notes:
                names = of.setdefault((target, note), [])
                names += [each.name] if each.name not in names else []
    return [f"{target}: {note} ({', '.join(names)})" for (target, note), names in of.items()]
