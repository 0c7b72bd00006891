"""Taps: what they take, what they keep, and that nothing of them stays."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from varied_networks import Encoder, Odd, Packed, Recurrent, hooks

from edgekd.correspondence import Tap, Taps
from edgekd.correspondence.inputs import inputs_of, mask_of
from edgekd.correspondence.layout import axes, token_grid
from edgekd.correspondence.stages import survey
from edgekd.correspondence.taps import inner
from edgekd.errors import ModelError
from edgekd.models.network import Network
from edgekd.types import Preprocessing, TensorSpec


def _tap(path: str, layout: str = "BC", **more: Any) -> Tap:
    return Tap(path, layout, (), 8, 0.5, None, **more)


def _inplace() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)
    )


def test_taps_take_outputs_inputs_and_concatenations() -> None:
    network, x = _inplace(), torch.randn(3, 4)
    with Taps(network, [_tap("4:in"), _tap("1+3"), _tap("0", cloned=True)]) as taps:
        network(x)
        taken = taps.take()
    first = network[0](x)
    hidden = network[3](network[2](first.relu()))
    assert torch.equal(taken["0"], first)
    assert torch.equal(taken["4:in"], hidden)
    assert torch.equal(taken["1+3"], torch.cat([first.relu(), hidden], 1))
    assert hooks(network) == 0


def test_what_changes_in_place_is_found_and_copied() -> None:
    network, x = _inplace(), torch.randn(4, 4)
    found = survey(network, inputs_of(network, x))
    assert found.tap("0").cloned
    assert not found.tap("1").cloned
    with Taps(network, [found.tap("0")]) as taps:
        network(x)
        assert torch.equal(taps.take()["0"], network[0](x))  # before the activation


def test_calls_of_one_module_and_wrapped_outputs() -> None:
    network, x = Odd(), torch.randn(3, 5, 8)
    found = survey(network, inputs_of(network, x))
    paths = ["again#2", "again#3:in", "first", "pair", "mapping", "record"]
    with Taps(network, [found.tap(path) for path in paths]) as taps:
        network(x)
        taken = taps.take()
    second = torch.tanh(network.again(x))
    assert torch.equal(taken["again#2"], network.again(second))
    assert torch.equal(taken["again#3:in"], torch.tanh(network.again(second)))
    assert torch.equal(taken["pair"], network.pair.linear(taken["first"]))
    assert torch.equal(taken["mapping"], network.mapping.linear(taken["first"]))
    assert torch.equal(taken["record"], network.record.linear(taken["first"]))
    with pytest.raises(ModelError, match="called 3 times: name one of again#1, again#2, again#3"):
        found.tap("again")
    with Taps(network, [found.tap("first")]) as taps, Taps(network, [_tap("same", "BNC")]) as others:
        network(x)
        assert torch.equal(taps.take()["first"], others.take()["same"])


def test_what_is_taken_is_forgotten_and_a_pass_forgets_the_one_before() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with Taps(network, [_tap("1")]) as taps:
        network(torch.randn(2, 4))
        tensor = taps.take()["1"]
        alive = weakref.ref(tensor)
        del tensor
        assert alive() is None
        with pytest.raises(ModelError, match="gave no tensor in the last forward pass"):
            taps.take()
        seen: list[weakref.ref[Tensor]] = []
        handle = network[1].register_forward_hook(lambda _m, _a, output: seen.append(weakref.ref(output)))
        network(torch.randn(2, 4))
        network(torch.randn(2, 4))
        handle.remove()
        assert [ref() is None for ref in seen] == [True, False]
    assert seen[1]() is None  # closed


def test_a_recomputation_in_backward_keeps_nothing() -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(checkpoint(self.inside, x, use_reentrant=False))
            return logits

    network = Saving()
    with Taps(network, [_tap("inside")]) as taps:
        output = network(torch.randn(3, 4))
        taken = taps.take()["inside"]
        (output.sum() + taken.sum()).backward()
        assert not taps._kept
    assert network.inside.weight.grad is not None


def test_no_hook_stays_after_an_error() -> None:
    network = _inplace()
    with pytest.raises(RuntimeError), Taps(network, [_tap("1")]):
        network(torch.randn(3, 5))
    assert hooks(network) == 0
    with pytest.raises(ModelError, match="no module 'missing'"):
        Taps(network, [_tap("1"), _tap("missing")])
    assert hooks(network) == 0
    with pytest.raises(ModelError, match="fails on the probe"):
        survey(network, inputs_of(network, torch.randn(3, 5)))
    assert hooks(network) == 0


def test_an_error_names_the_nearest_path() -> None:
    network = nn.ModuleDict({"layer1": nn.Linear(2, 2)})
    with pytest.raises(ModelError, match="did you mean 'layer1'"):
        Taps(network, [_tap("layr1")])


def test_teacher_without_and_student_with_gradients() -> None:
    network, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(3, 4)
    with Taps(network, [_tap("1")]) as taps:
        with torch.inference_mode():
            network(x)
        assert taps.take()["1"].is_inference()
        network(x)
        taps.take()["1"].sum().backward()  # type: ignore[no-untyped-call]
    assert network[0].weight.grad is not None
    assert network[2].weight.grad is None


def test_taps_work_in_compiled_networks() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    tap = _tap("0", cloned=True)
    with Taps(network, [tap]) as taps:
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        assert isinstance(compiled, nn.Module)
        assert inner(compiled) is network
        for _ in range(3):
            x = torch.randn(3, 4)
            compiled(x).sum().backward()
            assert torch.equal(taps.take()["0"], network[0](x))
    assert hooks(network) == 0


def test_taps_work_in_distributed_networks(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        distributed, x = nn.parallel.DistributedDataParallel(network), torch.randn(3, 4)
        assert inner(distributed) is network
        with Taps(distributed, [_tap("1")]) as taps:
            (distributed(x).sum() + taps.take()["1"].sum()).backward()
        assert network[0].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_paths_are_relative_to_the_module_of_a_network() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    image = (TensorSpec("image", "uint8", ("batch", 8, 8, 3)),)
    network = Network(module, image, Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3))
    sample = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    assert inner(network) is module
    for probe in (sample, (sample,), {"image": sample}):
        found = survey(network, inputs_of(network, probe))
        assert found.tap("0").layout == "BCHW"
    with Taps(network, [found.tap("0")]) as taps:
        network(sample)
        assert torch.equal(taps.take()["0"], module[0](network.prepare(sample)[0]))
    with pytest.raises(ModelError, match="no input 'image'; did you mean 'images'"):
        inputs_of(network, {"images": sample})


def test_sequences_come_batch_first_however_the_module_has_them() -> None:
    ids = torch.randint(0, 50, (4, 7))
    for batch_first in (True, False):
        network = Recurrent(nn.LSTM, 16, batch_first=batch_first)
        found = survey(network, inputs_of(network, ids))
        tap = found.tap("rnn")
        assert (tap.layout, tap.shape, tap.batch) == ("BNC", (-1, 7, 16), 0 if batch_first else 1)
        with Taps(network, [tap]) as taps:
            logits = network(ids)
            assert torch.equal(network.head(taps.take()["rnn"][:, -1]), logits)


def test_packed_sequences_are_padded() -> None:
    network, ids = Packed(16), torch.randint(0, 50, (4, 7))
    mask = torch.arange(7) < torch.tensor([5, 3, 1, 4])[:, None]
    found = survey(network, inputs_of(network, (ids, mask)))
    tap = found.tap("rnn")
    assert tap.ragged
    assert [stage.path for stage in found.stages] == ["rnn"]
    with Taps(network, [tap]) as taps:
        network(ids, mask)
        assert taps.take()["rnn"].shape == (4, 5, 16)  # as long as the longest


@pytest.mark.parametrize("batch_first", [True, False])
def test_queries_keys_and_values_of_torchs_attention(batch_first: bool) -> None:
    network = Encoder(16, 4, 2, batch_first=batch_first).eval()
    ids = torch.randint(0, 50, (4, 7))
    tap = survey(network, inputs_of(network, ids)).relations
    assert tap is not None
    assert tap.path == "encoder.layers.1.self_attn:qkv"
    assert (tap.layout, tap.shape, tap.channels) == ("BNC", (-1, 7, 48), 48)
    with Taps(network, [tap, _tap("encoder.layers.0", "BNC", batch=0 if batch_first else 1)]) as taps, torch.no_grad():
        network(ids)
        taken = taps.take()
    attention = network.encoder.layers[1].self_attn
    assert isinstance(attention, nn.MultiheadAttention)
    given = taken["encoder.layers.0"]
    torch.testing.assert_close(taken[tap.path], given @ attention.in_proj_weight.T + attention.in_proj_bias)


def test_nested_tensors_are_padded() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).eval()  # takes nested tensors where there is a mask and no gradient
    x, padding = torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.bool)
    padding[:, 5:] = True
    with pytest.warns(UserWarning, match="nested"):
        found = survey(module, inputs_of(module, {"src": x, "src_key_padding_mask": padding}))
    assert found.tap("layers.1").ragged
    assert found.tap("layers.1").shape == (-1, 5, 16)


def test_the_mask_is_found_by_its_name() -> None:
    real = torch.tensor([[1, 1, 0]])
    assert mask_of({"ids": real, "attention_mask": real}) is not None
    expected = torch.tensor([[True, True, False]])
    for name, value in {"mask": real, "attention_mask": real, "key_padding_mask": real == 0}.items():
        found = mask_of({name: value})
        assert found is not None
        assert torch.equal(found, expected)
    assert mask_of({"ids": real, "masked": real, "mask": real.float()}) is None


@pytest.mark.parametrize(
    ("shape", "fewer", "resized", "layout", "grid", "prefix", "batch"),
    [
        ((3, 16, 8, 8), (2, 16, 8, 8), (3, 16, 16, 24), "BCHW", (8, 8), 0, 0),
        ((3, 8, 8, 16), (2, 8, 8, 16), (3, 16, 24, 16), "BHWC", (8, 8), 0, 0),
        ((3, 8, 8, 16), (2, 8, 8, 16), None, "BHWC", (8, 8), 0, 0),
        ((3, 16, 8, 8), (2, 16, 8, 8), None, "BCHW", (8, 8), 0, 0),
        ((3, 65, 64), (2, 65, 64), None, "BNC", (8, 8), 1, 0),
        ((3, 192, 66), (2, 192, 66), None, "BCN", (8, 8), 2, 0),
        ((3, 192, 64), (2, 192, 64), (3, 192, 384), "BCN", (8, 8), 0, 0),
        ((64, 3, 192), (64, 2, 192), None, "BNC", (8, 8), 0, 1),
        ((3, 10), (2, 10), (3, 10), "BC", (), 0, 0),
        ((3, 16, 4, 8, 8), (2, 16, 4, 8, 8), (3, 16, 4, 16, 16), "BCDHW", (4, 8, 8), 0, 0),
    ],
)
def test_axes(
    shape: tuple[int, ...],
    fewer: tuple[int, ...],
    resized: tuple[int, ...] | None,
    layout: str,
    grid: tuple[int, ...],
    prefix: int,
    batch: int,
) -> None:
    found = axes(shape, fewer, resized, (32, 32), picture=True)
    assert found is not None
    assert (found.layout, found.grid, found.prefix, found.batch) == (layout, grid, prefix, batch)
    assert found.shape[0] == -1
    assert found.channels == found.shape[layout.index("C")]


def test_axes_that_are_no_features() -> None:
    assert axes((3, 3), (2, 2), None, (32, 32), picture=True) is None  # samples × samples
    assert axes((64, 16), (64, 16), None, (32, 32), picture=True) is None  # no batch
    assert axes((12, 16), (8, 16), None, (32, 32), picture=True) is None  # folded into another dimension
    assert axes((3, 8, 8), (2, 8, 8), (3, 16, 16), (32, 32), picture=False) is None  # positions × positions
    pooled = axes((3, 16, 1, 1), (2, 16, 1, 1), (3, 16, 1, 1), (32, 32), picture=True)
    assert pooled is not None
    assert pooled.pooled


def test_tokens_as_a_grid() -> None:
    assert token_grid(197, (224, 224)) == ((14, 14), 1)
    assert token_grid(198, (224, 224)) == ((14, 14), 2)
    assert token_grid(201, (224, 224)) == ((14, 14), 5)
    assert token_grid(33, (32, 64)) == ((4, 8), 1)
    assert token_grid(31, (32, 32)) == ((31,), 0)  # 6 more than a square of 25
    assert token_grid(12, (100,)) == ((12,), 0)
