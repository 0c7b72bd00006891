"""Peak memory of quantization with few and with many calibration images, each in a process of its own.

    python benchmarks/calibration.py [--images 100 10000] [--methods auto "equalize mse rounding"]
    python benchmarks/calibration.py --table

The images are CIFAR-10's where they lie beside the checkout, else random ones; they are decoded batch by batch and let
go, as a streamed data set does it. The network is a ResNet-20 with random weights, whose values between layers take as
much memory as a trained one's. One JSON line a process goes to results/calibration.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edgekd import models, quantize, target
from edgekd.types import Arrays, Json, ModelSpec, TensorSpec

from ledger import DATA, RESULTS, Ledger  # isort: skip  # a script beside this one

BATCH = 32
INPUTS = (TensorSpec("image", "uint8", ("batch", 32, 32, 3)),)
ARCHIVE = DATA / "cifar10" / "cifar10-images.zip"


class Images:
    """So many images, decoded anew each time they are read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Arrays]:
        if not ARCHIVE.exists():
            for start in range(0, self.count, BATCH):
                shape = (min(BATCH, self.count - start), 32, 32, 3)
                yield {"image": np.random.default_rng(start).integers(0, 256, shape, dtype=np.uint8)}
            return
        with zipfile.ZipFile(ARCHIVE) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            order = np.random.default_rng(0).permutation(len(names))[: self.count]
            for start in range(0, self.count, BATCH):
                chosen = [names[i] for i in order[start : start + BATCH]]
                yield {"image": np.stack([np.asarray(Image.open(BytesIO(archive.read(name)))) for name in chosen])}


def main() -> None:
    """Run what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description="peak memory of calibration")
    parser.add_argument("--images", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--methods", nargs="+", default=["minmax", "auto", "equalize mse rounding"])
    parser.add_argument("--target", default="host")
    parser.add_argument("--results", type=Path, default=RESULTS / "calibration.jsonl")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.child is not None:
        print(json.dumps(child(asked.child, asked.methods[0], asked.target)))
        return
    ledger = Ledger(asked.results)
    for method in [] if asked.table else asked.methods:
        for count in asked.images:
            settings = {
                "images": count, "method": method, "target": asked.target, "model": "resnet20", "batch": BATCH,
                "real": ARCHIVE.exists(), "quantizer": quantize.VERSION,
            }  # fmt: skip
            if ledger.find(settings) is None:
                command = [sys.executable, __file__, "--child", str(count), "--methods", method]
                done = subprocess.run([*command, "--target", asked.target], stdout=subprocess.PIPE, check=True)
                ledger.add(settings, **json.loads(done.stdout.splitlines()[-1]))
    print(table(ledger.rows()))


def child(count: int, method: str, board: str) -> dict[str, Any]:
    """Quantize in this process; its peak memory before and after."""
    torch.manual_seed(0)
    network = models.build(ModelSpec("resnet20"), classes=10, inputs=INPUTS, images=True).eval()
    rules = target.load(board)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        meta = quantize.quantize(
            network, Images(count), rules.quantization, opset=rules.opset, preprocessing=True, say=silent,
            path=Path(folder) / "model.onnx", method="auto" if method == "auto" else method.split(),  # type: ignore[arg-type]
        )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(time.perf_counter() - begun, 1)
    tried = [" + ".join(one["methods"]) for one in meta["methods"]]  # type: ignore[index, union-attr, call-overload, arg-type]
    return {"peak_bytes": peak, "before_bytes": before, "seconds": seconds, "samples": meta["samples"], "tried": tried}


def silent(event: str, /, **fields: Json) -> None:
    """Rows tell all there is."""


def table(rows: list[dict[str, Any]]) -> str:
    """Peak memory by method and number of images, and how far apart the largest and the smallest are."""
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        own = row["settings"]
        if own["quantizer"] == quantize.VERSION:
            groups.setdefault((own["method"], own["target"]), {})[own["images"]] = row
    counts = sorted({count for found in groups.values() for count in found})
    head = [f"MB with {count:,} images | s" for count in counts]
    lines = ["| method | target | " + " | ".join(head) + " | apart |", "|---" * (3 + 2 * len(counts)) + "|"]
    for (method, board), found in groups.items():
        cells = [f"{found[c]['peak_bytes'] / 1e6:.0f} | {found[c]['seconds']}" if c in found else " | " for c in counts]
        peaks = [row["peak_bytes"] for row in found.values()]
        lines.append(f"| {method} | {board} | " + " | ".join(cells) + f" | {max(peaks) / min(peaks) - 1:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
