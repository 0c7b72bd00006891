"""The one training loop: cross-entropy of a teacher and distillation of a student differ in the loss alone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.distill import checkpoint, precision, views
from edgekd.distill.augment import random_bits
from edgekd.distill.job import Job, check_finite, deterministic, identity
from edgekd.distill.logits import device, forward, place
from edgekd.distill.optimizer import Average, learning_rate, optimizer
from edgekd.distill.precision import Choice, Computed, autocast
from edgekd.distill.samples import Inputs, Samples, Step
from edgekd.distill.views import TeacherViews
from edgekd.errors import EdgekdError
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.types import Json, Outputs

_SAVE_EVERY_S = 60.0  # inside an epoch; at its end always
_SAY_EVERY_S = 0.5


def fit(job: Job) -> dict[str, Json]:
    """Train the job's network in place, leave work/weights.safetensors, and tell what happened.

    Afterwards the network is on the processor, in eval mode, with the weights that were kept.
    """
    home = device()
    check_finite(job)
    for network in (job.network, job.teacher):
        if network is not None:
            place(network, job.data.images)
    teacher_modes = {} if job.teacher is None else {m: m.training for m in job.teacher.modules()}
    gpus = [torch.cuda.current_device()] if home.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), deterministic(job.options.threads):
            training = _Training(job, home)
            training.begin()
            while training.step < training.steps:
                training.epoch()
            training.finish()
    finally:
        for module, mode in teacher_modes.items():
            module.training = mode
    job.network.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as torch documents it
    job.network.eval()
    meta = {"step": job.step, "epochs": str(job.options.epochs), "seed": str(job.seed)}
    weights.save(job.work / "weights.safetensors", job.network.module, meta)
    checkpoint.remove(job.work)
    views.remove(job.work)
    return training.meta()


class _Training:
    """A training under way: all that changes from step to step."""

    def __init__(self, job: Job, home: torch.device) -> None:
        self.job, self.home = job, home
        self.samples = Samples(
            job.data, job.augment, batch_size=job.options.batch_size, views=job.options.teacher_views, seed=job.seed,
            device=home,
        )  # fmt: skip
        self.per_epoch = self.samples.steps_per_epoch
        self.step, self.steps = 0, self.per_epoch * job.options.epochs
        self.optimizer = optimizer(job.network.module, job.options)
        self.average = Average(job.network.module, job.options.ema_decay)
        self.losses = torch.zeros(self.per_epoch, device=home)  # of this epoch; looked at rarely, to not wait for them
        self.history: list[Json] = []
        self.train_s = 0.0
        self.student, self.teacher = Choice("fp32", "as asked"), Choice("fp32", "as asked")
        self._began_s = self._saved_s = self._said_s = time.monotonic()
        self._began_step = 0
        self._views: TeacherViews | None = None
        self._identity = identity(job)

    # ------------------------------------------------------------ start and end

    def begin(self) -> None:
        """Go on from the last checkpoint, or choose the precision and write the first one."""
        job = self.job
        job.network.train()
        if job.teacher is not None:
            job.teacher.eval()
        kept = checkpoint.load(job.work, self._identity, job.say, step=job.step)
        if job.teacher is not None and 0 < self.samples.views < job.options.epochs:
            shape = (self.samples.views, self.samples.count, len(job.data.classes))
            self._views = TeacherViews(job.work, shape, fresh=kept is None)
        if kept is None:
            self._choose_precision()
            self._save()
        else:
            self._restore(kept)
            job.say("resumed", step=job.step, epoch=self.step // self.per_epoch)
        self._began_s, self._began_step = time.monotonic(), self.step

    def finish(self) -> None:
        """Leave the kept weights in the network."""
        result = self.average.result()
        self._check_weights(result)
        self.job.network.module.load_state_dict(result)

    def meta(self) -> dict[str, Json]:
        """What is worth knowing about the training once it has ended."""
        job = self.job
        found: dict[str, Json] = {
            "epochs": job.options.epochs, "steps": self.steps, "train_s": round(self.train_s, 3),
            "samples": self.samples.count, "device": self.home.type, "threads": torch.get_num_threads(),
            "precision": self.student.precision, "precision_reason": self.student.reason, "history": self.history,
        }  # fmt: skip
        if job.teacher is not None:
            found |= {"teacher_precision": self.teacher.precision, "teacher_precision_reason": self.teacher.reason}
        return found

    # ------------------------------------------------------------ one epoch

    def epoch(self) -> None:
        """Train to the end of this epoch, from wherever in it the training stands."""
        job, epoch = self.job, self.step // self.per_epoch
        first = self.step % self.per_epoch
        start_s, begun_s = time.monotonic(), self.train_s
        for at, step in enumerate(self.samples.epoch(epoch, first=first), first):
            self.losses[at] = self._one_step(step)
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
            if now_s - self._saved_s >= _SAVE_EVERY_S:
                self._mean_loss(at + 1)
                self._save()
        loss = self._mean_loss(self.per_epoch)
        seconds = time.monotonic() - start_s
        row: dict[str, Json] = {
            "epoch": epoch + 1, "loss": loss, "learning_rate": self._rate(self.step - 1),
            "samples_per_s": (self.per_epoch - first) * self.samples.count / self.per_epoch / max(seconds, 1e-9),
        }  # fmt: skip
        self.history.append(row)
        self._save()
        job.say("epoch", step=job.step, of=job.options.epochs, eta_s=self._eta_s(), **row)

    def _one_step(self, step: Step) -> Tensor:
        """One step of the optimizer; the loss before it, not waited for."""
        job = self.job
        # Dropout and the like draw from torch's generator. It starts anew at each step, so that a resumed training
        # draws what an undisturbed one does, whatever ran in between.
        draw = int(random_bits(np.array([self.step]), seed=job.seed, purpose="step")[0] >> np.uint64(1))
        torch.default_generator.manual_seed(draw)
        if self.home.type == "cuda":
            torch.cuda.manual_seed(draw)
        teacher = None if job.teacher is None else self._target(job.teacher, step)
        with autocast(self.home, self.student.precision):
            logits = forward(job.network, step.inputs)
        student = Outputs(logits.float())
        loss = job.loss(student, student if teacher is None else Outputs(teacher), step.labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.step)
        return loss.detach()

    def _target(self, teacher: Network, step: Step) -> Tensor:
        """The teacher's logits, kept from when this view was there before, or computed."""
        kept = None if self._views is None else self._views.take(step.view, step.indices)
        if kept is not None:
            return torch.from_numpy(kept).to(self.home)
        with torch.inference_mode(), autocast(self.home, self.teacher.precision):
            logits = forward(teacher, step.inputs)
        if self._views is not None:
            return torch.from_numpy(self._views.put(step.view, step.indices, logits.float().cpu().numpy())).to(
                self.home
            )
        return logits.float().clone()  # a loss may keep it for its backward pass, which torch forbids of the original

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
        model = self.job.network.module.state_dict()
        self._check_weights(model)
        state = {
            "step": self.step, "train_s": self.train_s, "history": self.history, "losses": self.losses,
            "model": dict(model), "average": self.average.kept(), "optimizer": self.optimizer.state_dict(),
            "student": self.student.json(), "teacher": self.teacher.json(),
        }  # fmt: skip
        if self._views is not None:
            self._views.flush()
        checkpoint.save(self.job.work, self._identity, state)
        self._saved_s = time.monotonic()

    def _restore(self, kept: dict[str, Any]) -> None:
        self.job.network.module.load_state_dict(kept["model"])
        self.average.restore(kept["average"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.losses.copy_(kept["losses"])
        self.step, self.train_s, self.history = kept["step"], kept["train_s"], kept["history"]
        self.student, self.teacher = Choice(**kept["student"]), Choice(**kept["teacher"])

    def _choose_precision(self) -> None:
        asked = self.job.options.precision
        if asked != "auto":
            self.student = self.teacher = Choice(asked, "as asked")
            return
        job = self.job
        step = next(self.samples.epoch(0))
        before = {name: value.clone() for name, value in job.network.module.state_dict().items()}

        def student_step(computed: Computed) -> None:
            with autocast(self.home, computed):
                logits = forward(job.network, step.inputs)
            torch.nn.functional.cross_entropy(logits.float(), step.labels).backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad()

        self.student = precision.measured(student_step, self.home)
        job.network.module.load_state_dict(before)  # running statistics moved meanwhile
        job.say("precision", step=job.step, **self.student.json())
        if job.teacher is not None:
            self.teacher = self._measured_teacher(job.teacher, step.inputs)
            job.say("precision", step="teacher", **self.teacher.json())

    def _measured_teacher(self, teacher: Network, inputs: Inputs) -> Choice:
        def teacher_step(computed: Computed) -> None:
            with torch.inference_mode(), autocast(self.home, computed):
                forward(teacher, inputs)

        return precision.measured(teacher_step, self.home)
