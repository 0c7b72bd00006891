"""A hard swish between unsigned integers is simulated as the runtime computes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.graph.edit import save
from edgekd.graph.program import capture, graph_inputs
from edgekd.quantize import write
from edgekd.quantize.fake_quantizer import FakeQuantizer
from edgekd.quantize.gates import Gate
from edgekd.quantize.ranges import set_activations, set_weights
from edgekd.quantize.simulation import Simulation
from edgekd.types import QuantizationRules

HOST = QuantizationRules("uint8", False, "int8", True, True, True, 0, "onnxruntime")
BOARD = QuantizationRules("int8", True, "int8", True, False, False, 0, "tensorrt")


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
    assert sum(isinstance(module, Gate) for module in simulation.graph.modules()) == 1
    assert not any(isinstance(module, Gate) for module in simulation.convert().modules())


def test_other_runtimes_keep_it_in_float() -> None:
    simulation, _, _ = simulated(BOARD)
    assert not any(isinstance(module, Gate) for module in simulation.graph.modules())


def test_gate_by_hand() -> None:
    given = FakeQuantizer(
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine, lowest_scale=1e-9
    )
    x = torch.tensor([-4.0, -1.0, 1.0, 4.0])
    assert torch.equal(Gate(given)(x), torch.nn.functional.hardswish(x))
    given.state = "simulate"
    gates = [0, round(255 / 3) / 255, round(255 * 2 / 3) / 255, 1]
    torch.testing.assert_close(Gate(given)(x), x * torch.tensor(gates), rtol=0, atol=1e-6)
