"""Weights from and to files: safetensors, and torch checkpoints read without running the code in them."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn

from edgekd.errors import EdgekdError, ModelError, StoreError, nearest

# Where training loops put the state; the first that is there is taken.
_NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "ema", "model_ema", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # left by DataParallel, torch.compile and wrapping modules
_META = "edgekd"  # one entry holds all: safetensors writes several in no fixed order
_NAMED = 3  # keys an account lists before it only counts


VERSION = 1  # of what loading does to a checkpoint


def load(path: str | Path, module: nn.Module) -> None:
    """Fills `module` with the weights in a file, all of them or none.

    The file is safetensors or a torch checkpoint; a state nested in a dictionary is found, and the prefixes
    `module.`, `_orig_mod.` and `model.` are dropped where that makes keys fit. Counters of batch normalisation
    (`num_batches_tracked`) may be absent.

    Raises:
        ModelError: no such file, not weights, code in it, NaN or infinite values, or keys and shapes that do not fit.
    """
    state = _fitted(read(path), module)
    own = module.state_dict()
    missing, unexpected, mismatched = _differences(state, own)
    if missing or unexpected or mismatched:
        raise _misfit(state, own, missing, unexpected, mismatched, Path(path), type(module).__name__)
    _check_finite(state, path)
    module.load_state_dict(state, strict=False)


def load_pretrained(path: str | Path, module: nn.Module) -> None:
    """Fills `module` with weights trained for other classes or channels, as a start to train from.

    The classifier (the last layer with a weight) keeps its initial values where the number of classes differs, and
    the weights of the first layer are summed over colours where the data has one channel and they have three.

    Raises:
        ModelError: as for `load`, for every other layer.
    """
    state = _fitted(read(path), module)
    own = module.state_dict()
    weights = [key for key in own if key.endswith(".weight") and own[key].ndim > 1]
    if not weights:
        raise ModelError(f"{type(module).__name__} has no layer to fill", where=str(path))
    first, last = weights[0], weights[-1].removesuffix("weight")
    if first in state and state[first].ndim == 4 and own[first].shape[1] == 1 and state[first].shape[1] == 3:
        state[first] = state[first].sum(1, keepdim=True)
    for key in (last + "weight", last + "bias"):
        if key in own and key in state and own[key].shape[1:] == state[key].shape[1:] != state[key].shape:
            state[key] = own[key] if state[key].shape != own[key].shape else state[key]
    missing, unexpected, mismatched = _differences(state, own)
    if missing or unexpected or mismatched:
        raise _misfit(state, own, missing, unexpected, mismatched, Path(path), type(module).__name__)
    _check_finite(state, path)
    module.load_state_dict(state, strict=False)


def save(path: str | Path, module: nn.Module, meta: Mapping[str, str]) -> None:
    """Writes the module's state as safetensors: equal weights and meta give equal bytes, and never half a file.

    Raises:
        ModelError: a weight is NaN or infinite.
        StoreError: the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in sorted(module.state_dict().items())}
    _check_finite(state, path)
    content = safetensors.save(state, {_META: json.dumps(dict(meta), sort_keys=True)})
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as problem:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"the weights cannot be written: {problem.strerror}", where=str(path)) from problem


