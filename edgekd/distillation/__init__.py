"""Training: a teacher on labels, a student on teachers. One loop, exact to resume, without image assumptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgekd import plugins
from edgekd.distillation.distiller import Distiller
from edgekd.distillation.job import Course, Job, Teacher
from edgekd.distillation.logits import device, evaluate, forward, place
from edgekd.distillation.loop import fit
from edgekd.distillation.objective import Objective, Term, build, default_losses
from edgekd.distillation.samples import on_device
from edgekd.errors import ModelError, RecipeError
from edgekd.models.network import Network
from edgekd.processes import here
from edgekd.recipe import loss_table
from edgekd.types import Augment, Dataset, Json, LossTerm, Part, Say, Task, TrainOptions

VERSION = 3  # of what training does with its options; raised where old weights would no longer be what it makes
PROBE_SAMPLES = 64  # that layers are matched on

__all__ = [
    "VERSION", "Distiller", "Lesson", "Teacher", "default_losses", "distill", "distill_tasks", "evaluate", "train",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a student learns of one task: the data, who teaches it, and the losses it is held to."""

    data: Dataset
    task: Task
    teachers: Sequence[Teacher]
    terms: Sequence[LossTerm]
    head: str | None = None  # of the student's outputs; None: it has but one


def train(
    network: Network,
    data: Dataset,
    options: TrainOptions,
    augment: Augment,
    *,
    task: Task,
    seed: int,
    work: Path,
    say: Say,
) -> dict[str, Json]:
    """Train a network on the labels by its task's own loss, from the weights it has.

    The network is trained in place and ends in eval mode with the weights that are kept (the moving average), which
    are also in `work`/weights.safetensors. Where `work`/last.pt is there, training goes on from it and ends with the
    very bits an undisturbed training ends with.

    Args:
        network: takes the stored samples of `data`.
        data: its train split alone is read.
        task: what the labels are, and the loss on them.
        seed: of the order and what the network itself draws; not of its initial weights, nor of the augmentation.
        work: a folder that is there.
        say: told "epoch", "batch" (at most twice a second), "precision", "resumed", "corrupt", "note".

    Returns:
        epochs, steps, train_s, precision and its reason, history (a row an epoch), device, threads, samples.

    Raises:
        ModelError: the network's weights are not finite, or it does not give one logit a class.
        EdgekdError: the loss or the weights stop being finite; the last checkpoint before it is kept.
        StoreError: the disk is full or read-only.
    """
    say = _begun(say)
    if options.views:
        raise RecipeError(
            "views does nothing without a teacher", where="teacher.train", fix="it belongs into [distill]"
        )
    term = task.label_loss
    if options.label_smoothing:
        term = LossTerm(Part(term.part.name, dict(term.part.options) | {"label_smoothing": options.label_smoothing}))
    loss = plugins.bind("losses", term.part, where="teacher.train")
    _check_outputs([("network", network, None, data, task)])
    _check_augment(data, augment, say)
    course = Course(None, data, task, (), Objective([Term(loss, term.weight)], task, len(data.classes)))
    return fit(Job("train", network, (course,), options, augment, seed, work, None, say))


def distill(
    student: Network,
    teachers: Network | Sequence[Teacher],
    data: Dataset,
    terms: Sequence[LossTerm],
    options: TrainOptions,
    augment: Augment,
    *,
    task: Task,
    seed: int,
    work: Path,
    cache: Path | None,
    say: Say,
) -> dict[str, Json]:
    """Train a student on what its teachers say about the same augmented samples: loss = Σ weight · loss_i.

    Teachers are in eval mode, get no gradient, and are neither changed nor stored. Several are one by the weighted
    mean of their probabilities; features are the first one's. Everything else is as in `train`.

    With options.views = n the augmentation repeats after n epochs, so that teachers run in the first n alone; samples
    that are not augmented are one view. What a teacher said is kept in `cache` for this and every later training on
    the same views, up to options.cache_gb.

    Args:
        terms: losses of the recipe; one of features without pairs gets them from `match`.
        cache: folder of teachers' answers; None: they are not kept.

    Returns:
        As `train`, and for each head the `losses` with every pair of layers named, and the `correspondence`: the pairs
        where losses compare layers, with what was found and is not used.

    Raises:
        ModelError: teacher and student have different numbers of outputs, or one differs from the data's.
        PartError: a loss asks for what is not there.
        RecipeError: no loss, or a label smoothing, which belongs to a loss here.
    """
    given = (Teacher(teachers),) if isinstance(teachers, Network) else tuple(teachers)
    lessons = [Lesson(data, task, given, terms)]
    return distill_tasks(student, lessons, options, augment, seed=seed, work=work, cache=cache, say=say)


