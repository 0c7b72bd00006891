"""Command lines of NVIDIA's trtexec for TensorRT 8.5 to 11.x, and the times that it exports.

Pure functions. This file is copied into every Jetson bundle: standard library only, Python 3.8.

Which flag exists in which version was read from samples/common/sampleOptions.cpp of NVIDIA/TensorRT (Apache-2.0),
branches release/8.5 to release/11.1. Not validated on a device: no TensorRT library could be installed where edgekd was
developed, so these lines are tested against the flag tables of each version and against a fake executable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

FIRST, LAST = (8, 5), (11, 99)  # TensorRT 8.0-8.4 (JetPack 4 and 5.0) has another Python API and ends at opset 13
PRECISIONS = ("fp32", "fp16", "int8")


def unsupported(version: Sequence[int]) -> str | None:
    """Why this version of TensorRT cannot be used, or None where it can."""
    if tuple(version[:2]) < FIRST:
        return (
            f"TensorRT {version[0]}.{version[1]} is too old: edgekd builds for 8.5 and later (JetPack 5.1 or later); "
            "JetPack 4 and 5.0 have another Python API and stop at ONNX opset 13"
        )
    if tuple(version[:2]) > LAST:
        return f"TensorRT {version[0]}.{version[1]} is newer than this edgekd knows (8.5 to 11.x)"
    return None


def build(
    version: Sequence[int],
    *,
    onnx: str,
    precision: str,
    engine: str,
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]],
    workspace_mib: int,
    timing_cache: str,
    executable: str = "trtexec",
) -> list[str]:
    """The command that turns an ONNX file into an engine.

    TensorRT 8 is weakly typed: the flags --fp16 and --int8 allow a precision (int8 with Q/DQ in the graph, and fp16 for
    the layers around it). TensorRT 10 is run strongly typed and 11 always is: there the graph says the precision.

    Args:
        version: (major, minor) of the TensorRT that runs it.
        onnx: the model.
        precision: "fp32", "fp16" or "int8".
        engine: the file to write.
        shapes: by input with dynamic dimensions (min, opt, max); empty for a model whose shapes are all fixed.
        workspace_mib: limit of the memory that a tactic may take, in MiB.
        timing_cache: file that keeps kernel timings between builds; for this device and TensorRT version only.
        executable: where trtexec is.

    Raises:
        ValueError: the version or the precision is not one that edgekd builds for.
    """
    reason = unsupported(version)
    if reason:
        raise ValueError(reason)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision '{precision}'; there is {', '.join(PRECISIONS)}")
    command = [
        executable,
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        f"--memPoolSize=workspace:{workspace_mib}",
        f"--timingCacheFile={timing_cache}",
        "--profilingVerbosity=detailed",
    ]
    if version[0] == 8:
        command += {"fp32": [], "fp16": ["--fp16"], "int8": ["--int8", "--fp16"]}[precision]
    elif version[0] == 10:
        command.append("--stronglyTyped")
    if shapes:
        for position, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            command.append(f"{flag}={_shapes({name: three[position] for name, three in shapes.items()})}")
    command.append("--buildOnly" if tuple(version[:2]) < (8, 6) else "--skipInference")
    return command


def measure(
    version: Sequence[int],
    *,
    engine: str,
    times: str,
    shapes: Mapping[str, Sequence[int]],
    inputs: Mapping[str, str] | None = None,
    warm_up_ms: int = 500,
    duration_s: int = 10,
    iterations: int = 200,
    data_transfers: bool = True,
    cuda_graph: bool = False,
    spin_wait: bool = True,
    executable: str = "trtexec",
) -> list[str]:
    """The command that times an engine and exports each inference's times to the file `times`.

    Versions 8 and 10 include copies to and from the GPU and use neither CUDA graphs nor spin-wait unless told; 11 is
    the other way round in all three. The flags say what is wanted in either, so that figures can be compared.

    Args:
        shapes: shape by input with dynamic dimensions; empty for a model whose shapes are all fixed.
        inputs: raw binary file by input; left out, trtexec makes up random values.
    """
    reason = unsupported(version)
    if reason:
        raise ValueError(reason)
    command = [
        executable,
        f"--loadEngine={engine}",
        f"--warmUp={warm_up_ms}",
        f"--duration={duration_s}",
        f"--iterations={iterations}",
        f"--exportTimes={times}",
    ]
    if shapes:
        command.append(f"--shapes={_shapes(shapes)}")
    if inputs:
        command.append("--loadInputs=" + ",".join(f"{_quoted(name)}:{file}" for name, file in inputs.items()))
    if version[0] >= 11:
        wanted = {
            "--includeDataTransfers": data_transfers,
            "--noCudaGraph": not cuda_graph,
            "--noSpinWait": not spin_wait,
        }
    else:
        wanted = {"--noDataTransfers": not data_transfers, "--useCudaGraph": cuda_graph, "--useSpinWait": spin_wait}
    return command + [flag for flag, on in wanted.items() if on]


def profile(
    version: Sequence[int],
    *,
    engine: str,
    shapes: Mapping[str, Sequence[int]],
    profile_path: str,
    layers_path: str,
    executable: str = "trtexec",
) -> list[str]:
    """The command that exports the time of each layer and what it became: a run of its own, never a benchmark."""
    reason = unsupported(version)
    if reason:
        raise ValueError(reason)
    command = [
        executable,
        f"--loadEngine={engine}",
        "--profilingVerbosity=detailed",
        "--dumpProfile",
        f"--exportProfile={profile_path}",
        "--dumpLayerInfo",
        f"--exportLayerInfo={layers_path}",
    ]
    if shapes:
        command.append(f"--shapes={_shapes(shapes)}")
    if version[0] < 11:
        command.append("--separateProfileRun")  # 11 always runs it apart
    return command


def read_times(text: str, key: str = "latencyMs") -> list[float]:
    """Milliseconds of each inference from the JSON that --exportTimes wrote; its warm-up is already left out.

    Args:
        text: the file's content: one object an inference, the same keys from 8.5 to 11.1.
        key: "latencyMs" (copy in, compute, copy out) or "computeMs" (kernels only).

    Raises:
        ValueError: it is not such a file, or holds a time that is negative or no number.
    """
    try:
        rows = json.loads(text)
    except ValueError as problem:
        raise ValueError(f"the exported times are not JSON ({problem}); was trtexec stopped?") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError("the exported times hold no inference; was trtexec stopped before its warm-up ended?")
    times = []
    for position, row in enumerate(rows):
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"the exported times have no valid '{key}' at row {position}: {value!r}")
        times.append(float(value))
    return times


def percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99, mean, n and the 95 % interval (low, high) of the median, all in milliseconds save n.

    Percentiles are interpolated linearly; the interval is distribution-free, from order statistics (the ranks
    n/2 ± 0.98 √n; Conover, Practical Nonparametric Statistics, 1999, §3.2).
    """
    ordered = sorted(times_ms)
    n = len(ordered)
    if n == 0:
        raise ValueError("no times to summarise")
    half = 0.98 * math.sqrt(n)
    low = ordered[max(0, math.floor(n / 2 - half))]
    high = ordered[min(n - 1, math.ceil(n / 2 + half))]
    return {
        "p50": _at(ordered, 0.5),
        "p90": _at(ordered, 0.9),
        "p99": _at(ordered, 0.99),
        "mean": sum(ordered) / n,
        "n": n,
        "low": low,
        "high": high,
    }


