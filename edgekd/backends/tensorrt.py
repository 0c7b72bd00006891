"""NVIDIA TensorRT 8.5 to 11.x: an ONNX file becomes an engine for the GPU at hand, and runs on it.

An engine is never portable: it belongs to one TensorRT version and one GPU. So it is built where it runs; a record
beside it (`<engine>.json`) says for what, and is compared before TensorRT sees the file.

The branches for 8, 10 and 11 are modules of their own (`_tensorrt/build_8.py` and so on), each type-checked against the
real bindings of its version. Not validated: no machine with TensorRT has run this; tests use a fake of the bindings.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.backends._tensorrt import record, trtexec
from edgekd.errors import BackendError
from edgekd.types import Arrays, Backend, Precision, Session, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from edgekd.backends._tensorrt.engine import Engine

Shapes = Mapping[str, "tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]"]


def tensorrt(*, workspace_bytes: int = 1 << 30, max_batch: int = 16) -> Backend:
    """TensorRT on the GPU of this machine.

    Args:
        workspace_bytes: most memory that one kernel may take while the engine is built and run; on a Jetson, where CPU
            and GPU share memory, keep it to a quarter of the RAM.
        max_batch: largest batch that an engine takes at once; it is tuned for a batch of 1. Sessions split larger ones.
    """
    return Backend(
        name="tensorrt",
        available=available,
        compile=partial(_compile, workspace_bytes=workspace_bytes, max_batch=max_batch),
        load=_load,
        engine=_built_for,
    )


def available() -> str | None:
    """None where TensorRT and a GPU can be used here, else the reason why not."""
    try:
        import tensorrt as trt
    except ImportError as problem:
        return f"TensorRT's Python bindings are not on this machine ({problem})"
    try:
        reason = trtexec.unsupported(_version(trt.__version__))
        if reason is None:
            from edgekd.backends._tensorrt.engine import Cuda

            Cuda().close()
    except RuntimeError as problem:
        return str(problem)
    return reason


def _built_for() -> str:
    """What an engine built here is for: it loads on no other version and no other GPU."""
    import tensorrt as trt

    return f"tensorrt {trt.__version__}, sm {_compute_capability()}"


def _compile(source: Path, precision: Precision, folder: Path, *, workspace_bytes: int, max_batch: int) -> Path:
    """Build the engine of an ONNX file; writes it, its record and the timing cache into `folder`.

    Raises:
        BackendError: TensorRT is not here, refuses the model, or the graph is not of that precision.
    """
    reason = available()
    if reason:
        raise BackendError(
            reason, where="tensorrt", fix="bundle verify and the build recipe in the bundle run on the board"
        )
    import tensorrt as trt

    version = _version(trt.__version__)
    shapes = _read_model(source, precision, max_batch, typed=version[0] >= 10)
    folder.mkdir(parents=True, exist_ok=True)
    sm = _compute_capability()
    cache = folder / f"timing.{trt.__version__}.sm{sm}.cache"
    branch = importlib.import_module(f"edgekd.backends._tensorrt.build_{version[0]}")
    try:
        earlier = cache.read_bytes() if cache.is_file() else b""
        plan, timings = branch.build(str(source), precision, shapes, workspace_bytes, earlier)
    except RuntimeError as problem:
        raise BackendError(str(problem), where=str(source)) from problem
    engine = folder / f"{source.stem}.engine"
    engine.write_bytes(plan)
    cache.write_bytes(timings)
    record.write(
        str(engine), tensorrt=trt.__version__, sm=sm, precision=precision, onnx=str(source),
        built_with="python", workspace_bytes=workspace_bytes, shapes=shapes,
    )  # fmt: skip
    return engine


def _load(engine: Path, threads: int) -> Session:
    """Deserialise an engine; `threads` says nothing to a GPU.

    Raises:
        BackendError: TensorRT is not here, or the engine was built for another version or device, or is changed.
    """
    reason = available()
    if reason:
        raise BackendError(reason, where="tensorrt")
    import tensorrt as trt

    from edgekd.backends._tensorrt.engine import Cuda, Engine

    problem = record.mismatch(str(engine), tensorrt=trt.__version__, sm=_compute_capability())
    if problem:
        fix = "engines are not portable: build it again here, from the ONNX file it came from"
        raise BackendError(problem, where=str(engine), fix=fix)
    cuda = Cuda()
    try:
        return _Session(Engine(engine.read_bytes(), cuda), f"tensorrt {trt.__version__}")
    except RuntimeError as refusal:
        cuda.close()
        raise BackendError(str(refusal), where=str(engine)) from refusal


class _Session:
    """An engine behind the Session protocol; batches larger than it takes are split."""

    def __init__(self, engine: Engine, runtime: str) -> None:
        self._engine = engine
        self.runtime = runtime
        self.inputs = tuple(TensorSpec(name, dtype, _symbolic(shape)) for name, dtype, shape in engine.inputs)
        self.outputs = tuple(TensorSpec(name, dtype, _symbolic(shape)) for name, dtype, shape in engine.outputs)
        batches = [engine.largest[name][0] for name, _, shape in engine.inputs if shape and shape[0] == -1]
        self._max_batch = min(batches) if batches else None

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        import numpy as np

        size = len(next(iter(inputs.values())))
        step = self._max_batch or size
        with _translated():
            parts = [
                self._engine({name: array[begin : begin + step] for name, array in inputs.items()})
                for begin in range(0, size, step)
            ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        self._engine.close()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as problem:
        raise BackendError(str(problem), where="tensorrt") from problem


def _symbolic(shape: tuple[int, ...]) -> tuple[int | str, ...]:
    return tuple(("batch" if axis == 0 else f"dim{axis}") if size == -1 else size for axis, size in enumerate(shape))


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _compute_capability() -> str:
    from edgekd.backends._tensorrt.engine import Cuda

    cuda = Cuda()
    try:
        return cuda.compute_capability()
    finally:
        cuda.close()


def _read_model(source: Path, precision: Precision, max_batch: int, *, typed: bool) -> Shapes:
    """Shapes for the dynamic inputs of an ONNX file, after a check that the graph is of that precision."""
    import onnx

    model = onnx.load(str(source))
    problem = mistyped(model, precision, typed=typed)
    if problem:
        raise BackendError(problem, where=str(source), fix="export the model in that precision first")
    known = {tensor.name for tensor in model.graph.initializer}
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for value in model.graph.input:
        sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
        if value.name in known or -1 not in sizes:
            continue
        if -1 in sizes[1:]:
            raise BackendError(
                f"input '{value.name}' has a dynamic dimension beside the batch: {sizes}",
                where=str(source),
                expected="fixed sizes behind the batch dimension",
                fix="export it with a fixed length, padded inputs and a mask",
            )
        one = (1, *sizes[1:])
        shapes[value.name] = (one, one, (max_batch, *sizes[1:]))
    return shapes


def mistyped(model: onnx.ModelProto, precision: Precision, *, typed: bool) -> str | None:
    """Why the graph would not give an engine of that precision, or None.

    TensorRT 10 and 11 take every precision from the graph: an fp32 graph silently gives an fp32 engine. TensorRT 8 is
    weakly typed, its graphs stay in fp32; but int8 needs Q/DQ nodes in any version, since edgekd writes no calibration.
    """
    import onnx

    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in _tensors(model))
    if precision == "int8" and not quantized:
        return "int8 was asked for, and the graph has no QuantizeLinear node"
    if precision != "int8" and quantized:
        return f"{precision} was asked for, and the graph is quantized"
    if typed and precision == "fp16" and not half:
        return "fp16 was asked for, and no weight of the graph is fp16; a strongly typed engine would be fp32"
    if precision == "fp32" and half:
        return "fp32 was asked for, and weights of the graph are fp16"
    return None


def _tensors(model: onnx.ModelProto) -> Iterator[Any]:
    yield from model.graph.initializer
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")
