"""A hard swish between unsigned integers is simulated as the runtime computes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from rules import BOARD, HOST

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.graph.edit import save
from edgekd.graph.program import capture, graph_inputs
from edgekd.models.network import Network
from edgekd.quantize import write
from edgekd.quantize.fake_quantizer import FakeQuantizer
from edgekd.quantize.gates import Gate
from edgekd.quantize.ranges import set_activations, set_weights
from edgekd.quantize.simulation import Simulation
from edgekd.types import QuantizationRules


def simulated(rules: QuantizationRules) -> tuple[Simulation, dict[str, np.ndarray], tuple[torch.Tensor, ...]]:
    network = networks.small()
    given = networks.samples(network.inputs, 64)
    args, specs = graph_inputs(network, given, preprocessing=True)
    simulation = Simulation(capture(network, args, specs, preprocessing=True), rules)
    simulation.observe([args])
    set_activations(simulation, "minmax")
    set_weights(simulation, "minmax")
    return simulation, given, args


@pytest.mark.parametrize("optimizations", [True, False])
def test_simulation_gives_what_the_integers_give(optimizations: bool, tmp_path: Path) -> None:
    simulation, given, args = simulated(HOST)
    model, _ = write(simulation, 19)
    save(model, tmp_path / "model.onnx")
    session = onnxruntime(optimizations=optimizations).load(tmp_path / "model.onnx", 1)
    found = session(given)["logits"]
    session.close()
    wanted = simulation.logits(args, quantized=True).numpy()
    assert float(np.abs(wanted - found).mean()) < 1e-3 * float(wanted.std())
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert counts["HardSwish"] == 0


def test_without_rounding_it_is_the_hard_swish() -> None:
    simulation, _, args = simulated(HOST)
    network = networks.small()
    with torch.no_grad():
        torch.testing.assert_close(simulation.logits(args, quantized=False), network(*args), rtol=0, atol=1e-5)
    gates = [module for module in simulation.graph.modules() if isinstance(module, Gate)]
    assert sorted(module.swish for module in gates) == [False, True]
    assert not any(isinstance(module, Gate) for module in simulation.convert().modules())


def test_other_runtimes_keep_it_in_float() -> None:
    simulation, _, _ = simulated(BOARD)
    assert not any(isinstance(module, Gate) for module in simulation.graph.modules())


def test_gate_by_hand() -> None:
    given = FakeQuantizer(
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine, lowest_scale=1e-9
    )
    x = torch.tensor([-4.0, -1.0, 1.0, 4.0])
    swish, sigmoid = Gate(given, swish=True), Gate(given, swish=False)
    assert torch.equal(swish(x), torch.nn.functional.hardswish(x))
    assert torch.equal(sigmoid(x), torch.nn.functional.hardsigmoid(x))
    given.state = "simulate"
    gates = torch.tensor([0, round(255 / 3) / 255, round(255 * 2 / 3) / 255, 1])
    torch.testing.assert_close(swish(x), x * gates, rtol=0, atol=1e-6)
    torch.testing.assert_close(sigmoid(x), torch.tensor([0, 1 / 3, 2 / 3, 1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizations", [True, False])
def test_half_a_gate_is_no_tie(optimizations: bool, tmp_path: Path) -> None:
    """At zero the gate is 127.5 steps: every kernel rounds it to 128."""
    first, second = torch.nn.Conv2d(3, 8, 1, bias=False), torch.nn.Conv2d(8, 8, 1, bias=False)
    with torch.no_grad():
        second.weight.copy_(torch.eye(8)[:, :, None, None])
    module = torch.nn.Sequential(first, torch.nn.Hardsigmoid(), second, torch.nn.Flatten())
    network = Network(module.eval(), networks.IMAGE, networks.NORMAL)
    given = networks.samples(network.inputs, 4)
    args, specs = graph_inputs(network, given, preprocessing=False)
    simulation = Simulation(capture(network, args, specs, preprocessing=False), HOST)
    simulation.observe([args, (torch.full_like(args[0], 30.0),), (torch.full_like(args[0], -30.0),)])
    set_activations(simulation, "minmax")
    set_weights(simulation, "minmax")
    model, _ = write(simulation, 19)
    save(model, tmp_path / "model.onnx")
    session = onnxruntime(optimizations=optimizations).load(tmp_path / "model.onnx", 1)
    zeros = torch.zeros_like(args[0])
    found = session({specs[0].name: zeros.numpy()})["logits"]
    session.close()
    np.testing.assert_allclose(found, 128 / 255, rtol=0, atol=1e-3)
    np.testing.assert_allclose(simulation.logits((zeros,), quantized=True).numpy(), found, rtol=0, atol=1e-4)
