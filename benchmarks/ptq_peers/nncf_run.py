"""NNCF's post-training quantization: of the ONNX file, to run on ONNX Runtime, and of the same as OpenVINO's IR.

    python nncf_run.py JOB.json    # {"float", "calibration", "test", "out"}: paths

"default" is `nncf.quantize(model, dataset)`; "mixed" has activations asymmetric, as its documentation proposes where
the default loses accuracy; "transformer" is its model type of that name; "accurate" has its slower bias correction. The
last line that is printed tells of them as JSON. An IR runs on OpenVINO alone, so that its outputs for the test images
are written as well, and those of the fp32 model on OpenVINO. Runs in its own environment (requirements-onnx.txt).
"""

import json
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

with mock.patch.dict("os.environ", {"NNCF_CI": "1"}):  # no report of this run to anybody
    import nncf
import onnx
import openvino

VARIANTS = {
    "default": {},
    "mixed": {"preset": nncf.QuantizationPreset.MIXED},
    "transformer": {"model_type": nncf.ModelType.TRANSFORMER},
    "accurate": {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False},
}
BATCH = 1  # NNCF's bias correction is made for single samples


def main():
    """Quantize in every way, in both forms."""
    job = json.loads(Path(sys.argv[1]).read_text())
    images, out = np.load(job["calibration"]), Path(job["out"])
    test = np.load(job["test"], mmap_mode="r")
    batches = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
    found = {}
    for name, options in VARIANTS.items():
        begun, file = time.time(), out / f"{name}.onnx"
        try:
            dataset = nncf.Dataset(batches, lambda batch: {job["input"]: batch})
            model = nncf.quantize(onnx.load(job["float"]), dataset, subset_size=len(images), **options)
            onnx.save(model, file)
            found[name] = {"file": str(file), "seconds": round(time.time() - begun, 1)}
        except Exception as problem:  # whatever a peer raises on a model is its result
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
        begun = time.time()
        try:
            dataset = nncf.Dataset(batches)
            model = nncf.quantize(openvino.Core().read_model(job["float"]), dataset, subset_size=len(images), **options)
            seconds, file = round(time.time() - begun, 1), out / f"{name}.xml"
            openvino.save_model(model, file)
            found[f"{name} (OpenVINO)"] = judged(model, test, out / f"{name}.npy") | {"seconds": seconds}
            found[f"{name} (OpenVINO)"]["size_bytes"] = file.with_suffix(".bin").stat().st_size + file.stat().st_size
        except Exception as problem:
            found[f"{name} (OpenVINO)"] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    plain = judged(openvino.Core().read_model(job["float"]), test, out / "float.npy")
    print(json.dumps({"fp32 (OpenVINO)": plain, **found}))


def judged(model, test, file):
    """Outputs for the test images, and the milliseconds one image takes on one thread."""
    # fp32 stays fp32: by itself OpenVINO computes in bfloat16 where the CPU has it.
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    run = openvino.Core().compile_model(model, "CPU", options)
    parts = [run(test[at : at + 250])[0] for at in range(0, len(test), 250)]
    np.save(file, np.concatenate(parts))
    times = []
    for _ in range(300):
        begun = time.perf_counter()
        run(test[:1])
        times.append(1000 * (time.perf_counter() - begun))
    return {"logits": str(file), "runtime": f"openvino {openvino.__version__}", "p50_ms": float(np.median(times[100:]))}


if __name__ == "__main__":
    main()