def read_version(log: str) -> tuple[int, int, int] | None:
    """TensorRT's version from the first line that trtexec prints, "[TensorRT v8502]" or "[TensorRT v101601] [b…]"."""
    found = re.search(r"TensorRT v(\d{4,6})\]", log)
    if not found:
        return None
    number = int(found.group(1))
    if number < 10000:  # 8.x: major × 1000 + minor × 100 + patch
        return number // 1000, number // 100 % 10, number % 100
    return number // 10000, number // 100 % 100, number % 100


def read_device(log: str) -> dict[str, str]:
    """GPU name and compute capability from trtexec's device report, e.g. {"gpu": "Orin", "sm": "8.7"}."""
    found = {}
    for key, label in (("gpu", "Selected Device"), ("sm", "Compute Capability")):
        match = re.search(rf"{label}: *(.+?) *$", log, re.MULTILINE)
        if match:
            found[key] = match.group(1)
    return found


def warnings(log: str) -> list[str]:
    """What trtexec itself says against its own figures: an unstable clock, or a host that cannot keep the GPU busy."""
    marks = ("coefficient of variance", "Throughput may be bound by Enqueue", "unstable")
    return [line.strip() for line in log.splitlines() if any(mark in line for mark in marks)]


def _at(ordered: Sequence[float], fraction: float) -> float:
    place = fraction * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ",".join(f"{_quoted(name)}:{'x'.join(str(size) for size in shape)}" for name, shape in shapes.items())


def _quoted(name: str) -> str:
    return f"'{name}'" if set(name) & {":", ","} else name
