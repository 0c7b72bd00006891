"""Hard swishes in a simulated graph, rounded as the integer form is that the runtime gets (`clips.py`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.quantize.clips import UNIT
from edgekd.quantize.fake_quantizer import FakeQuantizer
from edgekd.quantize.quantizer import aten

_HARD_SWISH = {aten.hardswish.default, aten.hardswish_.default}
_PREFIX = "edgekd_gate_"


class Gate(nn.Module):
    """x · hardsigmoid(x), where the second factor is a uint8 of scale 1/255 while what gives x rounds."""

    def __init__(self, given: FakeQuantizer) -> None:
        super().__init__()
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        if self.given.state != "simulate":
            return nn.functional.hardswish(x)
        return x * torch.fake_quantize_per_tensor_affine(x / 6 + 0.5, float(UNIT), 0, 0, 255)


def put_gates(graph: GraphModule) -> None:
    """Make each hard swish between unsigned integers a `Gate`; its node keeps its name and place."""
    for node in graph.graph.nodes:
        if node.target not in _HARD_SWISH:
            continue
        given = _unsigned(graph, node.args[0])
        if given is not None and node.users and all(_unsigned(graph, user) is not None for user in node.users):
            graph.add_submodule(f"{_PREFIX}{node.name}", Gate(given))
            node.op, node.target, node.args, node.kwargs = "call_module", f"{_PREFIX}{node.name}", node.args[:1], {}
    graph.recompile()


def take_gates(graph: GraphModule) -> None:
    """Make each `Gate` the hard swish that it was."""
    for node in graph.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith(_PREFIX):
            node.op, node.target = "call_function", aten.hardswish.default
    graph.delete_all_unused_submodules()
    graph.recompile()


def _unsigned(graph: GraphModule, node: object) -> FakeQuantizer | None:
    target = getattr(node, "target", None) if getattr(node, "op", "") == "call_module" else None
    module = graph.get_submodule(str(target)) if target is not None else None
    return module if isinstance(module, FakeQuantizer) and module.dtype == torch.uint8 else None
