"""Distillation for anybody's own training loop: the losses, the hooks and the projectors as one module."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from edgekd import plugins
from edgekd.correspondence import Taps, mask_of
from edgekd.distillation.objective import build, default_losses
from edgekd.errors import ModelError
from edgekd.recipe import loss_terms
from edgekd.types import LossTerm, Outputs, Part, Task


class Distiller(nn.Module):
    """Runs a student and its teacher on a batch and gives the loss that brings the one to the other.

        distiller = edgekd.Distiller(teacher, student, images)
        optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()])
        for images, labels in loader:
            loss = distiller(images, labels=labels)
            loss.backward(); optimizer.step(); optimizer.zero_grad()

    `correspondence` is what `match` found, where a loss is "auto" (None where it found nothing; a warning says why no
    layers are compared); `logits` are the student's, of the last batch. The parameters are those of the projectors
    alone, which only training needs: the student is saved, exported and used as it is. The networks are watched
    through hooks on their modules; `close` (or `with`) takes them off.

    Args:
        teacher, student: any modules that take the same batch and return logits; the student is trained as it is put
            (train or eval mode), the teacher is put into eval mode and gets no gradient. Several teachers are one by
            the mean of their probabilities; layers are compared with the first one's.
        probe: one batch as both take it (a tensor, or a tuple or dictionary of them), for a look at their layers.
        losses: names of losses, or tables as a recipe has them: {"name": "kd", "weight": 0.9, "temperature": 2.0};
            None: "auto" alone for classes, else the task's own.
        task: what the outputs are: "classification", "segmentation", "multilabel", "regression" or a Task.

    Raises:
        PartError: a loss is unknown, does not take an option, or finds no layers that suit it.
        ModelError: a network does not return logits, or the two differ in their number.
    """

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        student: nn.Module,
        probe: Any,
        losses: str | Sequence[str | Mapping[str, Any] | LossTerm] | None = None,
        *,
        task: str | Task = "classification",
    ) -> None:
        super().__init__()
        self.task: Task = plugins.build("tasks", Part(task)) if isinstance(task, str) else task
        # In tuples, so that their weights are not taken for this module's.
        self._teachers = (teacher,) if isinstance(teacher, nn.Module) else tuple(teacher)
        self._student = (student,)
        first, classes = self._teachers[0], self._classes(probe)
        terms = default_losses(self.task) if losses is None else loss_terms(losses)
        built = build(first, student, terms, self.task, classes, lambda: probe)
        self.objective, self.correspondence = built.objective, built.correspondence
        if losses is not None and built.notes and not self.objective.student_taps:
            warnings.warn(built.notes[-1], stacklevel=2)
        device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
        self.objective.to(device)
        self._taps = Taps(first, self.objective.teacher_taps), Taps(student, self.objective.student_taps)
        self.logits: Tensor | None = None
        for each in self._teachers:
            each.eval()

    def forward(self, *inputs: Any, labels: Tensor | None = None, **named: Any) -> Tensor:
        """The loss of one batch, given as both networks take it.

        Args:
            labels: as the task takes them; may be left out where no loss asks for them.
        """
        logits = _logits(self._student[0](*inputs, **named), "student")
        student = Outputs(logits, self._taps[1].take())
        with torch.no_grad():
            said = [_logits(teacher(*inputs, **named), "teacher") for teacher in self._teachers]
        features = self._taps[0].take()
        answers = [(1.0, Outputs(each, features if at == 0 else {})) for at, each in enumerate(said)]
        self.logits = logits.detach()
        loss: Tensor = self.objective(student, answers, labels, mask_of(named))
        return loss

    def close(self) -> None:
        """Take every hook off the networks."""
        for taps in self._taps:
            taps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _classes(self, probe: Any) -> int:
        """The number of outputs, which both networks have to agree on."""
        counts = []
        for role, network in (*(("teacher", each) for each in self._teachers), ("student", self._student[0])):
            modes = {module: module.training for module in network.modules()}
            network.eval()
            try:
                with torch.no_grad():
                    counts.append(_logits(_called(network, probe), role).shape[1])
            finally:
                for module, mode in modes.items():
                    module.training = mode
        if len(set(counts)) > 1:
            raise ModelError(
                f"the student has {counts[-1]} outputs, and of its teachers {', '.join(map(str, counts[:-1]))}",
                expected="as many of one as of the other",
            )
        return counts[0]


def _called(network: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return network(**batch)
    return network(*batch) if isinstance(batch, tuple | list) else network(batch)


def _logits(output: Any, role: str) -> Tensor:
    """The logits among what a network returned: a tensor, or what calls itself `logits` (as Hugging Face has it)."""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise ModelError(
            f"the {role} returns a {type(output).__name__}", expected="logits as one tensor, batch × classes"
        )
    return found
