"""Which layer costs what in int8, and the fewest that must stay in float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rules import BOARD, HOST
from torch import Tensor, nn

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.graph.program import capture, graph_inputs
from edgekd.models.network import Network
from edgekd.quantize import mixed, quantize
from edgekd.quantize.examination import rows_of, sensitivity_of
from edgekd.quantize.ladder import Ladder
from edgekd.quantize.measured import Loss, measure
from edgekd.quantize.samples import Halves
from edgekd.quantize.sensitivity import analyse, blocks, cost, interval, places, plan, take
from edgekd.quantize.simulation import Simulation
from edgekd.tasks.classification import classification
from edgekd.types import Batch, Json, LayerSensitivity, QuantizationRules, TensorSpec

RULES = {"onnxruntime": HOST, "tensorrt": BOARD}
IMAGE = (TensorSpec("x", "float32", ("batch", 3, 8, 8)),)


def silent(event: str, /, **fields: Json) -> None:
    """Nobody listens."""


class Chain(nn.Module):
    """Convolutions in a row. Nothing between them is homogeneous, so that equalisation cannot mend them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Hardswish())
        # A kernel so far spread that on 8 × 8 pixels all but its centre sees nothing but padding.
        self.depthwise = nn.Conv2d(16, 16, 3, padding=8, dilation=8, groups=16)
        self.project = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(nn.functional.hardswish(self.stem(x)))
        x = nn.functional.hardswish(self.depthwise(x))
        x = nn.functional.hardswish(self.project(x))
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits


def chain(*, bad_weight: bool = False, bad_values: bool = False) -> Network:
    """bad_weight: taps that only see padding are 1000 times the others, and so is the step of the weight's integers.
    bad_values: one channel of what the depthwise convolution gives is 1000 times the others.
    """
    torch.manual_seed(1)
    module = Chain().eval()
    with torch.no_grad():
        weight = torch.zeros(16, 1, 3, 3)
        weight[:, :, 1, 1] = torch.linspace(0.8, 1.6, 16).reshape(16, 1)
        module.depthwise.weight.copy_(weight)
        if bad_weight:
            module.depthwise.weight[:, :, 0, 0] = 1000.0
        if bad_values:
            module.depthwise.weight[3] *= 1000.0
            module.project.weight[:, 3] /= 1000.0
        module.stem.weight *= 3
        seen = torch.randn(256, 3, 8, 8)
        logits = module(seen)  # every class is decided for now and then, and surely
        module.head.weight *= 8 / logits.std(0, keepdim=True).T
        module.head.bias.zero_()
        module.head.bias.copy_(-module(seen).mean(0))
    return Network(module, IMAGE, None)


def samples(network: Network, count: int = 256, size: int = 32) -> list[Batch]:
    """Labelled by the network itself: in float it makes no mistake."""
    random = np.random.default_rng(0)
    found = []
    for start in range(0, count, size):
        x = random.normal(size=(size, 3, 8, 8)).astype(np.float32)
        with torch.no_grad():
            labels = network(torch.from_numpy(x)).argmax(1).numpy()
        found.append(Batch(np.arange(start, start + size), {"x": x}, labels))
    return found


def climbed(network: Network, rules: QuantizationRules, *, max_drop: float = 0.1) -> Ladder:
    batches = samples(network)
    args, specs = graph_inputs(network, batches[0].inputs, preprocessing=True)
    program = capture(network, args, specs, preprocessing=True)
    ladder = Ladder(
        Simulation(program, rules), Halves(network, batches, True, False), max_drop=max_drop, task=classification()
    )
    ladder.climb(silent)
    return ladder


@pytest.fixture(scope="module", params=RULES)
def rules(request: pytest.FixtureRequest) -> QuantizationRules:
    return RULES[request.param]


@pytest.fixture(scope="module")
def bad(rules: QuantizationRules) -> Ladder:
    return climbed(chain(bad_weight=True), rules)


@pytest.fixture(scope="module")
def easy(rules: QuantizationRules) -> Ladder:
    return climbed(chain(), rules)


def rows(ladder: Ladder) -> tuple[LayerSensitivity, ...]:
    return analyse(ladder.simulation, ladder.samples.held_out, ladder.task, say=silent)[0]


def search(ladder: Ladder, found: Sequence[LayerSensitivity]) -> mixed.Found:
    return mixed.search(
        ladder.simulation, found, ladder.samples.ranging, ladder.samples.held_out, ladder.task,
        whole=loss_of(ladder), max_drop=ladder.max_drop, say=silent,
    )  # fmt: skip


def loss_of(ladder: Ladder) -> Loss:
    loss = ladder.attempts[ladder.best].loss
    assert loss is not None
    return loss


