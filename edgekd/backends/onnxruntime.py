"""ONNX Runtime on the CPU: the host, and any board without an accelerator."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import BackendError
from edgekd.types import Arrays, Backend, Precision, Session, TensorSpec

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8",
    "tensor(int8)": "int8", "tensor(int32)": "int32", "tensor(int64)": "int64", "tensor(bool)": "bool",
}  # fmt: skip
_INTEGER_PREFIXES = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "QAttention", "DynamicQuantize")
_FLOAT_LAYERS = frozenset({"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})


def onnxruntime(*, optimizations: bool = True, spin: bool = False) -> Backend:
    """ONNX Runtime's CPU execution provider, with as many threads as asked for.

    Args:
        optimizations: False runs the graph node by node as written (ORT_DISABLE_ALL): the numerics reference of a
            TensorRT-form Q/DQ graph, which this runtime would otherwise fuse in its own way. Its speed means nothing.
        spin: whether waiting threads keep a core busy. It is off, because an app shares its cores; on a machine of
            its own it makes two threads up to twice as fast on small models, and one thread no faster.
    """

    def load(path: Path, threads: int) -> Session:
        return _Session(path, threads, optimizations=optimizations, spin=spin)

    return Backend(name="onnxruntime", available=_available, compile=_compile, load=load)


def fused(path: Path) -> dict[str, Any]:
    """What ONNX Runtime makes of a graph on this machine: operators after all optimizations.

    Returns:
        `nodes` (count by type), `integer` (operators that run on integers) and `float` (convolutions and products that
        run in float: all of them in a float model, none in one that is quantized whole).

    Raises:
        BackendError: the runtime refuses the model.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        options = _options(1, optimizations=True, spin=False)
        options.optimized_model_filepath = str(written)
        _open(path, options)
        graph = onnx.load(written).graph
    nodes = Counter(node.op_type for node in graph.node)
    integer = {name: count for name, count in nodes.items() if name.startswith(_INTEGER_PREFIXES)}
    floats = {name: count for name, count in nodes.items() if name in _FLOAT_LAYERS}
    return {"nodes": dict(sorted(nodes.items())), "integer": integer, "float": floats}


class _Session:
    """One model in memory."""

    def __init__(self, path: Path, threads: int, *, optimizations: bool, spin: bool) -> None:
        import onnxruntime as ort

        self._session: Any = _open(path, _options(threads, optimizations=optimizations, spin=spin))
        self.inputs = tuple(map(_spec, self._session.get_inputs()))
        self.outputs = tuple(map(_spec, self._session.get_outputs()))
        self.runtime = f"onnxruntime {ort.__version__}"
        self.settings = {
            "provider": "CPUExecutionProvider",
            "threads": threads,
            "spin": spin,
            "optimizations": optimizations,
        }
        self._names = [spec.name for spec in self.outputs]

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            BackendError: an input is missing or has another type or shape, or the session is closed.
        """
        if self._session is None:
            raise BackendError("the session is closed", where="onnxruntime")
        try:
            values = self._session.run(self._names, dict(inputs))
        except _errors() as error:
            expected = ", ".join(f"{s.name}: {s.dtype} {s.shape}" for s in self.inputs)
            raise BackendError(_short(error), where="onnxruntime", expected=expected) from error
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        self._session = None


def _available() -> str | None:
    try:
        import onnxruntime as ort
    except ImportError as error:
        return f"onnxruntime cannot be imported: {error}"
    return None if "CPUExecutionProvider" in ort.get_available_providers() else "this build has no CPU provider"


def _compile(model: Path, precision: Precision, folder: Path) -> Path:
    """The ONNX file is what runs; a graph optimized here would be bound to this machine's instructions."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(model, folder / "model.onnx"))


def _options(threads: int, *, optimizations: bool, spin: bool) -> Any:
    import onnxruntime as ort

    if threads < 1:
        raise BackendError(f"{threads} threads", where="onnxruntime", expected="1 or more")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.log_severity_level = 4  # what goes wrong is raised; the rest would be printed past `say`
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimizations else level.ORT_DISABLE_ALL
    return options


def _open(path: Path, options: Any) -> Any:
    import onnxruntime as ort

    if not path.is_file():
        raise BackendError("there is no such file", where=str(path))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _errors() as error:
        raise BackendError(f"ONNX Runtime refuses the model: {_short(error)}", where=path.name) from error


def _errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's own exceptions share no base class; its bindings also raise plain ones for wrong arguments."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, ValueError, RuntimeError, TypeError)


def _short(error: Exception) -> str:
    """ONNX Runtime's message without its code prefix and source positions, at most 300 characters."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text if len(text) <= 300 else text[:297] + "..."


def _spec(value: Any) -> TensorSpec:
    dtype = _DTYPES.get(value.type)
    if dtype is None:
        raise BackendError(f"{value.name} has type {value.type}", expected=", ".join(_DTYPES))
    shape = tuple(dim if isinstance(dim, int | str) else "unknown" for dim in value.shape)
    return TensorSpec(value.name, dtype, shape)
