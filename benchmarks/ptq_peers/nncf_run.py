"""NNCF's post-training quantization: of the ONNX file, to run on ONNX Runtime, and of the same as OpenVINO's IR.

    python nncf_run.py JOB.json    # {"float", "calibration", "test", "out"}: paths

"default" is `nncf.quantize(model, dataset)`; "mixed" has activations asymmetric, as its documentation proposes where
the default loses accuracy; "transformer" is its model type of that name; "accurate" has its slower bias correction. The
last line that is printed tells of them as JSON. An IR runs on OpenVINO alone, so that its outputs for the test images
are written as well, and those of the fp32 model on OpenVINO. Runs in its own environment (requirements-onnx.txt).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

with mock.patch.dict("os.environ", {"NNCF_CI": "1"}):  # no report of this run to anybody
    import nncf  # type: ignore[import-not-found]
import onnx
import openvino  # type: ignore[import-not-found]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "mixed": {"preset": nncf.QuantizationPreset.MIXED},
    "transformer": {"model_type": nncf.ModelType.TRANSFORMER},
    "accurate": {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False},
}
BATCH = 1  # NNCF's bias correction is made for single samples
ROUNDS, RUNS = 40, 10


def main() -> None:
    """Quantize in every way, in both forms."""
    job = json.loads(Path(sys.argv[1]).read_text())
    images, out = np.load(job["calibration"]), Path(job["out"])
    test = np.load(job["test"], mmap_mode="r")
    batches = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
    found: dict[str, dict[str, Any]] = {}
    irs = {"fp32": openvino.Core().read_model(job["float"])}
    for name, options in VARIANTS.items():
        options = options | {"subset_size": len(images)}
        begun, file = time.time(), out / f"{name}.onnx"
        try:
            dataset = nncf.Dataset(batches, lambda batch: {job["input"]: batch})
            onnx.save(nncf.quantize(onnx.load(job["float"]), dataset, **options), file)
            found[name] = {"file": str(file), "seconds": round(time.time() - begun, 1)}
        except Exception as problem:  # whatever a peer raises on a model is its result
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
        begun, own = time.time(), f"{name} (OpenVINO)"
        try:
            irs[name] = nncf.quantize(openvino.Core().read_model(job["float"]), nncf.Dataset(batches), **options)
            found[own] = {"seconds": round(time.time() - begun, 1)}
        except Exception as problem:
            found[own] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    for name, told in judged(irs, test, out).items():
        found[f"{name} (OpenVINO)"] = found.get(f"{name} (OpenVINO)", {}) | told
    print(json.dumps(found))


def judged(models: dict[str, Any], test: np.ndarray, out: Path) -> dict[str, dict[str, Any]]:
    """Outputs for the test images, bytes on disk, and milliseconds an image on one thread, measured in turns."""
    # fp32 stays fp32: by itself OpenVINO computes in bfloat16 where the CPU has it.
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    runs = {name: openvino.Core().compile_model(model, "CPU", options) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            for turn in range(RUNS):
                begun = time.perf_counter()
                run(test[:1])
                if turn:  # the first one of a turn finds the caches full of another model
                    times[name].append(1000 * (time.perf_counter() - begun))
    for name, run in runs.items():
        file, outputs = out / f"{name}.xml", out / f"{name}.npy"
        openvino.save_model(models[name], file)
        np.save(outputs, np.concatenate([run(test[at : at + 250])[0].copy() for at in range(0, len(test), 250)]))
        found[name] = {
            "logits": str(outputs), "runtime": f"openvino {openvino.__version__}",
            "p50_ms": float(np.median(times[name])),
            "size_bytes": file.with_suffix(".bin").stat().st_size + file.stat().st_size,
        }  # fmt: skip
    return found


if __name__ == "__main__":
    main()
