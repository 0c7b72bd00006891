"""A PyTorch module becomes an exported program, an exported program becomes an ONNX model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import DataError, ModelError
from edgekd.graph.gelu import gelus
from edgekd.types import Arrays, TensorSpec

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from edgekd.models.network import Network

LOWEST_EXPORTED_OPSET = 18  # torch.onnx writes no less; graph/opset.py goes further down


@dataclass(frozen=True)
class Program:
    """An exported program with the shapes it was captured for; `why_static` is None where the batch is symbolic."""

    exported: ExportedProgram
    args: tuple[Tensor, ...]
    inputs: tuple[TensorSpec, ...]
    dynamic_shapes: Any
    why_static: str | None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters: their warnings, log lines and prints name their own internals, not the user's model."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def reason(error: BaseException) -> str:
    """The innermost cause of an exporter's error as one line of at most 300 characters."""
    seen: BaseException = error
    while seen.__cause__ is not None:
        seen = seen.__cause__
    lines = [line.strip() for line in str(seen).splitlines() if line.strip()]
    text = lines[0] if lines else type(seen).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def graph_inputs(
    network: Network, samples: Arrays, *, preprocessing: bool
) -> tuple[tuple[Tensor, ...], tuple[TensorSpec, ...]]:
    """Tensors and specs of what the graph of `network` takes: samples as stored, or as its module sees them.

    Raises:
        DataError: an input of the network is not among the samples.
    """
    import torch

    missing = [spec.name for spec in network.inputs if spec.name not in samples]
    if missing:
        raise DataError(f"the samples have no input named {', '.join(missing)}", expected=", ".join(samples))
    stored = tuple(torch.from_numpy(np.array(samples[spec.name], order="C")) for spec in network.inputs)
    if preprocessing:
        return stored, tuple(network.inputs)
    with torch.no_grad():
        prepared = tuple(network.prepare(*stored))
    specs = []
    for spec, before, after in zip(network.inputs, stored, prepared, strict=True):
        same = before.shape == after.shape
        shape = spec.shape if same else (spec.shape[0], *(int(d) for d in after.shape[1:]))
        specs.append(TensorSpec(spec.name, str(after.dtype).removeprefix("torch."), shape))
    return prepared, tuple(specs)


def capture(network: Network, args: Sequence[Tensor], inputs: Sequence[TensorSpec], *, preprocessing: bool) -> Program:
    """Trace `network` in evaluation mode; every string in the shapes of `inputs` becomes a symbolic dimension.

    Args:
        network: with its preprocessing, or only its module.
        args: samples as `graph_inputs` gives them, with their specs `inputs`.

    Where the model cannot be traced with symbolic dimensions, it is traced for a batch of one and `why_static` says so.

    Raises:
        ModelError: the model cannot be traced at all, or does not return one tensor.
    """
    import torch

    from edgekd.graph.plain import plain

    network.eval()
    dims = {d: torch.export.Dim(d) for spec in inputs for d in spec.shape if isinstance(d, str)}
    shapes = (tuple({k: dims[d] for k, d in enumerate(s.shape) if isinstance(d, str)} for s in inputs),)
    pair = tuple(_rows(arg, 2) for arg in args)  # a batch of one would be taken for a constant
    entry = _entry(network.module, network.prepare if preprocessing else None)
    why_static = None
    with quiet(), torch.no_grad():
        try:
            exported = torch.export.export(entry, pair, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # any exception of the user's own forward
            why_static = reason(error)
    if why_static is None:
        program = Program(exported, pair, tuple(inputs), shapes, None)
    else:
        program = _capture_static(entry, args, inputs, why_static)
    plain(program.exported)
    outputs = program.exported.graph_signature.user_outputs
    if len(outputs) != 1 or not isinstance(outputs[0], str):
        raise ModelError(
            f"the model returns {len(outputs)} values",
            where=type(network.module).__name__,
            expected="one tensor of logits, batch × classes",
            fix="wrap the model in a module whose forward returns its logits",
        )
    return program


def recapture(module: nn.Module, program: Program) -> Program:
    """Trace a rewritten module under the shapes of the program it came from."""
    import torch

    with quiet(), torch.no_grad():
        exported = torch.export.export(
            _entry(module), program.args, dynamic_shapes=program.dynamic_shapes, strict=False
        )
    return Program(exported, program.args, program.inputs, program.dynamic_shapes, program.why_static)


def to_onnx(program: Program, opset: int) -> onnx.ModelProto:
    """The program as ONNX with its weights inside, inputs named as the specs say, and the output named logits.

    The opset is `opset`, or the lowest the exporter writes where that is higher.

    Raises:
        ModelError: the exporter has no ONNX form for one of the operators.
    """
    import torch

    wanted = max(opset, LOWEST_EXPORTED_OPSET)
    try:
        with quiet(), torch.no_grad():
            written = torch.onnx.export(
                program.exported,
                (),
                dynamo=True,
                opset_version=wanted,
                external_data=False,
                verbose=False,
                optimize=True,
                input_names=[spec.name for spec in program.inputs],
                output_names=["logits"],
            )
    except Exception as error:  # the exporter wraps whatever an operator's translation raised
        raise ModelError(
            f"the model cannot be written as ONNX: {reason(error)}",
            expected="operators that ONNX knows",
            fix="replace that operation in the model's forward by one that torch.onnx can export",
        ) from error
    assert written is not None
    model: onnx.ModelProto = gelus(written.model_proto)
    _name_dimensions(model, program.inputs)
    return model


def _capture_static(entry: nn.Module, args: Sequence[Tensor], inputs: Sequence[TensorSpec], why_static: str) -> Program:
    import torch

    one = tuple(_rows(arg, 1) for arg in args)
    fixed = tuple(TensorSpec(s.name, s.dtype, tuple(a.shape)) for s, a in zip(inputs, one, strict=True))
    try:
        with quiet(), torch.no_grad():
            exported = torch.export.export(entry, one, strict=False)
    except Exception as error:  # any exception of the user's own forward
        raise ModelError(
            f"the model cannot be traced by torch.export: {reason(error)}",
            expected="a forward without control flow that depends on values",
            fix="try torch.export.export(model, example_inputs) to see the full trace",
        ) from error
    return Program(exported, one, fixed, None, why_static)


def _entry(module: nn.Module, prepare: Callable[..., tuple[Tensor, ...]] | None = None) -> nn.Module:
    """The module behind one variadic forward, whatever the names of its own parameters are.

    What it reads is contiguous: of a transposed image the exporter would trace how each pool strides over it.
    """
    from torch import nn
    from torch.utils import _pytree as pytree

    class Entry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs: Tensor) -> Any:
            prepared = inputs if prepare is None else prepare(*inputs)
            found = self.inner(*(value.contiguous() for value in prepared))
            leaves = pytree.tree_leaves(found)  # one tensor may stand in a tuple or under a name
            return leaves[0] if len(leaves) == 1 else found

    return Entry()


def _rows(array: Tensor, count: int) -> Tensor:
    repeated = array[:count]
    while len(repeated) < count:
        repeated = repeated.new_empty((count, *array.shape[1:])).copy_(array[:1].expand(count, *array.shape[1:]))
    return repeated.contiguous()


def _name_dimensions(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Give symbolic dimensions the names of the specs; the exporter numbers them."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.input, inputs, strict=True):
        for dim, wanted in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if dim.dim_param and isinstance(wanted, str):
                names[dim.dim_param] = wanted
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
