"""Training batches: pure functions of the seeds, whatever the batch size, the order, the workers and the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd.data.arrays import ArraySplit
from edgekd.data.imagefolder import imagefolder
from edgekd.distillation.augment import augmented, blended, mixing
from edgekd.distillation.samples import Samples, Step
from edgekd.errors import DataError, RecipeError
from edgekd.types import Augment, Dataset, TensorSpec

CPU = torch.device("cpu")
PLAIN = Augment(crop_pixels=2, flip=True, cutout_pixels=3)
MIXED = replace(PLAIN, mixup=1.0)
CLASSES = ("a", "b", "c")


def dataset(count: int = 23, labels: np.ndarray | None = None, *, images: bool = True) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 10, 12, 1), np.uint8)
    given = rng.integers(0, 3, count) if labels is None else labels
    split = ArraySplit({"x": pixels}, given, np.arange(count))
    spec = TensorSpec("x", "uint8", ("batch", 10, 12, 1))
    return Dataset("some", (spec,), CLASSES, split, split, split, images, "f")


def samples(
    data: Dataset, augment: Augment = PLAIN, batch_size: int = 4, seed: int = 0, rank: int = 0, world: int = 1
) -> Samples:
    return Samples(
        data, augment, batch_size=batch_size, views=2, seed=seed, device=CPU, rank=rank, world=world
    )  # fmt: skip


def by_sample(steps: Sequence[Step]) -> dict[int, tuple[bytes, bytes]]:
    """The bytes of each sample's image and label."""
    return {
        int(index): (step.inputs[name][at].numpy().tobytes(), step.labels[at].numpy().tobytes())
        for step in steps
        for name in step.inputs
        for at, index in enumerate(step.indices)
    }


# ---------------------------------------------------------------- the same sample in the same view


@pytest.mark.parametrize("augment", [PLAIN, MIXED])
def test_a_sample_in_a_view_is_the_same_in_every_batch_and_order(augment: Augment) -> None:
    data = dataset(24)
    first = by_sample(list(samples(data, augment).epoch(1)))
    assert len(first) == 24
    for other in (samples(data, augment, batch_size=5), samples(data, augment, batch_size=24, seed=7)):
        found = by_sample(list(other.epoch(3)))  # two views: epoch 3 is view 1 again
        assert all(found[index] == first[index] for index in found)
        assert list(found) != list(first)
    assert by_sample(list(samples(data, augment).epoch(0))) != first
    other_seed = by_sample(list(samples(data, replace(augment, seed=1)).epoch(1)))
    assert sum(other_seed[index][0] != first[index][0] for index in first) > 20


@pytest.mark.parametrize("augment", [PLAIN, MIXED])
def test_any_sample_in_any_view_can_be_asked_for(augment: Augment) -> None:
    found = samples(dataset(), augment)
    step = list(found.epoch(1))[2]
    for chosen in ([3, 0], [1]):
        again = found.at(step.view, step.indices[chosen])
        assert torch.equal(again.inputs["x"], step.inputs["x"][chosen])
        assert torch.equal(again.labels, step.labels[chosen])
        assert torch.equal(again.stored["x"], step.stored["x"][chosen])


def test_a_step_has_the_images_as_they_are_stored_too() -> None:
    data = dataset()
    whole = torch.from_numpy(next(iter(data.train.batches([np.arange(23)]))).inputs["x"])
    for augment in (PLAIN, MIXED, Augment()):
        step = next(samples(data, augment).epoch(0))
        assert torch.equal(step.stored["x"], whole[torch.from_numpy(step.indices)])
        assert torch.equal(step.stored["x"], step.inputs["x"]) == (augment == Augment())


@pytest.mark.parametrize("augment", [PLAIN, MIXED])
def test_streamed_images_are_the_same_for_every_number_of_workers(tmp_path: Path, augment: Augment) -> None:
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(9):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(tmp_path / name / f"{number}.png")
    found = []
    for memory_bytes, workers, batch_size in ((1 << 30, 0, 4), (0, 0, 5), (0, 1, 5), (0, 2, 3)):
        data = imagefolder(0, path=str(tmp_path), memory_bytes=memory_bytes, workers=workers)
        found.append(by_sample(list(samples(data, augment, batch_size).epoch(1))))
    assert type(data.train).__name__ == "StreamedSplit"
    complete = max(found, key=len)
    assert all(each == {index: complete[index] for index in each} for each in found)


# ---------------------------------------------------------------- mixup


