"""What was decided about a simulation, as a file: ranges, weights and biases, from which it is made again."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from edgekd.errors import ModelError
from edgekd.graph.program import Program
from edgekd.quantize.simulation import Simulation
from edgekd.types import QuantizationRules

FILE = "simulation.safetensors"
_META = "edgekd"  # one entry holds all: safetensors writes several in no fixed order


def save(simulation: Simulation, path: Path) -> None:
    """Write the ranges, and each weight and bias that is not the captured network's own.

    Equal simulations give equal bytes, and nothing in them is code.
    """
    tensors: dict[str, Tensor] = {}
    for site, (low, high) in simulation.ranges().items():
        tensors[f"low:{site}"], tensors[f"high:{site}"] = low, high
    rewritten, adjusted = simulation.rewritten(), simulation.adjusted()
    for layer in simulation.layers:
        for part, own in (("weight", layer.weight), ("bias", simulation.bias_path(layer) or "")):
            if own in rewritten:
                tensors[f"float {part}:{layer.node.name}"] = rewritten[own]
            if own in adjusted:
                tensors[f"adjusted {part}:{layer.node.name}"] = adjusted[own]
    meta = {_META: json.dumps({"keep_float": sorted(simulation.keep_float)})}
    kept = {name: tensors[name].detach().cpu().clone().contiguous() for name in sorted(tensors)}
    safetensors.save_file(kept, path, meta)


def load(program: Program, rules: QuantizationRules, path: Path) -> Simulation:
    """The simulation that `save` wrote, on the program of the same network.

    Raises:
        ModelError: the file is damaged, or is of another network.
    """
    try:
        with safe_open(str(path), "pt") as file:
            keep_float = json.loads((file.metadata() or {}).get(_META, "{}")).get("keep_float", [])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except (SafetensorError, OSError, ValueError) as problem:
        raise ModelError(f"not a saved simulation: {problem}", where=str(path)) from problem
    simulation = Simulation(program, rules, keep_float)
    for state, change in (
        ("float", simulation.rewrite),
        ("adjusted", simulation.adjust),
    ):  # the first forgets the other
        for layer in simulation.layers:
            parts = {part: tensors.get(f"{state} {part}:{layer.node.name}") for part in ("weight", "bias")}
            change(layer, weight=parts["weight"], bias=parts["bias"])
    lows = {name.removeprefix("low:"): low for name, low in tensors.items() if name.startswith("low:")}
    simulation.set_ranges({name: (low, tensors[f"high:{name}"]) for name, low in lows.items()})
    missing = [site.name for site in simulation.sites if site.quantizer.range is None]
    if missing:
        raise ModelError(f"it has no range of {', '.join(missing[:3])}", where=str(path), expected="the same network")
    return simulation
