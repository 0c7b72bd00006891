"""Taps: tensors taken from inside a network while it runs, by hooks that are gone afterwards."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from typing_extensions import Self

from edgekd.errors import ModelError, nearest
from edgekd.models.network import Network

Kind: TypeAlias = Literal["stage", "block", "penultimate", "relations", "other"]
# Modules that only pass a call on to the network inside them.
_WRAPPERS = (Network, DistributedDataParallel, DataParallel)


@dataclass(frozen=True, slots=True)
class Tap:
    """A place in a network whose tensor is taken, and how to read that tensor.

    Args:
        path: of the module, relative to the network that the user wrote: "layer3" its output, "layer3:in" its first
            input, "encoder#2" its second call of a pass, "block.attention:qkv" the queries, keys and values of a
            `torch.nn.MultiheadAttention`; "a.q+a.k+a.v" several, their channels concatenated.
        layout: a letter a dimension of the tensor as `Taps.take` gives it: B batch (always first), C channels,
            the others positions: "BCHW", "BHWC", "BNC", "BCN", "BC".
        shape: of the probe's tensor in that order, -1 for the batch.
        channels: size of C.
        depth: part of the network's multiply-accumulates that are done when the tensor is there, in [0, 1].
        stride: positions of the input for one of the tensor, along a side; None for a vector.
        kind: what it was found as.
        grid: positions along each side, without the prefix; () for a vector.
        prefix: tokens before the grid: class, distillation and register tokens.
        batch: the dimension of the batch in what the module gives.
        cloned: the network changes the tensor in place afterwards, so that a copy is taken.
        ragged: the module gives only as many positions as the batch's longest sequence has.
    """

    path: str
    layout: str
    shape: tuple[int, ...]
    channels: int
    depth: float
    stride: float | None
    kind: Kind = "other"
    grid: tuple[int, ...] = ()
    prefix: int = 0
    batch: int = 0
    cloned: bool = False
    ragged: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """One piece of a path: a module, which of its calls (0: its only one), and what of it is taken."""

    module: str
    call: int
    what: str  # "out", "in" or "qkv"

    def __str__(self) -> str:
        return self.module + (f"#{self.call}" if self.call else "") + (f":{self.what}" if self.what != "out" else "")


def places(path: str) -> list[Place]:
    """The pieces of a path, in the order in which their channels are concatenated."""
    found = []
    for piece in path.split("+"):
        match = re.fullmatch(r"(.*?)(?:#(\d+))?(?::(in|qkv))?", piece)
        assert match is not None  # every part is optional
        found.append(Place(match[1], int(match[2] or 0), match[3] or "out"))
    return found


def inner(network: nn.Module) -> nn.Module:
    """The network that the user wrote: without preprocessing, without what distributes or compiles it."""
    while True:
        if isinstance(network, _WRAPPERS):
            network = network.module
        elif isinstance(compiled := getattr(network, "_orig_mod", None), nn.Module):  # of torch.compile
            network = compiled
        else:
            return network


def first_tensor(value: object) -> tuple[Tensor | None, bool]:
    """The first floating tensor of two dimensions or more in what a module gave, and whether it is ragged.

    Looked for in tuples, lists, mappings and dataclasses: the output of an LSTM, the last hidden state of a
    transformer. Packed and nested sequences are padded to batch × positions × channels.
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            return value.to_padded_tensor(0.0), True
        return (value, False) if value.is_floating_point() and value.ndim >= 2 else (None, False)
    if isinstance(value, PackedSequence):
        return pad_packed_sequence(value, batch_first=True)[0], True
    for item in _items(value):
        found = first_tensor(item)
        if found[0] is not None:
            return found
    return None, False


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in what a module gave."""
    if isinstance(value, Tensor):
        yield value
    for item in _items(value):
        yield from tensors(item)


def _items(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return value if isinstance(value, (tuple, list)) else ()


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, bool]:
    """The first floating tensor among the arguments of a call, and whether it is ragged."""
    found = first_tensor(args)
    return found if found[0] is not None else first_tensor(dict(kwargs))


def projected(attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Queries, keys and values of self-attention, their channels concatenated, as the module computes them inside."""
    given, _ = first_input(args, kwargs)
    assert given is not None
    return first_tensor(linear(given, attention.in_proj_weight, attention.in_proj_bias))[0]  # type: ignore[return-value]


