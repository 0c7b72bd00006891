#!/usr/bin/env python3
"""Run, check and time the model of this bundle. Needs Python 3.8, numpy and the runtime (onnxruntime or TensorRT).

    python3 run.py photo.jpg            what the model says: the likeliest classes, the labels that hold, the share of
                                        each class in a class map, or values (Pillow for JPEG and PNG; .ppm, .pgm and
                                        .npy without it)
    python3 run.py inputs.npz           named arrays in, arrays out
    python3 run.py --selftest           recompute golden.npz; exit code 1 where the outputs differ too much
    python3 run.py --bench              latency as one JSON document on stdout

Written by edgekd. It reads the bundle, writes nothing but what --save names, and asks no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from typing import Any, Callable, Mapping  # noqa: UP035 - Python 3.8 has no collections.abc.Callable[...]

import numpy as np

sys.dont_write_bytecode = True  # a bundle stays as it was verified
HERE = os.path.dirname(os.path.abspath(__file__))
Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Problem(Exception):
    """Something the user can fix; shown as one line, exit code 1."""


# ---------------------------------------------------------------- the bundle


def read_manifest() -> dict[str, Any]:
    with open(os.path.join(HERE, "edgekd.json"), encoding="utf-8") as file:
        manifest: dict[str, Any] = json.load(file)
    if manifest.get("schema") != 1:
        raise Problem(f"edgekd.json is of schema {manifest.get('schema')}; this run.py reads schema 1")
    return manifest


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_hash(manifest: Mapping[str, Any], name: str) -> str:
    """The path of a file of the bundle, once its hash is found to be the manifest's."""
    listed = {file["path"]: file["sha256"] for file in manifest["files"]}
    path = os.path.join(HERE, name)
    if name not in listed:
        raise Problem(
            f"{name} is not in the manifest; the models here are {', '.join(m['path'] for m in manifest['models'])}"
        )
    if not os.path.isfile(path) or sha256_of(path) != listed[name]:
        raise Problem(f"{name} is missing or not the file that the manifest was written for; copy the bundle again")
    return path


def choose_model(manifest: Mapping[str, Any], model: str | None, runtime: str | None) -> tuple[str, str]:
    """(file, runtime): an engine built on this board where there is one for the bundle's model, else the ONNX file."""
    if model is None:
        model = manifest["model"]
        engine = built_engine(manifest)
        if engine and runtime != "onnxruntime":
            model = engine
        elif runtime == "tensorrt":
            raise Problem("no engine of the bundle's precision was built here yet: run ./build.sh on this board")
    needed = "tensorrt" if model.endswith(".engine") else "onnxruntime"
    if runtime is not None and runtime != needed:
        raise Problem(f"{model} runs on {needed}, not on {runtime}")
    return model, needed


def built_engine(manifest: Mapping[str, Any]) -> str | None:
    """The engine that was built here in the precision of the bundle's model."""
    precision = next(item["precision"] for item in manifest["models"] if item["path"] == manifest["model"])
    folder = os.path.join(HERE, "engine")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".engine.json"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                if json.load(file).get("precision") == precision:
                    return os.path.join("engine", name[: -len(".json")])
    return None


def load(manifest: Mapping[str, Any], model: str, runtime: str, threads: int) -> tuple[Run, str, str]:
    """(run, runtime's name and version, the ONNX file that the golden outputs belong to)."""
    if runtime == "onnxruntime":
        return (*load_onnx(check_hash(manifest, model), threads), model)
    return load_engine(manifest, os.path.join(HERE, model))