def test_mixed_images_and_labels_are_those_of_a_plain_computation() -> None:
    data = dataset()
    whole = next(iter(data.train.batches([np.arange(23)])))
    pixels = torch.from_numpy(whole.inputs["x"])
    steps = list(samples(data, MIXED).epoch(1))
    assert sum(len(step.indices) for step in steps) == 23
    for step in steps:
        assert step.labels.dtype == torch.float32
        assert torch.equal(step.labels.sum(1), torch.ones(len(step.indices)))
        for at, index in enumerate(step.indices):
            alone = np.array([index])
            partner, part = mixing(alone, 1, MIXED, 23)
            own, other = (augmented(pixels[each], each, 1, MIXED) for each in (alone, partner))
            assert torch.equal(step.inputs["x"][at], blended(own, other, part)[0])
            expected = np.zeros(3)
            expected[whole.labels[index]] += part[0] / 256
            expected[whole.labels[partner[0]]] += 1 - part[0] / 256
            assert step.labels[at].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (np.zeros((23, 3), np.int64), r"int64 values of shape \(3,\)"),
        (np.zeros(23, np.float32), "float32 values"),
        (np.zeros((23, 10, 12), np.uint8), r"uint8 values of shape \(10, 12\)"),
    ],
)
def test_labels_that_cannot_be_mixed_are_refused(labels: np.ndarray, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        next(samples(dataset(labels=labels), MIXED).epoch(0))


# ---------------------------------------------------------------- labels


def test_labels_keep_their_kind() -> None:
    def dtype(labels: np.ndarray) -> torch.dtype:
        step = next(samples(dataset(labels=labels)).epoch(0))
        assert torch.equal(step.labels.double(), torch.from_numpy(labels[step.indices].astype(np.float64)))
        return step.labels.dtype

    assert dtype(np.arange(23, dtype=np.int32) % 3) == torch.int64
    assert dtype(np.linspace(-1, 1, 23)[:, None].astype(np.float32)) == torch.float32
    assert dtype(np.eye(23, 3, dtype=np.uint8)) == torch.int64


def test_label_maps_go_where_their_pixels_go() -> None:
    pixels = next(iter(dataset().train.batches([np.arange(23)]))).inputs["x"]
    data = dataset(labels=pixels[..., 0].copy())  # the label of a pixel is its value
    moves = Augment(crop_pixels=2, flip=True)
    step = next(samples(data, moves).epoch(1))
    assert torch.equal(step.labels, step.inputs["x"][..., 0].long())
    assert not torch.equal(step.labels, step.stored["x"][..., 0].long())
    cut = next(samples(data, PLAIN).epoch(1))
    assert torch.equal(cut.labels, step.labels), "a cut-out pixel keeps its class"


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("augment", [PLAIN, MIXED])
def test_the_shares_of_all_processes_are_the_batches_of_one(world: int, augment: Augment) -> None:
    data = dataset(26)
    whole = list(samples(data, augment, batch_size=10).epoch(1, first=1))
    shares = [list(samples(data, augment, batch_size=10, rank=r, world=world).epoch(1, first=1)) for r in range(world)]
    for at, step in enumerate(whole):
        parts = [each[at] for each in shares]
        assert np.concatenate([part.indices for part in parts]).tolist() == step.indices.tolist()
        assert torch.equal(torch.cat([part.inputs["x"] for part in parts]), step.inputs["x"])
        assert torch.equal(torch.cat([part.labels for part in parts]), step.labels)
        assert {part.total for part in parts} == {step.total} == {len(step.indices)}
        sizes = [len(part.indices) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("count", "batch_size", "world", "sizes"),
    [
        (9, 4, 1, [4, 4]),
        (10, 4, 1, [4, 4, 2]),
        (3, 64, 1, [3]),
        (11, 8, 2, [8]),
        (12, 8, 2, [8, 4]),
        (13, 6, 3, [6, 6]),
    ],
)
def test_a_last_batch_without_two_samples_a_process_is_left_out(
    count: int, batch_size: int, world: int, sizes: list[int]
) -> None:
    made = [samples(dataset(count), batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    steps = [list(each.epoch(0)) for each in made]
    assert [step.total for step in steps[0]] == sizes
    assert made[0].steps_per_epoch == len(sizes)
    assert all(len(step.indices) >= 2 for each in steps for step in each)


def test_too_little_for_the_processes_is_refused() -> None:
    with pytest.raises(DataError, match="1 training sample"):
        samples(dataset(1))
    with pytest.raises(DataError, match="5 training samples; expected at least two for each of 3"):
        samples(dataset(5), world=3, batch_size=8)
    with pytest.raises(RecipeError, match="batch_size is 4 for 3 processes"):
        samples(dataset(9), world=3)


# ---------------------------------------------------------------- views and inputs


def test_what_is_not_augmented_is_one_view() -> None:
    assert [step.view for step in samples(dataset()).epoch(3)] == [1] * 6
    for data, augment in ((dataset(), Augment(seed=4)), (dataset(images=False), MIXED)):
        found = samples(data, augment)
        assert (found.augmented, found.views) == (False, 1)
        assert {step.view for step in found.epoch(3)} == {0}
        assert next(found.epoch(3)).labels.dtype == torch.int64
    endless = Samples(dataset(), PLAIN, batch_size=4, views=0, seed=0, device=CPU)
    assert {step.view for step in endless.epoch(7)} == {7}
