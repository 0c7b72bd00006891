"""Run an engine: the CUDA runtime through ctypes, and TensorRT's execution context (8.5 to 11.x, by tensor name).

The CUDA runtime is called through ctypes, not through cuda-python: every TensorRT installation brings libcudart, the
seven functions used here have had one C interface from CUDA 10 to 13, and a board then needs no package beside numpy.

Type-checked against the real bindings of 8.6, 10.3, 10.16 and 11.4; never run on a GPU here. This file is copied into
every Jetson bundle: standard library, numpy and tensorrt only, Python 3.8.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind (driver_types.h)
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor and Minor (driver_types.h)
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}  # not trt.nptype: that of 8.5 asks numpy for a name which numpy 1.24 removed


class Cuda:
    """Memory and one stream of the first GPU.

    Raises:
        RuntimeError: there is no CUDA runtime or no GPU, or a call fails; the text says which.
    """

    def __init__(self) -> None:
        self._library = _load_cudart()
        count = ctypes.c_int(0)
        status = self._library.cudaGetDeviceCount(ctypes.byref(count))
        if status != 0 or count.value == 0:
            raise RuntimeError(f"no NVIDIA GPU can be used here (cudaGetDeviceCount: {self._reason(status)})")
        stream = ctypes.c_void_p()
        self._check("cudaStreamCreate", self._library.cudaStreamCreate(ctypes.byref(stream)))
        self.stream: int = stream.value or 0

    def compute_capability(self) -> str:
        """The GPU's compute capability, "8.7" for Orin."""
        parts = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int(0)
            status = self._library.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0)
            self._check("cudaDeviceGetAttribute", status)
            parts.append(str(value.value))
        return ".".join(parts)

    def allocate(self, size_bytes: int) -> int:
        """The address of so many bytes of GPU memory."""
        pointer = ctypes.c_void_p()
        self._check("cudaMalloc", self._library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(size_bytes, 1))))
        assert pointer.value is not None
        return pointer.value

    def free(self, pointer: int) -> None:
        self._check("cudaFree", self._library.cudaFree(ctypes.c_void_p(pointer)))

    def copy_in(self, pointer: int, array: np.ndarray[Any, Any]) -> None:
        self._copy(pointer, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def copy_out(self, array: np.ndarray[Any, Any], pointer: int) -> None:
        self._copy(array.ctypes.data, pointer, array.nbytes, _TO_HOST)

    def synchronize(self) -> None:
        self._check("cudaStreamSynchronize", self._library.cudaStreamSynchronize(ctypes.c_void_p(self.stream)))

    def close(self) -> None:
        self._check("cudaStreamDestroy", self._library.cudaStreamDestroy(ctypes.c_void_p(self.stream)))

    def _copy(self, to: int, source: int, size_bytes: int, kind: int) -> None:
        status = self._library.cudaMemcpyAsync(
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size_bytes),
            kind,
            ctypes.c_void_p(self.stream),
        )
        self._check("cudaMemcpyAsync", status)

    def _reason(self, status: int) -> str:
        text: bytes | None = self._library.cudaGetErrorString(status)
        return text.decode() if text else f"status {status}"

    def _check(self, call: str, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"{call} failed: {self._reason(status)}")


class Engine:
    """A deserialized engine with its buffers: named arrays in, named arrays out.

    Attributes:
        inputs, outputs: (name, numpy dtype, shape) of each tensor; -1 is a dynamic dimension.
        largest: by input, the largest shape that the engine was built for.
    """

    def __init__(self, plan: bytes, cuda: Cuda) -> None:
        import tensorrt as trt

        self._cuda = cuda
        logger = trt.Logger(trt.Logger.WARNING)
        trt.init_libnvinfer_plugins(logger, "")
        self._runtime = trt.Runtime(logger)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise RuntimeError(
                f"TensorRT {trt.__version__} refuses the engine: it was built by another version or for another GPU, "
                "or is damaged; build it again on this device"
            )
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RuntimeError("TensorRT could not create an execution context: not enough free memory")
        self.inputs: list[tuple[str, str, tuple[int, ...]]] = []
        self.outputs: list[tuple[str, str, tuple[int, ...]]] = []
        self.largest: dict[str, tuple[int, ...]] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            if kind not in _DTYPES:
                raise RuntimeError(f"tensor '{name}' is of type {kind}, which numpy has no equivalent for")
            spec = (name, _DTYPES[kind], tuple(engine.get_tensor_shape(name)))
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs.append(spec)
                dynamic = -1 in spec[2]
                self.largest[name] = tuple(engine.get_tensor_profile_shape(name, 0)[2]) if dynamic else spec[2]
            else:
                self.outputs.append(spec)
        self._buffers: dict[str, tuple[int, int]] = {}  # name → address, bytes

    def __call__(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for inputs by name; shapes must lie within those that the engine was built for."""
        known = [name for name, _, _ in self.inputs]
        if sorted(inputs) != sorted(known):
            raise ValueError("the engine takes {}, not {}".format(", ".join(known), ", ".join(inputs) or "nothing"))
        kept = []  # arrays must outlive their asynchronous copies
        for name, dtype, _ in self.inputs:
            array = np.ascontiguousarray(inputs[name])
            if array.dtype != np.dtype(dtype):
                raise ValueError(f"input '{name}' is {array.dtype}, expected {dtype}")
            if not self._context.set_input_shape(name, tuple(array.shape)):
                raise ValueError(
                    f"input '{name}' has shape {tuple(array.shape)}; the engine takes at most {self.largest[name]}"
                )
            self._cuda.copy_in(self._bind(name, array.nbytes), array)
            kept.append(array)
        results = {}
        for name, dtype, _ in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise ValueError(f"output '{name}' has a shape that depends on the data: {shape}")
            results[name] = np.empty(shape, dtype)
            self._bind(name, results[name].nbytes)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise RuntimeError("TensorRT could not run the engine; its log above says why")
        for name, array in results.items():
            self._cuda.copy_out(array, self._buffers[name][0])
        self._cuda.synchronize()
        return results

    def layers(self) -> str:
        """What the engine's layers became, as JSON (tactic and precision of each, reformats included)."""
        import tensorrt as trt

        inspector = self._engine.create_engine_inspector()
        text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return text

    def close(self) -> None:
        """Give the GPU memory back."""
        for address, _ in self._buffers.values():
            self._cuda.free(address)
        self._buffers.clear()
        self._cuda.close()

    def _bind(self, name: str, size_bytes: int) -> int:
        address, held = self._buffers.get(name, (0, -1))
        if held < size_bytes:
            if held >= 0:
                self._cuda.free(address)
            address = self._cuda.allocate(size_bytes)
            self._buffers[name] = (address, size_bytes)
        self._context.set_tensor_address(name, address)
        return address


def _load_cudart() -> ctypes.CDLL:
    """The CUDA runtime: on the loader's path, under /usr/local/cuda, or from NVIDIA's pip packages."""
    names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
    folders = ["/usr/local/cuda/lib64"] + [
        found
        for place in sys.path
        for pattern in ("nvidia/cuda_runtime/lib", "nvidia/cu1[0-9]/lib")
        for found in sorted(glob.glob(os.path.join(place or ".", pattern)))
    ]
    candidates = names + [
        file for folder in folders for file in sorted(glob.glob(os.path.join(folder, "libcudart.so*")))
    ]
    for candidate in candidates:
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        library.cudaGetErrorString.restype = ctypes.c_char_p
        return library
    raise RuntimeError(
        "no CUDA runtime (libcudart.so) was found on the loader's path, in /usr/local/cuda or beside numpy"
    )
