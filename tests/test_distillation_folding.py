"""A folded teacher says the same as the one it was made from, in fewer modules."""

from __future__ import annotations

import pytest
import timm
import torch
from frozen import IMAGES, images, network, settled
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from edgekd.correspondence import Tap, Taps
from edgekd.distillation.folding import folded
from edgekd.models import build
from edgekd.types import ModelSpec


def normalisations(of: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in of.modules())


class Block(nn.Module):
    """conv → batch norm, with something between them where it is asked for."""

    def __init__(self, convolution: nn.Module | None = None, *, read_twice: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.conv = convolution or nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.read_twice, self.twice = read_twice, twice

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        normal: Tensor = self.bn(found)
        if self.read_twice:
            normal = normal + found
        if self.twice:
            normal = self.bn(self.conv(x.flip(3))) + normal
        return normal.mean((2, 3))


@pytest.mark.parametrize("name", ["resnet20", "dscnn"])
def test_says_the_same_without_normalisation(name: str) -> None:
    torch.manual_seed(0)
    of = settled(build(ModelSpec(name), classes=4, inputs=IMAGES, images=True))
    state = {key: value.clone() for key, value in of.state_dict().items()}
    found = folded(of, images())
    assert found is not of
    assert normalisations(of) > 0
    assert normalisations(found) == 0
    expected = of(images(20)["image"])
    assert (found(images(20)["image"]) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(value, state[key]) for key, value in of.state_dict().items())
    assert not any(module._forward_hooks for module in [*of.modules(), *found.modules()])


@pytest.mark.parametrize(
    ("paths", "left"), [(["layer3", "linear:in"], 0), (["layer1.0.conv2", "layer2"], 1), (["layer1.0.bn2"], 1)]
)
def test_what_is_tapped_stays_the_same(paths: list[str], left: int) -> None:
    torch.manual_seed(0)
    of = settled(build(ModelSpec("resnet20"), classes=4, inputs=IMAGES, images=True))
    taps = [Tap(path, "BC" if ":in" in path else "BCHW", (), 0, 0.0, None) for path in paths]
    found = folded(of, images(), taps)
    assert normalisations(found) == left
    with Taps(of, taps) as theirs, Taps(found, taps) as ours:
        of(images(20)["image"])
        found(images(20)["image"])
        for expected, value in zip(theirs.take().values(), ours.take().values(), strict=True):
            assert (value - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not any(module._forward_hooks for module in [*of.modules(), *found.modules()])


class Apart(nn.Module):
    """conv → batch norm, the former in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.bn(self.stem(x))
        return normal.mean((2, 3))


def test_a_tap_that_folding_would_change() -> None:
    """The layer that is tapped gives what the convolution in it gives."""
    of = network(Apart())
    assert folded(of, images()) is not of
    assert folded(of, images(), [Tap("stem", "BCHW", (), 0, 0.0, None)]) is of


def test_timm() -> None:
    """Its normalisation has the activation inside, so that it stays; nothing breaks."""
    torch.manual_seed(0)
    of = network(timm.create_model("mobilenetv3_small_050", num_classes=4))
    found = folded(of, images())
    assert torch.allclose(found(images()["image"]), of(images()["image"]), atol=1e-3)


@pytest.mark.parametrize(
    "block",
    [
        Block(read_twice=True),
        Block(twice=True),
        Block(weight_norm(nn.Conv2d(3, 4, 3, padding=1))),
        Block(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())),
    ],
    ids=["read by another", "called twice", "parametrized", "not the next"],
)
def test_left_alone(block: nn.Module) -> None:
    of = network(block)
    assert folded(of, images()) is of
