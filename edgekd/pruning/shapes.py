"""The structure of a cut network as JSON: how it differs from the architecture it was cut out of."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from edgekd import toml
from edgekd.correspondence.pruned import Kept
from edgekd.errors import ModelError, nearest
from edgekd.models import weights
from edgekd.models.resnet import Block, convolution_shortcuts
from edgekd.store import write_text

Number: TypeAlias = "int | tuple[int, ...]"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Shapes:
    """How a cut network differs from its architecture, and where its weights come from.

    Args:
        numbers: plain numbers of modules that changed: in_channels, groups, normalized_shape, num_heads, by path.
        tensors: shapes of parameters and buffers that changed, by name.
        kept: for each dimension of each parameter that was cut the positions of the original that are left.
        origin: hash of the parameters of the network that it was cut out of.
    """

    numbers: Mapping[str, Mapping[str, Number]]
    tensors: Mapping[str, tuple[int, ...]]
    kept: Kept
    origin: str
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), sort_keys=True) + "\n")


def read(path: Path) -> Shapes:
    """What `Shapes.write` wrote.

    Raises:
        ModelError: no such file, or it is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(f"the shapes cannot be read: {problem}", where=str(path)) from problem
    found: Shapes = toml.read(Shapes, document, str(path), error=ModelError)
    if found.schema != SCHEMA:
        raise ModelError(f"shapes of schema {found.schema}", where=str(path), expected=str(SCHEMA))
    return found


def difference(before: nn.Module, after: nn.Module, kept: Kept, origin: str) -> Shapes:
    """How `after` was cut out of `before`."""
    changed: dict[str, dict[str, Number]] = {}
    inside = dict(after.named_modules())
    for path, module in before.named_modules():
        mine, theirs = _numbers(inside[path]), _numbers(module)
        own = {name: mine[name] for name in mine if mine[name] != theirs.get(name)}
        if own:
            changed[path] = own
    old = before.state_dict()
    tensors = {name: tuple(value.shape) for name, value in after.state_dict().items() if value.shape != old[name].shape}
    return Shapes(changed, tensors, kept, origin)


def apply(module: nn.Module, shapes: Shapes) -> None:
    """Give a freshly built architecture the structure of the network that was cut out of it, in place.

    Its weights are to be loaded afterwards: those of other shapes hold nothing.

    Raises:
        ModelError: it is another architecture.
    """
    inside = dict(module.named_modules())
    for path, numbers in shapes.numbers.items():
        if path not in inside:
            raise ModelError(f"there is no module '{path}' to cut", nearest=nearest(path, inside))
        own = _numbers(inside[path])
        for name, value in numbers.items():
            if type(own.get(name)) is not type(value):
                raise ModelError(f"it has no {type(value).__name__} '{name}'", where=path, nearest=nearest(name, own))
            setattr(inside[path], name, value)
    state = module.state_dict()
    for name, shape in shapes.tensors.items():
        if name not in state or len(shape) != state[name].ndim or any(side < 1 for side in shape):
            raise ModelError(f"there is no '{name}' of {len(shape)} dimensions to cut", nearest=nearest(name, state))
        owner, last = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        empty = torch.zeros(shape, dtype=state[name].dtype, device=state[name].device)
        setattr(owner, last, nn.Parameter(empty) if last in owner._parameters else empty)


def traceable(module: nn.Module) -> nn.Module:
    """A copy that can be cut: padding shortcuts are the convolutions that compute the same (see `models.resnet`)."""
    if any(isinstance(each, Block) for each in module.modules()):
        return convolution_shortcuts(module)
    return copy.deepcopy(module)


def restore(module: nn.Module, shapes: str | Path, state: str | Path) -> nn.Module:
    """A cut network from the architecture that it was cut out of, its shapes and its weights.

        student = restore(build_teacher(), "student.shapes.json", "student.safetensors")

    Raises:
        ModelError: the files are of another architecture, or cannot be read.
    """
    from edgekd.correspondence.pruned import remember

    made = traceable(module)
    found = read(Path(shapes))
    apply(made, found)
    weights.load(state, made)
    remember(made, found.kept, found.origin)
    return made


def _numbers(module: nn.Module) -> dict[str, Number]:
    """Plain attributes that say how large a module is."""
    found: dict[str, Number] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int):
            found[name] = value
        elif isinstance(value, tuple) and value and all(type(side) is int for side in value):
            found[name] = tuple(value)
    return found
