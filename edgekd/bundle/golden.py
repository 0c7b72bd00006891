"""Golden samples: real inputs, the outputs each model file gave for them, and how far another runtime may differ."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.errors import ModelError
from edgekd.types import Arrays, Precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "golden.npz"
LARGEST_BYTES = 256 << 20  # unpacked; a few samples are some megabytes, more is an attempt to exhaust memory
# Largest difference as a fraction of the largest expected magnitude, and the smallest cosine. Ours: fp32 allows TF32
# (10-bit mantissa: 2^-11 a product) and another order of sums; fp16 the same without wide sums; int8 a few steps of the
# last layer's scale, where kernels round ties differently or saturate (AVX2 without VNNI).
_ALLOWED: Mapping[Precision, tuple[float, float]] = {
    "fp32": (0.01, 0.9995),
    "fp16": (0.03, 0.999),
    "int8": (0.1, 0.99),
    "w8": (0.01, 0.9995),  # computed in fp32
    "dynamic": (0.1, 0.99),
}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What an output may differ by: the largest absolute difference, and the smallest cosine."""

    max_abs: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs by name (batch first), and by model file the expected outputs and their tolerance."""

    inputs: Arrays
    expected: Mapping[str, Arrays]
    tolerance: Mapping[str, Tolerance]


def tolerance(expected: Arrays, precision: Precision) -> Tolerance:
    """What may differ in outputs of that size, computed in that precision."""
    fraction, cosine = _ALLOWED[precision]
    largest = max(float(np.abs(value.astype(np.float64)).max()) for value in expected.values())
    return Tolerance(max(fraction * largest, 1e-6), cosine)


def compute(model: Path, inputs: Arrays, threads: int = 1) -> dict[str, NDArray[np.generic]]:
    """The model's outputs on ONNX Runtime, one sample at a time, as run.py computes them on the device.

    Raises:
        BackendError: ONNX Runtime refuses the model or the inputs.
    """
    session = onnxruntime().load(model, threads)
    samples = len(next(iter(inputs.values())))
    rows = [session({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(samples)]
    session.close()
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def difference(expected: Arrays, actual: Arrays, allowed: Tolerance) -> str | None:
    """How `actual` differs from `expected` by more than is allowed, or None."""
    for name, wanted in expected.items():
        if name not in actual:
            return f"output '{name}' is missing"
        want, got = wanted.astype(np.float64), actual[name].astype(np.float64)
        if got.shape != want.shape:
            return f"output '{name}' has shape {got.shape}, expected {want.shape}"
        if not np.isfinite(got).all():
            return f"output '{name}' has values that are no numbers"
        largest = float(np.abs(got - want).max())
        norms = float(np.linalg.norm(got) * np.linalg.norm(want))
        cosine = float((got * want).sum() / norms) if norms else float(largest == 0)
        if largest > allowed.max_abs or cosine < allowed.cosine:
            return (
                f"output '{name}' differs by {largest:.4g} (allowed {allowed.max_abs:.4g}), "
                f"cosine {cosine:.6f} (at least {allowed.cosine})"
            )
    return None


def write(path: Path, golden: Golden) -> None:
    """Write an .npz file whose bytes depend on the content alone (numpy's own carry the time of writing)."""
    arrays = {f"input/{name}": value for name, value in golden.inputs.items()}
    for model, outputs in golden.expected.items():
        arrays |= {f"expected/{model}/{name}": value for name, value in outputs.items()}
        allowed = golden.tolerance[model]
        arrays[f"tolerance/{model}"] = np.array([allowed.max_abs, allowed.cosine])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            with archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(arrays[name]), allow_pickle=False)


def read(path: Path) -> Golden:
    """The golden samples in that file.

    Raises:
        ModelError: it is not such a file, or would have to run code to be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked_bytes = sum(item.file_size for item in archive.infolist())
        if unpacked_bytes > LARGEST_BYTES:
            raise ModelError(f"the golden samples unpack to {unpacked_bytes} bytes", where=str(path))
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as problem:
        raise ModelError(f"the golden samples cannot be read: {problem}", where=str(path)) from problem
    inputs = {name.removeprefix("input/"): value for name, value in arrays.items() if name.startswith("input/")}
    expected: dict[str, dict[str, NDArray[np.generic]]] = {}
    allowed: dict[str, Tolerance] = {}
    for name, value in arrays.items():
        if name.startswith("expected/"):
            model, _, output = name.removeprefix("expected/").partition("/")
            expected.setdefault(model, {})[output] = value
        elif name.startswith("tolerance/") and value.shape == (2,):
            allowed[name.removeprefix("tolerance/")] = Tolerance(float(value[0]), float(value[1]))
    if not inputs or not expected or set(expected) != set(allowed):
        raise ModelError("it holds no inputs, or not as many tolerances as expected outputs", where=str(path))
    return Golden(inputs, expected, allowed)
