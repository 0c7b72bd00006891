"""ONNX Runtime's `quantize_static` as its documentation recommends it for x86 with VNNI: U8 activations, S8 weights.

    python ort_run.py JOB.json    # {"float", "calibration", "out"}: paths

Every variant is one quantized file; the last line that is printed tells of them as JSON. Runs in its own environment
(requirements-onnx.txt), knows nothing of edgekd.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

BATCH = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "minmax": {"per_channel": True},
    "percentile": {"per_channel": True, "calibrate_method": CalibrationMethod.Percentile},
    "entropy": {"per_channel": True, "calibrate_method": CalibrationMethod.Entropy},
    "minmax per-tensor": {},  # what the documentation names as the fastest
    "minmax linear": {"per_channel": True, "op_types_to_quantize": ["Conv", "Gemm", "MatMul"]},
}


class Images(CalibrationDataReader):  # type: ignore[misc]
    """The calibration images, batch by batch."""

    def __init__(self, images: np.ndarray, name: str) -> None:
        self.batches = iter([{name: images[at : at + BATCH]} for at in range(0, len(images), BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None behind the last one."""
        return next(self.batches, None)


def main() -> None:
    """Quantize in every way."""
    job = json.loads(Path(sys.argv[1]).read_text())
    images, out = np.load(job["calibration"]), Path(job["out"])
    prepared, found = out / "prepared.onnx", dict[str, dict[str, Any]]()
    quant_pre_process(job["float"], str(prepared))
    for name, options in VARIANTS.items():
        begun, file = time.time(), out / f"{name.replace(' ', '_')}.onnx"
        try:
            quantize_static(
                str(prepared), str(file), Images(images, job["input"]), quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, **options,
            )  # fmt: skip
        except Exception as problem:  # whatever a peer raises on a model is its result
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
            continue
        found[name] = {"file": str(file), "seconds": round(time.time() - begun, 1)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