class Taps:
    """Hooks that keep the tensors of some taps from each forward pass until they are taken.

    They sit on the modules inside, so that a distributed or compiled wrapper may be called, with gradients (a student)
    or without (a teacher). A pass forgets what the pass before it left. What is taken keeps its graph, as the output
    does. Use it in a `with`, or close it: no hook stays.

    Args:
        network: a module, a Network, or one of them distributed or compiled.
        taps: what to take; a path is taken once, however often it is named.

    Raises:
        ModelError: a path names no module of the network.
    """

    def __init__(self, network: nn.Module, taps: Iterable[Tap]) -> None:
        self._taps = {tap.path: tap for tap in taps}
        self._kept: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._handles: list[Any] = []
        self._open = False  # between the start of a pass and `take`: a recomputation in backward keeps nothing
        root = inner(network)
        modules = dict(root.named_modules(remove_duplicate=False))
        try:
            self._handles.append(root.register_forward_pre_hook(self._begin))
            for tap in self._taps.values():
                for place in places(tap.path):
                    self._listen(modules, place, tap)
        except BaseException:
            self.close()
            raise

    def take(self) -> dict[str, Tensor]:
        """The tensors of the last pass by path, batch first; they are given once and then forgotten.

        Raises:
            ModelError: a module of a tap did not run, or gave no tensor.
        """
        kept, self._kept, self._open = self._kept, {}, False
        taken = {}
        for path, tap in self._taps.items():
            pieces = [str(place) for place in places(path)]
            missing = [piece for piece in pieces if piece not in kept]
            if missing:
                raise ModelError(f"'{missing[0]}' gave no tensor in the last forward pass", fix="run the network first")
            tensors = [kept[piece].movedim(tap.batch, 0) for piece in pieces]
            taken[path] = tensors[0] if len(tensors) == 1 else torch.cat(tensors, tap.layout.index("C"))
        return taken

    def close(self) -> None:
        """Remove every hook and forget what was kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, _module: nn.Module, _args: object) -> None:
        self._kept.clear()
        self._calls.clear()
        self._open = True

    def _listen(self, modules: Mapping[str, nn.Module], place: Place, tap: Tap) -> None:
        module = modules.get(place.module)
        if module is None:
            raise unknown(place.module, modules)
        keep = self._keep(place, tap.cloned)
        if place.what == "out":
            handle = module.register_forward_hook(lambda _m, _args, output: keep(lambda: first_tensor(output)[0]))
        elif place.what == "in":
            handle = module.register_forward_pre_hook(
                lambda _m, args, kwargs: keep(lambda: first_input(args, kwargs)[0]), with_kwargs=True
            )
        elif isinstance(module, nn.MultiheadAttention):
            attention = module
            handle = module.register_forward_pre_hook(
                lambda _m, args, kwargs: keep(lambda: projected(attention, args, kwargs)), with_kwargs=True
            )
        else:
            raise ModelError(f"it is a {type(module).__name__}", where=str(place), expected="nn.MultiheadAttention")
        self._handles.append(handle)

    def _keep(self, place: Place, cloned: bool) -> Callable[[Callable[[], Tensor | None]], None]:
        name = str(place)

        def keep(tensor: Callable[[], Tensor | None]) -> None:
            if not self._open:
                return
            if place.call:  # counted only where it matters
                self._calls[name] = self._calls.get(name, 0) + 1
                if self._calls[name] != place.call:
                    return
            found = tensor()
            if found is not None:
                self._kept[name] = found.clone() if cloned else found

        return keep


def unknown(path: str, choices: Iterable[str]) -> ModelError:
    """The error for a path that leads nowhere."""
    return ModelError(f"the network has no module '{path}'", nearest=nearest(path, [c for c in choices if c]))
