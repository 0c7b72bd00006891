"""An exported program says the same in fewer ways, all of which the exporter and the quantizer read alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.export import ExportedProgram

aten = torch.ops.aten
_BY_NAME = {  # a convolution whose padding is a word → the one whose padding is numbers
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_FOLDING = {  # layers that take in the batch normalisation behind them
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.linear.default,
}  # fmt: skip


def plain(exported: ExportedProgram) -> None:
    """Rewrite the program in place: the same values, bit for bit but for the order of a product's sums.

    An adaptive pool to 1 × 1 becomes a mean, a convolution with padding="same" or "valid" one with numbers, a product
    with a stored matrix a linear layer; a batch normalisation that must not be folded into the layer before it, since
    that layer's output or weight is read elsewhere too, is set apart from it by a copy.
    """
    for node in list(exported.graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            # the exporter writes its general form, with tables of indices, where height and width are small or differ
            _replace(node, aten.mean.dim, (node.args[0], [-1, -2], True))
        elif node.target in _BY_NAME:
            _padded(node)
        elif node.target in (aten.matmul.default, aten.mm.default, aten.addmm.default):
            _linear(exported, node)
    readers = _readers(exported)
    for node in list(exported.graph_module.graph.nodes):
        if node.target is aten.batch_norm.default and not _folds(node.args[0], readers):
            _set_apart(node)
    exported.graph_module.recompile()


def _replace(node: Any, target: Any, args: tuple[Any, ...]) -> None:
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _padded(node: Any) -> None:
    """Numbers for a word: with "same" all but the last of an odd number of rows is halved, as torch has it."""
    kernel = [int(size) for size in node.args[1].meta["val"].shape[2:]]
    ones = [1] * len(kernel)
    defaults: tuple[Any, ...] = (None, None, None, ones, "valid", ones, 1)
    given = tuple(node.args)
    x, weight, bias, stride, word, dilation, groups = given + defaults[len(given) :]
    whole = [step * (size - 1) if word == "same" else 0 for step, size in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in whole):
        more = [side for total in reversed(whole) for side in (0, total % 2)]
        with node.graph.inserting_before(node):
            wider = node.graph.call_function(aten.constant_pad_nd.default, (x, more, 0.0))
        wider.meta = dict(node.meta) | {"val": aten.constant_pad_nd.default(x.meta["val"], more, 0.0)}
        x = wider
    padding = [total // 2 for total in whole]
    _replace(node, _BY_NAME[node.target], (x, weight, bias, list(stride), padding, list(dilation), groups))


def _linear(exported: ExportedProgram, node: Any) -> None:
    """x · W, with W stored and read nowhere else, becomes the linear layer of W transposed."""
    bias, x, weight = node.args if node.target is aten.addmm.default else (None, *node.args)
    names = exported.graph_signature.inputs_to_parameters
    if node.kwargs or getattr(weight, "name", None) not in names or len(weight.users) != 1:
        return
    if weight.meta["val"].dim() != 2 or x.meta["val"].dim() < 2:
        return
    if bias is not None and (bias.name not in names or bias.meta["val"].dim() != 1):
        return
    stored: Tensor = exported.state_dict[names[weight.name]]
    if _readers(exported)[_key(stored)] != 1:
        return
    exported.state_dict[names[weight.name]] = nn.Parameter(stored.detach().t().contiguous(), requires_grad=False)
    weight.meta["val"] = weight.meta["val"].t().contiguous()
    _replace(node, aten.linear.default, (x, weight) if bias is None else (x, weight, bias))


def _folds(layer: Any, readers: Counter[int]) -> bool:
    """Whether nothing but the batch normalisation behind a layer would notice that it was folded."""
    if getattr(layer, "target", None) not in _FOLDING:
        return True  # nothing is folded into it
    stored: Sequence[Any] = [arg for arg in layer.args[1:3] if arg is not None]
    return len(layer.users) == 1 and all(readers[arg.meta.get("stored", 0)] <= 1 for arg in stored)


def _set_apart(node: Any) -> None:
    layer = node.args[0]
    with node.graph.inserting_before(node):
        copy = node.graph.call_function(aten.clone.default, (layer,))
    copy.meta = dict(layer.meta)
    node.replace_input_with(layer, copy)


def _readers(exported: ExportedProgram) -> Counter[int]:
    """How many nodes read a stored tensor, under whichever of its names; it is noted in its nodes as `stored`."""
    signature, found = exported.graph_signature, Counter[int]()
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in exported.graph_module.graph.nodes:
        if node.op == "placeholder" and names.get(node.name) in exported.state_dict:
            node.meta["stored"] = _key(exported.state_dict[names[node.name]])
            found[node.meta["stored"]] += len(node.users)
    return found


def _key(tensor: Tensor) -> int:
    return tensor.data_ptr()
