"""What is to be trained: the facts of one training, and the settings it runs under."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekd.distillation.objective import Objective
from edgekd.errors import ModelError
from edgekd.models.network import Network
from edgekd.types import Augment, Dataset, Say, Task, TrainOptions


@dataclass(frozen=True, slots=True)
class Teacher:
    """One of the networks that a student learns from."""

    network: Network
    weight: float = 1.0  # of its answers among the teachers'


@dataclass(frozen=True, slots=True)
class Course:
    """One task that a network learns: the data, who teaches it, and by what losses."""

    head: str | None  # of the network's outputs; None: it has but one
    data: Dataset
    task: Task
    teachers: tuple[Teacher, ...]  # none: it learns from the labels
    objective: Objective


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained, on what, and how."""

    step: str  # "train" or "distill", as `say` is told
    network: Network
    courses: tuple[Course, ...]
    options: TrainOptions
    augment: Augment
    seed: int
    work: Path
    cache: Path | None  # where teachers' answers are kept; None: nowhere
    say: Say

    @property
    def teachers(self) -> tuple[Network, ...]:
        """Every teacher of every course, each once."""
        networks = [teacher.network for course in self.courses for teacher in course.teachers]
        return tuple({id(network): network for network in networks}.values())

    @property
    def trained(self) -> nn.ModuleList:
        """All that the optimizer moves: the network, and the projectors that only training needs."""
        return nn.ModuleList([self.network.module, *(course.objective for course in self.courses)])


def identity(job: Job) -> str:
    """A hash of what this training is; only a checkpoint of the same one may be gone on from."""
    digest = hashlib.sha256()
    shapes = [(name, tuple(value.shape)) for name, value in job.trained.state_dict().items()]
    options = replace(job.options, cache_gb=float(bool(job.options.cache_gb)))  # how much is kept changes no answer
    for fact in (job.step, options, job.augment, job.seed, shapes):
        digest.update(repr(fact).encode())
    for course in job.courses:
        facts = course.head, course.task.name, course.data.fingerprint, str(course.objective)
        digest.update(repr(facts).encode())
        for teacher in course.teachers:
            digest.update(f"{teacher.weight!r} {weights_hash(teacher.network)}".encode())
    return digest.hexdigest()


def weights_hash(network: Network) -> str:
    """A hash of what a network computes: its kind of module, its structure and its weights."""
    digest = hashlib.sha256()
    kind = type(network.module)
    digest.update(f"{kind.__module__}.{kind.__qualname__} {network.module} {network.preprocessing}".encode())
    for name, value in network.module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_finite(job: Job) -> None:
    """Refuse weights that cannot be trained from, or taught from.

    Raises:
        ModelError: a value is not finite.
    """
    roles = [("student" if job.teachers else "network", job.network), *(("teacher", each) for each in job.teachers)]
    for role, network in roles:
        for name, value in network.module.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ModelError(
                    f"the {role}'s '{name}' holds values that are not finite",
                    where=job.step,
                    fix="its weights file is broken: bring another one",
                )


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Where torch has a kernel that always gives the same bits, it is used; other settings come back afterwards.

    Sums are split among threads, so their number is part of what makes the bits; 0 leaves it as it is.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module whose settings are properties, unknown to type checkers
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # costs a pass over every new tensor
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
