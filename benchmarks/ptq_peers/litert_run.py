"""ai-edge-quantizer's static int8 on the model that litert-torch converts, run by ai-edge-litert with XNNPACK.

    python litert_run.py JOB.json    # {"program", "calibration", "test", "out"}: paths

The model comes as a `torch.export` program. The last line that is printed tells of the variants as JSON; each has its
outputs for the test images, since the files run on LiteRT alone. Runs in its own environment (requirements-litert.txt).
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import litert_torch  # type: ignore[import-not-found]
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]
from ai_edge_quantizer import quantizer, recipe  # type: ignore[import-not-found]

ROUNDS, RUNS = 40, 10


def main() -> None:
    """Convert, quantize, and run."""
    job = json.loads(Path(sys.argv[1]).read_text())
    images, out = np.load(job["calibration"]), Path(job["out"])
    test = np.load(job["test"], mmap_mode="r")
    program = torch.export.load(job["program"])
    plain, static = out / "fp32.tflite", out / "static_wi8_ai8.tflite"
    litert_torch.convert(Exported(program), (torch.from_numpy(images[:1]),)).export(str(plain))
    signatures = Interpreter(str(plain)).get_signature_list()
    (key,), (name,) = signatures, next(iter(signatures.values()))["inputs"]
    begun, files = time.time(), {"fp32": plain}
    found: dict[str, dict[str, Any]] = {}
    try:
        work = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
        ranges = work.calibrate({key: [{name: images[at : at + 1]} for at in range(len(images))]})
        work.quantize(ranges).export_model(str(static), overwrite=True)
        found["static_wi8_ai8"] = {"seconds": round(time.time() - begun, 1)}
        files["static_wi8_ai8"] = static
    except Exception as problem:  # whatever a peer raises on a model is its result
        found["static_wi8_ai8"] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    for name, told in judged(files, test, out).items():
        found[name] = found.get(name, {}) | told
    print(json.dumps({"fp32 (LiteRT)": found.pop("fp32"), **found}))


class Exported(torch.nn.Module):
    """An exported program as the module that the converter wants: it is in evaluation mode already."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.inner = program.module()
        self.training = False

    def forward(self, image: torch.Tensor) -> Any:
        """The logits."""
        return self.inner(image)

    def train(self, mode: bool = True) -> Exported:
        """Stays as it is."""
        return self


def judged(files: dict[str, Path], test: np.ndarray, out: Path) -> dict[str, dict[str, Any]]:
    """Outputs for the test images, and milliseconds an image on one thread, measured in turns."""
    models = {name: Model(file) for name, file in files.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for name, model in models.items():
            image = model.taken(test[:1])
            for turn in range(RUNS):
                begun = time.perf_counter()
                model.run(image)
                if turn:  # the first one of a turn finds the caches full of another model
                    times[name].append(1000 * (time.perf_counter() - begun))
    for name, model in models.items():
        outputs = out / f"{name}.npy"
        np.save(outputs, np.concatenate([model.logits(test[at : at + 1]) for at in range(len(test))]))
        found[name] = {
            "logits": str(outputs), "size_bytes": files[name].stat().st_size,
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}", "p50_ms": float(np.median(times[name])),
        }  # fmt: skip
    return found


class Model:
    """A file on LiteRT, with one thread."""

    def __init__(self, file: Path) -> None:
        self.interpreter = Interpreter(str(file), num_threads=1)
        self.interpreter.allocate_tensors()
        (self.into,), (self.out_of,) = self.interpreter.get_input_details(), self.interpreter.get_output_details()

    def run(self, image: np.ndarray) -> None:
        """Compute what it says of an image as it takes them."""
        self.interpreter.set_tensor(self.into["index"], image)
        self.interpreter.invoke()

    def taken(self, values: np.ndarray) -> np.ndarray:
        """Values as the input takes them."""
        if self.into["dtype"] == np.float32:
            return np.ascontiguousarray(values)
        (scale, zero), limits = self.into["quantization"], np.iinfo(self.into["dtype"])
        taken: np.ndarray = np.clip(np.round(values / scale) + zero, limits.min, limits.max).astype(self.into["dtype"])
        return taken

    def logits(self, values: np.ndarray) -> np.ndarray:
        """What it says of an image, as numbers."""
        self.run(self.taken(values))
        found: np.ndarray = self.interpreter.get_tensor(self.out_of["index"])
        if self.out_of["dtype"] == np.float32:
            return found.copy()
        scale, zero = self.out_of["quantization"]
        numbers: np.ndarray = ((found.astype(np.float32) - zero) * scale).astype(np.float32)
        return numbers


if __name__ == "__main__":
    main()
