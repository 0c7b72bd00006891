"""What each layer costs where it alone is in integers: which one to look at when int8 loses accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from edgekd.graph.work import counting
from edgekd.quantize.measured import Loss, compare, finite
from edgekd.quantize.quantizer import layer_name
from edgekd.quantize.simulation import Inputs, Layer, Simulation, Site, Snapshot
from edgekd.types import Interval, LayerSensitivity, Say, Task

SAMPLES = 256  # at most
WORK = 3e12  # multiply-accumulates, of all forward passes together: minutes on one core
LEAST = 32  # samples; where WORK allows fewer, neighbours are measured as one
_VALUE = 50.0  # what computing, moving and rounding one value takes, in multiply-accumulates (measured on CPUs)
_BYTES = 2**28  # of logits that are kept
_Z = 1.959963984540054  # 97.5 % point of the normal distribution
Labelled: TypeAlias = "tuple[Inputs, np.ndarray | None]"


@dataclass(frozen=True, eq=False)
class Place:
    """A layer, a block of neighbouring ones, or values between layers, with all that rounds where it is in integers."""

    name: str
    kind: Literal["layer", "block", "value"]
    layers: tuple[str, ...]  # that it holds
    sites: tuple[Site, ...]  # a layer's weight, its inputs, and its output where the target makes that an integer
    macs: int  # for one sample
    parameters: int


def analyse(
    simulation: Simulation, held_out: Iterable[Labelled], task: Task | None, *, say: Say
) -> tuple[tuple[LayerSensitivity, ...], int]:
    """Simulate each layer alone, all else in float, and compare the outputs with those of the float network.

    One layer at a time is how a sensitivity analysis is done (Wu, Judd, Zhang, Isaev, Micikevicius: Integer
    Quantization for Deep Learning Inference, 2020, on partial quantization); the ratio of signal to quantization noise
    in the outputs ranks layers finely where few decisions change (Pandey, Nagel, van Baalen, Huang, Patel,
    Blankevoort: A Practical Mixed Precision Algorithm for Post-Training Quantization, 2023). Ranges are those that the
    simulation has; corrections and learned roundings are left out, since they were fitted to the network with every
    layer in integers. The simulation is left as it was.

    The forward passes are bounded: at most 256 samples, fewer for large networks, and blocks instead of layers where
    that would leave fewer than 32.

    Returns:
        a row for each layer, or block, and for values between layers that are integers too, from input to output;
        and on how many samples they were measured.
    """
    begun = time.perf_counter()
    layers = places(simulation)
    chosen, count = plan(layers, cost(simulation))
    samples = take(held_out, min(count, _kept(simulation)))
    before = simulation.snapshot()
    simulation.restore(Snapshot(before.ranges, before.floats, {}))
    try:
        rows = tuple(_rows(simulation, chosen, samples, task))
    finally:
        simulation.restore(before)
    used, seconds = count_of(samples), round(time.perf_counter() - begun, 2)
    say("sensitivity", step="quantize", places=len(rows), samples=used, seconds=seconds)
    return rows, used


def places(simulation: Simulation) -> list[Place]:
    """Everything that can be in integers by itself, from the input to the output."""
    order = {node: index for index, node in enumerate(simulation.graph.graph.nodes)}
    found: list[tuple[int, Place]] = []
    for name in dict.fromkeys(layer.name for layer in simulation.layers if layer.site is not None):
        own = [layer for layer in simulation.layers if layer.name == name]
        sites = tuple(s for s in simulation.sites if name in s.layers and (s.kind != "weight" or s.layers[0] == name))
        macs = sum(_macs(simulation, layer) for layer in own)
        found.append((order[own[0].node], Place(name, "layer", (name,), sites, macs, _parameters(simulation, own[0]))))
    between: dict[str, list[tuple[int, Site]]] = {}
    by_name = {node.name: node for node in order}
    for site in simulation.sites:
        if not site.layers:
            node = by_name[site.values[0]]
            between.setdefault(layer_name(node), []).append((order[node], site))
    taken = {place.name for _, place in found}
    for name, pairs in between.items():
        shown = f"{name} (values)" if name in taken else name
        found.append((pairs[0][0], Place(shown, "value", (), tuple(site for _, site in pairs), 0, 0)))
    return [place for _, place in sorted(found, key=lambda pair: pair[0])]


def blocks(layers: Sequence[Place], depth: int) -> list[Place]:
    """Neighbours whose paths agree in the first `depth` steps become one; what stands alone stays as it is."""
    groups: list[tuple[str, list[Place]]] = []
    for place in layers:
        path = ".".join(place.name.removesuffix(" (values)").split(".")[:depth])
        if groups and groups[-1][0] == path:
            groups[-1][1].append(place)
        else:
            groups.append((path, [place]))
    return [parts[0] if len(parts) == 1 else _block(path, parts) for path, parts in groups]


def plan(layers: Sequence[Place], cost_of_one: float) -> tuple[list[Place], int]:
    """What is measured, layers or ever larger blocks, and on how many samples, so that the work stays bounded."""
    chosen = list(layers)
    deepest = max((place.name.count(".") for place in layers), default=0)
    for depth in range(deepest, 0, -1):
        if _affordable(chosen, cost_of_one) >= LEAST:
            break
        chosen = blocks(layers, depth)
    return chosen, max(8, min(SAMPLES, _affordable(chosen, cost_of_one)))


def cost(simulation: Simulation) -> float:
    """About what one sample takes, in multiply-accumulates; the same on every machine, unlike a time."""
    values = sum(_elements(node) for node in simulation.graph.graph.nodes)
    return sum(_macs(simulation, layer) for layer in simulation.layers) + _VALUE * values


def take(held_out: Iterable[Labelled], count: int) -> list[Labelled]:
    """The first `count` samples of a stream, batch by batch."""
    found: list[Labelled] = []
    for inputs, labels in held_out:
        left = count - count_of(found)
        if left <= 0:
            break
        found.append((tuple(tensor[:left] for tensor in inputs), None if labels is None else labels[:left]))
    return found


def interval(loss: Loss) -> Interval | None:
    """The drop on labels with its 95 % interval; None where there are no labels.

    Of right and wrong answers Agresti and Min's interval for matched pairs (Statistics in Medicine, 2005), which adds
    half a sample to each of the four outcomes, so that no change among few samples is not taken for certainty.
    """
    if loss.drop is None or loss.drop_error is None:
        return None
    n = loss.samples
    squares = n * (loss.drop_error**2 * n + loss.drop**2)  # the sum of the squared differences
    total = n * loss.drop
    middle = total / (n + 2)
    variance = (squares + 1 - total**2 / (n + 2)) / (n + 2) ** 2
    half = _Z * math.sqrt(max(variance, 0.0))
    return Interval(loss.drop, min(loss.drop, middle - half), max(loss.drop, middle + half), n)


def estimate(expected: float, drop: Interval | None) -> float:
    """One figure for what is lost: the drop on labels where it is surely above zero, else the expected one.

    Of a few hundred decisions one alone is some tenths of a point, so that small drops are lost in their counting.
    """
    return drop.value if drop is not None and drop.low > 0 else expected


def _rows(
    simulation: Simulation, chosen: Sequence[Place], samples: Sequence[Labelled], task: Task | None
) -> Iterator[LayerSensitivity]:
    wanted = [simulation.logits(inputs, quantized=False) for inputs, _ in samples]
    total = max(_whole(simulation), sum(place.macs for place in chosen))
    for place in chosen:
        with torch.no_grad(), simulation.simulating(sites=place.sites):
            pairs = [
                (logits, simulation(*inputs), labels) for logits, (inputs, labels) in zip(wanted, samples, strict=True)
            ]
        yield _row(place, compare(pairs, task), total)


def _row(place: Place, loss: Loss, total: int) -> LayerSensitivity:
    return LayerSensitivity(
        layer=place.name,
        kind=place.kind,
        sqnr_db=finite(loss.sqnr_db) if loss.sqnr_db != math.inf else None,
        divergence=finite(loss.divergence),
        changed=None if loss.changed is None else finite(loss.changed),
        expected_drop=finite(loss.expected_drop),
        drop=interval(loss),
        rest=None,
        macs=finite(place.macs / total if total else 0.0),
        parameters=place.parameters,
    )


def _whole(simulation: Simulation) -> int:
    """Multiply-accumulates of one sample in the whole network, with those of layers that stay in float."""
    args = simulation.program.args
    with torch.no_grad(), counting() as counter:
        simulation(*args)
    return int(counter.get_total_flops()) // (2 * len(args[0]))


def _block(path: str, parts: Sequence[Place]) -> Place:
    sites = tuple({id(site): site for place in parts for site in place.sites}.values())
    names = tuple(name for place in parts for name in place.layers)
    if not names:
        return Place(path, "value", (), sites, 0, 0)
    return Place(path, "block", names, sites, sum(p.macs for p in parts), sum(p.parameters for p in parts))


def _affordable(chosen: Sequence[Place], cost_of_one: float) -> int:
    return int(WORK / (max(cost_of_one, 1.0) * max(len(chosen), 1)))


def _macs(simulation: Simulation, layer: Layer) -> int:
    """Multiply-accumulates of one sample: a filter for each value of the output, or of the input if transposed."""
    weight = simulation.float_weight(layer)
    data: Any = layer.node.args[0] if layer.transposed else layer.node
    while data.op == "call_module":  # a fake-quantizer
        data = data.args[0]
    return _elements(data) * weight.numel() // weight.shape[0]


def _parameters(simulation: Simulation, layer: Layer) -> int:
    bias = simulation.float_bias(layer)
    return simulation.float_weight(layer).numel() + (0 if bias is None else bias.numel())


def _elements(node: Node) -> int:
    value = node.meta.get("val")
    return math.prod(int(side) for side in value.shape[1:]) if isinstance(value, Tensor) and value.dim() > 1 else 0


def _kept(simulation: Simulation) -> int:
    """How many samples' logits fit."""
    (output,) = (node for node in simulation.graph.graph.nodes if node.op == "output")
    return max(8, _BYTES // (4 * max(1, *map(_elements, output.all_input_nodes))))


def count_of(samples: Sequence[Labelled]) -> int:
    """How many samples there are in all batches."""
    return sum(len(inputs[0]) for inputs, _ in samples)
