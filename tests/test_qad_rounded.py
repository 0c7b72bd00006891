"""The module that quantization-aware distillation trains: its arithmetic, its gradients, what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networks
import pytest
import torch
from rules import HOST, RULES
from torch import Tensor, nn

from edgekd.errors import ModelError
from edgekd.graph.program import capture, graph_inputs
from edgekd.models.network import Network
from edgekd.quantize.ranges import set_activations, set_weights
from edgekd.quantize.simulation import Simulation
from edgekd.quantize.student import Rounded
from edgekd.types import (
    QuantizationRules,
)  # fmt: skip


def small(rules: QuantizationRules = HOST, **keep: Any) -> tuple[Simulation, tuple[Tensor, ...]]:
    return ranged(networks.small(), rules, **keep)


def ranged(network: Network, rules: QuantizationRules, **keep: Any) -> tuple[Simulation, tuple[Tensor, ...]]:
    args, specs = graph_inputs(network, networks.samples(network.inputs, 8), preprocessing=True)
    simulation = Simulation(capture(network, args, specs, preprocessing=True), rules, **keep)
    simulation.observe([args])
    set_activations(simulation, "minmax")
    set_weights(simulation, "minmax")
    return simulation, args


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradients_reach_every_weight_and_are_finite(rules: QuantizationRules) -> None:
    simulation, args = small(rules)
    rounded = Rounded(simulation)
    rounded(*args).square().sum().backward()
    gradients = {name: value.grad for name, value in rounded.values.items()}
    assert all(each is not None and bool(torch.isfinite(each).all()) for each in gradients.values())
    weights = [each for each in gradients.values() if each is not None and each.dim() > 1]
    assert len(weights) == len(simulation.quantized)
    assert all(bool(each.abs().sum() > 0) for each in weights)
    assert all(value.grad is None for value in simulation.graph.parameters())


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_activations_that_work_in_place_are_no_obstacle(rules: QuantizationRules) -> None:
    def gradients(inplace: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 1), nn.Hardswish(inplace), nn.Flatten()]
        network = Network(nn.Sequential(*layers, nn.Linear(8 * 36, 3)).eval(), networks.IMAGE, networks.NORMAL)
        rounded = Rounded(ranged(network, rules)[0])
        rounded(*ranged(network, rules)[1]).square().sum().backward()
        return [value.grad for value in rounded.values.values()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_module_gives_what_the_simulation_gives_before_and_after(rules: QuantizationRules) -> None:
    simulation, args = small(rules)
    rounded, wanted = Rounded(simulation), simulation.logits(args, quantized=True)
    with torch.no_grad():
        torch.testing.assert_close(rounded(*args), wanted, rtol=0, atol=1e-4)
        for value in rounded.values.values():
            value.add_(torch.linspace(-3, 3, value.numel()).reshape(value.shape) if value.dim() else 2.0)
        moved = rounded(*args)
        assert torch.equal(simulation.logits(args, quantized=True), wanted), "nothing was written back yet"
        rounded.write_back()
    assert not torch.allclose(moved, wanted, atol=0.05)
    assert torch.equal(simulation.logits(args, quantized=True), moved)
    assert torch.equal(simulation.logits(args, quantized=False), small(rules)[0].logits(args, quantized=False))


def test_it_computes_in_float32_under_autocast_and_is_the_same_in_training() -> None:
    simulation, args = small()
    rounded = Rounded(simulation)
    wanted = rounded.eval()(*args)
    with torch.autocast("cpu", torch.bfloat16):
        found = rounded.train()(*args)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_range_gradient_is_that_of_the_step_size() -> None:
    simulation, _ = small()
    site = next(each for each in simulation.sites if each.kind == "output")
    site.quantizer.set_range(torch.tensor(0.0), torch.tensor(255.0))  # steps of one
    rounded = Rounded(simulation)
    name, value = next((n, v) for n, v in rounded.values.items() if n == f"range/{simulation.sites.index(site)}")
    x = torch.tensor([0.4, 1.7, 300.0, -5.0], requires_grad=True)
    with simulation.simulating(), rounded._learning():
        site.quantizer(x).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    # d y / d ln s: round(x) - x within, the end of the range beyond it (Esser et al., eq. 3)
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(0.03 * (-0.4 + 10 * 0.3 + 100 * 255 + 1000 * 0), rel=1e-5), name
    assert x.grad is not None
    assert x.grad.tolist() == [1, 10, 0, 0]


def test_layers_kept_in_float_are_left_alone() -> None:
    simulation, args = small(keep_float={"stem"})
    rounded = Rounded(simulation)
    before = simulation.float_weight(simulation.layer("stem.0")).clone()
    assert not any("stem" in name for name in rounded.values)
    rounded(*args).sum().backward()
    rounded.write_back()
    assert torch.equal(simulation.weight(simulation.layer("stem.0")), before)


def test_graphs_of_one_sample_and_graphs_without_integers_are_refused() -> None:
    torch.manual_seed(0)
    network = Network(networks.BatchOfOne(), networks.IMAGE[:0] or _floats(8), None)
    args, specs = graph_inputs(network, networks.samples(network.inputs, 3), preprocessing=True)
    program = capture(network, args, specs, preprocessing=True)
    assert program.why_static is not None
    with pytest.raises(ModelError, match="one sample at a time"):
        Rounded(Simulation(program, HOST))
    simulation, _ = small(keep_float={"stem", "depthwise", "squeeze", "project", "head"})
    with pytest.raises(ModelError, match="nothing to train"):
        Rounded(simulation)


def _floats(width: int) -> tuple[Any, ...]:
    return (replace(networks.sensors().inputs[1], name="x", shape=("batch", width)),)
