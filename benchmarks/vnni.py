"""int8 files on x86 CPUs without VNNI: what ONNX Runtime's 16-bit sums cost, and that edgekd's files do not pay it.

    python benchmarks/vnni.py [--qemu qemu-x86_64] [--images 500] [--models resnet20 resnet56]

Every file runs on this machine's CPU and, the same library and file, on a Haswell (AVX2, neither AVX-512 nor VNNI) that
QEMU's user mode emulates (Debian: qemu-user; 7.2 and newer know AVX2). Written down, one JSON line each:

- part "layers": single quantized layers on random values; how many of their outputs are not the exact ones, and how
  many are not those of sums that are clipped pair by pair (edgekd.quantize.saturation.clipped_sums);
- part "models": trained networks as int8 with weights of 8 bits, of 7 bits, and as edgekd writes them (8 bits, layers
  where clipping matters relieved): accuracy, and decisions that differ from the same file on this CPU.

An emulated CPU shows what is computed, not how fast. Killed, it goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
MODELS = {"resnet20": "resnet20-published.th", "resnet56": "resnet56-cifar10.safetensors"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPUS = ("here", "Haswell")
LAYERS = {  # name → inputs, outputs, kernel, groups
    "3 channels": (3, 16, 3, 1), "6 channels": (6, 8, 3, 1), "16 channels": (16, 16, 3, 1),
    "64 channels": (64, 64, 3, 1), "1×1": (16, 32, 1, 1), "2 groups": (16, 16, 3, 2),
    "depthwise": (16, 16, 3, 16), "depthwise × 2": (16, 32, 3, 16), "linear": (64, 32, 0, 1),
}  # fmt: skip


def main() -> None:
    """Run what is not there yet, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shared = HERE.parent.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared, help="folder with cifar10/ and teachers/")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "vnni.jsonl")
    parser.add_argument("--store", type=Path, default=HERE / ".store")
    parser.add_argument("--qemu", default="qemu-x86_64", help="QEMU's user mode for x86-64")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    if shutil.which(options.qemu) is None:
        sys.exit(f"{options.qemu} is not here: install qemu-user, or say --qemu PATH")
    version = subprocess.run([options.qemu, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    work = options.store / "vnni"
    work.mkdir(parents=True, exist_ok=True)
    from ledger import Ledger

    ledger = Ledger(options.results)
    layers(ledger, options.qemu, version, work)
    for model in options.models:
        networks(ledger, options, version, work, model)
    print(table(ledger.rows()))


def layers(ledger: Any, qemu: str, version: str, work: Path) -> None:
    """Single layers, bit by bit."""
    import onnx

    from edgekd.quantize.saturation import clipped_sums

    for name, form in LAYERS.items():
        for cpu in CPUS:
            settings = {"part": "layers", "layer": name, "cpu": cpu, "qemu": version if cpu != "here" else None}
            if ledger.find(settings):
                continue
            model, x, weight, step = layer(form)
            path = work / "layer.onnx"
            onnx.save(model, path)
            found = answers(path, x, cpu, qemu, work)
            exact, clipped = (expected(form, x, weight, step, sums) for sums in (None, clipped_sums))
            ledger.add(
                settings, outputs=int(found.size), differ_from_exact=int((found != exact).sum()),
                differ_from_clipped=int((found != clipped).sum()), clipping_changes=int((exact != clipped).sum()),
            )  # fmt: skip


def layer(form: tuple[int, int, int, int]) -> tuple[Any, np.ndarray, np.ndarray, np.float32]:
    """A Conv (a Gemm, where the kernel is 0) between Q and DQ, random bytes for it, its weights, the output's step."""
    from onnx import TensorProto, helper, numpy_helper

    inputs, outputs, kernel, groups = form
    random = np.random.default_rng(0)
    side, shape = ([8, 8], (outputs, inputs // groups, kernel, kernel)) if kernel else ([], (outputs, inputs))
    weight = random.integers(-127, 128, shape).astype(np.int8)
    x = random.integers(0, 256, (4, inputs, *side)).astype(np.uint8)
    step = np.float32(2.0**-4 if groups == inputs else 2.0**-2)
    held: dict[str, np.ndarray] = {
        "xs": np.array(2.0**-6, np.float32), "xz": np.array(100, np.uint8), "w": weight,
        "ws": np.full(outputs, 2.0**-6, np.float32), "wz": np.zeros(outputs, np.int8), "ys": np.array(step),
        "yz": np.array(128, np.uint8),
    }  # fmt: skip
    more: dict[str, Any] = {"pads": [kernel // 2] * 4, "group": groups} if kernel else {"transB": 1}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv" if kernel else "Gemm", ["xd", "wd"], ["c"], **more),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info("x", TensorProto.UINT8, ["b", inputs, *side])],
        [helper.make_tensor_value_info("logits", TensorProto.UINT8, ["b", outputs, *side])],
        [numpy_helper.from_array(value, key) for key, value in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), x, weight, step


def expected(
    form: tuple[int, int, int, int], x: np.ndarray, weight: np.ndarray, step: np.float32, clipped: Any
) -> np.ndarray:
    """What the layer gives where sums are exact, or those of `clipped`."""
    inputs, outputs, kernel, groups = form
    if not kernel:
        sums = clipped(x, weight)[0] if clipped else x.astype(np.int64) @ weight.T.astype(np.int64)
        total = sums - 100 * weight.sum(1, dtype=np.int64)
    else:
        total = np.zeros((len(x), outputs, 8, 8), np.int64)
        around = kernel // 2
        padded = np.pad(x, ((0, 0), (0, 0), (around, around), (around, around)), constant_values=100)
        width, share = inputs // groups, outputs // groups
        for row in range(8):
            for column in range(8):
                window = padded[:, :, row : row + kernel, column : column + kernel]
                for group in range(groups):
                    taken = window[:, group * width : (group + 1) * width]
                    own = weight[group * share : (group + 1) * share]
                    left = np.moveaxis(taken, 1, -1).reshape(len(x), -1)
                    right = np.moveaxis(own, 1, -1).reshape(share, -1)
                    sums = clipped(left, right)[0] if clipped else left.astype(np.int64) @ right.T.astype(np.int64)
                    total[:, group * share : (group + 1) * share, row, column] = sums - 100 * right.sum(
                        1, dtype=np.int64
                    )
    levels = np.rint(total.astype(np.float32) * np.float32(2.0**-12) / step) + 128
    made: np.ndarray = np.clip(levels, 0, 255).astype(np.uint8)
    return made


def networks(ledger: Any, options: argparse.Namespace, version: str, work: Path, model: str) -> None:
    """A trained network in each form, here and there."""
    shape = {"part": "models", "model": model, "images": options.images, "calibration": options.calibration, "seed": 0}
    wanted = [
        shape | {"form": form, "cpu": cpu, "qemu": version if cpu != "here" else None}
        for form in ("fp32", "8 bit", "7 bit", "edgekd")
        for cpu in CPUS[: 1 if form == "fp32" else 2]
    ]
    if all(ledger.find(settings) for settings in wanted):
        return
    folder = work / f"{model}-{options.images}-{options.calibration}"
    images, labels, accounts = made(folder, options, model)
    for settings in wanted:
        if ledger.find(settings):
            continue
        path = folder / f"{settings['form'].replace(' ', '')}.onnx"
        begun = time.perf_counter()
        found = answers(path, images, settings["cpu"], options.qemu, work)
        seconds = round(time.perf_counter() - begun, 1)
        here = found if settings["cpu"] == "here" else answers(path, images, "here", options.qemu, work)
        ledger.add(
            settings, accuracy=float((found.argmax(1) == labels).mean()),
            decisions_that_differ=int((found.argmax(1) != here.argmax(1)).sum()),
            max_abs=float(np.abs(found - here).max()), largest=float(np.abs(here).max()),
            account=accounts.get(settings["form"]), seconds=seconds,
        )  # fmt: skip


def made(folder: Path, options: argparse.Namespace, model: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The files of a network in `folder`, test images with their labels, and what relieving said."""
    import torch

    from edgekd import data, export, models, target
    from edgekd.quantize import quantize, saturation
    from edgekd.types import ModelSpec, Part

    torch.set_num_threads(1)
    rules = target.load("host").quantization
    found = data.load(Part("imagefolder", {"path": str(options.data / "cifar10" / "cifar10-images.zip")}), 0)
    chosen = np.random.default_rng(0).permutation(len(found.test))[: options.images]
    (batch,) = found.test.batches([chosen])
    images = next(iter(batch.inputs.values()))
    if (folder / "account.json").exists():
        return images, batch.labels, dict(json.loads((folder / "account.json").read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    order = np.arange(min(options.calibration, len(found.calibration)))
    parts = [order[i : i + 32] for i in range(0, len(order), 32)]
    calibration = [each.inputs for each in found.calibration.batches(parts)]
    weights = str(options.data / "teachers" / MODELS[model])
    network = models.build(
        ModelSpec(model, weights=weights, mean=MEAN, std=STD), classes=10, inputs=found.inputs, images=True
    )
    export.export(network, calibration[0], opset=18, preprocessing=True, path=folder / "fp32.onnx")

    def quantized(bits: Any, name: str) -> None:
        quantize(
            network, calibration, replace(rules, weight_bits=bits), opset=18, preprocessing=True, path=folder / name,
            say=lambda event, /, **fields: None,
        )  # fmt: skip

    quantized(8, "8bit.onnx")
    quantized(7, "7bit.onnx")
    shutil.copy(folder / "8bit.onnx", folder / "edgekd.onnx")
    accounts = {"edgekd": saturation.relieve(folder / "edgekd.onnx", calibration[0])}
    (folder / "account.json").write_text(json.dumps(accounts), encoding="utf-8")
    return images, batch.labels, accounts


def answers(path: Path, x: np.ndarray, cpu: str, qemu: str, work: Path) -> np.ndarray:
    """What ONNX Runtime gives for the samples, one after the other, on this CPU or an emulated one."""
    given, written = work / "given.npy", work / "written.npy"
    np.save(given, x)
    command = [sys.executable, str(Path(__file__).resolve()), "--answer", str(path), str(given), str(written)]
    if cpu != "here":
        command = [qemu, "-cpu", cpu, *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{cpu}: {done.stderr[-2000:]}")
    found: np.ndarray = np.load(written)
    return found


def answer(path: str, given: str, written: str) -> None:
    """In the process of its own: nothing but numpy and ONNX Runtime is imported."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    name, x = session.get_inputs()[0].name, np.load(given)
    np.save(written, np.concatenate([session.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was found, as Markdown."""
    return "\n".join([*_layer_lines(rows), "", *_model_lines(rows)])


def _layer_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| layer | CPU | outputs | not exact | not those of clipped sums |"
    yield "|---|---|---|---|---|"
    for row in rows:
        s = row["settings"]
        if s["part"] == "layers":
            counts = (row["outputs"], row["differ_from_exact"], row["differ_from_clipped"])
            yield f"| {s['layer']} | {s['cpu']} | " + " | ".join(map(str, counts)) + " |"


def _model_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| model | weights | CPU | images | accuracy | decisions that differ | largest difference of logits |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        s = row["settings"]
        if s["part"] == "models":
            yield (
                f"| {s['model']} | {s['form']} | {s['cpu']} | {s['images']} | {row['accuracy']:.4f} "
                f"| {row['decisions_that_differ']} | {row['max_abs']:.3f} of {row['largest']:.1f} |"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(*sys.argv[2:5])
    else:
        main()
