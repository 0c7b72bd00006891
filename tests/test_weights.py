"""Weights files: what fits is loaded, what does not is told, and nothing in them is run."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgekd.data.imagefolder import imagefolder
from edgekd.errors import ModelError, StoreError
from edgekd.models import build, weights
from edgekd.models.dscnn import dscnn
from edgekd.models.network import Network
from edgekd.models.resnet import ResNet, resnet8, resnet20
from edgekd.models.timm import timm
from edgekd.types import Dataset, ModelSpec, TensorSpec

RGB = (TensorSpec("image", "uint8", ("batch", 32, 32, 3)),)
GREY = (TensorSpec("image", "uint8", ("batch", 32, 32, 1)),)


def seeded(seed: int, classes: int = 10, **options: Any) -> ResNet:
    torch.manual_seed(seed)
    return resnet8(classes, RGB, **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def error(path: Path, module: nn.Module | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        weights.load(path, module or seeded(1))
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


# ---------------------------------------------------------------- saving


def test_what_is_saved_loads_again_with_its_meta(tmp_path: Path) -> None:
    weights.save(tmp_path / "w.safetensors", seeded(0), {"epochs": "3", "accuracy": "0.9"})
    other = seeded(1)
    weights.load(tmp_path / "w.safetensors", other)
    assert equal(seeded(0), other)
    assert weights.meta(tmp_path / "w.safetensors") == {"epochs": "3", "accuracy": "0.9"}
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    for name, meta in (("a", {"x": "1", "y": "2", "z": "3"}), ("b", {"z": "3", "y": "2", "x": "1"})):
        weights.save(tmp_path / name, seeded(0), meta)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tied_and_strided_weights_are_saved(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = nn.Parameter(first.weight.t())
    tied = nn.ModuleDict({"a": first, "b": second})
    weights.save(tmp_path / "w", tied, {})
    state = weights.read(tmp_path / "w")
    assert torch.equal(state["b.weight"], state["a.weight"].t())


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.save(tmp_path / "w", seeded(0), {})
    before = (tmp_path / "w").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        weights.save(tmp_path / "w", seeded(1), {})
    assert (tmp_path / "w").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_broken_weights_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    module = seeded(0)
    with torch.no_grad():
        module.linear.bias[3] = float("nan")
    with pytest.raises(ModelError, match=r"NaN or infinite: linear\.bias"):
        weights.save(tmp_path / "w", module, {})
    torch.save(module.state_dict(), tmp_path / "w.pt")
    assert "weights are NaN or infinite: linear.bias" in error(tmp_path / "w.pt")


# ---------------------------------------------------------------- forms of checkpoints


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model_state_dict",), ("checkpoint", "model"), ("ema",)])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_nests_and_prefixes_are_seen_through(tmp_path: Path, nest: tuple[str, ...], prefix: str) -> None:
    loaded: Any = prefixed(seeded(0).state_dict(), prefix)
    for key in reversed([key for key in nest if key != "checkpoint"]):
        loaded = {"epoch": 3, "args": argparse.Namespace(lr=0.1), key: loaded}
    torch.save(loaded, tmp_path / "c.pt")
    module = seeded(1)
    weights.load(tmp_path / "c.pt", module)
    assert equal(seeded(0), module)


def test_prefixes_that_belong_to_the_model_stay(tmp_path: Path) -> None:
    module = nn.ModuleDict({"model": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    torch.save(module.state_dict(), tmp_path / "c.pt")
    weights.load(tmp_path / "c.pt", nn.ModuleDict({"model": nn.Linear(3, 2), "head": nn.Linear(2, 2)}))
    torch.save(prefixed(module.state_dict(), "module."), tmp_path / "d.pt")
    again = nn.ModuleDict({"model": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    weights.load(tmp_path / "d.pt", again)
    assert equal(module, again)


def test_legacy_half_precision_and_missing_counters(tmp_path: Path) -> None:
    state = {k: v for k, v in seeded(0).half().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    module = seeded(1)
    weights.load(tmp_path / "c.pt", module)
    assert module.linear.weight.dtype == torch.float32
    assert torch.equal(module.linear.weight, seeded(0).half().float().linear.weight)


# ---------------------------------------------------------------- refusals


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, legacy: bool) -> None:
    torch.save({"state_dict": Attack(tmp_path / "ran")}, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    message = error(tmp_path / "c.pt")
    assert "loading it would run code" in message
    assert "mkdir" in message
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_and_a_whole_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    error(tmp_path / "p.pkl")
    assert not (tmp_path / "ran").exists()
    torch.save(seeded(0), tmp_path / "m.pt")
    assert "save model.state_dict()" in error(tmp_path / "m.pt")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    weights.save(tmp_path / "teacher.safetensors", seeded(0), {})
    assert "did you mean 'teacher.safetensors'?" in error(tmp_path / "teacher.safetensor")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "teacher.safetensors").read_bytes()[:5000])
    assert "the weights cannot be read" in error(cut)
    torch.save(seeded(0).state_dict(), tmp_path / "c.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:3000])
    assert "the weights cannot be read" in error(tmp_path / "cut.pt")
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    assert "neither safetensors nor a torch checkpoint" in error(tmp_path / "page.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "neither safetensors nor a torch checkpoint" in error(tmp_path / "empty.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in error(tmp_path / "lfs.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "it holds a list" in error(tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    assert "a dictionary of epoch" in error(tmp_path / "none.pt")


def test_another_number_of_classes_is_told(tmp_path: Path) -> None:
    weights.save(tmp_path / "w", seeded(0, classes=100), {})
    message = error(tmp_path / "w")
    assert "linear.weight is 100×64, the model's 10×64" in message
    assert "another number of classes: layer 'linear' has 100 in the file and 10 in the model" in message


def test_another_architecture_is_told_and_nothing_is_changed(tmp_path: Path) -> None:
    weights.save(tmp_path / "w", dscnn(10, RGB), {})
    module = seeded(1)
    message = error(tmp_path / "w", module)
    assert "keys are missing (conv1.weight, bn1.weight, bn1.bias and" in message
    assert "are unexpected (" in message
    assert "another architecture" in message
    assert equal(seeded(1), module)


def test_another_depth_and_another_width_are_told(tmp_path: Path) -> None:
    weights.save(tmp_path / "w", seeded(0), {})
    assert "keys are missing (layer1.1.conv1.weight" in error(tmp_path / "w", resnet20(10, RGB))
    assert "of the same family with another depth" in error(tmp_path / "w", seeded(0, shortcut="conv"))
    assert "other options, such as width" in error(tmp_path / "w", seeded(0, width=8))
    told = "It was trained on images of 3 channels, and the model is built for 1: [data] channels = 3 reads them so"
    assert told in error(tmp_path / "w", resnet8(10, GREY))


# ---------------------------------------------------------------- weights to start from


def test_pretrained_weights_fit_other_classes_and_grey_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm(1000, RGB, name="resnet18")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(1)
    fresh = timm(10, GREY, name="resnet18").state_dict()
    torch.manual_seed(1)
    loaded = timm(10, GREY, name="resnet18", pretrained=str(tmp_path / "w.safetensors")).state_dict()
    given = source.state_dict()
    assert torch.equal(loaded["layer1.0.conv1.weight"], given["layer1.0.conv1.weight"])
    assert torch.equal(loaded["conv1.weight"], given["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(loaded["fc.weight"], fresh["fc.weight"])
    with pytest.raises(ModelError, match="do not fit"):
        weights.load_pretrained(tmp_path / "w.safetensors", seeded(0))


def test_pretrained_weights_keep_a_classifier_that_fits(tmp_path: Path) -> None:
    weights.save(tmp_path / "w", seeded(0), {})
    module = seeded(1)
    weights.load_pretrained(tmp_path / "w", module)
    assert equal(seeded(0), module)


# ---------------------------------------------------------------- published weights on real images


@pytest.fixture(scope="module")
def cifar_test(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A tenth of the real test images, 500, as a zip file of their own (reading all 55,000 takes seconds)."""
    import zipfile

    small = tmp_path_factory.mktemp("cifar") / "small.zip"
    with zipfile.ZipFile(shared_data / "cifar10" / "cifar10-images.zip") as source, zipfile.ZipFile(small, "w") as kept:
        for name in source.namelist():
            folder, _, index = name.removesuffix(".jpg").rpartition("/")
            if (folder.startswith("test/") and int(index) % 20 == 0) or (
                folder.startswith("train/") and index < "0004"
            ):
                kept.writestr(name, source.read(name))
    return imagefolder(0, path=str(small))


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [("resnet20", "resnet20-published.th", 0.81), ("resnet56", "resnet56-cifar10.safetensors", 0.90)],
)
def test_published_weights_reach_their_accuracy(
    shared_data: Path, cifar_test: Dataset, name: str, file: str, expected: float
) -> None:
    spec = ModelSpec(name, weights=str(shared_data / "teachers" / file))
    network = build(spec, classes=10, inputs=cifar_test.inputs, images=True).eval()
    assert isinstance(network, Network)
    right = 0
    with torch.no_grad():
        for batch in cifar_test.test.batches(np.array_split(np.arange(len(cifar_test.test)), 4)):
            right += int((network(torch.from_numpy(batch.inputs["image"])).argmax(1).numpy() == batch.labels).sum())
    assert len(cifar_test.test) == 500
    assert abs(right / 500 - expected) < 0.035  # two standard errors of 500 samples
