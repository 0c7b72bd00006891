"""The simulated network is the float one where nothing rounds, and the exported one where all does."""

from __future__ import annotations

from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from rules import BOARD, HOST
from wide_networks import chain, inputs_of, simulated

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.errors import ModelError
from edgekd.graph.edit import save
from edgekd.models.network import Network
from edgekd.quantize import write
from edgekd.quantize.bias import correct_biases
from edgekd.quantize.equalize import equalize
from edgekd.quantize.ranges import set_activations, set_weights
from edgekd.quantize.rounding import learn_rounding
from edgekd.quantize.simulation import Inputs, Simulation
from edgekd.types import QuantizationRules

RULES = pytest.mark.parametrize("rules", [HOST, BOARD], ids=["host", "board"])


@pytest.fixture(scope="module")
def network() -> Network:
    return networks.small()


def exported(simulation: Simulation, path: Path, seed: int) -> np.ndarray:
    model, _ = write(simulation, 19)
    save(model, path)
    given = networks.samples(networks.IMAGE, 32, seed)
    return onnxruntime(optimizations=False).load(path, 1)(given)["logits"]


@RULES
def test_at_rest_it_is_the_float_network(network: Network, rules: QuantizationRules) -> None:
    simulation = simulated(network, rules)
    given = inputs_of(network, seed=5)
    with torch.no_grad():
        assert torch.allclose(simulation(*given), network(*given), atol=1e-6)
    assert torch.equal(simulation.logits(given, quantized=False), simulation(*given))
    assert not torch.equal(simulation.logits(given, quantized=True), simulation(*given))


def test_sites_and_layers_are_known_by_the_users_names(network: Network) -> None:
    simulation = simulated(network, HOST)
    names = ["stem.0", "depthwise.0", "squeeze.1", "squeeze.3", "project.0", "head"]
    assert [layer.name for layer in simulation.layers] == names
    assert simulation.quantized == tuple(names)
    sites = {site.name: site for site in simulation.sites}
    weights = [site for site in simulation.sites if site.kind == "weight"]
    assert [site.layers for site in weights] == [(name,) for name in names]
    relu = sites["relu"]  # made by the first convolution with its ReLU, read by the second
    assert (relu.kind, relu.layers) == ("output", ("stem.0", "depthwise.0"))
    assert sites["contiguous"].kind == "input"
    assert sites["mean_dim_1"].values == ("mean_dim_1", "flatten")  # one range for both
    assert simulation.layer("depthwise.0").groups == 16
    with pytest.raises(ModelError, match="no layer 'stem'") as problem:
        simulation.layer("stem")
    assert problem.value.nearest == "stem.0"


def test_the_boards_graph_computes_what_was_simulated(network: Network, tmp_path: Path) -> None:
    simulation = simulated(network, BOARD)
    wanted = simulation.logits(inputs_of(network, seed=5), quantized=True).numpy()
    assert np.abs(wanted - exported(simulation, tmp_path / "m.onnx", 5)).max() < 1e-5 * np.abs(wanted).max()


def test_the_hosts_graph_computes_what_was_simulated(network: Network, tmp_path: Path) -> None:
    # A mean of a few integers often lies in the middle between two steps, where the last bit decides; and the graph's
    # hard sigmoid and hard swish work on integers. So some values are a step apart, and no more.
    simulation = simulated(network, HOST)
    assert_a_step_apart(simulation, inputs_of(network, seed=5), exported(simulation, tmp_path / "m.onnx", 5), 0.6)


def assert_a_step_apart(simulation: Simulation, given: Inputs, found: np.ndarray, part: float = 0.1) -> None:
    wanted = simulation.logits(given, quantized=True).numpy()
    head = simulation.layer("head")
    step = float(next(s for s in simulation.sites if "flatten" in s.values).quantizer.scale)
    one_step = step * simulation.weight(head).abs().sum(1).numpy()  # every input of the head by one step
    assert (np.abs(wanted - found) <= one_step).all()
    assert np.median(np.abs(wanted - found)) < part * np.median(
        np.abs(wanted - simulation.logits(given, quantized=False).numpy())
    )


