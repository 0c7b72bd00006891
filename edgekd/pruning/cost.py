"""What a network costs: multiply-accumulates, parameters, bytes of its weights file."""

from __future__ import annotations

from collections.abc import Callable

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgekd.graph.work import counting
from edgekd.pruning.cut import Plan, depthwise, removed

_META_BYTES = 256  # more than edgekd writes beside the weights


def macs(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one sample, counted in one run of the module.

    Args:
        inputs: as the module takes them, batch first; the first sample alone is run.
    """
    return sum(_by_module(module, inputs).values())


def predicted_macs(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[Plan], float]:
    """What `macs` would be after a cut, from one run of the whole network.

    Work of a convolution or linear layer goes with its weights, that of an attention with its heads; what else
    multiplies matrices is taken as it is.
    """
    work = _by_module(module, inputs)
    layers = dict(module.named_modules())

    def predicted(plan: Plan) -> float:
        parts: dict[str, float] = {}
        for slot, gone in removed(plan):
            layer = layers.get(slot.path)
            if not isinstance(layer, (_ConvNd, nn.Linear)):
                continue
            sizes = (layer.weight.shape[0], layer.weight.shape[1] * getattr(layer, "groups", 1))
            transposed = isinstance(layer, _ConvTransposeNd)
            size = sizes[0] if depthwise(layer) else sizes[(slot.side == "in") != transposed]
            parts[slot.path] = parts.get(slot.path, 1.0) * (1 - len(gone) / size)
        for group, units in plan.items():
            parts |= {count.path: len(units) / group.units for count in group.counts}
        return sum(own * parts.get(path, 1.0) for path, own in work.items())

    return predicted


def _by_module(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Multiply-accumulates that each module does itself, not in modules inside it; of all its calls together."""
    one = tuple(each[:1] for each in inputs)
    names = {each: path for path, each in module.named_modules()}
    own: dict[str, int] = {}
    inside: list[tuple[str, int]] = []  # modules that run now, and what was counted when each began
    with torch.no_grad(), counting() as counter:

        def begin(running: nn.Module, _args: object) -> None:
            inside.append((names[running], int(counter.get_total_flops())))

        def end(running: nn.Module, _args: object, _output: object) -> None:
            path, before = inside.pop()
            done = int(counter.get_total_flops()) - before
            own[path] = own.get(path, 0) + done
            if inside:
                own[inside[-1][0]] = own.get(inside[-1][0], 0) - done

        hooks = [each.register_forward_pre_hook(begin) for each in names]
        hooks += [each.register_forward_hook(end) for each in names]
        try:
            module(*one)
        finally:
            for hook in hooks:
                hook.remove()
    return {path: flops // 2 for path, flops in own.items()}


def parameters(module: nn.Module) -> int:
    """Trainable numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def size_bytes(module: nn.Module) -> int:
    """At most so many bytes has the file of its weights and buffers, in the types that they have."""
    state = {name: value.detach().contiguous().clone() for name, value in module.state_dict().items()}
    return len(safetensors.torch.save(state)) + _META_BYTES