# ---------------------------------------------------------------- what a layer costs


def test_the_one_bad_layer_is_found(bad: Ladder) -> None:
    found = {row.layer: row for row in rows(bad)}
    assert list(found) == ["stem", "first.0", "depthwise", "project", "head"], "from the input to the output"
    worst = max(found.values(), key=lambda row: row.divergence)
    assert worst.layer == "depthwise"
    assert worst.expected_drop > 0.4
    assert worst.drop is not None
    assert worst.drop.low > 0.4
    others = [row for row in found.values() if row is not worst]
    assert all(row.expected_drop < 0.05 for row in others)
    assert all((row.sqnr_db or 99) > (worst.sqnr_db or 99) + 20 for row in others)
    assert sum(row.macs for row in found.values()) == pytest.approx(1, abs=1e-3)
    assert found["depthwise"].parameters == 16 * 9 + 16
    assert found["head"].macs * 64 * (27 + 16 + 9 + 16) * 16 == pytest.approx(16 * 5, rel=0.01)


class Recurrent(nn.Module):
    """A linear layer on each side of a recurrent one, which does most of the work."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.before, self.middle, self.head = nn.Linear(12, 16), kind(16, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.before(x))[0].mean(1))
        return logits


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_shares_of_work_are_of_the_whole_network_and_what_stays_in_float_is_named(
    kind: type[nn.LSTM] | type[nn.GRU], gates: int, tmp_path: Path
) -> None:
    network = Network(Recurrent(kind).eval(), (TensorSpec("x", "float32", ("batch", 7, 12)),), None)
    batch = np.random.default_rng(0).normal(size=(64, 7, 12)).astype(np.float32)
    meta = quantize(
        network, [{"x": batch}], HOST, opset=18, preprocessing=False, path=tmp_path / "m.onnx", say=silent,
        sensitivity=True,
    )  # fmt: skip
    found = sensitivity_of("host", "host/student-int8", meta, None)
    assert found is not None
    assert found.left == {"middle": "a recurrent layer"}
    macs = {row.layer: row.macs for row in found.layers if row.kind == "layer"}
    whole = 7 * 12 * 16 + 7 * gates * 24 * (16 + 24) + 24 * 5
    assert macs == {
        "before": pytest.approx(7 * 12 * 16 / whole, rel=1e-3), "head": pytest.approx(24 * 5 / whole, rel=1e-3),
    }  # fmt: skip


def test_sqnr_is_that_of_the_logits_with_only_that_layer_rounded(easy: Ladder) -> None:
    """By hand: the layer's places switched on, 10 · log10(Σ z² / Σ (z - ẑ)²)."""
    held_out = list(easy.samples.held_out)
    for row in rows(easy):
        signal = noise = 0.0
        for inputs, _ in held_out:
            wanted = easy.simulation.logits(inputs, quantized=False).double()
            with torch.no_grad(), easy.simulation.simulating(layers={row.layer}):
                found = easy.simulation(*inputs).double()
            signal += float(wanted.square().sum())
            noise += float((wanted - found).square().sum())
        assert row.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.01)


def test_what_is_measured_leaves_the_simulation_as_it_was(bad: Ladder) -> None:
    before = bad.simulation.snapshot()
    loss = measure(bad.simulation, bad.samples.held_out, bad.task)
    rows(bad)
    assert measure(bad.simulation, bad.samples.held_out, bad.task) == loss
    after = bad.simulation.snapshot()
    assert after.adjusted.keys() == before.adjusted.keys()
    assert all(torch.equal(before.ranges[name][0], after.ranges[name][0]) for name in before.ranges)


def test_without_labels_there_is_no_drop_but_everything_else(easy: Ladder) -> None:
    unlabelled = [(inputs, None) for inputs, _ in easy.samples.held_out]
    found, count = analyse(easy.simulation, unlabelled, None, say=silent)
    assert count == 128
    assert all(row.drop is None and row.changed is not None and row.sqnr_db is not None for row in found)


def test_values_between_layers_count_as_places() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate = nn.Conv2d(3, 16, 1), nn.Hardsigmoid()
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            logits: Tensor = self.head((x * self.gate(x)).mean((2, 3)))
            return logits

    network = Network(Gated().eval(), IMAGE, None)
    ladder = climbed(network, HOST, max_drop=1.0)
    assert [(place.name, place.kind) for place in places(ladder.simulation)] == [
        ("stem", "layer"), ("gate", "value"), ("mul_2", "value"), ("head", "layer"),
    ]  # fmt: skip
    assert [row.kind for row in rows(ladder)] == ["layer", "value", "value", "layer"]
    board = climbed(network, BOARD, max_drop=1.0)
    assert [place.name for place in places(board.simulation) if place.kind == "value"] == ["mul_2"], "the pool's input"


