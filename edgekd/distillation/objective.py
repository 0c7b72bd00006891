"""The loss of one task: terms bound to what they ask for by name, and the projectors that only training needs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from edgekd import correspondence, plugins
from edgekd.correspondence import FEATURES, Adapter, Correspondence, Pair
from edgekd.correspondence.table import grouped, told
from edgekd.errors import ModelError, PartError, RecipeError, nearest
from edgekd.recipe import AUTO
from edgekd.types import Json, LossTerm, Outputs, Part, Task

_LOGITS = frozenset({"student_logits", "teacher_logits", "exit_logits"})
_VALUES = frozenset({"student_values", "teacher_values"})
_OUTPUTS = frozenset({"student", "teacher"})
_OF_TEACHER = (FEATURES | {"teacher_logits", "teacher_values", "teacher"}) - {"mask", "exit_logits"}
GIVEN = FEATURES | _LOGITS | _VALUES | _OUTPUTS | {"labels"}


def asks(loss: Callable[..., Tensor], where: str = "loss") -> tuple[str, ...]:
    """The names of a loss's positional parameters, which say what it is given (see `edgekd.losses`).

    One that edgekd does not give keeps its default.

    Raises:
        PartError: a name without a default stands for nothing that edgekd gives, or there is no name that does.
    """
    parameters = inspect.signature(loss).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    foreign = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
    foreign += [p for p in positional if p.name not in GIVEN and p.default is p.empty]
    fix = "make it an option of the recipe by putting it after a *"
    if foreign:
        name = foreign[0].name
        raise PartError(
            f"{name_of(loss)} has a positional parameter '{name}', which edgekd does not give",
            where=where,
            expected=f"names among {', '.join(sorted(GIVEN))}",
            nearest=nearest(name, GIVEN),
            fix=f"rename it, or {fix}",
        )
    found = tuple(p.name for p in positional if p.name in GIVEN)
    if not found:
        raise PartError(
            f"{name_of(loss)} asks for nothing", where=where, expected=f"parameters among {', '.join(sorted(GIVEN))}"
        )
    return found


def of_features(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss compares intermediate outputs, so that it needs pairs of them."""
    return not FEATURES.isdisjoint(asks(loss))


def name_of(loss: Callable[..., Tensor]) -> str:
    """Which loss it is, with its options, in words that are the same in every process."""
    if isinstance(loss, partial):
        options = [*map(repr, loss.args), *(f"{name}={value!r}" for name, value in sorted(loss.keywords.items()))]
        return f"{name_of(loss.func)}({', '.join(options)})"
    return f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"


@dataclass(frozen=True, slots=True)
class Term:
    """One addend: a loss, its weight and, where it is one of features, the pairs it is taken on."""

    loss: Callable[..., Tensor]
    weight: float = 1.0
    pairs: tuple[Pair, ...] = ()


