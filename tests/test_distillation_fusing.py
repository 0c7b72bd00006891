"""A fused teacher says the same as the one it was made from, in fewer calls."""

from __future__ import annotations

import pytest
import timm
import torch
from frozen import IMAGES, images, network, settled
from torch import Tensor, nn
from torch.nn import functional

from edgekd.correspondence import Tap, Taps
from edgekd.distillation.folding import folded
from edgekd.distillation.fusing import _able, _Fused, fused
from edgekd.models import build
from edgekd.models.network import Network
from edgekd.types import ModelSpec

pytestmark = pytest.mark.skipif(
    not _able(build(ModelSpec("resnet8"), classes=4, inputs=IMAGES, images=True)),
    reason="torch has no oneDNN with bf16 on this processor",
)


def calls(of: nn.Module) -> int:
    return sum(isinstance(module, _Fused) for module in of.modules())


def assert_same(of: Network, found: Network) -> None:
    """In fp32, and to what bf16 can tell in bf16."""
    given = images(20)["image"]
    with torch.no_grad():
        expected, value = of(given), found(given)
        assert (value - expected).abs().max() <= 1e-4 * expected.abs().max()
        with torch.autocast("cpu", torch.bfloat16):
            rounded, value = of(given).float(), found(given).float()
    off = (rounded - expected).abs().max()
    assert (value - expected).abs().max() <= 2 * off + 0.01 * expected.abs().max()


def resnet20() -> Network:
    torch.manual_seed(0)
    return settled(build(ModelSpec("resnet20"), classes=4, inputs=IMAGES, images=True))


def test_every_convolution_of_a_resnet() -> None:
    of = resnet20()
    plain = folded(of, images())
    found = fused(plain, images())
    assert calls(found) == 19
    assert calls(plain) == 0
    assert_same(of, found)
    assert not any("forward" in module.__dict__ for module in plain.modules())


@pytest.mark.parametrize(("paths", "left"), [(["layer3", "linear:in"], 19), (["layer1.0.conv2", "layer2"], 18)])
def test_what_is_tapped_stays_the_same(paths: list[str], left: int) -> None:
    of = resnet20()
    taps = [Tap(path, "BC" if ":in" in path else "BCHW", (), 0, 0.0, None) for path in paths]
    found = fused(folded(of, images(), taps), images(), taps)
    assert calls(found) == left
    with Taps(of, taps) as theirs, Taps(found, taps) as ours, torch.no_grad():
        of(images()["image"])
        found(images()["image"])
        for expected, value in zip(theirs.take().values(), ours.take().values(), strict=True):
            assert (value - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_b0"])
def test_timm(name: str) -> None:
    torch.manual_seed(0)
    of = network(timm.create_model(name, num_classes=4))
    found = fused(folded(of, images()), images())
    assert calls(found) > 30
    assert_same(of, found)


class Small(nn.Module):
    """A convolution, and what a case does with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.then(x).flatten(1)[:, :4]

    def then(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InPlace(Small):
    def then(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out += x
        return functional.relu_(out)


class Silu(Small):
    def then(self, x: Tensor) -> Tensor:
        return functional.silu(self.conv(x))


class SiluOfSum(Small):
    """oneDNN adds, and has no such activation behind it."""

    def then(self, x: Tensor) -> Tensor:
        return functional.silu(x + self.conv(x))


class ReadTwice(Small):
    def then(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        found: Tensor = self.act(out) + out
        return found


class CalledTwice(Small):
    def then(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.conv(self.act(self.conv(x))))
        return found


class Broadcast(Small):
    """One position is added to all."""

    def then(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.conv(x) + x.mean((2, 3), keepdim=True))
        return found


class Twice(Small):
    """The sum of a value and itself."""

    def then(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        found: Tensor = self.act(out + out)
        return found


class Scaled(Small):
    def then(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(torch.add(self.conv(x), x, alpha=2))
        return found


class ChangedBetween(Small):
    """What the convolution reads is changed in place before its sum is taken."""

    def then(self, x: Tensor) -> Tensor:
        x = x * 1
        out = self.conv(x)
        found: Tensor = self.act(out + x.mul_(3))
        return found


class Untraceable(Small):
    def then(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) if x.mean() > -100 else x


class Reflected(Small):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

    def then(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.conv(x))
        return found


@pytest.mark.parametrize("module", [InPlace(), Silu(), SiluOfSum(), Broadcast()], ids=lambda each: type(each).__name__)
def test_fused(module: Small) -> None:
    of = network(module)
    found = fused(of, images())
    assert calls(found) == 1
    assert_same(of, found)


@pytest.mark.parametrize(
    "module",
    [ReadTwice(), CalledTwice(), Twice(), Scaled(), ChangedBetween(), Untraceable(), Reflected()],
    ids=lambda each: type(each).__name__,
)
def test_left_alone(module: Small) -> None:
    of = network(module)
    assert fused(of, images()) is of


def test_hooks_of_a_user_are_still_called() -> None:
    of, seen = network(InPlace()), list[str]()
    of.module.register_forward_hook(lambda *_: seen.append("module"))
    found = fused(of, images())
    assert calls(found) == 1
    seen.clear()
    found(images()["image"])
    assert seen == ["module"]
