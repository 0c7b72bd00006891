"""The one training loop: a teacher on its labels and a student on its teachers differ in the objective alone.

Under a launcher every process runs it on its share of each batch (see `shares`); weights, averages and the state of
the optimizer are the same in all of them at every step, and the first one keeps and tells.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.distillation import checkpoint, compiled, precision
from edgekd.distillation.allocator import keep_freed_memory
from edgekd.distillation.augment import random_bits
from edgekd.distillation.job import Job, check_finite, deterministic, identity
from edgekd.distillation.lessons import Lessons, turns
from edgekd.distillation.logits import device, place
from edgekd.distillation.optimizer import Average, learning_rate, optimizer
from edgekd.distillation.precision import Choice, Computed, autocast
from edgekd.distillation.samples import Step
from edgekd.distillation.shares import follow, normalises, one_batch, sum_gradients
from edgekd.errors import EdgekdError
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.processes import here
from edgekd.types import Json

_SAVE_EVERY_S = 60.0  # inside an epoch; at its end always
_SAY_EVERY_S = 0.5


def fit(job: Job) -> dict[str, Json]:
    """Train the job's network in place, leave work/weights.safetensors, and tell what happened.

    Afterwards the network is on the processor, in eval mode, with the weights that were kept; teachers are as before.
    """
    home = device()
    keep_freed_memory()
    check_finite(job)
    for network in (job.network, *job.teachers):
        place(network, network.preprocessing is not None)
    for course in job.courses:
        course.objective.to(home)
    follow(job.trained)
    modes = {module: module.training for teacher in job.teachers for module in teacher.modules()}
    gpus = [torch.cuda.current_device()] if home.type == "cuda" else []
    try:
        with ExitStack() as hooks, torch.random.fork_rng(devices=gpus), deterministic(job.options.threads):
            lessons = [hooks.enter_context(closing(Lessons(job, at, home))) for at in range(len(job.courses))]
            training = _Training(job, lessons, home)
            training.begin()
            while training.step < training.steps:
                training.epoch()
            training.finish()
    finally:
        for module, mode in modes.items():
            module.training = mode
    job.network.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as torch documents it
    job.network.eval()
    here().once(lambda: _keep(job))
    return training.meta()


def _keep(job: Job) -> None:
    meta = {"step": job.step, "epochs": str(job.options.epochs), "seed": str(job.seed)}
    weights.save(job.work / "weights.safetensors", job.network.module, meta)
    checkpoint.remove(job.work)


class _Training:
    """A training under way: all that changes from step to step."""

    def __init__(self, job: Job, lessons: Sequence[Lessons], home: torch.device) -> None:
        self.job, self.lessons, self.home = job, lessons, home
        self.network = job.network  # as it is called: compiled, where that pays
        self.one_batch = here().world > 1 and normalises(job.network)
        self.per_epoch = sum(each.samples.steps_per_epoch for each in self.lessons)
        self.step, self.steps = 0, self.per_epoch * job.options.epochs
        self.trained = job.trained
        self.optimizer = optimizer(self.trained, job.options)
        self.average = Average(job.network.module, job.options.ema_decay)
        self.losses = torch.zeros(self.per_epoch, device=home)  # of this epoch; looked at rarely, to not wait for them
        self.history: list[Json] = []
        self.train_s = 0.0
        self.student = Choice("fp32", "as asked")
        self._began_s = self._saved_s = self._said_s = time.monotonic()
        self._began_step = 0
        self._identity = identity(job)

    # ------------------------------------------------------------ start and end

    def begin(self) -> None:
        """Go on from the last checkpoint, or choose the precision and write the first one."""
        job = self.job
        self.trained.train()
        for teacher in job.teachers:
            teacher.eval()
        here().agree(self._identity, "what is to be trained")
        kept = here().once(lambda: checkpoint.load(job.work, self._identity, job.say, step=job.step))
        if kept is not None:
            self._restore(kept)
            job.say("resumed", step=job.step, epoch=self.step // self.per_epoch)
        else:
            self.student = here().once(self._chosen)
        self.network = compiled.as_chosen(job.network, self.student)
        choices = iter(kept["teachers"] if kept is not None else ())
        for lessons in self.lessons:
            first = next(lessons.samples.epoch(0)) if lessons.answers else None
            for answers in lessons.answers:
                assert first is not None
                answers.choose(next(choices, None), first)
        if kept is None:
            self._save()
        self._began_s, self._began_step = time.monotonic(), self.step

    def finish(self) -> None:
        """Leave the kept weights in the network."""
        result = self.average.result()
        self._check_weights(result)
        self.job.network.module.load_state_dict(result)
        follow(self.job.network.module)  # buffers that a module of the user's own fills may differ

    def meta(self) -> dict[str, Json]:
        """What is worth knowing about the training once it has ended."""
        job = self.job
        found: dict[str, Json] = {
            "epochs": job.options.epochs, "steps": self.steps, "train_s": round(self.train_s, 3),
            "samples": self._count, "device": self.home.type, "threads": torch.get_num_threads(),
            "precision": self.student.precision, "precision_reason": self.student.reason, "history": self.history,
            "compiled": self.student.compiled, "compile_reason": self.student.compile_reason,
            "processes": here().world,
        }  # fmt: skip
        teachers: list[Json] = [answers.json() for lessons in self.lessons for answers in lessons.answers]
        if teachers:
            found["teachers"] = teachers
        return found

    # ------------------------------------------------------------ one epoch

    def epoch(self) -> None:
        """Train to the end of this epoch, from wherever in it the training stands."""
        job, epoch = self.job, self.step // self.per_epoch
        first = self.step % self.per_epoch
        start_s, begun_s = time.monotonic(), self.train_s
        for at, (lessons, step) in enumerate(turns(self.lessons, epoch, first, job.seed), first):
            self.losses[at] = self._one_step(lessons, step)
            self.step += 1
            now_s = time.monotonic()
            self.train_s = begun_s + now_s - start_s
            if at + 1 == self.per_epoch:
                break
            if now_s - self._said_s >= _SAY_EVERY_S:
                self._said_s = now_s
                loss = self._mean_loss(at + 1)
                job.say(
                    "batch", step=job.step, epoch=epoch, of=job.options.epochs, batch=at + 1, batches=self.per_epoch,
                    loss=loss, eta_s=self._eta_s(),
                )  # fmt: skip
            if here().first and now_s - self._saved_s >= _SAVE_EVERY_S:
                self._mean_loss(at + 1)
                self._save()
        loss = self._mean_loss(self.per_epoch)
        seconds = time.monotonic() - start_s
        row: dict[str, Json] = {
            "epoch": epoch + 1, "loss": loss, "learning_rate": self._rate(self.step - 1),
            "samples_per_s": (self.per_epoch - first) / self.per_epoch * self._count / max(seconds, 1e-9),
            "seconds": round(seconds, 3),
        }  # fmt: skip
        self.history.append(row)
        self._save()
        job.say("epoch", step=job.step, of=job.options.epochs, eta_s=self._eta_s(), **row)

    def _one_step(self, lessons: Lessons, step: Step) -> Tensor:
        """One step of the optimizer; the loss before it, not waited for."""
        job, together = self.job, here()
        self._draw_anew(together.rank)
        teachers = lessons.answered(step)
        with one_batch(self.one_batch):
            with autocast(self.home, self.student.precision):
                student = lessons.said(self.network, step)
            if together.world > 1:
                self._draw_anew(together.world)  # a loss that draws must draw the same everywhere
            loss = lessons.loss(student, teachers, step)
            # inside, since a network may compute parts of its forward pass again
            loss.backward()  # type: ignore[no-untyped-call]
        projectors = [parameter for course in job.courses for parameter in course.objective.parameters()]
        sum_gradients(job.network.module.parameters(), projectors)
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.step)
        return loss.detach()

    def _draw_anew(self, number: int) -> None:
        """Start torch's generator anew, from which dropout and the like draw; every step and number has its own draws.

        A resumed training so draws what an undisturbed one does, whatever ran in between.
        """
        bits = random_bits(np.array([self.step]), seed=self.job.seed, purpose="step", view=number)
        draw = int(bits[0] >> np.uint64(1))
        torch.default_generator.manual_seed(draw)
        if self.home.type == "cuda":
            torch.cuda.manual_seed(draw)

    @property
    def _count(self) -> int:
        return sum(each.samples.count for each in self.lessons)

    def _rate(self, step: int) -> float:
        return learning_rate(self.job.options, step, self.steps, self.per_epoch)

    def _eta_s(self) -> float:
        done = self.step - self._began_step
        return round((time.monotonic() - self._began_s) / max(done, 1) * (self.steps - self.step), 1)

    # ------------------------------------------------------------ what may go wrong

    def _mean_loss(self, count: int) -> float:
        """Mean loss of this epoch's first `count` steps, all of which must be finite."""
        losses = self.losses[:count].cpu()
        wrong = (~torch.isfinite(losses)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise self._diverged(f"the loss is {losses[at].item()}", at)
        return float(losses.double().mean())

    def _check_weights(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self._diverged(f"'{name}' is no longer finite", (self.step - 1) % self.per_epoch)

    def _diverged(self, what: str, at: int) -> EdgekdError:
        epoch = (self.step - 1) // self.per_epoch
        rate = self._rate(epoch * self.per_epoch + at)
        fix = f"try a lower learning_rate, e.g. {self.job.options.learning_rate / 4:.2g}"
        if self.student.precision == "bf16":
            fix += ', or precision = "fp32"'
        return EdgekdError(
            f"{what} in epoch {epoch + 1}, step {at + 1} of {self.per_epoch}, at learning rate {rate:.3g}",
            where=self.job.step,
            fix=f"{fix}; where that does not help, look for inputs that are not finite. "
            "The checkpoint before it was kept",
        )

    # ------------------------------------------------------------ checkpoints and precision

    def _save(self) -> None:
        state = self.trained.state_dict()
        self._check_weights(state)
        teachers = [answers.json() for lessons in self.lessons for answers in lessons.answers]
        kept = {
            "step": self.step, "train_s": self.train_s, "history": self.history, "losses": self.losses,
            "trained": dict(state), "average": self.average.kept(), "optimizer": self.optimizer.state_dict(),
            "student": self.student.json(), "teachers": teachers,
        }  # fmt: skip
        for lessons in self.lessons:
            for answers in lessons.answers:
                answers.flush()
        if here().first:
            checkpoint.save(self.job.work, self._identity, kept)
        self._saved_s = time.monotonic()

    def _restore(self, kept: dict[str, Any]) -> None:
        self.trained.load_state_dict(kept["trained"])
        self.average.restore(kept["average"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.losses.copy_(kept["losses"])
        self.step, self.train_s, self.history = kept["step"], kept["train_s"], kept["history"]
        self.student = Choice(**kept["student"])

    def _chosen(self) -> Choice:
        """What the student computes in and whether it is compiled: as asked, or as a measurement says."""
        job, lessons, asked = self.job, self.lessons[0], self.job.options.precision
        step = next(lessons.samples.epoch(0))
        before = {name: value.clone() for name, value in job.network.module.state_dict().items()}

        def one_step(computed: Computed, network: Network = job.network) -> None:
            with autocast(self.home, computed):
                said = lessons.said(network, step)
            means = [each.float().square().mean() for each in (said.logits, *said.features.values())]
            torch.stack(means).sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad()

        choice = Choice(asked, "as asked") if asked != "auto" else precision.measured(one_step, self.home)
        choice = compiled.decided(
            choice, job.network, lambda network: one_step(choice.precision, network), asked=job.options.compile,
            steps=self.steps, device=self.home,
            against="batch normalisation over several processes cannot be compiled" if self.one_batch else "",
        )  # fmt: skip
        job.network.module.load_state_dict(before)  # running statistics moved meanwhile
        if asked == "auto":
            job.say("precision", step=job.step, precision=choice.precision, reason=choice.reason)
        if choice.compiled:
            job.say("compile", step=job.step, reason=choice.compile_reason)
        return choice
