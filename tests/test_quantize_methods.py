"""Range methods by values computed by hand; equalisation, bias correction and rounding by what they promise."""

from __future__ import annotations

import itertools
import math

import networks
import numpy as np
import pytest
import torch
from rules import BOARD, HOST
from torch import Tensor, nn
from wide_networks import chain, inputs_of, simulated

from edgekd.quantize.bias import correct_biases, mean_error
from edgekd.quantize.equalize import equalize, find_pairs
from edgekd.quantize.fake_quantizer import FakeQuantizer
from edgekd.quantize.histogram import BINS, Histogram
from edgekd.quantize.quantizer import LOWEST_SCALE
from edgekd.quantize.ranges import METHODS, set_weights
from edgekd.quantize.rounding import Moments, descend, learn_rounding
from edgekd.quantize.simulation import Layer, Simulation, fake_quantizer
from edgekd.quantize.walk import Parts, gather, quantized_output, walk
from edgekd.types import QuantizationRules

RULES = pytest.mark.parametrize("rules", [HOST, BOARD], ids=["host", "board"])


def counted(values: Tensor) -> Histogram:
    seen = Histogram(counting=True)
    seen.add(values)
    return seen


def quantizer(least: int = 0, most: int = 255, *, symmetric: bool = False, axis: int | None = None) -> FakeQuantizer:
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return FakeQuantizer(
        dtype=torch.int8 if least < 0 else torch.uint8, quant_min=least, quant_max=most, qscheme=scheme,
        lowest_scale=LOWEST_SCALE, ch_axis=axis,
    )  # fmt: skip


def found(method: str, values: Tensor, by: FakeQuantizer) -> tuple[float, float]:
    low, high = METHODS[method](counted(values), by)
    return float(low), float(high)


# ---------------------------------------------------------------- ranges


def test_scale_and_zero_point_by_hand() -> None:
    affine = quantizer()
    affine.set_range(torch.tensor(-1.0), torch.tensor(4.1))
    assert float(affine.scale) == pytest.approx(5.1 / 255)
    assert int(affine.zero_point) == 50
    affine.set_range(torch.tensor(1.0), torch.tensor(5.1))  # zero is always inside
    assert float(affine.scale) == pytest.approx(5.1 / 255)
    assert int(affine.zero_point) == 0
    symmetric = quantizer(-127, 127, symmetric=True)
    symmetric.set_range(torch.tensor(-2.54), torch.tensor(1.0))
    assert float(symmetric.scale) == pytest.approx(0.02)
    assert int(symmetric.zero_point) == 0
    symmetric.state = "simulate"
    assert symmetric(torch.tensor([0.031, -9.0])).tolist() == pytest.approx([0.04, -2.54])


def test_minmax_by_hand() -> None:
    assert found("minmax", torch.tensor([0.5, -1.0, 3.0]), quantizer()) == (-1.0, 3.0)


def test_percentile_by_hand() -> None:
    # One value in 10,000 is 0.01 %: it is left out, and the range ends with the bin of the next, 256 / 8192 wide.
    values = torch.cat([torch.ones(9999), torch.tensor([100.0])])
    assert found("percentile", values, quantizer()) == (1.0, 1.0 + 256 / BINS)
    # Of a two-sided value half as many at each end: one in 20,000.
    values = torch.cat([torch.tensor([-50.0]), -torch.ones(9999), torch.ones(9999), torch.tensor([100.0])])
    assert found("percentile", values, quantizer()) == (-1.0, 1.0 + 256 / BINS)
    assert found("percentile", values[1:-1], quantizer()) == (-1.0, 1.0)  # never beyond what was seen


def test_mse_by_hand() -> None:
    # With the levels -r, 0, r: 100 (1 - r)² + (3 - r)² is smallest at r = 103 / 101, and 1.02 is the nearest tried.
    values = torch.cat([torch.ones(100), torch.tensor([3.0])])
    assert found("mse", values, quantizer(-1, 1, symmetric=True))[1] == pytest.approx(1.02)
    assert found("mse", values, quantizer(0, 1))[1] == pytest.approx(1.02)
    low, high = found("mse", torch.cat([values, -values]), quantizer(-1, 1))
    assert (high - low) / 2 == pytest.approx(1.02, abs=0.02)


