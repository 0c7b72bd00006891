"""Training batches: which samples each step sees, in an order and with changes that are pure functions of the seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edgekd.distillation import augment as augmentation
from edgekd.errors import DataError, RecipeError
from edgekd.types import Arrays, Augment, Batch, Dataset

Inputs = Mapping[str, Tensor]  # by input name, batch first, on the training device


@dataclass(frozen=True, slots=True)
class Step:
    """What this process trains on in one step."""

    view: int
    indices: np.ndarray  # int64 positions in the training split
    inputs: Inputs  # as they are in this view
    labels: Tensor  # int64; float32 where the data's are; float32, batch × classes probabilities of mixed images
    total: int  # samples of this step in all processes together
    stored: Inputs  # as the split has them, without augmentation


class Samples:
    """The training split of `data`, batch by batch, on `device`.

    What a sample is like in a view depends on nothing but its position, the view and augment.seed; in which order
    samples come depends on `seed` alone. Trainings with other seeds so share what a teacher said.

    The split reads: one in memory by a single index per array (0.10 ms for 128 small images; gathered in tensors first
    it would be 0.08 ms and a second copy of the data), a streamed one ahead of time. Images that are mixed are read
    with their partners, which is twice the reading.

    Args:
        data: its train split; images are augmented, and label maps of their height and width are cropped and mirrored
            with them; other inputs are taken as they are.
        augment: what is done to images.
        batch_size: samples a step, in all processes together.
        views: epochs after which the augmented views come again; 0 is never.
        seed: of the order.
        device: where the batches are wanted.
        rank, world: this process and how many there are; each gets a contiguous share of every batch, none of which
            differs from another by more than one sample.

    Raises:
        DataError: fewer than two training samples a process.
        RecipeError: the images are too small for the augmentation, or a batch for the processes.
    """

    def __init__(
        self,
        data: Dataset,
        augment: Augment,
        *,
        batch_size: int,
        views: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.count, least = len(data.train), 2 * world
        if self.count < least:
            raise DataError(
                f"there {'is 1 training sample' if self.count == 1 else f'are {self.count} training samples'}",
                where=data.name,
                expected="at least two" + (f" for each of {world} processes" if world > 1 else ""),
            )
        if batch_size < least:
            raise RecipeError(
                f"batch_size is {batch_size} for {world} processes", expected=f"at least {least}: two for each"
            )
        self._data, self._augment, self._seed, self._device = data, augment, seed, device
        self._rank, self._world = rank, world
        self._batch_size = min(batch_size, self.count)
        # A last batch of less than two samples a process is left out: batch normalisation cannot train on one. Others
        # are trained on, so that small data sets lose nothing; which samples are left out changes with every epoch.
        rest = self.count % self._batch_size
        self._used = self.count - (rest if rest < least else 0)
        self.steps_per_epoch = -(-self._used // self._batch_size)
        self.augmented = data.images and augment != Augment(seed=augment.seed)  # whether a view differs from another
        if self.augmented:
            augmentation.check(augment, data.inputs[0].shape, "augment")
        self.views = views if self.augmented else 1  # what is never changed is one view

    def epoch(self, epoch: int, *, first: int = 0) -> Iterator[Step]:
        """This process's share of each step of an epoch, from its step number `first` on."""
        bits = augmentation.random_bits(np.arange(self.count), seed=self._seed, purpose="order", view=epoch)
        order = np.argsort(bits, kind="stable")[: self._used]
        batches = [order[start : start + self._batch_size] for start in range(0, self._used, self._batch_size)]
        shares = [np.array_split(batch, self._world)[self._rank] for batch in batches[first:]]
        view = epoch % self.views if self.views else epoch
        for total, step in zip(map(len, batches[first:]), self._steps(view, shares), strict=True):
            yield replace(step, total=total)

    def at(self, view: int, indices: np.ndarray) -> Step:
        """These samples as they are in a view: what a step of that view has for them, to the bit."""
        return next(self._steps(view, [indices]))

    def _steps(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Step]:
        if self.augmented and self._augment.mixup:
            yield from self._mixed_steps(view, order)
            return
        for batch in self._data.train.batches(order):
            stored = on_device(batch.inputs, self._device)
            inputs, labels = dict(stored), _labels(batch.labels).to(self._device)
            if self.augmented:
                name = self._data.inputs[0].name
                inputs[name] = augmentation.augmented(stored[name], batch.indices, view, self._augment)
                if labels.shape == stored[name].shape[:3]:  # a class for each pixel goes where its pixel goes
                    moves = replace(self._augment, cutout_pixels=0)
                    labels = augmentation.augmented(labels[..., None], batch.indices, view, moves)[..., 0]
            yield Step(view, batch.indices, inputs, labels, len(batch.indices), stored)

    def _mixed_steps(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Step]:
        """As `_steps`, each image mixed with its partner, which is augmented as itself in this view."""
        name = self._data.inputs[0].name
        mixings = [augmentation.mixing(indices, view, self._augment, self.count) for indices in order]
        both = [np.concatenate([own, partners]) for own, (partners, _) in zip(order, mixings, strict=True)]
        for own, (_, parts), batch in zip(order, mixings, self._data.train.batches(both), strict=True):
            read, n = on_device(batch.inputs, self._device), len(own)
            images = augmentation.augmented(read[name], batch.indices, view, self._augment)
            inputs = {name: augmentation.blended(images[:n], images[n:], parts)}
            labels = self._mixed_labels(batch, parts).to(self._device)
            yield Step(view, own, inputs, labels, n, {name: read[name][:n]})

    def _mixed_labels(self, batch: Batch, parts: np.ndarray) -> Tensor:
        labels, n = batch.labels, len(parts)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise RecipeError(
                f"mixup mixes class labels, and those of {self._data.name} are {labels.dtype} values"
                + (f" of shape {labels.shape[1:]}" if labels.ndim > 1 else ""),
                where="augment.mixup",
                expected="one class index a sample",
                fix="leave mixup out",
            )
        mixed = np.zeros((n, len(self._data.classes)), np.float32)
        share = parts.astype(np.float32) / augmentation.PARTS
        np.add.at(mixed, (np.arange(n), labels[:n]), share)
        np.add.at(mixed, (np.arange(n), labels[n:]), 1 - share)
        return torch.from_numpy(mixed)


def on_device(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on `device`, sharing memory where they can."""
    writable = {name: np.require(array, requirements=["C", "W"]) for name, array in arrays.items()}
    return {name: torch.from_numpy(array).to(device) for name, array in writable.items()}


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64))
