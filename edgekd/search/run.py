"""search(): several students of one recipe, the best of each precision of them, and one report on all.

space ─► a trial: width or pruning ─► train, export, quantize, measure ─► … ─► finalists ─► timed together ─► report

The teacher is trained once, and what it says of the training samples is kept, as in any run. A candidate gives all the
precisions of its targets at once. Trials are kept in a storage (`trials`) that several processes may share.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekd import __version__, measure, pipeline
from edgekd.clock import Deadline
from edgekd.deploy import Source, row_id
from edgekd.errors import BackendError, EdgekdError, ModelError, ParityError, PartError
from edgekd.outcome import Candidate, Search
from edgekd.pipeline import TIMING_S, Entrant
from edgekd.processes import here
from edgekd.recipe import Recipe, SearchPlan, loss_table
from edgekd.search import candidate as making
from edgekd.search import trials as storing
from edgekd.search.candidate import Found, Lab
from edgekd.search.space import space
from edgekd.search.trials import Finished, Proposal, Trials
from edgekd.types import Comparison, Report, Say, Target, Variant

VERSION = 1  # raised when what a trial remembers, or how it is measured, changes
STORAGE = "search.log"  # in the run folder
MOST = 16  # candidates that are timed together at the end
_REFUSED = (ModelError, ParityError, PartError, BackendError)  # there is no such student, and others may be had


def search(
    recipe: Recipe, targets: Sequence[Target], out: Path, *, plan: SearchPlan, store: Path, threads: int, quick: bool,
    deadline: Deadline, say: Say,
) -> Report:  # fmt: skip
    """Try so many students as the plan says, and leave one report on all of them, with models and bundles, in `out`.

    The first target leads: its accuracy, latency (multiply-accumulates where it cannot run here) and size are what
    the candidates are proposed by, within the budget. Every candidate is made for all targets.

    Args:
        recipe: what to make; its student is the first candidate.
        targets: where it shall run.
        out: the run folder, which exists.
        plan: how many candidates, how long each is trained, where trials are kept.
        store: the folder of finished builds; processes that share the storage should share it, too.
        threads: that latency is measured with.
        quick: a tenth of the epochs and short measurements.
        deadline: no candidate is begun that would not be done by then.
        say: told what happens.

    Raises:
        EdgekdError: the user's data, model, recipe or disk stands in the way.
    """
    recipe.task  # noqa: B018  # one task at a time can be deployed
    found = space(recipe)
    axes = making.objectives(targets[0])
    storage = storing.storage_at(plan.storage or str(out / STORAGE)) if here().first else None
    run = pipeline.begin(recipe, targets[0].opset, store, quick, say, deadline)
    taught_by = pipeline.teachers(run)
    examiner, teacher = None, list[Variant]()
    if here().first:
        with run.timed("accuracy"):
            sources: dict[Any, Source] = {"teacher": taught_by[0][0]}
            examiner, teacher = measure.weights_rows(sources, pipeline.workshop(run, taught_by[0]), run.task)
        if (doubt := measure.guessing(examiner)) is not None:
            run.note(doubt)
    lab = Lab(run, targets, taught_by, examiner, found, plan, threads, quick)
    trials = None
    if here().first:
        trials = storing.open_trials(
            _key(lab), storage, found, count=plan.candidates, objectives=len(axes), seed=recipe.seed, say=run.say
        )
    _try_all(lab, trials, axes)
    return _concluded(lab, trials, teacher, axes, out)


# ---------------------------------------------------------------- trials


def _try_all(lab: Lab, trials: Trials | None, axes: Sequence[str]) -> None:
    """Make candidates until there are as many as asked for, or the time is up."""
    deadline, in_all = lab.run.deadline, min(lab.plan.candidates, len(lab.space.values))

    def may_begin(left: int) -> bool:
        assert trials is not None
        done = trials.finished()
        seconds = [float(each.found["seconds"]) for each in done if each.refused is None]
        if not seconds:  # a report needs one
            return True
        reserve = TIMING_S * len(lab.targets)
        return deadline.fits(f"{left} of {in_all} candidates", max(seconds) + reserve)

    def may_wait() -> bool:
        return deadline.fits("waiting for candidates that other processes have under way", 0.0)

    while True:
        proposal = here().once(lambda: trials.next(may_begin, may_wait) if trials is not None else None)
        if proposal is None:
            return
        with trials.held(proposal) if trials is not None else nullcontext():
            _try(lab, trials, proposal, axes)


def _try(lab: Lab, trials: Trials | None, proposal: Proposal, axes: Sequence[str]) -> None:
    begun_s, at, epochs = time.monotonic(), proposal.at, lab.plan.epochs
    if trials is not None:
        done = len(trials.finished())
        lab.run.say("candidate", name=making.name_of(lab, at, epochs), done=done, of=lab.plan.candidates)

    def examine() -> None:
        assert trials is not None
        found = making.examined(lab, at, school, made, begun_s)
        best = making.best(lab, found.rows, lab.targets[0].name)
        goals = None if best is None else making.goals(found, best, axes)
        if best is None or goals is None:
            trials.refuse(proposal, f"one of {', '.join(axes)} could not be measured")
        else:
            trials.tell(proposal, found.to_json(), goals, making.beyond(lab, best))

    try:
        school, made = making.trained(lab, at, epochs)
        here().once(examine)
    except _REFUSED as problem:
        if at == lab.space.own:  # the recipe's own student: the user must know
            raise
        if trials is not None:
            trials.refuse(proposal, str(problem))


def _key(lab: Lab) -> str:
    """The name of this search in a storage: another recipe, budget or target is another search."""
    run, recipe = lab.run, lab.run.recipe
    subject = run.school.subjects[0]
    facts = [
        VERSION, __version__, recipe.seed, asdict(replace(recipe.student, weights=None)), lab.space.kind,
        [loss_table(term) for term in subject.terms], asdict(recipe.distill), asdict(recipe.augment),
        [asdict(each) for each in recipe.assistants], asdict(recipe.export), asdict(recipe.quantize),
        asdict(recipe.budget), run.data.fingerprint, [source.weights.key for source in lab.taught_by[0]],
        [asdict(target) for target in lab.targets], lab.threads, lab.quick, lab.plan.epochs,
        asdict(recipe.prune) if recipe.prune is not None else None,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{recipe.name}-{digest[:16]}"


# ---------------------------------------------------------------- the end


@dataclass(frozen=True, slots=True)
class _Tried:
    """A candidate that is done."""

    at: int
    found: Found


def _concluded(lab: Lab, trials: Trials | None, teacher: list[Variant], axes: Sequence[str], out: Path) -> Report:
    """Train the best in full where they were not, time the finalists together, and tell."""
    done: list[Finished] = here().once(lambda: trials.finished() if trials is not None else [])
    tried = [_Tried(each.at, Found.of_json(each.found)) for each in done if each.refused is None]
    if not tried:
        raise EdgekdError(
            "no candidate is done", where="--search",
            fix="the others are still at work, or the time budget is too short; run the same command again",
        )  # fmt: skip
    tried += _promoted(lab, tried)
    finalists = here().once(lambda: _finalists(lab, [each.found for each in tried]))
    made = []
    for each in tried:
        if each.found.name in finalists:
            made.append((each, *making.trained(lab, each.at, each.found.epochs)))

    def publish() -> Report:
        entrants = [making.entrant(lab, each.found.name, school, trained) for each, school, trained in made]
        entrants.sort(key=lambda one: finalists.index(_name(one)))
        rows, comparisons = _rows(lab, [each.found for each in tried], entrants, teacher)
        _note(lab, tried, finalists, axes)
        searched = Search(
            asked=lab.plan.candidates, optimizer=storing.version(), objectives=tuple(axes),
            candidates=tuple(_told(lab, done, tried)), epochs=lab.run.recipe.distill.epochs,
            workers=len({each.worker for each in done}),
        )  # fmt: skip
        return pipeline.publish(lab.run, entrants, rows, comparisons, lab.shop, out, search=searched)

    return here().once(publish)


def _name(entrant: Entrant) -> str:
    """The candidate that an entrant is, by the ids of its graphs."""
    return next(graph.id for graph in entrant.made[0].graphs if graph.stage != "teacher").rpartition("/")[0]


def _promoted(lab: Lab, tried: Sequence[_Tried]) -> list[_Tried]:
    """The best candidates of a search with short trainings, trained in full: a quarter of them, from the front."""
    full = lab.run.recipe.distill.epochs
    short = [each for each in tried if each.found.epochs < full]
    if not short:
        return []
    most = math.ceil(lab.plan.candidates / 4)
    names = here().once(lambda: _ranked(lab, [each.found for each in short], lab.targets[0].name)[:most])
    made = []
    for name in names:
        each = next(one for one in short if one.found.name == name)
        about = each.found.seconds * full / each.found.epochs
        what = f"training {name} in full"
        if not here().once(lambda what=what, about=about: lab.run.deadline.fits(what, about)):  # type: ignore[misc]
            continue
        begun_s = time.monotonic()
        school, trained = making.trained(lab, each.at, None)
        found = here().once(
            lambda each=each, school=school, trained=trained, begun_s=begun_s: making.examined(  # type: ignore[misc]
                lab, each.at, school, trained, begun_s
            )
        )
        made.append(_Tried(each.at, found))
    return made


def _ranked(lab: Lab, found: Sequence[Found], target: str) -> list[str]:
    """The candidates that matter on a target, first the one that would be chosen (or is nearest), then the front."""
    rows = [row for each in found for row in each.rows]
    first = making.best(lab, rows, target)
    memory = ("peak_memory_bytes",) if lab.run.recipe.budget.max_memory_bytes is not None else ()
    on, near = making.contenders(found, target, memory)
    excess = {}
    for each in found:
        best = making.best(lab, each.rows, target)
        excess[each.name] = sum(making.beyond(lab, best).values()) if best is not None else math.inf
    on.sort(key=lambda name: excess[name])
    return list(dict.fromkeys([*([str(first.candidate)] if first else []), *on, *near]))


def _finalists(lab: Lab, found: Sequence[Found]) -> list[str]:
    """The candidates that are timed together, of all targets; the ones that would be chosen first."""
    ranked = [_ranked(lab, found, target.name) for target in lab.targets]
    ranked = [names for names in ranked if names] or [[found[0].name]]
    together = dict.fromkeys(names[0] for names in ranked)
    together |= dict.fromkeys(name for names in ranked for name in names)
    names = list(together)
    if len(names) > MOST:
        lab.run.note(
            f"{len(names)} candidates are on a front or near it; the first {MOST} were timed together, which leaves "
            f"out {', '.join(names[MOST:])}"
        )
    return names[:MOST]


def _rows(
    lab: Lab, found: Sequence[Found], entrants: Sequence[Entrant], teacher: Sequence[Variant]
) -> tuple[list[Variant], list[Comparison]]:
    """All rows of the report, those of the finalists with the latency of the common rounds."""
    kept = {row_id(made.target, graph) for each in entrants for made in each.made for graph in made.graphs}
    no_file = "not a finalist: its file is in the store alone"
    rows = [row for each in found for row in each.rows]
    rows = [
        row if row.target is None or row.id in kept else replace(row, missing={**row.missing, "path": no_file})
        for row in rows
    ]
    comparisons: list[Comparison] = []
    theirs: list[Variant] = []
    times: dict[str, Any] = {}
    for at, target in enumerate(lab.targets):
        first = entrants[0]
        teachers = tuple(graph for graph in first.made[at].graphs if graph.stage == "teacher")
        graphs = [graph for each in entrants for graph in each.made[at].graphs if graph.stage != "teacher"]
        together = replace(first.made[at], graphs=(*teachers, *graphs))
        _know(lab, replace(first.made[at], graphs=teachers), first)
        with lab.run.timed(f"bench {target.name}"):
            short = lab.quick or pipeline.is_short(lab.run, len(together.graphs))
            measured, compared, told = measure.latencies(
                together, first.sources, lab.shop, threads=lab.threads, quick=short, wanted=_pairs
            )
        times |= measured
        comparisons += compared
        for text in told:
            lab.run.note(f"{target.name}: {text}")
        theirs += [lab.teacher[row_id(target, graph)] for graph in teachers]
    rows = [replace(row, latency_ms=times[row.id]) if row.id in times else row for row in [*theirs, *rows]]
    weights = [row for row in rows if row.target is None]
    by_target = [row for target in lab.targets for row in rows if row.target == target.name]
    return [*teacher, *weights, *by_target], comparisons


def _know(lab: Lab, made: Any, entrant: Entrant) -> None:
    """The teacher's rows on a target, where no candidate of this process has shown them."""
    if all(row_id(made.target, graph) in lab.teacher for graph in made.graphs):
        return
    assert lab.examiner is not None
    rows, _, _ = measure.target_rows(
        lab.examiner, made, entrant.sources, lab.shop, threads=lab.threads, quick=True, known=lab.teacher
    )
    for row in rows:
        lab.teacher.setdefault(row.id, row)


