"""Through the graph layer by layer, as the float network and the quantized one at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from edgekd.quantize.fake_quantizer import FakeQuantizer
from edgekd.quantize.gates import Gate
from edgekd.quantize.simulation import Inputs, Layer, Simulation

SAMPLES = 256  # at most, that corrections are learned from
_FEW = 64
_BYTES, _MOST_BYTES = 2**23, 2**27  # of one value for all samples: with more than 64, and with more than 16
Parts: TypeAlias = "list[Tensor]"  # one value, cut along the batch
Visit: TypeAlias = "Callable[[Layer, Parts, Parts], None]"


def gather(simulation: Simulation, batches: Iterable[Inputs]) -> list[Inputs]:
    """The first samples of a stream: at most 256, and fewer where the values between their layers are large.

    All samples are in memory at every layer of a walk, as two networks, so that their number is what memory depends on.
    """
    largest = 1
    for node in simulation.graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() > 1:
            largest = max(largest, math.prod(int(side) for side in value.shape[1:]) * value.element_size())
    left = min(SAMPLES, max(_FEW, _BYTES // largest), max(16, _MOST_BYTES // largest))
    found: list[Inputs] = []
    for batch in batches:
        found.append(tuple(tensor[:left] for tensor in batch))
        left -= len(found[-1][0])
        if left <= 0:
            break
    return found


def walk(simulation: Simulation, parts: Sequence[Inputs], visit: Visit) -> None:
    """Call `visit` for each quantized layer in order, with its quantized inputs and its float outputs.

    `visit` may adjust the layer; what comes after it computes with the adjusted one. Only values that are still
    needed are kept, for all samples.

    Args:
        parts: the samples, cut along the batch as they are to be computed.
    """
    steps = list(simulation.graph.graph.nodes)
    layers = {layer.node: layer for layer in simulation.layers}
    last = {used: node for node in steps for used in node.all_input_nodes}
    done: dict[Node, list[Node]] = {}
    for used, node in last.items():
        done.setdefault(node, []).append(used)
    floats: dict[Node, list[Any]] = {}
    rounded: dict[Node, list[Any]] = {}
    given = iter(range(len(parts[0])))
    with torch.no_grad(), simulation.simulating():
        for node in steps:
            if node.op == "output":
                break
            if node in layers:
                _layer(simulation, layers[node], floats, rounded, visit)
            elif node.op == "placeholder":
                index = next(given)
                floats[node] = [part[index] for part in parts]
                rounded[node] = list(floats[node])
            else:
                _plain(simulation, node, floats, rounded, len(parts))
            for used in done.get(node, ()):
                floats.pop(used, None)
                rounded.pop(used, None)


def quantized_output(simulation: Simulation, layer: Layer, value: Tensor) -> Tensor:
    """What the layer gives with its weight quantized and its bias adjusted, and an integer where the rules say so."""
    weight = simulation.weight(layer)
    if layer.site is not None:
        weight = layer.site.quantizer(weight)
    return _call(layer, value, weight, simulation.simulated_bias(layer))


def _layer(
    simulation: Simulation,
    layer: Layer,
    floats: dict[Node, list[Any]],
    rounded: dict[Node, list[Any]],
    visit: Visit,
) -> None:
    data: Any = layer.node.args[0]
    weight, bias = simulation.float_weight(layer), simulation.float_bias(layer)
    floats[layer.node] = [_call(layer, value, weight, bias) for value in floats[data]]
    if layer.site is None:
        rounded[layer.node] = [_call(layer, value, weight, bias) for value in rounded[data]]
        return
    visit(layer, rounded[data], floats[layer.node])
    rounded[layer.node] = [quantized_output(simulation, layer, value) for value in rounded[data]]


def _call(layer: Layer, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    function: Any = layer.node.target
    output: Tensor = function(value, weight, bias, *layer.node.args[3:], **layer.node.kwargs)
    return output


def _plain(
    simulation: Simulation, node: Node, floats: dict[Node, list[Any]], rounded: dict[Node, list[Any]], count: int
) -> None:
    if node.op == "get_attr":
        value: Any = simulation.graph
        for step in str(node.target).split("."):
            value = getattr(value, step)
        floats[node] = rounded[node] = [value] * count
        return
    if node.op == "call_module":
        module, source = simulation.graph.get_submodule(str(node.target)), cast("Node", node.args[0])
        if isinstance(module, FakeQuantizer):
            floats[node] = list(floats[source])
            rounded[node] = [module(value) for value in rounded[source]]
        elif isinstance(module, Gate):
            floats[node] = [module.plain(value) for value in floats[source]]
            rounded[node] = [module(value) for value in rounded[source]]
        else:  # the check of shapes that torch.export puts in front
            assert not node.users, f"{node} is a module that the walk does not know"
        return
    for values in (floats, rounded):
        made = []
        for index in range(count):

            def chosen(used: Node, values: dict[Node, list[Any]] = values, index: int = index) -> Any:
                return values[used][index]

            function: Any = node.target
            made.append(function(*map_arg(node.args, chosen), **map_arg(node.kwargs, chosen)))
        values[node] = made
