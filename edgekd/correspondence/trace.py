"""A forward pass, recorded by hooks: which module called which, and what each was given and gave."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.correspondence.inputs import Inputs, unwrapped
from edgekd.correspondence.taps import first_input, first_tensor, inner, tensors
from edgekd.errors import ModelError


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module. Tensors are the first floating ones of what it was given and gave."""

    name: str  # path of the module, "" for the network itself
    count: int  # 1 for the module's first call of the pass
    module: nn.Module
    parent: Call | None
    children: list[Call] = field(default_factory=list)
    given: Tensor | None = None
    gave: Tensor | None = None
    given_ragged: bool = False
    gave_ragged: bool = False
    bare: bool = False  # it gave the tensor itself, not a tuple or mapping that holds it
    self_attention: bool = False  # queries, keys and values come from one tensor
    versions: tuple[int, int] = (0, 0)  # of `given` and `gave`, when the hook saw them
    before: float = 0.0  # part of the pass's multiply-accumulates that was done when the call began, and ended
    after: float = 0.0

    @property
    def key(self) -> tuple[str, int]:
        """What names the call in another pass of the network."""
        return self.name, self.count

    @property
    def gave_changed(self) -> bool:
        """The network changed what was given back, in place, after the call."""
        return self.gave is not None and not self.gave_ragged and self.gave._version != self.versions[1]

    @property
    def given_changed(self) -> bool:
        """The network changed what the call was given, in place, after the call began."""
        return self.given is not None and not self.given_ragged and self.given._version != self.versions[0]


@dataclass(frozen=True, slots=True)
class Trace:
    """The calls of a pass in the order in which they ended; the last one is the network's own."""

    calls: tuple[Call, ...]
    outputs: tuple[Tensor, ...] = ()  # all that the network gave
    problem: Exception | None = None  # what stopped the pass

    @property
    def root(self) -> Call:
        """The call of the network."""
        return self.calls[-1]


@contextlib.contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which nothing is left changed: modes, buffers and random states come back."""
    modes = {module: module.training for module in network.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in network.buffers()]
    devices = sorted({p.device.index or 0 for p in network.parameters() if p.device.type == "cuda"})
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    try:
        network.eval()
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def trace(network: nn.Module, inputs: Inputs, *, partial: bool = False) -> Trace:
    """Run the network once, without gradients, and record its calls.

    Args:
        network: as given by the user; its own wrappers are called too, what is recorded is the network inside.
        inputs: a few samples: every tensor is kept until the trace is dropped.
        partial: return what was recorded before the pass failed, instead of raising.

    Raises:
        ModelError: the network fails, or its own module was not called.
    """
    recorder = _Recorder(inputs.samples)
    problem: Exception | None = None
    output: object = None
    with undisturbed(network):
        recorder.listen(inner(network))
        try:
            with torch.no_grad():
                output = unwrapped(network)(*inputs.args, **inputs.kwargs)
        except Exception as failed:  # a user's forward may raise anything
            problem = failed
        finally:
            recorder.close()
    if problem is None and not recorder.ended:
        problem = RuntimeError("its forward was not called as a module")
    if problem is not None and not partial:
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in inputs.tensors())
        raise ModelError(
            f"the network fails on the probe ({shapes}): {problem}", where=type(inner(network)).__name__
        ) from problem
    total = recorder.done or 1.0
    for call in recorder.ended:
        call.before, call.after = call.before / total, call.after / total
    return Trace(tuple(recorder.ended), tuple(tensors(output)), problem)


class _Recorder:
    def __init__(self, samples: int) -> None:
        self.ended: list[Call] = []
        self.done = 0.0
        self._samples = samples
        self._open: list[Call] = []
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []

    def listen(self, root: nn.Module) -> None:
        for name, module in root.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._open.clear()

    def _before(self, name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._counts[name] = self._counts.get(name, 0) + 1
            call = Call(name, self._counts[name], module, self._open[-1] if self._open else None)
            call.before = self.done
            call.given, call.given_ragged = first_input(args, kwargs)
            if isinstance(module, nn.MultiheadAttention):
                of = [*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs)]
                call.self_attention = len(of) > 2 and of[0] is of[1] is of[2] and module.in_proj_weight is not None
            if call.given is not None:
                call.versions = (call.given._version, 0)
            if call.parent is not None:
                call.parent.children.append(call)
            self._open.append(call)

        return before

    def _after(self, module: nn.Module, _args: object, output: object) -> None:
        call = self._open.pop()
        while call.module is not module:  # a call inside failed, and the network went on
            call = self._open.pop()
        call.gave, call.gave_ragged = first_tensor(output)
        call.bare = call.gave is output
        if call.gave is not None:
            call.versions = (call.versions[0], call.gave._version)
            self.done += _macs(call, self._samples)
        call.after = self.done
        self.ended.append(call)


def _macs(call: Call, samples: int) -> float:
    """Multiply-accumulates of the call itself, for one sample: the elements of its weights × positions of its output.

    That is exact for convolutions, linear and recurrent layers. Where a module calls none inside, the weights of all
    modules in it are its own (`torch.nn.MultiheadAttention`). A look-up in a table of embeddings is no work.
    """
    assert call.gave is not None
    parameters = call.module.parameters(recurse=not call.children)
    weights = [p for p in parameters if p.ndim >= 2 and not isinstance(call.module, (nn.Embedding, nn.EmbeddingBag))]
    channels = call.gave.shape[1 if any(weight.ndim > 2 for weight in weights) else -1]
    return sum(weight.numel() for weight in weights) * call.gave.numel() / (samples * max(1, channels))
