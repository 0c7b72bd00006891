"""What a network is called with: samples of a probe, some of them, or with other sides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from edgekd.correspondence.taps import inner
from edgekd.errors import ModelError, nearest
from edgekd.models.network import Network

Probe: TypeAlias = "Tensor | Sequence[Any] | Mapping[str, Any]"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of a forward pass; tensors whose first dimension is the batch hold samples, the rest is passed on."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors among the arguments, in order."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                yield value

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return next(self.tensors()).shape[0]

    @property
    def main(self) -> Tensor:
        """The tensor with the most dimensions: the image, the sequence."""
        return max(self.tensors(), key=lambda tensor: tensor.ndim)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with every tensor changed."""
        return Inputs(
            tuple(change(value) if isinstance(value, Tensor) else value for value in self.args),
            {key: change(value) if isinstance(value, Tensor) else value for key, value in self.kwargs.items()},
        )

    def rows(self, first: int, count: int) -> Inputs:
        """`count` samples from the `first` one on, begun anew where the probe ends."""
        samples = self.samples

        def pick(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != samples:
                return tensor
            return tensor[(first + torch.arange(count, device=tensor.device)) % samples]

        return self.map(pick)

    def resized(self, sides: Mapping[int, int]) -> Inputs:
        """Other sizes of some dimensions of `main`: cut, or begun anew.

        So are tensors that are as long there (a mask), and in proportion those of the same kind (a second sequence).
        """
        main = self.main

        def resize(tensor: Tensor) -> Tensor:
            alike = (tensor.ndim, tensor.dtype) == (main.ndim, main.dtype)
            for dim, size in sides.items():
                if dim < tensor.ndim and (alike or tensor.shape[dim] == main.shape[dim]):
                    before = tensor.shape[dim]
                    after = max(1, round(before * size / main.shape[dim]))
                    tensor = tensor.index_select(dim, torch.arange(after, device=tensor.device) % before)
            return tensor

        return self.map(resize)


def inputs_of(network: nn.Module, probe: Probe) -> Inputs:
    """A probe as arguments of `network`, on its device: a tensor, a tuple, or a mapping by keyword.

    A Network takes a mapping by the names of its inputs.

    Raises:
        ModelError: the probe holds no tensor, or one sample, or not the inputs that the network has.
    """
    if isinstance(probe, Tensor):
        inputs = Inputs((probe,), {})
    elif isinstance(probe, Mapping):
        outer = unwrapped(network)
        if isinstance(outer, Network):
            names = [spec.name for spec in outer.inputs]
            missing = [name for name in names if name not in probe]
            if missing:
                raise ModelError(
                    f"the probe has no input '{missing[0]}'", where="probe", nearest=nearest(missing[0], probe)
                )
            inputs = Inputs(tuple(probe[name] for name in names), {})
        else:
            inputs = Inputs((), dict(probe))
    else:
        inputs = Inputs(tuple(probe), {})
    if not any(tensor.ndim for tensor in inputs.tensors()):
        raise ModelError("the probe holds no tensor", expected="a tensor, a tuple or a mapping of them, batch first")
    if inputs.samples < 2:
        raise ModelError("the probe is one sample", expected="two or more that differ; 256 are a good number")
    parameter = next(inner(network).parameters(), None)
    return inputs if parameter is None else inputs.map(lambda tensor: tensor.to(parameter.device))


def unwrapped(network: nn.Module) -> nn.Module:
    """The network with its preprocessing, without what distributes or compiles it."""
    while not isinstance(network, Network) and (wrapped := inner_once(network)) is not None:
        network = wrapped
    return network


def inner_once(network: nn.Module) -> nn.Module | None:
    """What a wrapper that distributes or compiles holds, or None where the module is none."""
    if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        wrapped: nn.Module = network.module
        return wrapped
    compiled = getattr(network, "_orig_mod", None)
    return compiled if isinstance(compiled, nn.Module) else None


def named(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a call by name: of the Network's inputs, or of the parameters of the module's forward."""
    outer = unwrapped(network)
    if isinstance(outer, Network):
        names = [spec.name for spec in outer.inputs]
    else:
        names = list(inspect.signature(outer.forward).parameters)
    found = {name: value for name, value in zip(names, inputs.args, strict=False) if isinstance(value, Tensor)}
    return found | {name: value for name, value in inputs.kwargs.items() if isinstance(value, Tensor)}


def mask_of(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The positions that are no padding (batch × positions, bool, True: a real one), where an input says so.

    That input is a tensor of batch × positions of zeros and ones whose name ends in `mask` (1: real, as in
    `attention_mask`); in a name that ends in `padding_mask` 1 is padding, as torch has it. Its values are trusted, not
    looked at: a look would make a GPU wait.
    """
    for name, value in inputs.items():
        word = name.lower().rpartition(".")[2]
        if word.endswith("mask") and value.ndim == 2 and not value.is_floating_point():
            return ~value.bool() if word.endswith(("padding_mask", "pad_mask")) else value.bool()
    return None


def attempts(network: nn.Module, main: Tensor) -> list[tuple[dict[int, int], ...]]:
    """Which sides of the main input may be changed, as alternatives of alternatives: dimension → new size.

    Each inner tuple is about the same dimensions, in the order of what is likelier to be taken: an image grows, by
    unlike amounts, so that height and width can be told apart; a sequence is halved, else doubled.
    """
    shape = main.shape
    if main.ndim >= 4:
        height, width = picture_dims(network, main)
        return [({height: shape[height] + 32, width: shape[width] + 64},)]
    return [
        ({dim: max(1, shape[dim] // 2)}, {dim: 2 * shape[dim]})
        for dim in ((1, 2) if main.ndim == 3 else (1,) if main.ndim == 2 else ())
    ]


def picture_dims(network: nn.Module, main: Tensor) -> tuple[int, int]:
    """The dimensions of height and width in an input of four or more."""
    outer = unwrapped(network)
    stored = isinstance(outer, Network) and outer.preprocessing is not None
    channels_last = main.ndim == 4 and main.shape[3] <= 4 < main.shape[1]
    return (1, 2) if stored or channels_last else (main.ndim - 2, main.ndim - 1)
