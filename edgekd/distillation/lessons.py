"""Courses under way: the batches of each, what its teachers answer, and the loss of what the student says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from edgekd.correspondence import Taps, mask_of
from edgekd.distillation.answers import Answers
from edgekd.distillation.augment import random_bits
from edgekd.distillation.job import Job
from edgekd.distillation.logits import forward
from edgekd.distillation.samples import Samples, Step
from edgekd.distillation.shares import whole, whole_outputs
from edgekd.models.network import Network
from edgekd.processes import here
from edgekd.types import Outputs


class Lessons:
    """One course under way: its samples, the taps of the student, and the answers of its teachers.

    Args:
        job: what is to be trained.
        at: number of the course among the job's.
        home: where it is computed.
    """

    def __init__(self, job: Job, at: int, home: torch.device) -> None:
        self.course = course = job.courses[at]
        self.samples = Samples(
            course.data, job.augment, batch_size=job.options.batch_size, views=job.options.views, seed=job.seed,
            device=home, rank=here().rank, world=here().world,
        )  # fmt: skip
        teachers = course.teachers if course.objective.needs_teacher else ()
        self.answers = [
            Answers(job, course, teacher, course.objective.teacher_taps if number == 0 else (), self.samples, home)
            for number, teacher in enumerate(teachers)
        ]
        self.taps = Taps(job.network, course.objective.student_taps)
        taps = (*course.objective.student_taps, *course.objective.teacher_taps)
        self._ragged = {tap.path for tap in taps if tap.ragged}

    def said(self, network: Network, step: Step) -> Outputs:
        """What the student says of a step, with the features that the losses ask for."""
        logits = forward(network, step.inputs, self.course.head)
        return Outputs(logits, self.taps.take())

    def answered(self, step: Step) -> list[tuple[float, Outputs]]:
        """What each teacher says of a step, with what its word counts."""
        return [(answers.weight, answers(step)) for answers in self.answers]

    def loss(self, student: Outputs, teachers: Sequence[tuple[float, Outputs]], step: Step) -> Tensor:
        """The loss of a whole batch, of what this process has of it."""
        student = whole_outputs(Outputs(student.logits.float(), student.features), step.total, self._ragged)
        teachers = [(weight, whole_outputs(each, step.total, self._ragged)) for weight, each in teachers]
        mask = mask_of(step.inputs)
        mask = None if mask is None else whole(mask, step.total)
        loss: Tensor = self.course.objective(student, teachers, whole(step.labels, step.total), mask)
        return loss

    def close(self) -> None:
        """Take every hook off the networks."""
        self.taps.close()
        for answers in self.answers:
            answers.close()


def turns(lessons: Sequence[Lessons], epoch: int, first: int, seed: int) -> Iterator[tuple[Lessons, Step]]:
    """Each step of an epoch with the course it belongs to, from step `first` on.

    Several courses take turns at random, each as often as its data has batches (Liu, He, Chen, Gao: Multi-Task Deep
    Neural Networks for Natural Language Understanding, ACL 2019, algorithm 1).
    """
    order = np.repeat(np.arange(len(lessons)), [each.samples.steps_per_epoch for each in lessons])
    bits = random_bits(np.arange(len(order)), seed=seed, purpose="course", view=epoch)
    order = order[np.argsort(bits, kind="stable")]
    done = np.bincount(order[:first], minlength=len(lessons))
    steps = [each.samples.epoch(epoch, first=int(n)) for each, n in zip(lessons, done, strict=True)]
    for turn in order[first:]:
        yield lessons[turn], next(steps[turn])
