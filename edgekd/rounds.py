"""A student cut out of its teacher: prune, distil, prune again, each a step of the store.

teacher ─► cut ─► distil ─► cut ─► distil ─► … ─► cut ─► distil ([distill].epochs) ─► student

Each round takes at most [prune].step of what is left, and is distilled from the teacher itself. Cutting less at a time
loses less than can be won back (Muralidharan et al.: Compact Language Models via Pruning and Knowledge Distillation,
NeurIPS 2024; He, Zhang, Sun, ICCV 2017).
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import export, plugins, pruning, training
from edgekd import target as targets
from edgekd.bench import conditions, latency
from edgekd.correspondence.pruned import remember
from edgekd.data.preprocessed import normalise
from edgekd.deploy import Source
from edgekd.distillation.objective import Objective, Term
from edgekd.distillation.samples import Samples
from edgekd.errors import ModelError
from edgekd.goals import Measure, Prune, compared
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.outcome import LeftAlone, Pruning
from edgekd.pruning import cost, shapes
from edgekd.recipe import PRUNED
from edgekd.training import WEIGHTS, School, Subject
from edgekd.types import Augment, Backend, Json, ModelSpec, Outputs, Target

SHAPES = "shapes.json"
STATISTICS_SAMPLES = 2048  # of training, that batch normalisation is estimated from
GRADIENT_SAMPLES = 512  # of training, that "taylor" takes its gradients from
_BATCH = 128
_MOST_ROUNDS = 40
_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Outcome:
    """A pruned student, the network that its last distillation began with, and the account of it all."""

    student: Source
    cut: Source
    account: Pruning
    notes: tuple[str, ...]


def count(part: float, step: float) -> int:
    """Rounds that leave `part`, when each takes at most `step` of what is left."""
    if step >= 1:
        return 1
    return max(1, math.ceil(math.log(part) / math.log(1 - step) - _SLACK))


def student(school: School, taught_by: Sequence[Sequence[Source]], on: Sequence[Target]) -> Outcome:
    """The student of a recipe with [prune], cut out of the first teacher of its one task.

    Args:
        on: targets; latency is measured with the runtime of the first one that runs here.

    Raises:
        ModelError: the teacher cannot be cut, or not so far.
    """
    prune = school.recipe.prune
    assert prune is not None
    teacher = taught_by[0][0]
    rounds = _Rounds(school, prune, teacher, on)
    between = replace(school, opset=None)  # what comes between is never deployed
    now, done = teacher, list[dict[str, Any]]()
    while len(done) < _MOST_ROUNDS:
        cut, last_one = rounds.next(now, len(done))
        done.append(dict(cut.weights.meta))
        if last_one:
            last = training.distilled(school, ModelSpec(PRUNED), school.recipe.distill.epochs, taught_by, start=cut)
            return Outcome(last, cut, rounds.account(done), tuple(rounds.notes))
        now = training.distilled(between, ModelSpec(PRUNED), prune.epochs, taught_by, start=cut)
    raise ModelError(f"after {_MOST_ROUNDS} rounds the goal is not reached", where="prune.step", fix="make it larger")


class _Rounds:
    """What all rounds of one student have in common."""

    def __init__(self, school: School, prune: Prune, teacher: Source, on: Sequence[Target]) -> None:
        self.school, self.prune, self.teacher = school, prune, teacher
        self.subject: Subject = school.subjects[0]
        self.notes: list[str] = []
        self.round_to = prune.round_to or math.lcm(*(each.pruning.channel_multiple for each in on))
        self.measure, asked = prune.goal
        teacher.network.cpu()
        self.inputs = self._inputs(np.arange(min(2, len(self.subject.data.train))))
        self.timed_on = _timed_on(on, self.notes) if self.measure == "latency_ms" else None
        module = teacher.network.module.eval()
        self.macs, self.parameters = cost.macs(module, self.inputs), cost.parameters(module)
        known: dict[Measure, float] = {"macs": self.macs, "parameters": self.parameters}
        if self.measure in known:
            self.goal, self.whole = asked * known[self.measure], known[self.measure]
        else:
            self.goal = asked
            self.whole = float(cost.size_bytes(module)) if self.measure == "size_bytes" else float(self.macs)

    def next(self, now: Source, number: int) -> tuple[Source, bool]:
        """The network after one more round of cutting, a step of the store, and whether that was the last one."""
        school, prune = self.school, self.prune
        self.teacher.network.cpu()  # where the last distillation may have left it
        asked, last = self._asked(number)
        # Of a goal that is known beforehand only this round's part: goals whose rounds keep the same parts share them.
        # A quarter is four rounds of 0.71 and a half two of them; 0.6 is two of 0.77, of which neither has any.
        # What is left free of a latency is told where it is timed, so that other cuts keep their keys.
        options: dict[str, Json] = {
            "measure": self.measure, "at_most": asked, "step": None if last is not None else prune.step,
            "importance": prune.importance, "global_ranking": prune.global_ranking, "round_to": self.round_to,
            "ignore": list(prune.ignore), "seed": school.recipe.seed, "data": self.subject.data.fingerprint,
            "timed_on": [self.timed_on.name, conditions.device_name(), pruning.SLACK] if self.timed_on else None,
        }  # fmt: skip

        def build(work: Path) -> Mapping[str, Json]:
            made, reached = self._cut(now.network.module, asked, number)
            weights.save(work / WEIGHTS, made.module, {})
            made.shapes.write(work / SHAPES)
            facts: dict[str, Json] = {
                "reached": reached, "before": made.before, "after": made.after,
                "macs": cost.macs(made.module, self.inputs), "parameters": cost.parameters(made.module),
                "layers": {name: list(sizes) for name, sizes in made.layers.items()},
                "left_alone": [asdict(each) | {"layers": list(each.layers)} for each in made.left_alone],
            }  # fmt: skip
            school.say("pruned", round=number + 1, macs=facts["macs"], parameters=facts["parameters"])
            return facts

        parents = [now.weights, *([] if now is self.teacher else [self.teacher.weights])]
        made = school.store.step("cut", pruning.VERSION, options, parents, build)
        module = pruning.traceable(self.teacher.network.module)
        found = shapes.read(made.path / SHAPES)
        shapes.apply(module, found)
        weights.load(made.path / WEIGHTS, module)
        remember(module, found.kept, found.origin)
        reached = bool(made.meta["reached"]) if last is None else last
        return Source(self._network(module).eval(), made), reached

    def account(self, done: Sequence[Mapping[str, Any]]) -> Pruning:
        """All rounds together."""
        layers: dict[str, tuple[int, int]] = {}
        for each in done:
            for name, (before, after) in each["layers"].items():
                layers[name] = (layers.get(name, (before, after))[0], after)
        left = []
        for one in done[-1]["left_alone"]:
            untouched = tuple(layer for layer in one["layers"] if layer not in layers)
            if untouched:
                left.append(LeftAlone(untouched, one["reason"]))
        last = done[-1]
        return Pruning(
            measure=self.measure, goal=self.goal, before=done[0]["before"], after=last["after"],
            importance=self.prune.importance, round_to=self.round_to, rounds=len(done),
            macs_before=self.macs, macs_after=last["macs"],
            parameters_before=self.parameters, parameters_after=last["parameters"],
            layers=layers, left_alone=tuple(left),
        )  # fmt: skip

    def _asked(self, number: int) -> tuple[float, bool | None]:
        """What this round may leave of the measure, and whether it is the last one; None: a measurement tells."""
        if self.measure == "latency_ms":
            return self.goal, None
        if self.goal >= self.whole:
            raise self._enough(self.whole)
        rounds = count(self.goal / self.whole, self.prune.step)
        if number + 1 == rounds:
            return math.floor(self.goal), True
        return math.floor(self.whole * (self.goal / self.whole) ** ((number + 1) / rounds)), False

    def _cut(self, module: nn.Module, asked: float, number: int) -> tuple[pruning.Cut, bool]:
        """One round, and whether it reached what was asked for."""
        try:
            if self.measure == "latency_ms":
                return self._cut_by_time(module, asked, number)
            return self._pruned(module, self.measure, asked, number), True
        except pruning.OutOfReach as problem:
            least, part = compared(self.measure, problem.least, asked)
            raise ModelError(
                f"{self._compared(problem.least)[1]} is out of reach: round {number + 1} has to leave {part}, and with "
                f"nine tenths of every layer cut that can be cut it leaves {least}",
                where=self._where, fix=problem.fix,
            ) from problem  # fmt: skip

    def _cut_by_time(self, module: nn.Module, asked: float, number: int) -> tuple[pruning.Cut, bool]:
        timer = self._timer()
        before_ms = timer(module)
        if before_ms <= asked and number == 0:
            raise self._enough(before_ms)
        if before_ms > asked:
            step = self._one_step(module, number)
            if step is not None:
                took_ms = timer(step.module)
                self.school.say("pruned latency", round=number + 1, milliseconds=took_ms)
                if took_ms > asked:
                    return replace(step, before=before_ms, after=took_ms), False
        cut = self._pruned(module, "latency_ms", asked, number)  # nothing is cut where the goal is kept already
        return cut, cut.after <= asked

    def _one_step(self, module: nn.Module, number: int) -> pruning.Cut | None:
        """A whole step of the work gone; None: so much cannot be cut, and less may be enough."""
        part = max(1 - self.prune.step, 0.1)
        try:
            return self._pruned(module, "macs", cost.macs(module, self.inputs) * part, number)
        except pruning.OutOfReach:
            return None

    def _enough(self, found: float) -> ModelError:
        """The teacher costs no more than the goal."""
        had, goal = compared(self.measure, found, self.goal)
        return ModelError(f"the teacher costs {had} already, and {goal} is the goal", where=self._where)

    def _reachable(self, smallest: nn.Module, untouched: str) -> None:
        """Raise ModelError where all rounds together cannot reach the goal, before the first one is trained."""
        timer = self._timer() if self.measure == "latency_ms" else None
        for _ in range(2 if timer else 1):  # a timing that was disturbed once refuses nothing
            found = pruning.measured(self.measure, smallest, self.inputs, timer)
            if found <= self.goal:
                return
        costs, goal = self._compared(found)
        fix = "ask for less"
        if self.round_to > 1:
            fix += f", or for channels in multiples of less than {self.round_to} (prune.round_to)"
        if untouched:
            fix += f"; left alone are {untouched}"
        raise ModelError(
            f"with nine tenths of every layer that can be cut gone in every round it still costs {costs}, and {goal} "
            "is the goal",
            where=self._where,
            fix=fix,
        )

    def _compared(self, found: float) -> tuple[str, str]:
        """A cost and the goal, as the user put it."""
        return compared(self.measure, found, self.goal, self.whole)

    @property
    def _where(self) -> str:
        return f"{self.school.recipe.source}: prune.{self.measure}"

    def _most_rounds(self) -> int:
        """As many as there may be, of a latency as many as are ever made."""
        return _MOST_ROUNDS if self.timed_on is not None else count(self.goal / self.whole, self.prune.step)

    def _pruned(self, module: nn.Module, measure: Measure, goal: float, number: int) -> pruning.Cut:
        return pruning.prune(
            module, self.inputs, measure, goal, self.prune,
            seed=self.school.recipe.seed, round_to=self.round_to, architecture=self.teacher.network.module,
            gradients=self._gradients, timer=self._timer() if measure == "latency_ms" else None,
            batches=lambda: map(self._inputs, self._spread(STATISTICS_SAMPLES)),
            ahead=pruning.Ahead(self._most_rounds(), self._reachable) if number == 0 else None,
        )  # fmt: skip

    def _spread(self, most: int) -> Iterable[np.ndarray]:
        """Training samples from all over the split, a batch at a time."""
        size = len(self.subject.data.train)
        order = np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))
        return (order[at : at + _BATCH] for at in range(0, len(order), _BATCH))

    def _inputs(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """Training samples as the module takes them."""
        batch = next(iter(self.subject.data.train.batches([indices])))
        stored = (torch.from_numpy(np.ascontiguousarray(batch.inputs[spec.name])) for spec in self._specs())
        return self.teacher.network.prepare(*stored)

    def _specs(self) -> Iterator[Any]:
        return iter(self.teacher.network.inputs)

    def _gradients(self, module: nn.Module) -> None:
        """Of the task's own loss on labels, summed over training samples."""
        subject = self.subject
        term = subject.task.label_loss
        loss = Term(plugins.bind("losses", term.part, where="prune.importance"), term.weight)
        objective = Objective([loss], subject.task, len(subject.data.classes))
        samples = Samples(
            subject.data, Augment(), batch_size=_BATCH, views=1, seed=0, device=torch.device("cpu")
        )  # as they are
        network = self._network(module)
        for indices in self._spread(GRADIENT_SAMPLES):
            step = samples.at(0, indices)
            logits = network(*(step.inputs[spec.name] for spec in network.inputs))
            objective(Outputs(logits), (), step.labels).backward()

    def _network(self, module: nn.Module) -> Network:
        like = self.teacher.network
        return Network(module, like.inputs, like.preprocessing)

    def _timer(self) -> Callable[[nn.Module], float]:
        """Median milliseconds of one sample on the runtime, fp32, one thread."""
        target, school = self.timed_on, self.school
        assert target is not None
        backend: Backend = plugins.build("backends", target.backend)
        stored = next(iter(self.subject.data.calibration.batches([np.arange(1)]))).inputs
        plain = school.recipe.export.preprocessing or self.teacher.network.preprocessing is None
        given = stored if plain else normalise(stored, self.teacher.network.preprocessing)  # type: ignore[arg-type]

        def milliseconds(module: nn.Module) -> float:
            with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
                path = Path(folder) / "candidate.onnx"
                export.export(
                    self._network(copy.deepcopy(module)), stored, opset=target.opset,
                    preprocessing=school.recipe.export.preprocessing, path=path,
                )  # fmt: skip
                session = backend.load(path, 1)
                try:
                    timing = latency.measure({"candidate": session}, given, threads=1, quick=True, say=school.say)
                finally:
                    session.close()
            return float(np.median(timing.series_ns["candidate"])) / 1e6

        return milliseconds


def _timed_on(on: Sequence[Target], notes: list[str]) -> Target:
    """The first target whose runtime runs here, else this machine."""
    for target in on:
        backend: Backend = plugins.build("backends", target.backend)
        if backend.available() is None and backend.engine is None:
            return target
    host = targets.load("host")
    notes.append(f"pruning: no runtime of {', '.join(t.name for t in on)} runs here; latency is that of {host.title}")
    return host
