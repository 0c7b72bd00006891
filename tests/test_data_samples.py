"""Data of a user's own, and torchvision's."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from edgekd.data import load
from edgekd.data.digits import digits
from edgekd.data.samples import Reading, wrapped
from edgekd.data.torchvision import torchvision
from edgekd.errors import DataError, PartError
from edgekd.types import Dataset, Part, Split


def whole(split: Split) -> dict[str, np.ndarray]:
    (batch,) = split.batches([np.arange(len(split))])
    return dict(batch.inputs)


def made(value: object, **options: Any) -> Dataset:
    return wrapped(value, "mine", Reading(0, **options))


def error(value: object) -> str:
    with pytest.raises(DataError) as caught:
        made(value)
    assert str(caught.value).startswith("mine")
    return str(caught.value)


class Pictures:
    """A map-style data set as users write it."""

    classes = ("cat", "dog")

    def __init__(self, kind: str, count: int = 40, side: int = 6) -> None:
        self.kind, self.count, self.side = kind, count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        array = np.random.default_rng(index).integers(0, 256, (self.side, 8, 3), np.uint8)
        forms: dict[str, Callable[[np.ndarray], Any]] = {
            "pil": Image.fromarray,
            "array": np.asarray,
            "tensor": lambda a: torch.from_numpy(a).permute(2, 0, 1),
        }
        return forms[self.kind](array), index % 2


@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_images_of_any_form_are_the_same_data(kind: str) -> None:
    data = made(Pictures(kind))
    assert data.images
    assert data.classes == ("cat", "dog")
    assert data.inputs[0].shape == ("batch", 6, 8, 3)
    assert (len(data.train), len(data.calibration), len(data.test)) == (29, 3, 8)
    assert np.array_equal(whole(data.test)["image"], whole(made(Pictures("array")).test)["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_and_in_memory_give_the_same_bytes(workers: int) -> None:
    kept, streamed = made(Pictures("pil")), made(Pictures("pil"), memory_bytes=0, workers=workers)
    assert type(streamed.train).__name__ == "StreamedSplit"
    assert kept.fingerprint == streamed.fingerprint
    assert np.array_equal(whole(kept.train)["image"], whole(streamed.train)["image"])


def test_a_data_set_that_cannot_be_pickled_is_streamed_in_this_process() -> None:
    source: Any = Pictures("array")
    source.transform = lambda image: image
    data = made(source, memory_bytes=0, workers=2)
    assert whole(data.test)["image"].shape == (8, 6, 8, 3)


@pytest.mark.parametrize("form", [tuple, dict])
def test_a_pair_keeps_its_test_split(form: type) -> None:
    pair = (Pictures("array", 30), Pictures("array", 7))
    data = made(pair if form is tuple else dict(zip(("train", "test"), pair, strict=True)))
    assert (len(data.train), len(data.calibration), len(data.test)) == (27, 3, 7)
    assert "7 of 7 test samples are exact copies of training samples" in data.notes


def test_float_tensors_and_named_arrays_are_passed_on() -> None:
    x, y = torch.randn(40, 3, 5), torch.arange(40) % 4
    data = made(TensorDataset(x, y))
    assert not data.images
    assert data.inputs[0] == data.inputs[0].__class__("x", "float32", ("batch", 3, 5))
    assert data.classes == ("0", "1", "2", "3")
    named = [{"ids": [1, 2, i], "mask": np.ones(3, bool), "label": i % 2} for i in range(40)]
    data = made(named)
    assert [(spec.name, spec.dtype, spec.shape) for spec in data.inputs] == [
        ("ids", "int64", ("batch", 3)),
        ("mask", "bool", ("batch", 3)),
    ]
    assert whole(data.train)["ids"].shape[1:] == (3,)


def test_images_that_differ_in_size_become_one() -> None:
    data = made([(np.zeros((10 + i % 2, 12), np.uint8), i % 2) for i in range(40)], size=(8, 8))
    assert data.inputs[0].shape == ("batch", 8, 8, 1)
    data = made([(np.zeros((10 + i % 2, 12), np.uint8), i % 2) for i in range(40)])
    assert data.inputs[0].shape == ("batch", 224, 224, 1)
    assert "images differ in size" in data.notes[0]


def test_random_samples_are_frozen_and_noted() -> None:
    class Noisy(Pictures):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return torch.rand(4), index % 2

    assert "other values each time" in made(Noisy("array")).notes[0]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (Stream(), "collect it in a list"),
        (7, "a int is no data set"),
        ([], "the data set is empty"),
        ({"train": [], "tset": []}, "the keys train, tset"),
        ([1, 2, 3], "a sample is a int"),
        ([{"ids": [1]}] * 9, "expected (input, label), or a dictionary of arrays with a 'label'"),
        ([(torch.zeros(3), torch.zeros(2))] * 9, "the label of sample 0 is a Tensor of shape (2,)"),
        ([(torch.zeros(3 + i), i % 2) for i in range(9)], "pad or crop them to one shape"),
        ([(torch.full((3,), float("nan")), i % 2) for i in range(9)], "mine (all)[0]: it holds NaN"),
        ([("text", 0)] * 9, "a str is no array of numbers"),
        ([(np.zeros((3, 8, 8), np.uint8), 0)] * 9, "height × width × channels, of 1 or 3 channels"),
        ([(torch.zeros(3), 0)] * 9, "there is 1 class"),
    ],
)
def test_errors(value: object, told: str) -> None:
    assert told.lower() in error(value).lower()


def test_a_users_callable_is_found_and_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def load(seed, *, count=40):\n    return [([float(i), seed], i % 2) for i in range(count)]\n"
    (tmp_path / "own_data_here.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = load(Part("own_data_here:load", {"count": 60}), 5)
    assert (data.name, len(data.test)) == ("own_data_here:load", 12)
    assert (whole(data.train)["x"][:, 1] == 5).all()
    with pytest.raises(PartError, match="did you mean 'count'"):
        load(Part("own_data_here:load", {"cuont": 60}), 5)


def test_a_callable_may_return_our_dataset() -> None:
    assert load(Part("edgekd.data.digits:digits"), 0).fingerprint == digits(0).fingerprint


# ---------------------------------------------------------------- torchvision


def write_mnist(root: Path) -> None:
    """Files of torchvision's FashionMNIST, in the IDX format (LeCun, Cortes, Burges, 1998)."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def test_torchvision_data_set_with_its_own_splits(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = torchvision(0, dataset="FashionMNIST", root=str(tmp_path))
    assert (len(data.train), len(data.calibration), len(data.test)) == (54, 6, 20)
    assert data.inputs[0].shape == ("batch", 28, 28, 1)
    assert data.classes[0] == "T-shirt/top"
    wide = torchvision(0, dataset="FashionMNIST", root=str(tmp_path), size=32, channels=3)
    assert wide.inputs[0].shape == ("batch", 32, 32, 3)


@pytest.mark.parametrize("dataset", ["CIFAR10", "MNIST", "Flowers102", "SVHN"])
def test_torchvision_never_downloads_by_itself(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(DataError, match="set download = true"):
        torchvision(0, dataset=dataset, root=str(tmp_path / "none"))
    assert not list(tmp_path.rglob("*.*"))


def test_torchvision_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'CIFAR10'"):
        torchvision(0, dataset="CIFAR1O", root=str(tmp_path))
    with pytest.raises(DataError, match="fetch it by hand"):
        torchvision(0, dataset="ImageNet", root=str(tmp_path), download=True)
