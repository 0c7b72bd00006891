"""A teacher and a student, surveyed on one probe, and the pairs between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from edgekd.correspondence.align import FEWEST, MOST_PAIRS, align, cka, grams, quarters, score
from edgekd.correspondence.choice import Relation, relation
from edgekd.correspondence.inputs import Inputs, Probe, inputs_of
from edgekd.correspondence.pair import Pair, Role
from edgekd.correspondence.pruned import channel_map, is_copy, is_cut_from, recorded_map
from edgekd.correspondence.stages import Survey, survey
from edgekd.correspondence.taps import Tap

_DEEPER = 0.1


@dataclass(frozen=True)
class Side:
    """One network of the two, its probe and what was found in it."""

    network: nn.Module
    inputs: Inputs
    survey: Survey

    def grams(self, taps: Sequence[Tap]) -> Mapping[str, Tensor]:
        """Inner products of the probe's samples by the features of each tap."""
        return grams(self.network, list({tap.path: tap for tap in taps}.values()), self.inputs)


@dataclass(frozen=True)
class Both:
    """Teacher and student side by side."""

    teacher: Side
    student: Side

    @classmethod
    def read(cls, teacher: nn.Module, student: nn.Module, probe: Probe) -> Both:
        """Survey both on one probe."""
        sides = [(network, inputs_of(network, probe)) for network in (teacher, student)]
        return cls(*(Side(network, inputs, survey(network, inputs)) for network, inputs in sides))

    @cached_property
    def copied(self) -> bool:
        """The student was cut out of the teacher, and says so or has weights that are still the teacher's."""
        if self.recorded:
            return True
        return is_copy(self.teacher.network, self.student.network) and any(
            self._channel_map(mine, mine) for mine in self._heads_and_stages()
        )

    @cached_property
    def recorded(self) -> bool:
        """The student has a record of having been cut out of this teacher."""
        return is_cut_from(self.teacher.network, self.student.network)

    @property
    def relation(self) -> Relation:
        """What the two are to each other."""
        return "pruned" if self.copied else relation(self.teacher.survey, self.student.survey)

    def matched(self) -> tuple[Pair, ...]:
        """All pairs: of stages in order, of what the heads are given, of attention relations. None has a loss yet."""
        mine, theirs = self.student.survey, self.teacher.survey
        students, teachers = quarters(mine.stages), theirs.stages
        others = self._heads_and_relations()
        of_student = self.student.grams([*students, *(tap for tap, _, _ in others)])
        of_teacher = self.teacher.grams([*teachers, *(tap for _, tap, _ in others)])

        def alike(student: Tap, teacher: Tap) -> float | None:
            known = student.path in of_student and teacher.path in of_teacher
            return cka(of_student[student.path], of_teacher[teacher.path]) if known else None

        if self.copied:
            shared = {tap.path: tap for tap in teachers}
            chosen = [(tap, shared[tap.path]) for tap in mine.stages if tap.path in shared]
        else:
            # where not all are paired, of two that fit as well the deeper
            scores = [[score(s, t, alike(s, t)) + _DEEPER * (s.depth + t.depth) for t in teachers] for s in students]
            count = min(len(students), len(teachers), MOST_PAIRS)
            chosen = [(students[i], teachers[j]) for i, j in align(scores, count)]
        pairs = [
            self.pair(s, t, alike(s, t), "last" if s.path == mine.stages[-1].path else "earlier") for s, t in chosen
        ]
        pairs += [self.pair(s, t, alike(s, t), role) for s, t, role in others]
        return tuple(pairs)

    def _heads_and_relations(self) -> list[tuple[Tap, Tap, Role]]:
        mine, theirs = self.student.survey, self.teacher.survey
        found: list[tuple[Tap, Tap, Role]] = []
        s, t = mine.penultimate, theirs.penultimate
        if s and t and math.prod(s.grid) == math.prod(t.grid) == 1:  # with positions it is the last stage
            found.append((s, t, "penultimate"))
        s, t = mine.relations, theirs.relations
        if s and t and mine.family == theirs.family == "tokens" and (s.grid == t.grid or s.ragged or t.ragged):
            found.append((s, t, "relations"))
        return found

    def chosen(self, paths: Sequence[tuple[str, str]]) -> tuple[Pair, ...]:
        """The pairs that somebody names by (student path, teacher path).

        Raises:
            ModelError: there is nothing to tap at a path.
        """
        taps = [(self.student.survey.tap(mine), self.teacher.survey.tap(theirs)) for mine, theirs in paths]
        of_student = self.student.grams([mine for mine, _ in taps])
        of_teacher = self.teacher.grams([theirs for _, theirs in taps])
        return tuple(
            self.pair(
                s, t, cka(of_student[s.path], of_teacher[t.path]) if of_student and of_teacher else None, "chosen"
            )
            for s, t in taps
        )

    def pair(self, student: Tap, teacher: Tap, similarity: float | None, role: Role) -> Pair:
        """A pair without a loss, with the channels of the teacher that count."""
        of_teacher, of_student = self.teacher.survey, self.student.survey
        channels = self._channel_map(student, teacher) if role != "relations" and self.copied else None
        exact = channels is not None
        if teacher.path in of_teacher.bidirectional and student.path not in of_student.bidirectional:
            # the half that, like the student, knows nothing of what is yet to come
            channels = tuple(range(teacher.channels // 2)) if of_student.family == "recurrent" else None
        return Pair(
            student,
            teacher,
            loss="",
            weight=0.0,
            cka=similarity,
            score=score(student, teacher, similarity),
            channel_map=channels,
            projector="none" if exact else "linear",
            role=role,
        )

    def notes(self, pairs: Sequence[Pair]) -> tuple[str, ...]:
        """What was left out, and why."""
        told = [f"{name}: {note}" for name, side in self._named() for note in side.survey.notes]
        for name, side in self._named():
            taken = {(pair.student if name == "student" else pair.teacher).path for pair in pairs}
            left = [tap for tap in side.survey.stages if tap.path not in taken]
            if left and left[0].kind == "block":
                told.append(f"{name}: {len(left)} of {len(side.survey.stages)} blocks have no counterpart")
            elif left:
                told.append(f"{name}: no counterpart for {', '.join(tap.path for tap in left)}")
        told += [
            f"{pair.teacher.path}: the forward half of its channels, since {pair.student.path} runs forward alone"
            for pair in pairs
            if pair.channel_map is not None and pair.projector == "linear"
        ]
        if pairs and pairs[0].cka is None:
            told.append(f"CKA was not measured: it takes a probe of {FEWEST} samples")
        return tuple(told)

    def _named(self) -> tuple[tuple[str, Side], ...]:
        return ("teacher", self.teacher), ("student", self.student)

    def _heads_and_stages(self) -> tuple[Tap, ...]:
        head = self.student.survey.penultimate
        return (*self.student.survey.stages, *([head] if head else ()))

    def _channel_map(self, student: Tap, teacher: Tap) -> tuple[int, ...] | None:
        if student.path != teacher.path:
            return None
        writer = self.student.survey.writers.get(student.path)
        if self.recorded:
            return recorded_map(self.student.network, writer)
        return channel_map(self.teacher.network, self.student.network, writer)
