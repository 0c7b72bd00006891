"""A cut network afterwards: built again from shapes and weights, exported, quantized, compared with its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuts import PIXELS, Branches, built, cut_to, images
from networks import IMAGE, NORMAL, SIZE, Small, samples
from torch import Tensor, nn

import edgekd
from edgekd import export, plugins, pruning, quantize
from edgekd.correspondence.pruned import fingerprint, remembered
from edgekd.errors import ModelError, RecipeError
from edgekd.goals import Prune
from edgekd.models.network import Network
from edgekd.models.resnet import resnet8
from edgekd.pruning import cost, shapes
from edgekd.pruning.cut import Group, Slot, cut
from edgekd.target import load
from edgekd.types import Backend, Part

# ---------------------------------------------------------------- rebuilt, without pickle


@pytest.mark.parametrize("make", [lambda: resnet8(10, PIXELS, width=8), Branches], ids=["ours", "a user's"])
def test_shapes_and_weights_rebuild_the_network_bit_for_bit(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = built(make)
    first = cut_to(module, images(), 0.7)
    with torch.no_grad():
        for parameter in first.module.parameters():
            parameter.add_(0.01)
    goal = 0.7 * first.after
    again: Any = pruning.prune(first.module, (images(),), "macs", goal, Prune(macs=0.5), architecture=module)
    pruning.write(again, tmp_path)
    rebuilt: Any = pruning.restore(make(), tmp_path / "shapes.json", tmp_path / "weights.safetensors").eval()
    mine, theirs = rebuilt.state_dict(), again.module.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(rebuilt(images()), again.module(images()))
    assert repr(rebuilt) == repr(again.module)
    assert remembered(rebuilt) == remembered(again.module)
    # the record is of the network that the first round began with
    record = remembered(rebuilt)
    assert record is not None
    assert record[1] == fingerprint(module)
    for name, dims in record[0].items():
        for dim, kept in dims.items():
            assert len(kept) == mine[name].shape[dim]
            assert list(kept) == sorted(set(kept))


def test_shapes_of_another_network_are_refused(tmp_path: Path) -> None:
    made = cut_to(built(lambda: resnet8(10, PIXELS, width=8)), images(), 0.7)
    pruning.write(made, tmp_path)
    with pytest.raises(ModelError, match="there is no module"):
        pruning.restore(Branches(), tmp_path / "shapes.json", tmp_path / "weights.safetensors")
    text = (tmp_path / "shapes.json").read_text()
    broken = {"unknown": 1, **json.loads(text)}
    (tmp_path / "shapes.json").write_text(json.dumps(broken))
    with pytest.raises(ModelError, match="unknown key 'unknown'"):
        shapes.read(tmp_path / "shapes.json")
    with pytest.raises(ModelError, match="cannot be read"):
        shapes.read(tmp_path / "none.json")


def test_weights_are_selected_never_permuted() -> None:
    """A normalisation of many channels, most of them cut: what is left keeps its order."""
    module: Any = nn.Sequential(nn.Linear(4, 200), nn.LayerNorm(200), nn.Linear(200, 3))
    with torch.no_grad():
        module[1].weight.copy_(torch.arange(200.0))
    index = tuple((at,) for at in range(200))
    group = Group("0", 200, 1, (Slot("0", "out", index), Slot("1", "out", index), Slot("2", "in", index)))
    kept = [60, 61, 62, 63, 64, 65, 130]
    cut(module, {group: kept})
    assert module[1].weight.tolist() == kept
    assert module[1].normalized_shape == (7,)


def test_statistics_are_those_of_the_cut_network() -> None:
    module = built(lambda: resnet8(10, PIXELS, width=8))
    torch.manual_seed(1)
    given = [(torch.randn(16, 3, 16, 16),) for _ in range(3)]
    goal = 0.5 * cost.macs(module, (images(),))
    made: Any = pruning.prune(module, (images(),), "macs", goal, Prune(macs=0.5), batches=lambda: given)
    seen: list[Tensor] = []
    hook = made.module.bn1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in given:
            made.module(*batch)
    hook.remove()
    mean = torch.stack([each.mean((0, 2, 3)) for each in seen]).mean(0)
    assert torch.allclose(made.module.bn1.running_mean, mean, atol=1e-5)
    assert made.module.bn1.momentum == 0.1
    assert pruning.recalibrate(nn.Linear(2, 2), []) == 0


def test_a_last_batch_of_one_sample_does_not_count_behind_global_pooling() -> None:
    """129 training samples are a batch of 128 and one of 1, in which a channel has one value there."""
    torch.manual_seed(0)
    module: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8),
        nn.BatchNorm1d(8), nn.Linear(8, 4),
    )  # fmt: skip
    many, one = torch.randn(128, 3, 8, 8), torch.randn(1, 3, 8, 8)
    assert pruning.recalibrate(module, [(many,), (one,)]) == 2
    assert (module[1].num_batches_tracked, module[5].num_batches_tracked) == (2, 1)
    assert not any(layer.training for layer in module.modules())
    behind = module[5].running_var.clone()
    both = torch.stack([module[0](each).mean((0, 2, 3)) for each in (many, one)])
    assert torch.allclose(module[1].running_mean, both.mean(0), atol=1e-5)
    pruning.recalibrate(module, [(many,)])
    assert torch.equal(module[5].running_var, behind)
    with pytest.raises(ModelError, match=r"^5: there are no statistics of one value a channel.*two samples or more"):
        pruning.recalibrate(module, [(one,), (one,)])
    with pytest.raises(ModelError, match="there are no batches for its statistics"):
        pruning.recalibrate(module, [])
    assert (module[5].momentum, module[5].training) == (0.1, False)


# ---------------------------------------------------------------- what comes after


def test_a_cut_network_becomes_onnx_and_int8(tmp_path: Path) -> None:
    module = built(Small, SIZE)
    made: Any = pruning.prune(
        module, (images(SIZE),), "macs", 0.7 * cost.macs(module, (images(SIZE),)), Prune(macs=0.7), round_to=4
    )
    network = Network(made.module, IMAGE, NORMAL).eval()
    given = samples(IMAGE, 16)
    target = load("host")
    export.export(network, given, opset=target.opset, preprocessing=True, path=tmp_path / "fp32.onnx")
    meta = quantize.quantize(
        network,
        [given],
        target.quantization,
        opset=target.opset,
        preprocessing=True,
        path=tmp_path / "int8.onnx",
        say=lambda event, /, **fields: None,
    )
    assert meta.get("fallback") is None
    backend: Backend = plugins.build("backends", Part("onnxruntime"))
    with torch.no_grad():
        expected = network(torch.from_numpy(given["image"])).numpy()
    for name, tolerance in (("fp32", 1e-4), ("int8", 0.2)):
        session = backend.load(tmp_path / f"{name}.onnx", 1)
        found = session(given)["logits"]
        session.close()
        assert np.abs(found - expected).max() < tolerance * max(1.0, float(np.abs(expected).max()))


def test_layers_are_compared_channel_by_channel_after_training() -> None:
    """The record holds where weights are no longer the teacher's, and where its shortcuts were convolutions' before."""
    teacher = built(lambda: resnet8(10, PIXELS, width=8))
    made: Any = edgekd.prune(teacher, images(), macs=0.6)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    found = edgekd.match(teacher, made.module, images())
    assert found.family == "pruned"
    record = remembered(made.module)
    assert record is not None
    for pair in found.pairs:
        assert pair.projector == "none"
        assert pair.channel_map is not None
        assert len(pair.channel_map) == pair.student.channels
    assert found.pairs[0].channel_map == record[0]["layer1.0.conv2.weight"][0]
    with edgekd.Distiller(teacher, made.module, images(), losses=["kd", "hint"]) as distiller:
        assert list(distiller.parameters()) == []  # no projector
        loss = distiller(images())
        loss.backward()
    assert float(loss.detach()) > 0
    # another teacher of the same architecture is not the one that it was cut out of
    other = built(lambda: resnet8(10, PIXELS, width=8))
    with torch.no_grad():
        other.linear.weight.add_(1)
    assert edgekd.match(other, made.module, images()).family == "same"


def test_prune_of_modules_in_hand(tmp_path: Path) -> None:
    module = built(Branches)
    made: Any = edgekd.prune(
        module, images(), parameters=0.5, importance="taylor", loss=lambda net: net(images()).sum(),
        batches=[images()], out=tmp_path,
    )  # fmt: skip
    told = made.account
    assert told.measure == "parameters"
    assert told.parameters_before == cost.parameters(module)
    assert told.parameters_after == cost.parameters(made.module) <= 0.5 * told.parameters_before
    assert told.macs_after < told.macs_before
    assert (tmp_path / "shapes.json").exists()
    with pytest.raises(RecipeError, match="goals: none"):
        edgekd.prune(module, images())
    with pytest.raises(RecipeError, match=r"unknown key 'mac'.*did you mean 'macs'"):
        edgekd.prune(module, images(), mac=0.5)
    with pytest.raises(RecipeError, match="Give timer="):
        edgekd.prune(module, images(), latency_ms=1.0)
    with pytest.raises(RecipeError, match="Give loss="):
        edgekd.prune(module, images(), macs=0.5, importance="taylor")


def test_inputs_by_name_are_in_the_order_of_the_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            logits: Tensor = self.head((self.a(first) + self.b(second)).relu())
            return logits

    module = Two().train()
    made: Any = edgekd.prune(module, {"x": torch.randn(2, 6), "y": torch.randn(2, 4)}, macs=0.5)
    assert made.account.layers == {"a": (16, 8)}
    assert module.training
