"""CIFAR-10 end to end: ResNet-56 teacher → ResNet-20 student → int8, against the teacher's fp32 ONNX on this machine.

    python benchmarks/cifar10.py [--data ../shared/data] [--quick]

Runs `edgekd compress --target host --target jetson` on real images and appends one JSON line to
results/cifar10.jsonl: accuracies with intervals, sizes, p50 latencies from the same interleaved rounds, seconds.
Killed, it goes on where it was when it is started again (the store is kept in benchmarks/.store).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECIPE = """\
name = "cifar10"
seed = {seed}

[data]
name = "imagefolder"
path = "{data}/cifar10/cifar10-images.zip"

[teacher]
model = "resnet56"
weights = "{data}/teachers/resnet56-cifar10.safetensors"
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[student]
model = "resnet20"

[[loss]]
name = "kd"
weight = 0.9
temperature = 4.0
[[loss]]
name = "ce"
weight = 0.1

[distill]
epochs = {epochs}
batch_size = 128
learning_rate = 0.2
precision = "bf16"
views = 4

[augment]
crop_pixels = 4
flip = true

[budget]
max_accuracy_drop = 0.025
"""


def main() -> None:
    """Run it and write the result down."""
    parser = argparse.ArgumentParser(description="CIFAR-10 end to end")
    parser.add_argument(
        "--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder with cifar10/ and teachers/"
    )
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    work = HERE / ".store" / "cifar10"
    work.mkdir(parents=True, exist_ok=True)
    recipe = work / "edgekd.toml"
    recipe.write_text(RECIPE.format(seed=options.seed, epochs=options.epochs, data=options.data.resolve()))
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", "compress", str(recipe)]
    command += [
        "--target",
        "host",
        "--target",
        "jetson",
        "--store",
        str(HERE / ".store"),
        "-o",
        str(work / "run"),
        "--json",
    ]
    command += ["--quick"] if options.quick else []
    begun = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(done.returncode)
    result = summary(json.loads(done.stdout)) | {"epochs": options.epochs, "seed": options.seed, "quick": options.quick}
    result["wall_s"] = round(time.time() - begun, 1)
    with (HERE / "results" / "cifar10.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report.json that this benchmark is about."""
    rows = {row["id"]: row for row in report["variants"]}
    ratios = {
        f"{c['candidate']} vs {c['baseline']}": {"speed_up": round(1 / c["ratio"]["value"], 3), "verdict": c["verdict"]}
        for c in report["comparisons"]
    }
    return {
        "accuracy": {name: row["accuracy"] for name, row in rows.items()},
        "drop": {name: row["drop"] for name, row in rows.items()},
        "agreement": {name: row["agreement"] for name, row in rows.items()},
        "size_bytes": {name: row["size_bytes"] for name, row in rows.items() if row["size_bytes"]},
        "p50_ms": {name: row["latency_ms"]["p50"] for name, row in rows.items() if row["latency_ms"]},
        "ratios": ratios,
        "chosen": report["chosen"],
        "timings_s": report["timings_s"],
        "environment": {key: report["environment"].get(key) for key in ("packages", "cpu", "python")},
    }


if __name__ == "__main__":
    main()
