"""What a teacher says about a step: taken from the cache where it said it before, else computed and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from edgekd.correspondence import Tap, Taps
from edgekd.distillation import augment as augmentation
from edgekd.distillation import compiled, equivariance, precision
from edgekd.distillation.cache import MANIFEST, TeacherCache, folder_of, remove_oldest
from edgekd.distillation.folding import folded
from edgekd.distillation.fusing import fused
from edgekd.distillation.job import Course, Job, Teacher, weights_hash
from edgekd.distillation.logits import forward
from edgekd.distillation.precision import Choice, autocast
from edgekd.distillation.samples import Inputs, Samples, Step
from edgekd.models.network import Network
from edgekd.processes import here
from edgekd.types import Augment, Json, Outputs

LOGITS = "logits"  # the name of a network's output beside its taps
PLAIN = 0  # the one view of images that are not augmented


class Answers:
    """One teacher of one course, with its taps and its cache.

    The teacher is in eval mode, gets no gradient and is not changed. What it says about a sample in a view is rounded
    to float16 when it is kept, and given out so rounded the first time too: a target must not depend on when it is
    used.

    Args:
        job: where answers are kept, and how the teacher computes.
        course: its data and task.
        teacher: who is asked.
        taps: which of its intermediate outputs are wanted.
        samples: gives the steps, and any sample in any view again.
        home: where it computes.
    """

    def __init__(
        self, job: Job, course: Course, teacher: Teacher, taps: Sequence[Tap], samples: Samples, home: torch.device
    ) -> None:
        self._job, self._course, self._samples, self._home = job, course, samples, home
        self._moves = job.options.teacher_augment == "output" and samples.augmented
        if self._moves:
            equivariance.check_options(job.augment)
        self.network, self.weight = teacher.network, teacher.weight
        self._frozen = teacher.network  # or a copy that says the same sooner
        self._called = teacher.network  # compiled, where that pays
        self._tap_list = tuple(taps)
        self._taps = Taps(teacher.network, taps)
        self._cache: TeacherCache | None = None
        self.choice = Choice("fp32", "as asked")
        self._asked_for = self._recalled = 0  # samples, and those of them that were kept from before
        self._size = [side for side in course.data.inputs[0].shape[1:3] if isinstance(side, int)]

    def choose(self, kept: Mapping[str, Json] | None, first: Step) -> None:
        """Decide how the teacher computes: as a checkpoint says, as its cache was filled, or by a measurement."""
        self._make_faster(folded, first)
        if kept is not None:
            facts: dict[str, Any] = dict(kept)
            self._asked_for, self._recalled = facts.pop("asked", 0), facts.pop("recalled", 0)
            self.choice = Choice(**facts)
        else:
            self.choice = here().once(lambda: self._precision(first))
            if self._job.options.precision == "auto":
                self._job.say("precision", step="teacher", precision=self.choice.precision, reason=self.choice.reason)
        if self.choice.precision == "bf16":
            self._make_faster(fused, first)
        if self._moves:
            self._check_moves(first)
        if self._job.cache is not None and self._job.options.cache_gb:
            self._open(first)
        if kept is None:
            self.choice = here().once(lambda: self._compiling(first))
            if self.choice.compiled:
                self._job.say("compile", step="teacher", reason=self.choice.compile_reason)
        self._called = compiled.as_chosen(self._frozen, self.choice)

    def __call__(self, step: Step) -> Outputs:
        """The teacher's outputs for a step, on its device: float32 logits, and features as they were kept."""
        view = PLAIN if self._moves else step.view
        found: Mapping[str, Tensor] | None = None
        if self._cache is not None:
            kept = self._cache.take(view, step.indices)
            self._asked_for += len(step.indices)
            self._recalled += len(step.indices) if kept is not None else 0
            if kept is None:
                kept = self._cache.put(view, step.indices, self._live(step))
            found = {name: torch.from_numpy(array).to(self._home) for name, array in kept.items()}
        if found is None:
            found = self._live(step)
        if self._moves:
            found = equivariance.moved(found, step.indices, step.view, self._job.augment, self._size)
        return Outputs(found[LOGITS].float(), {name: value for name, value in found.items() if name != LOGITS})

    def json(self) -> dict[str, Json]:
        """As it stands in meta: how the teacher computes, and where answers are kept how many were."""
        return self.choice.json() | {"asked": self._asked_for, "recalled": self._recalled}

    def flush(self) -> None:
        """Make sure that the disk holds what was kept; before a checkpoint that counts on it."""
        if self._cache is not None:
            self._cache.flush()

    def close(self) -> None:
        """Take the hooks off the teacher, whether or not the disk takes what is left."""
        self._taps.close()
        self.flush()

    # ------------------------------------------------------------ how it computes

    def _make_faster(self, rewritten: Callable[[Network, Inputs, Sequence[Tap]], Network], first: Step) -> None:
        """Call a copy that says the same in less time, where there is one."""
        self._taps.close()  # or the copy would have these hooks, too
        self._frozen = self._called = rewritten(self._frozen, first.inputs, self._tap_list)
        self._taps = Taps(self._frozen, self._tap_list)

    def _precision(self, first: Step) -> Choice:
        asked = self._job.options.precision
        if asked != "auto":
            return Choice(asked, "as asked")
        filled = [each for each in precision.ALL if self._is_filled(each)]
        if filled:
            return Choice(filled[0], "as its cache was filled")

        def tried(computed: precision.Computed) -> None:
            self._live(first, computed)

        return precision.measured(tried, self._home)

    def _compiling(self, first: Step) -> Choice:
        """The choice with whether it is compiled, for the epochs in which it has to compute."""
        epochs, view = self._job.options.epochs, PLAIN if self._moves else first.view
        if self._cache is not None:
            views = 1 if self._moves else self._samples.views
            epochs = min(views, epochs) if views else epochs
            epochs = 0 if self._cache.take(view, first.indices) is not None else epochs

        def run(network: Network) -> None:
            self._called = network
            try:
                self._live(first)
            finally:
                self._called = self._frozen

        return compiled.decided(
            self.choice, self._frozen, run, asked=self._job.options.compile,
            steps=epochs * self._samples.steps_per_epoch, device=self._home,
        )  # fmt: skip

    # ------------------------------------------------------------ computing and keeping

    def _live(self, step: Step, computed: precision.Computed | None = None) -> dict[str, Tensor]:
        """What it says about a step's images, or about the plain ones where its outputs are moved instead."""
        return self._asked(step.stored if self._moves else step.inputs, computed)

    def _asked(self, inputs: Inputs, computed: precision.Computed | None = None) -> dict[str, Tensor]:
        with torch.inference_mode(), autocast(self._home, computed or self.choice.precision):
            logits = forward(self._called, inputs)
            features = self._taps.take()
        # A loss may keep them for its backward pass, which torch forbids of what inference mode made: hence clones.
        return {LOGITS: logits.float().clone()} | {name: value.clone() for name, value in features.items()}

    def _check_moves(self, first: Step) -> None:
        """Tell how equivariant the teacher is, and refuse to move the outputs of one that is not."""
        name = self._course.data.inputs[0].name
        figures = equivariance.agreement(
            lambda images: self._asked({name: images}), first.stored[name], first.indices, self._job.augment
        )
        told = ", ".join(f"{tensor} {cosine:.4f}" for tensor, cosine in figures.items())
        self._job.say("note", text=f"equivariance of the teacher (cosine, at least {equivariance.LEAST}): {told}")
        equivariance.check(figures)

    def _is_filled(self, computed: precision.Computed) -> bool:
        cache = self._job.cache
        return cache is not None and (folder_of(cache, self._facts(computed)) / MANIFEST).exists()

    def _open(self, first: Step) -> None:
        job = self._job
        assert job.cache is not None
        for tap in self._tap_list:
            if tap.ragged:  # and without it the logits alone would spare no forward pass
                text = f"what the teacher says is not kept: '{tap.path}' is as long as the longest sequence of a batch"
                job.say("note", text=text)
                return
        shapes = {name: tuple(value.shape[1:]) for name, value in self._live(first).items()}
        limit_bytes = int(job.options.cache_gb * 1e9)
        self._cache = TeacherCache(
            job.cache, self._facts(self.choice.precision), samples=self._samples.count, limit_bytes=limit_bytes,
            keep=shapes, say=job.say,
        )  # fmt: skip
        root = job.cache
        here().once(lambda: remove_oldest(root, limit_bytes, say=job.say))
        self._cache.check(lambda view, indices: self._live(self._samples.at(view, indices)))

    @cached_property
    def _weights(self) -> str:
        return weights_hash(self.network)

    def _facts(self, computed: str) -> dict[str, Json]:
        """All that decides what the teacher says about sample i in view v."""
        views = self._samples.augmented and not self._moves
        augment = asdict(self._job.augment if views else Augment())
        return {
            "teacher": self._weights, "data": self._course.data.fingerprint, "split": "train",
            "augment": augment, "augment_version": augmentation.VERSION, "precision": computed,
        }  # fmt: skip
