"""A simulation comes back from its file as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from rules import HOST
from torch import Tensor

from edgekd.errors import ModelError
from edgekd.graph.program import Program, capture, graph_inputs
from edgekd.quantize import state
from edgekd.quantize.ranges import set_activations, set_weights
from edgekd.quantize.simulation import Simulation


def captured() -> tuple[Program, tuple[Tensor, ...]]:
    network = networks.small()
    args, specs = graph_inputs(network, networks.samples(network.inputs, 8), preprocessing=True)
    return capture(network, args, specs, preprocessing=True), args


def ranged(program: Program, args: tuple[Tensor, ...], **keep: Any) -> Simulation:
    simulation = Simulation(program, HOST, **keep)
    simulation.observe([args])
    set_activations(simulation, "minmax")
    set_weights(simulation, "minmax")
    return simulation


def test_ranges_weights_biases_and_layers_in_float_come_back(tmp_path: Path) -> None:
    program, args = captured()
    simulation = ranged(program, args, keep_float={"stem"})
    first, second = simulation.layer("depthwise.0"), simulation.layer("head")
    simulation.rewrite(first, weight=2 * simulation.weight(first))
    simulation.adjust(first, weight=simulation.weight(first) + 0.01)
    simulation.adjust(second, bias=torch.ones(5))
    state.save(simulation, tmp_path / "one")
    fresh, _ = captured()
    found = state.load(fresh, HOST, tmp_path / "one")
    for quantized in (True, False):
        assert torch.equal(found.logits(args, quantized=quantized), simulation.logits(args, quantized=quantized))
    assert found.left == simulation.left
    assert found.quantized == simulation.quantized
    state.save(found, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_weights_of_the_captured_network_are_not_written(tmp_path: Path) -> None:
    program, args = captured()
    state.save(ranged(program, args), tmp_path / "plain")
    weights = sum(value.numel() for value in networks.small().module.parameters())
    assert (tmp_path / "plain").stat().st_size < 4 * weights + 8192


@pytest.mark.parametrize("content", [b"", b"pickle?", b"\x80\x04K\x01."])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ModelError, match="not a saved simulation"):
        state.load(captured()[0], HOST, tmp_path / "file")


def test_the_simulation_of_another_network_is_refused(tmp_path: Path) -> None:
    program, args = captured()
    state.save(ranged(program, args), tmp_path / "file")
    other = networks.sensors()
    args, specs = graph_inputs(other, networks.samples(other.inputs, 8), preprocessing=True)
    with pytest.raises(ModelError, match="has no range of"):
        state.load(capture(other, args, specs, preprocessing=True), HOST, tmp_path / "file")
