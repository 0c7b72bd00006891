"""ai-edge-quantizer's static int8 on the model that litert-torch converts, run by ai-edge-litert with XNNPACK.

    python litert_run.py JOB.json    # {"program", "calibration", "test", "out"}: paths

The model comes as a `torch.export` program. The last line that is printed tells of the variants as JSON; each has its
outputs for the test images, since the files run on LiteRT alone. Runs in its own environment (requirements-litert.txt).
"""

import json
import sys
import time
from pathlib import Path

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe


def main():
    """Convert, quantize, and run."""
    job = json.loads(Path(sys.argv[1]).read_text())
    images, out = np.load(job["calibration"]), Path(job["out"])
    test = np.load(job["test"], mmap_mode="r")
    program = torch.export.load(job["program"])
    plain = out / "float.tflite"
    litert_torch.convert(Exported(program), (torch.from_numpy(images[:1]),)).export(str(plain))
    found = {"fp32 (LiteRT)": judged(plain, test, out / "float.npy")}
    signatures = Interpreter(str(plain)).get_signature_list()
    (key,), (name,) = signatures, next(iter(signatures.values()))["inputs"]
    begun, file = time.time(), out / "static.tflite"
    try:
        work = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
        ranges = work.calibrate({key: [{name: images[at : at + 1]} for at in range(len(images))]})
        work.quantize(ranges).export_model(str(file), overwrite=True)
        seconds = round(time.time() - begun, 1)
        found["static_wi8_ai8"] = judged(file, test, out / "static.npy") | {"seconds": seconds}
    except Exception as problem:  # whatever a peer raises on a model is its result
        found["static_wi8_ai8"] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    print(json.dumps(found))


class Exported(torch.nn.Module):
    """An exported program as the module that the converter wants: it is in evaluation mode already."""

    def __init__(self, program):
        super().__init__()
        self.inner = program.module()
        self.training = False

    def forward(self, image):
        """The logits."""
        return self.inner(image)

    def train(self, mode=True):
        """Stays as it is."""
        return self


def judged(file, test, outputs):
    """Outputs for the test images, and the milliseconds one image takes on one thread."""
    interpreter = Interpreter(str(file), num_threads=1)
    interpreter.allocate_tensors()
    (into,), (from_,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(image):
        interpreter.set_tensor(into["index"], image)
        interpreter.invoke()

    found = []
    for at in range(len(test)):
        run(quantized(test[at : at + 1], into))
        found.append(plain(interpreter.get_tensor(from_["index"]), from_))
    np.save(outputs, np.concatenate(found))
    image, times = quantized(test[:1], into), []
    for _ in range(300):
        begun = time.perf_counter()
        run(image)
        times.append(1000 * (time.perf_counter() - begun))
    size = file.stat().st_size
    p50_ms = float(np.median(times[100:]))
    return {"logits": str(outputs), "size_bytes": size, "runtime": "ai-edge-litert 2.3.0", "p50_ms": p50_ms}


def quantized(values, detail):
    """Values as the input takes them."""
    scale, zero = detail["quantization"]
    if detail["dtype"] == np.float32:
        return np.ascontiguousarray(values)
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.round(values / scale) + zero, limits.min, limits.max).astype(detail["dtype"])


def plain(values, detail):
    """Numbers of an output."""
    scale, zero = detail["quantization"]
    if detail["dtype"] == np.float32:
        return values.copy()
    return ((values.astype(np.float32) - zero) * scale).astype(np.float32)


if __name__ == "__main__":
    main()