def meta(path: str | Path) -> dict[str, str]:
    """What `save` was given beside the weights; empty for a file written by others."""
    try:
        with safe_open(str(path), "pt") as file:
            table: dict[str, str] = json.loads((file.metadata() or {}).get(_META, "{}"))
            return table
    except (SafetensorError, OSError, ValueError) as problem:
        raise ModelError(f"not a safetensors file: {problem}", where=str(path)) from problem


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file, on the CPU, by key. No code in the file is run.

    Raises:
        ModelError: no such file, not weights, or a checkpoint that holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError("no such file", where=str(path), nearest=nearest(path.name, siblings))
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ModelError("a Git LFS pointer, not the weights", where=str(path), fix="fetch it with `git lfs pull`")
    try:
        if head[8:9] == b"{":
            return dict(safetensors.load_file(path))
        if head.startswith((b"PK\x03\x04", b"\x80")):
            with (
                warnings.catch_warnings(),
                torch.serialization.safe_globals([argparse.Namespace]),
            ):  # timm saves its own
                warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read is an error anyway
                return _unwrapped(torch.load(path, map_location="cpu", weights_only=True), path)
    except EdgekdError:
        raise
    except Exception as problem:  # a damaged file fails in any way at all
        named = re.search(r"GLOBAL (\S+)", str(problem)) if isinstance(problem, pickle.UnpicklingError) else None
        if named is None:
            first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
            raise ModelError(f"the weights cannot be read: {first}", where=str(path)) from problem
        raise ModelError(
            f"loading it would run code ({named[1]}), so it was not loaded",
            where=str(path),
            expected="tensors only",
            fix="where you trust it: load it in Python and save model.state_dict() with safetensors",
        ) from problem
    raise ModelError("neither safetensors nor a torch checkpoint", where=str(path))


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        for nest in _NESTS:
            if isinstance(loaded.get(nest), Mapping):
                return _unwrapped(loaded[nest], path)
        state = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
        if state:
            return state
        kind = f"a dictionary of {', '.join(map(str, loaded)) or 'nothing'}"
    else:
        kind = f"a {type(loaded).__name__}"
    raise ModelError(f"it holds {kind}", where=str(path), expected="a state_dict: tensors by name")


def _fitted(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The state with those prefixes dropped, or the one of a wrapper (models/hf.py) added, that make most keys fit."""
    own = module.state_dict().keys()
    best, most = dict(state), len(own & state.keys())
    for depth in (1, 2, 3):
        for prefixes in itertools.product(_PREFIXES, repeat=depth):
            renamed = {_without(key, prefixes): value for key, value in state.items()}
            if len(renamed) == len(state) and len(own & renamed.keys()) > most:
                best, most = renamed, len(own & renamed.keys())
    wrapped = {f"model.{key}": value for key, value in state.items()}
    return wrapped if len(own & wrapped.keys()) > most else best


def _without(key: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        key = key.removeprefix(prefix)
    return key.replace("._orig_mod.", ".")  # of a compiled part inside


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Keys missing, unexpected, and of another shape."""
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    return missing, unexpected, [key for key in own if key in state and state[key].shape != own[key].shape]


def _check_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    wrong = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if wrong:
        raise ModelError(
            f"weights are NaN or infinite: {_listed(wrong)}", where=str(path), fix="use a checkpoint from before that"
        )


def _misfit(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Sequence[str],
    path: Path,
    name: str,
) -> ModelError:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} keys are missing ({_listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unexpected ({_listed(unexpected)})")
    if mismatched:
        shapes = [f"{key} is {_sides(state[key])}, the model's {_sides(own[key])}" for key in mismatched]
        parts.append(f"{len(mismatched)} have another shape ({_listed(shapes)})")
    text = f"the weights do not fit {name}: {'; '.join(parts)}"
    return ModelError(text, where=str(path), fix=_cause(state, own, missing, unexpected, mismatched))


def _cause(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Sequence[str],
) -> str:
    layers = {key.rpartition(".")[0] for key in mismatched}
    rows_only = all(state[key].shape[1:] == own[key].shape[1:] for key in mismatched if own[key].ndim)
    if mismatched and not missing and not unexpected and len(layers) == 1 and rows_only:
        key = mismatched[0]
        return (
            f"it was trained for another number of classes: layer '{layers.pop()}' has {state[key].shape[0]} in the "
            f"file and {own[key].shape[0]} in the model"
        )
    channels = _channels(state, own, mismatched)
    if channels is not None and not missing and not unexpected:
        seen, given = channels
        return (
            f"it was trained on images of {seen} channels, and the model is built for {given}: "
            f"[data] channels = {seen} reads them so"
        )
    if len(missing) > len(own) / 2:
        return "it is most likely of another architecture"
    if missing or unexpected:
        return "it is most likely of the same family with another depth, or with layers added or removed"
    return "it is most likely of the same architecture with other options, such as width or input channels"


def _channels(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], mismatched: Sequence[str]
) -> tuple[int, int] | None:
    """Channels of the images in the file and in the model, where one convolution differs by that alone."""
    if len(mismatched) != 1:
        return None
    one, other = state[mismatched[0]].shape, own[mismatched[0]].shape
    alike = one[:1] + one[2:] == other[:1] + other[2:]
    return (one[1], other[1]) if len(one) == 4 and alike and {one[1], other[1]} == {1, 3} else None


def _sides(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