def distill_tasks(
    student: Network,
    lessons: Sequence[Lesson],
    options: TrainOptions,
    augment: Augment,
    *,
    seed: int,
    work: Path,
    cache: Path | None,
    say: Say,
) -> dict[str, Json]:
    """Train one student with a head for each task, each on its own data, from its own teachers, by its own losses.

    Every step is a batch of one task; tasks take turns at random, each as often as it has batches.

    Reference: Liu, He, Chen, Gao: Improving Multi-Task Deep Neural Networks via Knowledge Distillation for Natural
    Language Understanding, 2019.
    """
    say = _begun(say)
    if options.label_smoothing:
        raise RecipeError(
            "label_smoothing does nothing in distillation",
            where="distill",
            fix='give it to the loss on labels: [[loss]] name = "ce", label_smoothing = …',
        )
    checked = []
    for lesson in lessons:
        checked.append(("student", student, lesson.head, lesson.data, lesson.task))
        checked += [("teacher", each.network, None, lesson.data, lesson.task) for each in lesson.teachers]
        _check_augment(lesson.data, augment, say)
    _check_outputs(checked)
    courses: list[Course] = []
    losses: dict[str, Json] = {}
    matched: dict[str, Json] = {}
    for lesson in lessons:
        if not lesson.teachers:
            raise RecipeError("there is no teacher", where="teacher", fix="name one, or train on the labels")
        first, classes = lesson.teachers[0].network, len(lesson.data.classes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the projectors
            built = build(first, student, lesson.terms, lesson.task, classes, _probe(lesson.data))
        name = lesson.head or "student"
        losses[name] = [loss_table(term) for term in built.terms]
        if pairs := built.pairs():
            matched[name] = pairs
        for text in built.notes:
            say("note", text=text)
        courses.append(Course(lesson.head, lesson.data, lesson.task, tuple(lesson.teachers), built.objective))
    meta = fit(Job("distill", student, tuple(courses), options, augment, seed, work, cache, say))
    return meta | {"losses": losses, "correspondence": matched}


def _begun(say: Say) -> Say:
    """Meet the processes that train together, before anything is computed; the first one alone tells what happens."""
    here().join()
    return here().heard(say)


def _probe(data: Dataset) -> Callable[[], dict[str, Tensor]]:
    """The first training samples, read when they are asked for."""

    def read() -> dict[str, Tensor]:
        order = np.arange(min(PROBE_SAMPLES, len(data.train)))
        return on_device(next(iter(data.train.batches([order]))).inputs, torch.device("cpu"))

    return read


def _check_outputs(networks: Sequence[tuple[str, Network, str | None, Dataset, Task]]) -> None:
    """Every network gives as many outputs as its data has, for real samples: known before anything is trained."""
    given = []
    for role, network, head, data, task in networks:
        batch = next(iter(data.train.batches([np.arange(min(2, len(data.train)))])), None)
        if batch is None:
            continue  # an empty split is told by what reads it
        place(network, network.preprocessing is not None)
        modes = {module: module.training for module in network.modules()}
        network.eval()
        with torch.inference_mode():
            output = forward(network, on_device(batch.inputs, device()), head)
        for module, mode in modes.items():
            module.training = mode
        if (output.ndim > 2) != task.dense:
            raise ModelError(
                f"the {role} gives outputs of shape {tuple(output.shape)}",
                where=role,
                expected=f"batch × {len(data.classes)}{' × grid' if task.dense else ''}, for {task.name}",
            )
        given.append((role, output.shape[1], data))
    for role, count, data in given:
        wanted = len(data.classes)
        if count == wanted:
            continue
        others = "".join(f", and the {other} {found}" for other, found, of in given if other != role and of is data)
        raise ModelError(
            f"the {role} has {count} outputs{others}, but {data.name} has {wanted} classes",
            where=role,
            expected=f"{wanted} outputs, in the order of the data's classes",
            fix=f"bring a {role} that was trained on these classes, or leave out its weights so that it is trained",
        )


def _check_augment(data: Dataset, augment: Augment, say: Say) -> None:
    if not data.images and augment != Augment(seed=augment.seed):
        say("note", text=f"{data.name} has no images: [augment] does nothing")