def test_the_work_is_bounded_and_large_networks_are_measured_by_blocks(easy: Ladder) -> None:
    layers = places(easy.simulation)
    one = cost(easy.simulation)
    assert plan(layers, one) == (layers, 256), "a small network: every layer, on all samples"
    chosen, count = plan(layers, 3e12 / 5 / 100)
    assert (len(chosen), count) == (5, 100), "a larger one: fewer samples"
    many = [replace(layers[0], name=f"blocks.{i // 10}.conv{i % 10}", layers=(f"l{i}",)) for i in range(300)]
    chosen, count = plan(many, 3e12 / 300 / 10)
    assert (len(chosen), count) == (30, 100), "a large one: blocks of neighbours"
    assert chosen[0].kind == "block"
    assert chosen[0].layers == tuple(f"l{i}" for i in range(10))
    assert chosen[0].macs == 10 * layers[0].macs
    assert plan(many, 1e15)[1] == 8, "never nothing"
    assert [place.name for place in blocks(layers, 1)] == ["stem", "first.0", "depthwise", "project", "head"]


def test_no_more_samples_are_taken_than_asked_for() -> None:
    stream = [((torch.zeros(16, 3),), np.zeros(16)), ((torch.zeros(16, 3),), None)]
    found = take(stream, 20)
    assert [len(inputs[0]) for inputs, _ in found] == [16, 4]
    assert len(take(stream, 100)) == 2


def test_the_interval_of_a_drop_holds_it_and_is_never_a_point() -> None:
    def loss(drop: float, error: float) -> Loss:
        return Loss(100, 20.0, 0.1, 0.1, 0.1, drop, error)

    none = interval(loss(0.0, 0.0))
    assert none is not None
    assert none.low < 0 < none.high
    # Agresti and Min by hand: 7 lost, 2 won of 100: (b - c) / 102 ± 1.96 · √((b + c + 1) - (b - c)² / 102) / 102
    found = interval(loss(0.05, math.sqrt((0.09 - 0.05**2) / 100)))
    assert found is not None
    half = 1.95996 * math.sqrt(10 - 25 / 102) / 102
    assert (found.low, found.high) == pytest.approx((5 / 102 - half, 5 / 102 + half), abs=1e-5)
    assert interval(replace(loss(0.0, 0.0), drop=None)) is None


# ---------------------------------------------------------------- mixed precision


def test_the_bad_layer_is_put_into_float_and_the_drop_is_recovered(bad: Ladder) -> None:
    assert not loss_of(bad).within(bad.max_drop)
    found = search(bad, rows(bad))
    best = found.mixes[0]
    assert best.layers == ("depthwise",)
    assert best.loss.within(bad.max_drop)
    assert best.loss.expected_drop < 0.1 * loss_of(bad).expected_drop
    assert best.macs == pytest.approx(9 / (27 + 16 + 9 + 16), abs=0.01)
    assert found.rest["depthwise"] < 0.1 < 0.4 < found.rest["stem"]
    assert found.why[1].startswith("depthwise alone in float leaves")


@pytest.mark.parametrize("name", RULES)
def test_no_layer_of_a_set_can_be_left_out(name: str) -> None:
    """One channel of the values behind the depthwise convolution is 1000 times the others."""
    ladder = climbed(chain(bad_values=True), RULES[name])
    found = search(ladder, rows(ladder))
    # ONNX Runtime makes integers where a value is made and where it is read; TensorRT only where it is read.
    assert found.mixes[0].layers == (("depthwise", "project") if name == "onnxruntime" else ("project",))
    parts = [inputs for inputs, _ in take(((one, None) for one in ladder.samples.ranging), 64)]
    for mix in found.mixes:
        assert mix.loss.within(ladder.max_drop)
        for layer in mix.layers:
            less = mixed.with_float(ladder.simulation, set(mix.layers) - {layer}, parts)
            assert not measure(less, ladder.samples.held_out, ladder.task).within(ladder.max_drop), layer


@pytest.mark.parametrize(
    "needed", [{0}, {1, 4}, {8}, {0, 5, 8}, {1, 2, 3, 4, 5, 6, 7, 8}, set(range(9)), set(range(10))]
)
def test_the_shortest_beginning_is_found_whatever_its_length(needed: set[int]) -> None:
    tried: list[frozenset[str]] = []

    def holds(layers: frozenset[str]) -> bool:
        tried.append(layers)
        return needed <= {int(name) for name in layers}

    found = mixed.fewest([(str(i),) for i in range(10)], holds, lambda: False)
    assert found == (None if len(needed) == 10 else frozenset(map(str, needed)))
    assert len(set(tried)) <= 30
    assert mixed.fewest([("0",)], holds, lambda: False) is None, "all layers in float are no mixed precision"
    assert mixed.fewest([(str(i),) for i in range(10)], lambda layers: len(layers) > 3, lambda: True) is None


