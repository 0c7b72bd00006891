"""Which channels can only be cut together: torch-pruning's dependency graph, believed only where a trial confirms it.

The graph comes from one run of the network; what it does not know it takes for element-wise. So every group is tried:
the network with some of its channels cut must compute what it computes with those channels zero and read by nobody.

Reference: Fang, Ma, Song, Mi, Wang: DepGraph: Towards Any Structural Pruning, CVPR 2023.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from edgekd.correspondence.taps import tensors
from edgekd.errors import ModelError, RecipeError, nearest
from edgekd.outcome import LeftAlone
from edgekd.pruning.cut import NORMS, Group, Plan, Slot, cut, depthwise, masked
from edgekd.pruning.heads import attentions

Inputs: TypeAlias = "tuple[Tensor, ...]"
TOLERANCE = 1e-3  # of the largest output: float32 sums in another order

OUTPUT = "it gives the output"
IGNORED = "asked to be left alone"
SHARED = "its weights are used in several places"
FAILS = "the network does not run without some of its channels"
UNFOLLOWED = (
    "the network runs, but torch-pruning cannot follow it, so it cannot be pruned: distil it into a student of its "
    'own, [student] model = "…", instead of "pruned"'
)
UNTRACED = "torch-pruning cannot follow its channels"
UNLIKE = "cut, the network does not compute what it does with these channels zero: their way was not understood"
UNTRIED = "with some of these channels zero the network gives values that are not finite, which tell nothing"


@dataclass(frozen=True, slots=True)
class Traced:
    """What can be cut, what is left alone and why."""

    groups: tuple[Group, ...]
    views: Mapping[Group, Any]  # of each group what torch-pruning's importance looks at
    left_alone: tuple[LeftAlone, ...]


class _Refused(Exception):
    """A group is left alone."""


def trace(module: nn.Module, inputs: Inputs, ignore: Collection[str] = ()) -> Traced:
    """Find the groups of channels of a module in eval mode whose parameters want gradients.

    Args:
        inputs: as the module takes them, batch first.
        ignore: paths of modules of which neither side is touched.

    Raises:
        ModelError: the module cannot be traced, or nothing in it can be cut.
        RecipeError: there is no module of an ignored path.
    """
    import torch_pruning

    paths = dict(module.named_modules())
    for path in ignore:
        if path not in paths:
            raise RecipeError(f"the network has no module '{path}'", where="prune.ignore", nearest=nearest(path, paths))
    graph = torch_pruning.DependencyGraph()
    untouched = copy.deepcopy(module)  # a forward under autograd may leave tensors behind that cannot be copied
    recorded: list[bool] = []  # of each output, once the network has run

    def forward(net: nn.Module, given: Inputs) -> list[Tensor]:
        outputs = [*tensors(net(*given))]
        recorded.extend(each.requires_grad for each in outputs)
        return outputs

    try:
        with torch.enable_grad(), _quiet():
            graph.build_dependency(module, inputs, forward_fn=forward, verbose=False)
    except Exception as problem:  # it runs the user's network and walks whatever autograd recorded of it
        raise ModelError(
            f"torch-pruning cannot trace it: {problem}", where=type(module).__name__,
            fix=UNFOLLOWED if any(recorded) else "a forward that runs under autograd and returns tensors can be traced",
        ) from problem  # fmt: skip
    reader = _Reader(graph, module, ignore)
    found, refused = dict(reader.groups()), list(reader.refused)
    for group, reason in _tried(untouched, inputs, tuple(found)).items():
        refused.append(LeftAlone(_layers(module, group), reason))
        del found[group]
    order = {path: at for at, path in enumerate(paths)}
    groups = sorted(found, key=lambda group: order.get(group.name, 0))
    return Traced(tuple(groups), found, tuple(merged(refused)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Of graphs as deep as a recurrence is long torch-pruning warns, thousands of times; groups are tried anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Maximum recursive depth")
        yield


def merged(found: Sequence[LeftAlone]) -> Iterator[LeftAlone]:
    """One entry a reason."""
    for reason in dict.fromkeys(each.reason for each in found):
        layers = [layer for each in found if each.reason == reason for layer in each.layers]
        yield LeftAlone(tuple(dict.fromkeys(layers)), reason)


def _layers(module: nn.Module, group: Group) -> tuple[str, ...]:
    """The layers that make the channels of a group."""
    made = [slot.path for slot in group.slots if slot.side == "out" and slot.dim is None]
    return tuple(path for path in made if isinstance(module.get_submodule(path), (_ConvNd, nn.Linear, nn.Embedding)))


class _Reader:
    """Turns torch-pruning's groups into ours."""

    def __init__(self, graph: Any, module: nn.Module, ignore: Collection[str]) -> None:
        self.graph, self.module = graph, module
        self.names = {each: path for path, each in module.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in module.named_parameters()}
        self.ignore = tuple(ignore)
        self.attentions = list(attentions(module))
        self.in_attention = {path for each in self.attentions for path in each.made_by}
        self.refused: list[LeftAlone] = []
        times: dict[int, int] = {}
        for _, parameter in module.named_parameters(remove_duplicate=False):
            times[id(parameter)] = times.get(id(parameter), 0) + 1
        self.shared = {key for key, count in times.items() if count > 1}

    def groups(self) -> Iterator[tuple[Group, Any]]:
        """Every group with its view for importance; those that are left alone are in `refused` afterwards."""
        seen: set[nn.Module] = set()
        for layer in list(self.graph.module2node):
            if not isinstance(layer, (_ConvNd, nn.Linear)) or layer in seen or layer not in self.names:
                continue
            if depthwise(layer):
                continue  # its channels are made by the layer before it
            made = {layer}
            try:
                traced = self._whole(layer)
                made |= {item.dep.target.module for item in traced if self._side(item.dep) == "out"}
                seen |= made
                if self.names[layer] in self.in_attention:
                    continue  # told with its attention
                yield self._group(layer, traced), traced
            except _Refused as why:
                self.refused.append(LeftAlone(tuple(self._named(made)), str(why)))
        whole = [path for each, path in self.names.items() if isinstance(each, _ONE_WIDTH)]
        self.refused += [LeftAlone((path,), _of_one_width(self.module.get_submodule(path))) for path in whole]
        for each in self.attentions:
            try:
                for slot in each.group.slots:
                    self._check(slot.path)
                yield each.group, _View(self._items(each.group))
            except _Refused as why:
                self.refused.append(LeftAlone(each.made_by, str(why)))

    def _whole(self, layer: nn.Module) -> Any:
        pruner = self.graph.get_pruner_of_module(layer)
        try:
            with _quiet():
                return self.graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(_made(layer))))
        except Exception as problem:  # an operator of which the graph has no idea may break it anywhere
            raise _Refused(f"{UNTRACED} ({type(problem).__name__}: {problem})") from problem

    def _side(self, dep: Any) -> str:
        alone = self.graph.is_in_channel_pruning_fn(dep.handler)
        return "in" if alone and not self.graph.is_out_channel_pruning_fn(dep.handler) else "out"

    def _group(self, layer: nn.Module, traced: Any) -> Group:
        import torch_pruning

        channels = _made(layer)
        coupled = 1
        for item in traced:
            target = item.dep.target
            if target.type == torch_pruning.ops.OPTYPE.OUTPUT:
                raise _Refused(OUTPUT)
            coupled = max(coupled, _parts(target.module, self._side(item.dep)))
        units = channels // coupled
        if channels % coupled:
            raise _Refused(f"its {channels} channels are not {coupled} equal parts, as a layer behind it wants")
        slots: dict[tuple[str, str], Slot] = {}
        for item in traced:
            slot = self._slot(item, units)
            if slot is not None:
                slots[slot.path, slot.side] = slot
        for slot in slots.values():
            self._check(slot.path)
        makers = [s.path for s in slots.values() if s.side == "out" and s.dim is None and s.size == channels]
        named = [path for path in self.names.values() if path in makers and self._makes(path)]  # in their order
        return Group(named[0], units, coupled, tuple(slots.values()))

    def _named(self, made: Collection[nn.Module]) -> Iterator[str]:
        """The paths of those that make channels, in their order."""
        return (path for each, path in self.names.items() if each in made and self._makes(path))

    def _makes(self, path: str) -> bool:
        layer = self.module.get_submodule(path)
        return isinstance(layer, (_ConvNd, nn.Linear)) and not depthwise(layer)

    def _slot(self, item: Any, units: int) -> Slot | None:
        target = item.dep.target.module
        of_parameter = isinstance(target, nn.Parameter)
        path = self.parameters.get(id(target)) if of_parameter else self.names.get(target)
        if path is None:
            return None  # an operator without weights
        index: list[set[int]] = [set() for _ in range(units)]
        for position, root in zip(item.idxs, item.root_idxs, strict=True):
            if root is None:
                raise _Refused(UNTRACED)
            index[root % units].add(position)
        dim = item.dep.target.pruning_dim if of_parameter else None
        side = "in" if not of_parameter and self._side(item.dep) == "in" and not _alone(target) else "out"
        return Slot(path, side, tuple(tuple(sorted(own)) for own in index), dim)  # type: ignore[arg-type]

    def _check(self, path: str) -> None:
        if any(path == ignored or path.startswith(f"{ignored}.") for ignored in self.ignore):
            raise _Refused(IGNORED)
        owner = self.module.get_submodule(path) if path in self.names.values() else None
        weights = [*owner.parameters(recurse=False)] if owner is not None else [self.module.get_parameter(path)]
        if not self.shared.isdisjoint(map(id, weights)):
            raise _Refused(SHARED)
        if isinstance(owner, _ONE_WIDTH):
            raise _Refused(_of_one_width(owner))

    def _items(self, group: Group) -> Iterator[_Item]:
        from torch_pruning.pruner import function

        ends = {"out": function.prune_linear_out_channels, "in": function.prune_linear_in_channels}
        for slot in group.slots:
            both = [(at, unit) for unit, own in enumerate(slot.index) for at in own]
            dep = _Dep(self.module.get_submodule(slot.path), ends[slot.side])
            yield _Item(dep, [at for at, _ in both], [unit for _, unit in both])