@RULES
def test_the_graph_computes_what_was_simulated_after_every_method(rules: QuantizationRules, tmp_path: Path) -> None:
    network = chain(wide=1.0)
    simulation = simulated(network, rules, ranges=None)
    equalize(simulation)
    parts = [inputs_of(network, seed=seed) for seed in range(2)]
    simulation.observe(parts, histograms=True)
    set_activations(simulation, "mse")
    set_weights(simulation, "mse")
    correct_biases(simulation, parts)
    learn_rounding(simulation, parts)
    given = inputs_of(network, seed=5)
    wanted = simulation.logits(given, quantized=True)
    assert_a_step_apart(simulation, given, exported(simulation, tmp_path / "m.onnx", 5))
    assert torch.equal(wanted, simulation.logits(given, quantized=True))  # converting changed nothing


def test_places_can_be_switched_one_by_one(network: Network) -> None:
    simulation = simulated(network, HOST)
    given = inputs_of(network, seed=5)
    whole = simulation.logits(given, quantized=False)
    errors = {}
    for layer in simulation.layers:
        with torch.no_grad(), simulation.simulating(layers={layer.name}):
            errors[layer.name] = float((simulation(*given) - whole).abs().mean())
    everything = float((simulation.logits(given, quantized=True) - whole).abs().mean())
    assert all(0 < error < everything for error in errors.values())
    with torch.no_grad(), simulation.simulating(sites=[]):
        assert torch.equal(simulation(*given), whole)
    with torch.no_grad(), simulation.simulating(sites=[s for s in simulation.sites if s.kind == "weight"]):
        found = simulation.outputs(given, ["stem.0", "head"])
    with torch.no_grad():
        plain = simulation.outputs(given, ["stem.0", "head"])
    assert torch.equal(plain["head"], whole)
    assert float((found["stem.0"] - plain["stem.0"]).abs().max()) > 0


def test_a_place_without_a_range_cannot_round(network: Network) -> None:
    simulation = simulated(network, HOST, ranges=None)
    with pytest.raises(ModelError, match="has no range yet"):
        simulation.logits(inputs_of(network), quantized=True)


def test_adjusted_weights_hold_only_where_they_are_simulated(network: Network) -> None:
    simulation = simulated(network, HOST)
    given = inputs_of(network, seed=5)
    whole, before = (simulation.logits(given, quantized=on) for on in (False, True))
    kept = simulation.snapshot()
    layer = simulation.layer("stem.0")
    simulation.adjust(layer, weight=torch.zeros_like(simulation.weight(layer)))
    assert torch.equal(simulation.logits(given, quantized=False), whole)
    assert not torch.allclose(simulation.logits(given, quantized=True), before)
    with torch.no_grad(), simulation.simulating(layers={"head"}):
        apart = (simulation(*given) - whole).abs().max()
    assert apart < 0.1 * (simulation.logits(given, quantized=True) - whole).abs().max()
    simulation.restore(kept)
    assert torch.equal(simulation.logits(given, quantized=True), before)


def test_gradients_reach_adjusted_weights(network: Network) -> None:
    simulation = simulated(network, HOST)
    for layer in simulation.layers:
        simulation.adjust(layer, weight=simulation.weight(layer))
    parameters = simulation.adjusted()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with simulation.simulating():
        simulation(*inputs_of(network)).square().mean().backward()  # type: ignore[no-untyped-call]
    assert len(parameters) == 6
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters.values())


def test_layers_can_be_kept_in_float(network: Network) -> None:
    simulation = simulated(network, HOST, keep_float={"squeeze", "stem.0"})
    assert simulation.quantized == ("depthwise.0", "project.0", "head")
    assert set(simulation.left) == {"stem.0", "squeeze.1", "squeeze.3"}
    whole = simulated(network, HOST)
    simulation.set_ranges(whole.ranges())  # places are the same ones
    assert simulation.ranges().keys() <= whole.ranges().keys() | {"contiguous"}
    assert simulation.ranges()["hardswish"] == whole.ranges()["hardswish"]


def test_the_users_network_is_left_as_it_is(network: Network) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    simulation = simulated(network, HOST)
    for layer in simulation.layers:
        simulation.rewrite(layer, weight=torch.zeros_like(simulation.weight(layer)))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