def test_a_simulation_with_float_layers_is_the_same_elsewhere(bad: Ladder) -> None:
    parts = list(bad.samples.ranging)
    same = mixed.with_float(bad.simulation, (), parts)
    assert same.quantized == bad.simulation.quantized
    inputs = next(iter(bad.samples.held_out))[0]
    assert torch.equal(same.logits(inputs, quantized=False), bad.simulation.logits(inputs, quantized=False))
    every = mixed.with_float(bad.simulation, set(bad.simulation.quantized), parts)
    assert every.quantized == ()
    assert torch.equal(every.logits(inputs, quantized=True), bad.simulation.logits(inputs, quantized=False))


def test_rewritten_and_rounded_weights_go_along() -> None:
    network = chain(bad_values=True)
    ladder = climbed(network, HOST, max_drop=1.0)
    ladder.apply(("equalize", "minmax", "rounding"))
    parts = list(ladder.samples.ranging)
    made = mixed.with_float(ladder.simulation, {"head"}, parts)
    for old, new in zip(ladder.simulation.layers, made.layers, strict=True):
        assert torch.equal(ladder.simulation.float_weight(old), made.float_weight(new))
        if new.name != "head":
            assert torch.equal(ladder.simulation.weight(old), made.weight(new))
    assert made.layer("head").site is None


def test_an_easy_network_has_no_layer_in_float(easy: Ladder, tmp_path: Path, rules: QuantizationRules) -> None:
    assert loss_of(easy).within(easy.max_drop)
    network = chain()
    meta: Any = quantize(
        network, samples(network), rules, opset=19, preprocessing=True, path=tmp_path / "m.onnx", say=silent,
        task=classification(), max_drop=0.1, sensitivity=True, mixed=True,
    )  # fmt: skip
    assert meta["mixed"] is None
    assert meta["float"] == {}
    assert len(rows_of(meta)) == 5


def test_where_the_samples_of_the_search_show_no_loss_nothing_is_named(easy: Ladder) -> None:
    found = search(easy, rows(easy))
    assert found.mixes == ()
    assert "no layer can be named" in found.why[-1]


def test_where_nothing_but_float_holds_that_is_said(bad: Ladder) -> None:
    whole = loss_of(bad)
    found = mixed.search(
        bad.simulation, rows(bad), bad.samples.ranging, bad.samples.held_out, bad.task,
        whole=replace(whole, expected_drop=2.0), max_drop=0.0, say=silent,
    )  # fmt: skip
    assert all(mix.loss.expected_drop == 0 for mix in found.mixes)
    if not found.mixes:
        assert found.why[-1] == "only all layers in float hold"


def test_quantize_tells_and_the_graph_with_the_layer_in_float_holds(tmp_path: Path, rules: QuantizationRules) -> None:
    network = chain(bad_weight=True)
    batches = samples(network)
    common: dict[str, Any] = {
        "opset": 19, "preprocessing": True, "say": silent, "task": classification(), "max_drop": 0.1,
    }  # fmt: skip
    plain: Any = quantize(network, batches, rules, path=tmp_path / "plain.onnx", sensitivity=True, mixed=True, **common)
    layers = plain["mixed"]["mixes"][0]["layers"]
    assert layers == ["depthwise"]
    assert max(rows_of(plain), key=lambda row: row.divergence).layer == "depthwise"
    assert next(row for row in rows_of(plain) if row.layer == "depthwise").rest is not None
    again: Any = quantize(network, batches, rules, path=tmp_path / "mixed.onnx", float_layers=layers, **common)
    assert list(again["float"]) == ["depthwise"]
    assert "sensitivity" not in again
    hits = []
    for name in ("plain", "mixed"):
        session = onnxruntime().load(tmp_path / f"{name}.onnx", 1)
        found = [session(batch.inputs)["logits"].argmax(1) == batch.labels for batch in batches]
        hits.append(float(np.concatenate(found).mean()))
    assert hits[0] < 0.5
    assert hits[1] > 0.85


def test_what_cannot_be_examined_is_told_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rules: QuantizationRules
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("edgekd.quantize.sensitivity.analyse", refuse)
    network = chain()
    meta: Any = quantize(
        network, samples(network, 32), rules, opset=19, preprocessing=True, path=tmp_path / "m.onnx", say=silent,
        sensitivity=True,
    )  # fmt: skip
    assert (meta["quantizer"], meta["not_examined"]) == ("pt2e", "no such operator")
    assert rows_of(meta) == ()
