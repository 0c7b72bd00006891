"""FAKE TensorRT bindings (see tests/fakes/README.md): an "engine" is a note of its ONNX file, run on ONNX Runtime.

Only what edgekd calls, with the real names; what a version of the real bindings lacks is missing here too.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.3.0")
_MAJOR = int(__version__.split(".")[0])


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8 = range(6)
    if _MAJOR >= 10:
        INT64 = 6


_DATA_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(uint8)": (DataType.UINT8, np.uint8),
}


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.Enum):
    DETAILED = 2


class LayerInformationFormat(enum.Enum):
    JSON = 1


class NetworkDefinitionCreationFlag(enum.IntEnum):
    if _MAJOR < 11:
        EXPLICIT_BATCH = 0
    if _MAJOR >= 10:
        STRONGLY_TYPED = 1 if _MAJOR == 10 else 0


class BuilderFlag(enum.Enum):
    TF32 = 7
    if _MAJOR < 11:
        FP16 = 0
        INT8 = 1


class Logger:
    WARNING = 2

    def __init__(self, min_severity: int) -> None:
        self.min_severity = min_severity


def init_libnvinfer_plugins(logger: Logger, namespace: str) -> bool:
    return True


class ParserError:
    def desc(self) -> str:
        return "fake: the file is no ONNX model"


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.onnx = ""


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: Logger) -> None:
        self._network = network

    def parse_from_file(self, model: str) -> bool:
        try:
            onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        except Exception:
            self.num_errors = 1
            return False
        self._network.onnx = model
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content + b"+"


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        self.shapes[input] = (min, opt, max)


class IBuilderConfig:
    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.pools: dict[str, int] = {}
        self.profiles: list[IOptimizationProfile] = []
        self.profiling_verbosity: ProfilingVerbosity | None = None
        self._cache = ITimingCache(b"")

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.pools[pool.name] = pool_size

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag.name)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return 0


class Builder:
    def __init__(self, logger: Logger) -> None:
        pass

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        if os.environ.get("FAKE_TRTEXEC") == "fail":
            return None
        shapes = config.profiles[0].shapes if config.profiles else {}
        note: dict[str, Any] = {"fake": __version__, "onnx": network.onnx, "flags": sorted(config.flags)}
        note |= {"max": {name: list(three[2]) for name, three in shapes.items()}, "pools": config.pools}
        return json.dumps({**note, "network_flags": int(network.flags)}).encode()


class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return '{"Layers": []}'


class ICudaEngine:
    def __init__(self, note: dict[str, Any]) -> None:
        self._session = onnxruntime.InferenceSession(note["onnx"], providers=["CPUExecutionProvider"])
        self._tensors = [(item, TensorIOMode.INPUT) for item in self._session.get_inputs()]
        self._tensors += [(item, TensorIOMode.OUTPUT) for item in self._session.get_outputs()]
        self._max = note["max"]
        if isinstance(self._max, str):  # of trtexec: "image:4x8x8x3"
            pairs = [part.rsplit(":", 1) for part in self._max.split(",") if part]
            self._max = {name: [int(size) for size in shape.split("x")] for name, shape in pairs}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(self._tensors[index][0].name)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return next(mode for item, mode in self._tensors if item.name == name)

    def get_tensor_dtype(self, name: str) -> DataType:
        return next(_DATA_TYPES[item.type][0] for item, _ in self._tensors if item.name == name)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = next(item.shape for item, _ in self._tensors if item.name == name)
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        largest = tuple(self._max[name])
        return [(1, *largest[1:]), (1, *largest[1:]), largest]

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = self._engine.get_tensor_shape(name)
        largest = self._engine._max.get(name, wanted)
        sizes = zip(shape, wanted, largest, strict=True)
        fits = len(shape) == len(wanted) and all(a == b or (b == -1 and 1 <= a <= c) for a, b, c in sizes)
        self._shapes[name] = tuple(shape)
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if size == -1 else size for size in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        feeds, names = {}, []
        for item, mode in self._engine._tensors:
            if mode == TensorIOMode.INPUT:
                dtype, shape = np.dtype(_DATA_TYPES[item.type][1]), self._shapes[item.name]
                size = dtype.itemsize * int(np.prod(shape))
                content = ctypes.string_at(self._addresses[item.name], size)
                feeds[item.name] = np.frombuffer(content, dtype).reshape(shape)
            else:
                names.append(item.name)
        for name, value in zip(names, self._engine._session.run(names, feeds), strict=True):
            ctypes.memmove(self._addresses[name], value.tobytes(), value.nbytes)
        return stream_handle != 0


class Runtime:
    def __init__(self, logger: Logger) -> None:
        pass

    def deserialize_cuda_engine(self, serialized_engine: Sequence[int] | bytes) -> ICudaEngine | None:
        try:
            note = json.loads(bytes(serialized_engine))
        except ValueError:
            return None
        return ICudaEngine(note) if note["fake"].split(".")[:2] == __version__.split(".")[:2] else None