def test_mse_weighs_clipping_against_rounding() -> None:
    # 100,000 values in [0, 1) and one 4: (4 - h)² + 100,000 · (h / 255)² / 12 is smallest at h = 3.55.
    torch.manual_seed(0)
    values = torch.rand(100000)
    low, high = found("mse", values, quantizer())
    assert abs(low) < 0.01
    assert high == pytest.approx(1, abs=0.021)
    assert found("mse", torch.cat([values, torch.tensor([4.0])]), quantizer())[1] == pytest.approx(3.55, abs=0.05)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_stream_gives_what_the_whole_gives(method: str) -> None:
    random = np.random.default_rng(0)
    values = torch.from_numpy(random.normal(size=5000).astype(np.float32) * np.geomspace(1e-6, 300, 5000))
    streamed = Histogram(counting=True)
    for part in torch.split(values.float()[torch.from_numpy(random.permutation(5000))], 37):
        streamed.add(part)
    whole = counted(values.float())
    assert torch.equal(streamed.counts, whole.counts)
    assert int(whole.counts.sum()) == 5000
    for by in (quantizer(), quantizer(-128, 127, symmetric=True)):
        assert METHODS[method](streamed, by) == METHODS[method](whole, by)


def test_counts_lie_where_their_values_lie() -> None:
    values = torch.tensor([-4.0, -0.001, 0.0, 0.25, 3.9999])
    seen = counted(values)
    assert (seen.exponent, seen.width) == (3, 16 / BINS)
    bins = seen.counts.nonzero().squeeze(1)
    assert ((seen.edges[bins] <= values) & (values < seen.edges[bins] + seen.width)).all()
    zeros = counted(torch.zeros(3))
    assert (zeros.low, zeros.high, int(zeros.counts.sum())) == (0.0, 0.0, 3)
    assert found("mse", torch.zeros(3), quantizer()) == (0.0, 0.0)
    assert counted(torch.zeros(0)).low == math.inf


@RULES
def test_weight_ranges_by_channel(rules: QuantizationRules) -> None:
    simulation = simulated(chain(), rules)
    layer = simulation.layer("point")
    assert layer.site is not None
    largest = simulation.weight(layer).abs().flatten(1).amax(1)
    assert torch.allclose(layer.site.quantizer.scale, largest / 127)
    with torch.no_grad():
        weight = simulation.weight(layer).clone()
        weight[3] = 49.5 * 0.31 / 127  # between two levels; on one, if the range ends at 0.99 of the largest
        weight[3, 0] = 0.31
    simulation.rewrite(layer, weight=weight)
    errors = {}
    for method in ("minmax", "mse"):
        set_weights(simulation, method)
        layer.site.quantizer.state = "simulate"
        errors[method] = (layer.site.quantizer(weight) - weight).square().flatten(1).sum(1)
        layer.site.quantizer.state = "off"
    assert (errors["mse"] <= errors["minmax"] + 1e-12).all()
    assert errors["mse"][3] < 0.5 * errors["minmax"][3]


# ---------------------------------------------------------------- equalisation


@RULES
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Identity()], ids=["relu", "leaky", "none"])
def test_equalisation_keeps_what_the_float_network_gives(activation: nn.Module, rules: QuantizationRules) -> None:
    network = chain(wide=2.0, activation=activation)
    simulation = simulated(network, rules, ranges=None)
    given = inputs_of(network, seed=5)
    before = simulation.logits(given, quantized=False)
    pairs = equalize(simulation)
    assert [(p.first.name, p.second.name) for p in pairs] == [
        ("stem", "depthwise"), ("depthwise", "point"), ("point", "head"),
    ]  # fmt: skip
    after = simulation.logits(given, quantized=False)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    for pair in pairs:
        first, second = simulation.weight(pair.first), simulation.weight(pair.second)
        made = first.abs().flatten(1).amax(1)
        read = (
            second.abs().flatten(1).amax(1)
            if pair.second.groups > 1
            else second.abs().transpose(0, 1).flatten(1).amax(1)
        )
        assert torch.allclose(made, read, rtol=0.05)


