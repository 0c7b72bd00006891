"""Hard sigmoids and swishes in a simulated graph, rounded as the integers are that the runtime gets (`clips.py`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.quantize.clips import OFF_THE_TIE, UNIT
from edgekd.quantize.fake_quantizer import FakeQuantizer
from edgekd.quantize.quantizer import aten

_SWISH = {aten.hardswish.default, aten.hardswish_.default}
_SIGMOID = {aten.hardsigmoid.default, aten.hardsigmoid_.default}
_PREFIX = "edgekd_gate_"


class Gate(nn.Module):
    """hardsigmoid(x), or x · hardsigmoid(x) of which that factor is a uint8 of scale 1/255, while what gives x rounds.

    hardsigmoid(0) lies off the tie as the runtime's does.
    """

    def __init__(self, given: FakeQuantizer, *, swish: bool) -> None:
        super().__init__()
        self.given, self.swish = given, swish

    def forward(self, x: Tensor) -> Tensor:
        if self.given.state != "simulate":
            return self.plain(x)
        line = x / 6 + 0.5 * OFF_THE_TIE
        if not self.swish:
            return line.clamp(0, 1)
        return x * torch.fake_quantize_per_tensor_affine(line, float(UNIT), 0, 0, 255)

    def plain(self, x: Tensor) -> Tensor:
        """As the float network has it."""
        return nn.functional.hardswish(x) if self.swish else nn.functional.hardsigmoid(x)


def put_gates(graph: GraphModule) -> None:
    """Make each hard sigmoid or swish between unsigned integers a `Gate`; its node keeps its name and place."""
    for node in graph.graph.nodes:
        if node.target not in _SWISH | _SIGMOID:
            continue
        given = _unsigned(graph, node.args[0])
        if given is not None and node.users and all(_unsigned(graph, user) is not None for user in node.users):
            graph.add_submodule(f"{_PREFIX}{node.name}", Gate(given, swish=node.target in _SWISH))
            node.op, node.target, node.args, node.kwargs = "call_module", f"{_PREFIX}{node.name}", node.args[:1], {}
    graph.recompile()


def take_gates(graph: GraphModule) -> None:
    """Make each `Gate` the operator that it was."""
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Gate):
            node.op, node.target = "call_function", (aten.hardswish if module.swish else aten.hardsigmoid).default
    graph.delete_all_unused_submodules()
    graph.recompile()


def _unsigned(graph: GraphModule, node: object) -> FakeQuantizer | None:
    target = getattr(node, "target", None) if getattr(node, "op", "") == "call_module" else None
    module = graph.get_submodule(str(target)) if target is not None else None
    return module if isinstance(module, FakeQuantizer) and module.dtype == torch.uint8 else None