def load_onnx(path: str, threads: int) -> tuple[Run, str]:
    try:
        import onnxruntime
    except ImportError:
        raise Problem("onnxruntime is not installed here: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an app shares its cores
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime's errors share no base class of their own
        raise Problem(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {problem}") from None
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return dict(zip(names, session.run(names, dict(inputs))))  # noqa: B905 - Python 3.8
        except Exception as problem:
            raise Problem(f"onnxruntime refuses the input: {problem}") from None

    return run, f"onnxruntime {onnxruntime.__version__}"


def load_engine(manifest: Mapping[str, Any], path: str) -> tuple[Run, str, str]:
    if not os.path.isfile(path):
        raise Problem(f"there is no engine {os.path.relpath(path, HERE)}: build it on this board with ./build.sh")
    try:
        import tensorrt
        from board import engine, record
    except ImportError as problem:
        raise Problem(f"{problem}; on a Jetson use the system python3, which has TensorRT's bindings") from None
    cuda = engine.Cuda()
    mismatch = record.mismatch(path, tensorrt=tensorrt.__version__, sm=cuda.compute_capability())
    if mismatch:
        raise Problem(f"{mismatch}; engines are not portable: build it again on this board with ./build.sh")
    built_from = record.read(path)["onnx_sha256"]
    hashes = {file["sha256"]: file["path"] for file in manifest["files"]}
    if built_from not in hashes:
        raise Problem("the engine was built from another model than those in this bundle: run ./build.sh again")
    with open(path, "rb") as file:
        return engine.Engine(file.read(), cuda), f"tensorrt {tensorrt.__version__}", hashes[built_from]


# ---------------------------------------------------------------- inputs


def read_image(path: str, height: int, width: int, channels: int) -> Any:
    """An image file as uint8 height × width × channels of that size."""
    if path.endswith(".npy"):
        image = np.load(path, allow_pickle=False)
    elif path.endswith((".ppm", ".pgm")):
        image = read_netpbm(path)
    else:
        try:
            from PIL import Image
        except ImportError:
            raise Problem(
                "Pillow is not installed here: pip install pillow, or give a .ppm, .pgm or .npy file"
            ) from None
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
    if image.ndim == 2:
        image = image[:, :, None]
    if image.dtype != np.uint8 or image.ndim != 3:
        raise Problem(f"{path} is {image.dtype} of shape {image.shape}; expected uint8, height x width x channels")
    if image.shape[2] != channels:
        if image.shape[2] == 1:
            image = np.repeat(image, channels, axis=2)
        elif channels == 1:  # ITU-R BT.601 luma, as Pillow's "L"
            image = np.rint(image[:, :, :3] @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[:, :, None]
        else:
            raise Problem(f"{path} has {image.shape[2]} channels; expected {channels}")
    return resize(image, height, width)


def read_netpbm(path: str) -> Any:
    with open(path, "rb") as file:
        data = file.read()
    header = re.match(rb"(P[56])(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+255\s", data)
    if not header:
        raise Problem(f"{path} is no binary 8-bit PPM or PGM file (P6 or P5)")
    shape = (int(header.group(3)), int(header.group(2)), 3 if header.group(1) == b"P6" else 1)
    pixels = data[header.end() :]
    if len(pixels) < shape[0] * shape[1] * shape[2]:
        raise Problem(f"{path} is cut short")
    return np.frombuffer(pixels, np.uint8, shape[0] * shape[1] * shape[2]).reshape(shape)


def resize(image: Any, height: int, width: int) -> Any:
    """Bilinear with a support as wide as the scale, as Pillow does it, within one grey level; uint8 in and out."""
    if image.shape[:2] == (height, width):
        return image
    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    wide = np.einsum("xw,hwc->hxc", columns, image.astype(np.float64))
    wide = np.clip(np.rint(wide), 0, 255)
    return np.clip(np.rint(np.einsum("yh,hxc->yxc", rows, wide)), 0, 255).astype(np.uint8)


def weights(size: int, wanted: int) -> Any:
    """Row i: how much each of `size` samples adds to the i-th of `wanted` (triangle filter)."""
    scale = size / wanted
    support = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(size)[None, :] + 0.5 - centres[:, None]) / support
    triangle = np.clip(1.0 - distance, 0.0, None)
    return triangle / triangle.sum(axis=1, keepdims=True)


def image_layout(manifest: Mapping[str, Any]) -> tuple[int, int, int]:
    """Height, width, channels of the model's image input."""
    height, width = manifest["preprocessing"]["size"]
    return height, width, len(manifest["preprocessing"]["mean"])


def prepared(manifest: Mapping[str, Any], images: Any) -> dict[str, Any]:
    """Model inputs for a batch of uint8 images: as they are, or normalised where the graph does not do it."""
    if not manifest["preprocessing_in_graph"]:
        mean = np.array(manifest["preprocessing"]["mean"], np.float32)
        std = np.array(manifest["preprocessing"]["std"], np.float32)
        images = ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    return {manifest["inputs"][0]["name"]: np.ascontiguousarray(images)}


def read_inputs(manifest: Mapping[str, Any], path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise Problem(f"there is no file {path}")
    if path.endswith(".npz"):
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    if manifest["preprocessing"] is not None:
        return prepared(manifest, read_image(path, *image_layout(manifest))[None])
    if len(manifest["inputs"]) != 1 or not path.endswith(".npy"):
        raise Problem(f"give an .npz file with {', '.join(item['name'] for item in manifest['inputs'])}")
    return {manifest["inputs"][0]["name"]: np.load(path, allow_pickle=False)}


# ---------------------------------------------------------------- what it does


def golden(manifest: Mapping[str, Any], model: str) -> tuple[dict[str, Any], dict[str, Any], tuple[float, float]]:
    """(inputs, expected outputs of `model`, (largest difference, smallest cosine))."""
    with np.load(check_hash(manifest, manifest["golden"]["path"]), allow_pickle=False) as arrays:
        inputs = {key[len("input/") :]: arrays[key] for key in arrays.files if key.startswith("input/")}
        mark = f"expected/{model}/"
        expected = {key[len(mark) :]: arrays[key] for key in arrays.files if key.startswith(mark)}
        largest, cosine = arrays[f"tolerance/{model}"]
    return inputs, expected, (float(largest), float(cosine))


def selftest(manifest: Mapping[str, Any], run: Run, runtime: str, model: str) -> int:
    """0 where the golden outputs are computed within their tolerance, else 1."""
    inputs, expected, (largest, cosine) = golden(manifest, model)
    samples = len(next(iter(inputs.values())))
    rows = [run({name: array[i : i + 1] for name, array in inputs.items()}) for i in range(samples)]
    good = True
    for name, wanted in expected.items():
        got = np.concatenate([np.asarray(row[name]) for row in rows]).astype(np.float64)
        wanted = wanted.astype(np.float64)
        if got.shape != wanted.shape or not np.isfinite(got).all():
            sys.stdout.write(f"selftest FAILED: output '{name}' has shape {got.shape} or values that are no numbers\n")
            return 1
        difference = float(np.abs(got - wanted).max())
        norms = float(np.linalg.norm(got) * np.linalg.norm(wanted))
        alike = float((got * wanted).sum() / norms) if norms else float(difference == 0)
        within = difference <= largest and alike >= cosine
        good = good and within
        sys.stdout.write(
            f"selftest {'passed' if within else 'FAILED'}: {model} on {runtime}, output '{name}', {samples} samples: "
            f"largest difference {difference:.4g} (allowed {largest:.4g}), cosine {alike:.6f} (at least {cosine})\n"
        )
    if not good:
        sys.stdout.write(
            "The model does not compute here what it computed when the bundle was written. Is it the right file, is "
            "the runtime of a supported version, or was the engine built for another board?\n"
        )
    return 0 if good else 1


def bench(
    manifest: Mapping[str, Any], run: Run, runtime: str, model: str, file: str, threads: int, quick: bool
) -> dict[str, Any]:
    """Milliseconds for one sample: warm up until steady, then 200 runs and 2 s at least (quick: 50 and 0.5 s)."""
    samples = golden(manifest, model)[0]
    one = {name: array[:1] for name, array in samples.items()}
    cpus = pin(threads)
    warm_up = steady(run, one)
    before = machine()
    least, least_s = (50, 0.5) if quick else (200, 2.0)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < least or time.perf_counter() - begun < least_s:
        start = time.perf_counter()
        run(one)
        times.append((time.perf_counter() - start) * 1e3)
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    random = np.random.default_rng(0)
    medians = [np.median(random.choice(times, len(times))) for _ in range(500)]
    low, high = (float(value) for value in np.percentile(medians, (2.5, 97.5)))
    after = machine()
    return {
        "metric": "latency",
        "unit": "ms",
        "latency_ms": {
            "p50": p50,
            "p90": p90,
            "p99": p99,
            "mean": float(np.mean(times)),
            "n": len(times),
            "low": low,
            "high": high,
            "origin": "device",
            "device": device_name(),
            "threads": threads,
            "power_mode": power_mode(),
        },
        "conditions": {
            "bundle": manifest["name"],
            "target": manifest["target"],
            "file": file,
            "sha256": sha256_of(os.path.join(HERE, file)),
            "runtime": runtime,
            "batch": 1,
            "warm_up_runs": warm_up,
            "pinned_to_cpus": cpus,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "machine_before": before,
            "machine_after": after,
        },
    }


def steady(run: Run, inputs: Mapping[str, Any]) -> int:
    """Run until two halves of the last 40 runs have medians within 2 %, or for 5 s; the number of runs."""
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < 5.0:
        start = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - start)
        if len(times) >= 40 and len(times) % 20 == 0:
            earlier, later = np.median(times[-40:-20]), np.median(times[-20:])
            if abs(later / earlier - 1) < 0.02:
                break
    return len(times)


def pin(threads: int) -> list[int] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cpus)
    return cpus


def first_line(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return file.read(4096).rstrip(b"\0\n").decode(errors="replace")
    except OSError:
        return None


def device_name() -> str:
    board = first_line("/proc/device-tree/model")
    if board:
        return board
    found = re.search(r"model name\s*:\s*(.+)", first_line("/proc/cpuinfo") or "")
    return found.group(1) if found else f"{platform.system()} {platform.machine()}"


def power_mode() -> str | None:
    """The power mode of a Jetson as nvpmodel tells it, None elsewhere."""
    try:
        done = subprocess.run(
            ["nvpmodel", "-q"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"NV Power Mode: *(.+)", done.stdout.decode(errors="replace"))
    return found.group(1).strip() if found else None


def machine() -> dict[str, Any]:
    """Load, clock and temperatures, as far as the machine tells them."""
    zones = [f"/sys/class/thermal/thermal_zone{index}/temp" for index in range(20)]
    values = [first_line(zone) for zone in zones]
    return {
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpu_khz": first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"),
        "governor": first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "temperatures_celsius": [int(value) / 1000 for value in values if value and re.fullmatch(r"-?\d+", value)],
    }


def softmax(logits: Any) -> Any:
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    return exponents / exponents.sum()


def predict(manifest: Mapping[str, Any], run: Run, given: argparse.Namespace) -> None:
    outputs = run(read_inputs(manifest, given.input))
    output = np.asarray(next(iter(outputs.values())))
    labels, form = manifest["labels"], manifest.get("task", {}).get("labels", "classes")
    known = output.ndim >= 2 and output.shape[1] == len(labels) and (output.ndim > 2) == (form == "maps")
    decided = output.argmax(axis=1).astype(np.int32) if known and form == "maps" else output
    if given.save:
        np.save(given.save, decided)
    if not known:
        for name, value in outputs.items():
            sys.stdout.write(f"{name} {value.dtype} {value.shape}\n{value}\n")
        return
    for row in decided:
        if form == "values":
            sys.stdout.write("".join(f"{value:12.6g}  {label}\n" for value, label in zip(row, labels)))  # noqa: B905
        elif form == "flags":
            likely = 0.5 * (1 + np.tanh(row.astype(np.float64) / 2))
            write_ranked(likely, labels, len(labels), given.threshold, f"no label reaches {given.threshold}")
        elif form == "maps":
            write_ranked(np.bincount(row.ravel(), minlength=len(labels)) / row.size, labels, given.top, 1e-9, "")
        else:
            write_ranked(softmax(row), labels, given.top, 0.0, "")


def write_ranked(shares: Any, labels: Any, most: int, least: float, otherwise: str) -> None:
    """The largest shares with their labels, at most so many and none below `least`."""
    order = [index for index in np.argsort(-shares, kind="stable")[:most] if shares[index] >= least]
    for index in order:
        sys.stdout.write(f"{shares[index]:7.4f}  {labels[index]}\n")
    if not order:
        sys.stdout.write(f"{otherwise}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", help="an image, an .npy array or an .npz file with named arrays")
    parser.add_argument("--selftest", action="store_true", help="check the golden outputs")
    parser.add_argument("--bench", action="store_true", help="measure the latency, JSON on stdout")
    parser.add_argument("--quick", action="store_true", help="a shorter, less certain measurement")
    parser.add_argument("--model", help="a model file of the bundle, or engine/NAME.engine")
    parser.add_argument("--runtime", choices=("onnxruntime", "tensorrt"))
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (default 1)")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show (default 5)")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability from which a label holds (0.5)")
    parser.add_argument("--save", metavar="FILE.npy", help="write the output there: a class map, logits or values")
    given = parser.parse_args()
    if given.threads < 1 or given.top < 1:
        parser.error("--threads and --top take a number of at least 1")
    if not (given.input or given.selftest or given.bench):
        parser.error("give an input, --selftest or --bench")
    manifest = read_manifest()
    file, kind = choose_model(manifest, given.model, given.runtime)
    run, runtime, model = load(manifest, file, kind, given.threads)
    status = selftest(manifest, run, runtime, model) if given.selftest else 0
    if given.input and not status:
        predict(manifest, run, given)
    if given.bench and not status:
        found = bench(manifest, run, runtime, model, file, given.threads, given.quick)
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Problem, RuntimeError, ValueError, OSError) as problem:
        sys.stderr.write(f"run.py: {problem}\n")
        sys.exit(1)
