"""Training: a teacher on labels, a student on a teacher. One loop, exact to resume, without image assumptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.distill.job import Job
from edgekd.distill.logits import device, evaluate, forward, place
from edgekd.distill.loop import fit
from edgekd.distill.samples import on_device
from edgekd.errors import ModelError, PartError, RecipeError
from edgekd.losses.ce import ce
from edgekd.models.network import Network
from edgekd.types import Augment, Dataset, Json, Outputs, Say, TrainOptions

VERSION = 1  # of what training does with its options; raised where old weights would no longer be what it makes

__all__ = ["VERSION", "Loss", "distill", "evaluate", "train"]

Loss = Callable[[Outputs, Outputs, Tensor], Tensor]  # (student, teacher, labels) → scalar


def train(
    network: Network, data: Dataset, options: TrainOptions, augment: Augment, *, seed: int, work: Path, say: Say
) -> dict[str, Json]:
    """Train a network on the labels by cross-entropy, from the weights it has.

    The network is trained in place and ends in eval mode with the weights that are kept (the moving average), which
    are also in `work`/weights.safetensors. Where `work`/last.pt is there, training goes on from it and ends with the
    very bits an undisturbed training ends with.

    Args:
        network: takes the stored samples of `data`.
        data: its train split alone is read.
        seed: of the order, the augmentation and what the network itself draws; not of its initial weights.
        work: a folder that is there.
        say: told "epoch", "batch" (at most twice a second), "precision", "resumed", "corrupt", "note".

    Returns:
        epochs, steps, train_s, precision and its reason, history (a row an epoch), device, threads, samples.

    Raises:
        ModelError: the network's weights are not finite, or it does not give one logit a class.
        EdgekdError: the loss or the weights stop being finite; the last checkpoint before it is kept.
        StoreError: the disk is full or read-only.
    """
    if options.teacher_views:
        raise RecipeError(
            "teacher_views does nothing without a teacher", where="teacher.train", fix="it belongs into [distill]"
        )
    _check_classes([("network", network)], data)
    loss = partial(ce, label_smoothing=options.label_smoothing)
    _check_augment(data, augment, say)
    return fit(Job("train", network, None, loss, "ce", data, options, augment, seed, work, say))


def distill(
    student: Network,
    teacher: Network,
    data: Dataset,
    losses: Sequence[tuple[float, Loss]],
    options: TrainOptions,
    augment: Augment,
    *,
    seed: int,
    work: Path,
    say: Say,
) -> dict[str, Json]:
    """Train a student on a teacher's outputs for the same augmented samples: loss = Σ weight · loss_i.

    The teacher is in eval mode, gets no gradient, and is not changed nor stored. Everything else is as in `train`.

    Args:
        losses: (weight, loss) pairs.

    Raises:
        ModelError: teacher and student have different numbers of classes, or one differs from the data's.
        PartError: a loss has weights of its own, which nothing would train.
        RecipeError: no loss, or a label smoothing, which belongs to a loss here.

    With options.teacher_views = n the augmentation repeats after n epochs and the teacher runs only in the first n;
    its outputs are kept in `work` meanwhile. Samples that are not augmented are one view: the teacher sees them once.
    """
    if not losses:
        raise RecipeError("there is no loss to distil with", where="loss", fix='add [[loss]] with name = "kd"')
    if options.label_smoothing:
        raise RecipeError(
            "label_smoothing does nothing in distillation",
            where="distill",
            fix='give it to the loss on labels: [[loss]] name = "ce", label_smoothing = …',
        )
    for _, loss in losses:
        if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
            raise PartError(f"the loss {type(loss).__name__} has weights of its own", expected="a function of outputs")
    _check_classes([("teacher", teacher), ("student", student)], data)
    _check_augment(data, augment, say)

    def total(student_: Outputs, teacher_: Outputs, labels: Tensor) -> Tensor:
        return torch.stack([weight * loss(student_, teacher_, labels) for weight, loss in losses]).sum()

    name = " + ".join(f"{weight!r} {_named(loss)}" for weight, loss in losses)
    return fit(Job("distill", student, teacher, total, name, data, options, augment, seed, work, say))


def _named(loss: Loss) -> str:
    """Which loss it is, with its options, in words that are the same in every process."""
    if isinstance(loss, partial):
        return f"{_named(loss.func)}{loss.args}{sorted(loss.keywords.items())}"
    return f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"


def _check_classes(networks: Sequence[tuple[str, Network]], data: Dataset) -> None:
    """Every network gives one logit a class for real samples: known before anything is trained."""
    batch = next(iter(data.train.batches([np.arange(min(2, len(data.train)))])), None)
    if batch is None:
        return  # an empty split is told by what reads it
    given = {}
    for role, network in networks:
        place(network, data.images)
        modes = {module: module.training for module in network.modules()}
        network.eval()
        with torch.inference_mode():
            given[role] = forward(network, on_device(batch.inputs, device())).shape[1]
        for module, mode in modes.items():
            module.training = mode
    wanted = len(data.classes)
    for role, classes in given.items():
        if classes == wanted:
            continue
        others = "".join(f", and the {other} {count}" for other, count in given.items() if other != role)
        raise ModelError(
            f"the {role} has {classes} outputs{others}, but {data.name} has {wanted} classes",
            where=role,
            expected=f"{wanted} outputs, in the order of the data's classes",
            fix=f"bring a {role} that was trained on these classes, or leave out its weights so that it is trained",
        )


def _check_augment(data: Dataset, augment: Augment, say: Say) -> None:
    if not data.images and augment != Augment():
        say("note", text=f"{data.name} has no images: [augment] does nothing")