def _pairs(ids: Sequence[str]) -> list[tuple[str, str]]:
    """Which finalists are compared: each with the teacher (the first), and those of one candidate with each other."""
    first, *others = ids
    of = {name: name.rpartition("/")[0] for name in others}
    pairs = [(name, first) for name in others]
    for later, name in enumerate(others):
        pairs += [(name, earlier) for earlier in others[:later] if of[earlier] == of[name]]
    return pairs


def _note(lab: Lab, tried: Sequence[_Tried], finalists: Sequence[str], axes: Sequence[str]) -> None:
    """What a reader must know of how the figures came about."""
    run, first = lab.run, lab.targets[0].name
    if "latency_ms" not in axes:
        run.note(
            f"nothing can be timed on {first} here: the search went by accuracy, size and multiply-accumulates, and "
            "whether a candidate is fast enough there is measured with its bundle on the board"
        )
    if len(lab.targets) > 1:
        run.note(f"the search was led by {first}, the first target; every candidate was made for all targets")
    others = [each.found.name for each in tried if each.found.name not in finalists]
    timed = any(row.latency_ms is not None for each in tried for row in each.found.rows)
    if others and timed:
        run.note(
            f"latencies of {', '.join(finalists)} are from the same interleaved rounds; those of {', '.join(others)} "
            "are from short rounds of their own with the teacher, and are not held against them"
        )
    if len(lab.space.values) < lab.plan.candidates:
        run.note(f"there are but {len(lab.space.values)} candidates: {lab.space.kind} {_span(lab.space.values)}")
    for text in making.merged_notes([each.found for each in tried if each.found.name in finalists]):
        run.note(text)


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g} to {values[-1]:g}"


def _told(lab: Lab, done: Sequence[Finished], tried: Sequence[_Tried]) -> list[Candidate]:
    """Every candidate for the report: as they were begun, then those that were trained in full."""
    by_number = {each.number: each for each in done}
    found: list[Candidate] = []
    full = lab.run.recipe.distill.epochs
    for number in sorted(by_number):
        each = by_number[number]
        if each.refused is not None:
            name = making.name_of(lab, each.at, lab.plan.epochs)
            epochs = min(lab.plan.epochs or full, full)
            found.append(Candidate(name, lab.space.options(each.at), epochs, None, each.refused))
        else:
            found.append(_candidate(Found.of_json(each.found)))
    later = [each.found for each in tried if each.found.name not in {one.name for one in found}]
    return [*found, *map(_candidate, later)]


def _candidate(found: Found) -> Candidate:
    options: Mapping[str, float] = found.options
    return Candidate(found.name, dict(options), found.epochs, found.seconds)
