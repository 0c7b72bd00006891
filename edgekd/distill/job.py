"""What is to be trained: the facts of one training, and the settings it runs under."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekd.errors import ModelError
from edgekd.models.network import Network
from edgekd.types import Augment, Dataset, Outputs, Say, TrainOptions


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained, on what, and how."""

    step: str  # "train" or "distill", as `say` is told
    network: Network
    teacher: Network | None
    loss: Callable[[Outputs, Outputs, Tensor], Tensor]
    loss_name: str  # equal losses, equal names
    data: Dataset
    options: TrainOptions
    augment: Augment
    seed: int
    work: Path
    say: Say


def identity(job: Job) -> str:
    """A hash of what this training is; only a checkpoint of the same one may be gone on from."""
    digest = hashlib.sha256()
    shapes = [(name, tuple(value.shape)) for name, value in job.network.module.state_dict().items()]
    for fact in (job.step, job.loss_name, job.options, job.augment, job.seed, job.data.fingerprint, shapes):
        digest.update(repr(fact).encode())
    for value in [] if job.teacher is None else job.teacher.module.state_dict().values():
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_finite(job: Job) -> None:
    """Refuse weights that cannot be trained from, or taught from.

    Raises:
        ModelError: a value is not finite.
    """
    for role, network in (("student" if job.teacher else "network", job.network), ("teacher", job.teacher)):
        for name, value in [] if network is None else network.module.state_dict().items():
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