class Objective(nn.Module):
    """The distillation loss of one task: Σ weight · loss, each loss given what its parameters are named after.

    It holds the trainable projectors of its pairs, which have to be trained beside the student and are left out of
    it afterwards.

    Args:
        terms: losses with weights and pairs.
        task: turns outputs into the rows that losses see.
        classes: of the exits; the number of the student's outputs.

    Raises:
        PartError: a loss asks for what is not there: class logits of a task of values, features without pairs.
    """

    def __init__(self, terms: Sequence[Term], task: Task, classes: int) -> None:
        super().__init__()
        self.task, self.terms = task, tuple(terms)
        self._asks = [asks(term.loss) for term in terms]
        self._temperatures = [_temperature(term.loss) for term in terms]
        for term, names in zip(self.terms, self._asks, strict=True):
            self._check(term, names)
        both = zip(self.terms, self._asks, strict=True)
        self.adapters = nn.ModuleList(Adapter(term.pairs, names, classes=classes) for term, names in both)
        pairs = [pair for term in self.terms for pair in term.pairs]
        self.student_taps = tuple({pair.student.path: pair.student for pair in pairs}.values())
        self.teacher_taps = tuple({pair.teacher.path: pair.teacher for pair in pairs}.values())

    def __str__(self) -> str:
        """Equal objectives, equal words: for the identity of a training."""
        return repr([(term.weight, name_of(term.loss), [pair.paths for pair in term.pairs]) for term in self.terms])

    @property
    def needs_teacher(self) -> bool:
        """Whether any of its losses asks for what a teacher says."""
        return any(not _OF_TEACHER.isdisjoint(names) for names in self._asks)

    def forward(
        self,
        student: Outputs,
        teachers: Sequence[tuple[float, Outputs]],
        labels: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            student: its outputs, with the features of `student_taps`.
            teachers: (weight, outputs); the first one's outputs have the features of `teacher_taps`.
            labels: as the task takes them; None where no loss asks for them.
            mask: batch × positions, False where a sequence is padding.

        Returns:
            A scalar.
        """
        rows, of_rows = self.task.rows(student.logits, labels)
        answers = [(weight, self.task.rows(each.logits, labels)[0]) for weight, each in teachers]
        given: dict[str, Any] = {
            "student": student, "teacher": teachers[0][1] if teachers else None, "labels": of_rows,
            "student_logits": rows, "student_values": rows, "teacher_logits": None, "teacher_values": None,
        }  # fmt: skip
        if answers and self.task.values:
            given["teacher_values"] = sum(weight * each for weight, each in answers) / sum(w for w, _ in answers)
        total = rows.new_zeros(())
        for at, term in enumerate(self.terms):
            if answers and "teacher_logits" in self._asks[at]:
                given["teacher_logits"] = ensemble(answers, self._temperatures[at])
            total = total + term.weight * self._term(at, given, labels, mask)
        return total

    def _term(self, at: int, given: Mapping[str, Any], labels: Tensor | None, mask: Tensor | None) -> Tensor:
        if FEATURES.isdisjoint(self._asks[at]):
            return self._value(at, given)
        # projectors are of float32, whatever the networks compute in and the cache keeps
        mine, theirs = (
            {path: feature.float() for path, feature in given[side].features.items()} for side in ("student", "teacher")
        )
        losses = []
        for features in self.adapters[at](mine, theirs, mask):
            if "exit_logits" in features:
                features["exit_logits"] = self.task.rows(features["exit_logits"], labels)[0]
            losses.append(self._value(at, {**given, **features}))
        return torch.stack(losses).sum()

    def _value(self, at: int, given: Mapping[str, Any]) -> Tensor:
        loss, names = self.terms[at].loss, self._asks[at]
        try:
            return loss(**{name: given[name] for name in names})
        except (AttributeError, TypeError) as problem:
            if "labels" in names and given["labels"] is None:
                raise PartError(f"{name_of(loss)} needs labels, and there are none", fix="give labels=…") from problem
            raise

    def _check(self, term: Term, names: Sequence[str]) -> None:
        task, what = self.task, name_of(term.loss)
        if task.values and not _LOGITS.isdisjoint(names):
            raise PartError(
                f"{what} compares class logits, and the outputs of {task.name} are values",
                where="loss",
                fix='use [[loss]] name = "mse", or a loss of features',
            )
        if not task.values and not _VALUES.isdisjoint(names):
            raise PartError(
                f"{what} compares values, and the outputs of {task.name} are class logits",
                where="loss",
                fix='use [[loss]] name = "kd"',
            )
        if task.dense and "exit_logits" in names:
            raise PartError(
                f"{what} classifies a whole sample, and {task.name} classifies each of its points",
                where="loss",
                fix="use a loss of features",
            )
        _check_layers(what, names, bool(term.pairs), "loss")
        if not term.pairs and not FEATURES.isdisjoint(names):
            fix = "name the layers: pairs = [[student path, teacher path], …]"
            raise PartError(f"{what} needs pairs of layers, and none was found", where="loss", fix=fix)


@dataclass(frozen=True, slots=True)
class Built:
    """An objective, the terms it was made of with every pair named, and the correspondence where one was sought."""

    objective: Objective
    terms: tuple[LossTerm, ...]
    correspondence: Correspondence | None
    notes: tuple[str, ...] = ()  # what was left out of the search for layers, and why

    def pairs(self) -> dict[str, Json]:
        """For the report: the layers that are compared, and those that were found and are not; or why there are none.

        Empty where no loss is one of layers.
        """
        used = [pair for term in self.objective.terms for pair in term.pairs]
        found, known = self.correspondence, {pair.paths for pair in used}
        others = [pair for pair in found.pairs if pair.paths not in known] if found is not None and used else []
        if not used and not self.notes:
            return {}
        return {
            "family": found.family if found is not None else None,
            "pairs": [told(pair) for pair in (*used, *others)],
            "notes": list(self.notes),
        }


def default_losses(task: Task) -> tuple[LossTerm, ...]:
    """What a student is distilled by where no loss is named: "auto" alone, where the task leaves layers to it."""
    return (LossTerm(Part(AUTO)),) if task.beside_layers else task.losses


def build(
    teacher: nn.Module,
    student: nn.Module,
    terms: Sequence[LossTerm],
    task: Task,
    classes: int,
    probe: Callable[[], Any],
) -> Built:
    """The losses of a recipe bound to their task and to the layers they compare, and how those were found.

    Args:
        terms: "auto" among them stands for the losses of layers that `match` chooses: none, with a note, where it finds
            none that correspond. Alone it stands for those of outputs, too: the task's own, and layers where they are
            known to pay (of two convolutional networks).
        probe: gives some samples, for a look at both networks; not called where no loss compares features.

    Raises:
        RecipeError: no loss.
        PartError: a loss is unknown, does not take an option, or asks for what is not there.
    """
    if not terms:
        raise RecipeError("there is no loss to distil with", where="loss", fix='add [[loss]] with name = "kd"')
    spelt: list[tuple[LossTerm, tuple[Pair, ...] | None]] = []  # None: its pairs have to be resolved
    autos = [term for term in terms if term.part.name == AUTO]
    chosen, found, notes = _chosen(teacher, student, task, probe, len(autos) == len(terms)) if autos else ((), None, ())
    for at, term in enumerate(terms):
        if term.part.name == AUTO:
            for each in chosen:
                weighted = replace(each, weight=each.weight * term.weight)
                of_layers = found.pairs_of(each) if found is not None else ()
                spelt.append((weighted, tuple(replace(pair, weight=weighted.weight) for pair in of_layers)))
            continue
        names = asks(plugins.bind("losses", term.part, where=f"loss[{at}]"), f"loss[{at}]")
        _check_layers(term.part.name, names, bool(term.pairs), f"loss[{at}]")
        spelt.append((term, None))
    bound: list[Term] = []
    explicit: list[LossTerm] = []
    named = [term for term, on in spelt if on is None]
    compared = any(term.pairs or of_features(plugins.bind("losses", term.part)) for term in named)
    resolved = iter(correspondence.resolve(teacher, student, probe(), named) if compared else [()] * len(named))
    for term, known in spelt:
        on = next(resolved) if known is None else known
        # the options of a pair may follow from its layers: those that differ in them are terms of their own
        own = grouped((Part(term.part.name, pair.options), term.weight, pair.paths) for pair in on) or (term,)
        for each in own:
            its = tuple(pair for pair in on if pair.options == each.part.options)
            bound.append(Term(plugins.bind("losses", each.part), each.weight, its))
            explicit.append(each)
    return Built(Objective(bound, task, classes), tuple(explicit), found, notes)


def _chosen(
    teacher: nn.Module, student: nn.Module, task: Task, probe: Callable[[], Any], alone: bool
) -> tuple[tuple[LossTerm, ...], Correspondence | None, tuple[str, ...]]:
    """The losses that "auto" stands for, what corresponds, and what has to be known of it."""
    outputs = task.losses if alone else ()
    if alone and not task.beside_layers:
        return outputs, None, ()
    try:
        found = correspondence.match(teacher, student, probe())
    except ModelError as problem:
        return outputs, None, (f"outputs alone are compared, no layers: {problem}",)
    if alone and found.pays:
        return (*task.beside_layers, *found.terms()), found, found.notes
    if not alone and found.terms():
        return found.terms(), found, found.notes
    told = f"outputs alone are compared: of {found.family} networks no layers are, unless asked for"
    return outputs, found, (*found.notes, told)


def ensemble(answers: Sequence[tuple[float, Tensor]], temperature: float) -> Tensor:
    """One teacher out of several: logits whose softmax at T is the weighted mean of the teachers' softmaxes at T.

    z = T · log Σ_i w_i · softmax(z_i / T), with Σ w_i = 1. One teacher's logits are given back as they are.

    Reference: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arithmetic mean of an
    ensemble); Liu, He, Chen, Gao: Improving Multi-Task Deep Neural Networks via Knowledge Distillation, 2019.

    Args:
        answers: (weight, rows × classes logits) of each teacher.
        temperature: T.
    """
    if len(answers) == 1:
        return answers[0][1]
    whole = sum(weight for weight, _ in answers)
    logs = [log_softmax(each.float() / temperature, 1) + math.log(weight / whole) for weight, each in answers]
    return torch.logsumexp(torch.stack(logs), 0) * temperature


def _check_layers(loss: str, names: Sequence[str], given: bool, where: str) -> None:
    if given and (FEATURES | _OUTPUTS).isdisjoint(names):
        raise PartError(f"{loss} compares outputs, not layers", where=where, fix="leave out 'pairs'")


def _temperature(loss: Callable[..., Tensor]) -> float:
    """The temperature at which a loss softens what several teachers say; 1 where it has none."""
    parameter = inspect.signature(loss).parameters.get("temperature")
    value = None if parameter is None else parameter.default
    return float(value) if isinstance(value, int | float) else 1.0
