"""A frozen network whose convolutions add to and activate what they give in the same call: fewer passes over memory."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from edgekd.correspondence import Tap
from edgekd.correspondence.taps import inner
from edgekd.distillation.folding import PROBED, alike, tapped
from edgekd.distillation.logits import forward
from edgekd.distillation.samples import Inputs
from edgekd.models.network import Network

_Activation: TypeAlias = tuple[str, tuple[float, ...]]  # as torch calls it, and its bounds


def fused(network: Network, inputs: Inputs, taps: Sequence[Tap] = ()) -> Network:
    """A copy of a network in eval mode that computes the same with fewer passes; the network itself if there is none.

    conv → activation, conv + shortcut and conv + shortcut → ReLU become one call of oneDNN's convolution with what
    follows it ("post-ops"), as torch's compiler has them, without the time it takes to compile. What a module computes
    is read by tracing its own forward pass; one that cannot be traced stays as it is. That the copy gives the same is
    shown by comparing the two.

    Worth it in bf16 alone (benchmarks/LOG.md has the figures).

    Args:
        network: what is copied; it is left as it is, and so are its hooks.
        inputs: real samples to try both with.
        taps: what is taken from inside, which has to be the same as well. What is tapped itself is not changed.
    """
    if not _able(network):
        return network
    try:
        copied = copy.deepcopy(network)
    except (RuntimeError, TypeError):  # of a module that holds what cannot be copied
        return network
    fixed = tapped(copied, taps)
    changed = [_rewritten(module, fixed) for module in list(inner(copied).modules())]
    if not any(changed):
        return network
    try:
        _tried_in_bf16(copied, inputs)
        return copied if alike(network, copied, inputs, taps) else network
    except (RuntimeError, TypeError, AttributeError):  # of shapes it cannot add, or of a torch with other private calls
        return network


class _Fused(nn.Module):
    """A convolution, what is added to its output, and the activation behind."""

    def __init__(self, convolution: nn.Conv2d, activation: _Activation | None) -> None:
        super().__init__()
        self.convolution, self.activation = convolution, activation
        self._cast: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}  # the weights do not change any more

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        convolution = self.convolution
        how = convolution.padding, convolution.stride, convolution.dilation, convolution.groups
        x, (weight, bias) = x.to(dtype), self._as(dtype)
        called: Any = torch.ops.mkldnn._convolution_pointwise  # what torch's compiler calls
        found: Tensor
        if other is None:
            name, scalars = self.activation or ("none", ())
            found = called(x, weight, bias, *how, name, scalars, "")
        else:
            then = self.activation[0] if self.activation else None
            found = called.binary(x, other.to(dtype), weight, bias, *how, "add", 1.0, then, [], None)
        return found

    def _as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype not in self._cast:
            weight, bias = self.convolution.weight.detach(), self.convolution.bias
            self._cast[dtype] = weight.to(dtype), bias.detach().to(dtype) if bias is not None else None
        return self._cast[dtype]


class _Shallow(fx.Tracer):
    """Reads what a module does with its children, and not what they do."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _tried_in_bf16(network: Network, inputs: Inputs) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        forward(network, {name: value[:PROBED] for name, value in inputs.items()})


def _able(network: Network) -> bool:
    """Whether torch has oneDNN here, with bf16, and the network is where oneDNN computes."""
    if any(parameter.device.type != "cpu" for parameter in network.parameters()):
        return False
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _rewritten(module: nn.Module, fixed: set[nn.Module]) -> bool:
    """Fuse what one module does with the convolutions that are its own; whether there was anything."""
    if not any(type(child) is nn.Conv2d for child in module.children()) or "forward" in module.__dict__:
        return False
    try:
        graph = _Shallow().trace(module)
    except Exception:  # whatever the user's code makes of a value that is not there yet
        return False
    _without_identities(graph, module, fixed)
    found = False
    for node in list(graph.nodes):
        if _is_own_convolution(node, graph, module, fixed):
            found = _fuse(node, graph, module, fixed) or found
    if found:
        # The module stays what it is, with its hooks and all that others read of it; its forward pass alone is new.
        module.__dict__["forward"] = fx.GraphModule(module, graph).forward
    return found


def _fuse(node: fx.Node, graph: fx.Graph, module: nn.Module, fixed: set[nn.Module]) -> bool:
    """Let a convolution do what follows it."""
    added = _alone_after(node)
    if added is not None and not _is_addition(added):
        added = None
    last = added or node
    behind = _alone_after(last)
    activation = _activation(behind, module, fixed) if behind is not None else None
    if added is not None and activation != _RELU:  # the only one that oneDNN has behind an addition
        activation = None
    if added is None and activation is None:
        return False
    end = behind if behind is not None and activation is not None else last
    path = str(node.target)
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    convolution = getattr(owner, name)
    setattr(owner, name, _Fused(convolution, activation))
    others = tuple(each for each in added.args if each is not node) if added is not None else ()
    with graph.inserting_before(end):  # where all that it takes is there
        call = graph.call_module(path, (node.args[0], *others))
    end.replace_all_uses_with(call)
    for each in dict.fromkeys((end, last, node)):
        graph.erase_node(each)
    return True


def _without_identities(graph: fx.Graph, module: nn.Module, fixed: set[nn.Module]) -> None:
    """Leave out what folding has put in the place of normalisations."""
    for node in list(graph.nodes):
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(child) is nn.Identity and child not in fixed and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_own_convolution(node: fx.Node, graph: fx.Graph, module: nn.Module, fixed: set[nn.Module]) -> bool:
    """A convolution with zeros around, called once, that is not tapped and does nothing else."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    child = module.get_submodule(str(node.target))
    if type(child) is not nn.Conv2d or child in fixed or child._forward_hooks or child._forward_pre_hooks:
        return False
    calls = sum(each.op == "call_module" and each.target == node.target for each in graph.nodes)
    return calls == 1 and child.padding_mode == "zeros" and not isinstance(child.padding, str)


def _alone_after(node: fx.Node) -> fx.Node | None:
    """What reads a value, if it is the only one that does."""
    (reader,) = node.users if len(node.users) == 1 else (None,)
    return reader


def _is_addition(node: fx.Node) -> bool:
    """Of two different tensors, as they are."""
    by_name = node.op == "call_method" and node.target in ("add", "add_")
    if not by_name and not (node.op == "call_function" and node.target in _ADDITIONS):
        return False
    two = len(node.args) == 2 and all(isinstance(each, fx.Node) for each in node.args)
    return two and node.args[0] is not node.args[1] and not node.kwargs


def _activation(node: fx.Node, module: nn.Module, fixed: set[nn.Module]) -> _Activation | None:
    """What a node does, if oneDNN can do it."""
    if len(node.args) != 1:
        return None
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return None if child in fixed or child._forward_hooks else _ACTIVATIONS.get(type(child))
    return _ACTIVATIONS.get(node.target)


_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELU, _RELU6, _SILU, _HARD_SWISH = ("relu", ()), ("hardtanh", (0.0, 6.0)), ("swish", ()), ("hardswish", ())
_ACTIVATIONS: dict[object, _Activation] = {  # module, function or method → oneDNN's
    nn.ReLU: _RELU, functional.relu: _RELU, torch.relu: _RELU, torch.relu_: _RELU, "relu": _RELU, "relu_": _RELU,
    nn.ReLU6: _RELU6, functional.relu6: _RELU6,
    nn.SiLU: _SILU, functional.silu: _SILU,
    nn.Hardswish: _HARD_SWISH, functional.hardswish: _HARD_SWISH,
}  # fmt: skip