@dataclass(frozen=True, slots=True)
class _Dep:
    layer: nn.Module
    pruning_fn: Any


@dataclass(frozen=True, slots=True)
class _Item:
    """A dependency, its positions and the unit of each, as torch-pruning's importance reads them."""

    dep: _Dep
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))


class _View(list[_Item]):
    """A group that torch-pruning did not make, in the form of one that it did."""


_ONE_WIDTH = (nn.RNNBase, nn.MultiheadAttention)


def _of_one_width(layer: nn.Module) -> str:
    return f"a torch.nn.{type(layer).__name__} has the same width everywhere, inside and out"


def _made(layer: nn.Module) -> int:
    return int(layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features)  # type: ignore[arg-type]


def _alone(layer: nn.Module) -> bool:
    """Each channel goes through by itself: what comes in is what goes out."""
    return isinstance(layer, (*NORMS, nn.PReLU, nn.Embedding)) or depthwise(layer)


def _parts(layer: object, side: str) -> int:
    """Into how many equal parts a layer divides its channels, of which the same ones have to stay."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    return layer.groups if isinstance(layer, _ConvNd) and not depthwise(layer) else 1


# ---------------------------------------------------------------- the trial


def _tried(module: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> dict[Group, str]:
    """Why each of the groups that fail their trial cannot be cut: all at once, and one by one where that fails."""
    narrow = {group: "it has one channel" for group in groups if group.units < 2}
    rest = [group for group in groups if group not in narrow]
    module = _varied(module)
    expected = run(module, inputs)
    if not expected:
        raise ModelError(
            "it returns no floating tensors, so that no cut can be tried", where=type(module).__name__,
            expected="tensors, alone or in tuples, lists, mappings and dataclasses",
        )  # fmt: skip
    if not rest or _trial(module, inputs, expected, rest) is None:
        return narrow
    alone = {group: _trial(module, inputs, expected, [group]) for group in rest}
    failed = {group: why for group, why in alone.items() if why is not None}
    sound = [group for group in rest if group not in failed]
    if sound and failed and (why := _trial(module, inputs, expected, sound)) is not None:
        raise ModelError(f"its channels can be cut one group at a time, but not together: {why}")
    return narrow | failed


def _varied(module: nn.Module) -> nn.Module:
    """A copy in which no parameter is the same everywhere: a scale of zero would hide what stands before it."""
    copied = copy.deepcopy(module)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(torch.rand(parameter.shape, generator=random) + 0.5)
    return copied


def _trial(module: nn.Module, inputs: Inputs, expected: Sequence[Tensor], groups: Sequence[Group]) -> str | None:
    """Half of the units kept must mean the same as half of them zero; the first or the last one alone must run."""
    half: Plan = {group: [unit for unit in range(group.units) if unit % 2 == 0] for group in groups}
    first: Plan = {group: [0] for group in groups}
    last: Plan = {group: [group.units - 1] for group in groups}
    try:
        found, wanted = run(_cut_to(module, half), inputs), run(masked(module, half), inputs)
        for before, mine, theirs in zip(expected, found, wanted, strict=True):
            if mine.shape != before.shape:
                return OUTPUT
            if not bool(theirs.isfinite().all()):
                return UNTRIED
            difference = float((mine - theirs).abs().max())
            if not difference <= TOLERANCE * max(float(theirs.abs().max()), 1e-6):  # that of a NaN is none
                return UNLIKE
        for plan in (first, last):
            run(_cut_to(module, plan), inputs)
    except Exception as problem:  # whatever the user's forward raises on other shapes
        what = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        return f"{FAILS}: {what}"
    return None


def _cut_to(module: nn.Module, plan: Plan) -> nn.Module:
    changed = copy.deepcopy(module)
    cut(changed, plan)
    return changed


def run(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating tensors that a module in eval mode returns, however deep; empty ones tell nothing."""
    with torch.no_grad():
        output = module(*inputs)
    return [each.float() for each in tensors(output) if each.is_floating_point() and each.numel()]