def test_equalisation_undoes_any_rescaling() -> None:
    plain, wide = (simulated(chain(wide=w), ranges=None) for w in (0.0, 2.0))
    equalize(plain)
    equalize(wide)
    for one, other in zip(plain.layers, wide.layers, strict=True):
        assert torch.allclose(plain.weight(one), wide.weight(other), rtol=0.05, atol=1e-3)


class Refused(nn.Module):
    """Neighbours between which nothing may be rescaled: a clip at 6, a branch, a linear layer along the width."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped, self.branched, self.residual = (nn.Conv2d(3, 3, 3, 1, 1) for _ in range(3))
        self.along, self.swish, self.head = nn.Linear(8, 8), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.clipped(x))
        x = torch.relu(self.branched(x))
        x = self.residual(x) + x
        x = self.swish(self.along(x))
        logits: Tensor = self.head(nn.functional.hardswish(x)).mean((2, 3))
        return logits


def test_equalisation_leaves_what_it_cannot_rescale() -> None:
    torch.manual_seed(0)
    network = networks.settled(Refused(), networks.IMAGE, networks.NORMAL)
    assert find_pairs(simulated(network, ranges=None)) == ()


# ---------------------------------------------------------------- bias correction and rounding


def errors_of(simulation: Simulation, parts: list[tuple[Tensor, ...]]) -> dict[str, tuple[float, float]]:
    """By layer: the largest mean error of a channel, and the mean squared error."""
    known: dict[str, tuple[float, float]] = {}

    def visit(layer: Layer, given: Parts, wanted: Parts) -> None:
        difference = [quantized_output(simulation, layer, x) - y for x, y in zip(given, wanted, strict=True)]
        mean = float(mean_error(simulation, layer, given, wanted).abs().max())
        known[layer.name] = mean, float(torch.cat(difference).square().mean())

    walk(simulation, parts, visit)
    return known


def bias_steps(simulation: Simulation) -> dict[str, float]:
    """By layer: half of the largest step of a bias that is an integer, and what float32 cannot tell."""
    steps = {}
    for layer in simulation.layers:
        given = fake_quantizer(simulation.graph, layer.node.args[0])  # type: ignore[arg-type]
        assert given is not None
        assert layer.site is not None
        step = float((given.scale * layer.site.quantizer.scale).max())
        steps[layer.name] = 1e-5 + (step / 2 if simulation.rules.quantize_bias else 0.0)
    return steps


@RULES
def test_bias_correction_leaves_no_mean_error(rules: QuantizationRules) -> None:
    network = chain(wide=1.0)
    simulation = simulated(network, rules)
    parts = [inputs_of(network, seed=seed) for seed in range(3)]
    before = errors_of(simulation, parts)
    whole = simulation.logits(parts[0], quantized=False)
    assert correct_biases(simulation, parts) == ("stem", "depthwise", "point", "head")
    after = errors_of(simulation, parts)
    for name in before:
        assert after[name][0] < bias_steps(simulation)[name] < before[name][0]
    assert torch.equal(simulation.logits(parts[0], quantized=False), whole)
    assert simulation.bias(simulation.layer("depthwise")) is not None  # where there was none


def test_bias_correction_adds_none_where_onnx_has_no_place_for_it() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.tanh(self.rows(x[..., 0].float())).mean(1))
            return logits

    network = networks.settled(Rows(), networks.IMAGE, None)
    simulation = simulated(network)
    assert correct_biases(simulation, [inputs_of(network)]) == ("head",)


def test_rounding_by_hand() -> None:
    # Five equal inputs, each weight 0.4 of a step: nearest gives 0 for 2; two of them up give it exactly.
    grid = torch.stack([torch.zeros(1, 1, 5), torch.ones(1, 1, 5)])
    moments = Moments(100, torch.ones(1, 5, 5), torch.full((1, 1, 5), 2.0))
    weight = descend(grid, torch.zeros(1, 1, 5), moments)
    assert weight.sum() == 2
    assert set(weight.flatten().tolist()) == {0.0, 1.0}


def test_rounding_ends_between_nearest_and_the_best_there_is() -> None:
    torch.manual_seed(0)
    x, rows = torch.randn(200, 6) @ torch.randn(6, 6), torch.randn(1, 4, 6)
    moments = Moments(200, (x.T @ x / 200).unsqueeze(0), (rows[0] @ (x.T @ x / 200)).unsqueeze(0))
    scale = 0.25
    below = torch.floor(rows / scale)
    grid = torch.stack([below, below + 1]) * scale
    nearest = torch.round(rows / scale)
    learned = descend(grid, nearest - below, moments)
    choices = [torch.tensor(bits, dtype=torch.float32) for bits in itertools.product((0, 1), repeat=6)]
    best = torch.stack([moments.error((below + bits) * scale) for bits in choices]).amin(0)
    errors = moments.error(learned)
    assert (errors <= moments.error(nearest * scale) + 1e-5).all()
    assert (errors >= best - 1e-4).all()
    assert errors.sum() < moments.error(nearest * scale).sum() - 0.1 * (moments.error(nearest * scale) - best).sum()


@RULES
def test_learned_rounding_stays_on_the_grid_and_lowers_the_error(rules: QuantizationRules) -> None:
    network = chain()
    simulation = simulated(network, rules)
    parts = [inputs_of(network, seed=seed) for seed in range(3)]
    correct_biases(simulation, parts)
    before = errors_of(simulation, parts)
    assert learn_rounding(simulation, parts) == ("stem", "depthwise", "point", "head")
    after = errors_of(simulation, parts)
    assert all(after[name][1] < before[name][1] for name in before)
    assert all(after[name][0] < bias_steps(simulation)[name] for name in before)
    moved = 0
    for layer in simulation.layers:
        assert layer.site is not None
        scale = layer.site.quantizer.scale.reshape(-1, *[1] * (simulation.weight(layer).dim() - 1))
        steps = simulation.weight(layer) / scale
        assert torch.allclose(steps, torch.round(steps), atol=1e-3)
        assert (simulation.weight(layer) - simulation.float_weight(layer)).abs().max() <= scale.max() * 1.001
        assert steps.abs().max() <= 127.001
        moved += int((torch.round(steps) != torch.round(simulation.float_weight(layer) / scale)).sum())
    assert moved > 0


def test_rounding_stops_when_its_time_is_over() -> None:
    network = chain()
    simulation = simulated(network)
    assert learn_rounding(simulation, [inputs_of(network)], seconds=-1) == ()


def test_one_dimensional_and_grouped_convolutions_unfold_as_they_compute() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(8, 8, 3, stride=2, padding=2, dilation=2, groups=2)
            self.second = nn.Conv1d(8, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.second(torch.relu(self.first(x[..., 0].float()))).mean(2)
            return logits

    torch.manual_seed(0)
    network = networks.settled(Windows(), networks.IMAGE, None)
    simulation = simulated(network)
    parts = [inputs_of(network, seed=seed) for seed in range(3)]
    correct_biases(simulation, parts)
    before = errors_of(simulation, parts)
    assert learn_rounding(simulation, parts) == ("first", "second")
    after = errors_of(simulation, parts)
    assert all(after[name][1] < before[name][1] for name in before)


def test_what_corrections_learn_from_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    network = chain()
    simulation = simulated(network)

    def stream() -> object:
        seed = 0
        while True:  # it never ends: only what is needed is read
            yield inputs_of(network, 48, seed)
            seed += 1

    def count() -> int:
        return sum(len(part[0]) for part in gather(simulation, stream()))  # type: ignore[arg-type, misc]

    assert count() == 256
    monkeypatch.setattr("edgekd.quantize.walk._BYTES", 100 * 16 * 8 * 8 * 4)  # the first layer's 16 × 8 × 8 floats
    assert count() == 100
    monkeypatch.setattr("edgekd.quantize.walk._BYTES", 1)
    assert count() == 64
    monkeypatch.setattr("edgekd.quantize.walk._MOST_BYTES", 1)
    assert count() == 16
