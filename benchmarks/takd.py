"""Teacher assistants on CIFAR-10: ResNet-56 → ResNet-32 → ResNet-8 against ResNet-56 → ResNet-8, same total budget.

    python benchmarks/takd.py [--seeds 0 1 2] [--epochs 12] [--assistant-epochs 6]

Three trainings a seed, each a JSON line of results/takd.jsonl: the chain (assistant, then student), the direct student
with as many epochs as the chain's student, and the direct student with the whole budget of the chain, counted in
multiply-accumulates of training (forward and backward of what is trained; teachers' answers are kept, hence free).

Reference: Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh: Improved Knowledge Distillation via Teacher
Assistant, AAAI 2020.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekd import distillation
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import Augment, TrainOptions

from ledger import CACHE_GB  # isort: skip  # scripts beside this one
from quality import HERE, KD, Cifar, quiet  # isort: skip  # a script beside this one

RESULTS = HERE / "results" / "takd.jsonl"
VIEWS = 6  # of every image: what a teacher said of them is kept, and shared with quality.py
# Multiply-accumulates of one forward pass at 32 × 32 (edgekd's own count of the exported graphs).
MACS = {"resnet8": 12_500_000, "resnet32": 69_100_000}


def main() -> None:
    """Run what is not there yet and print the means."""
    parser = argparse.ArgumentParser(description="Teacher assistants on CIFAR-10")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--assistant-epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args()
    cifar = Cifar(asked.data)
    whole = asked.epochs + round(asked.assistant_epochs * MACS["resnet32"] / MACS["resnet8"])
    for seed in asked.seeds:
        chain = [("resnet32", asked.assistant_epochs), ("resnet8", asked.epochs)]
        for way in (chain, [("resnet8", asked.epochs)], [("resnet8", whole)]):
            _run(cifar, way, seed, asked.threads)
    ways: dict[str, list[float]] = {}
    for row in _rows():
        ways.setdefault(row["way"], []).append(100 * row["accuracy"]["value"])
    for name, values in ways.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{name}: {statistics.fmean(values):.2f}{spread} ({len(values)} seeds)")


def _run(cifar: Cifar, way: list[tuple[str, int]], seed: int, threads: int) -> None:
    """Distil along a chain that begins at the teacher, and write down how good its end is."""
    name = " → ".join(["resnet56", *(f"{model} ({epochs} epochs)" for model, epochs in way)])
    if any(row["way"] == name and row["seed"] == seed for row in _rows()):
        return
    teacher, seconds, steps = cifar.teacher, 0.0, []
    for model, epochs in way:
        teacher, meta = _distilled(cifar, teacher, model, epochs, seed, threads)
        found = cifar.judged(teacher)
        seconds += float(meta["train_s"])
        steps.append({"model": model, "epochs": epochs, "accuracy": found.value, "train_s": meta["train_s"]})
    row = {"way": name, "seed": seed, "accuracy": asdict(found), "steps": steps, "train_s": round(seconds, 1)}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _distilled(
    cifar: Cifar, teacher: Network, model: str, epochs: int, seed: int, threads: int
) -> tuple[Network, dict[str, Any]]:
    network = cifar.network(model, seed)
    work = HERE / ".store" / "takd" / f"{model}-{epochs}-{seed}-{id(teacher) == id(cifar.teacher)}"
    work.mkdir(parents=True, exist_ok=True)
    options = TrainOptions(
        epochs=epochs,
        learning_rate=0.2,
        precision="bf16",
        threads=threads,
        views=VIEWS,
        compile="off",
        cache_gb=CACHE_GB,
    )
    meta = distillation.distill(
        network, teacher, cifar.data, [loss_term(table, "kd") for table in KD], options,
        Augment(crop_pixels=4, flip=True), task=cifar.task, seed=seed, work=work,
        cache=HERE / ".store" / "answers", say=quiet,
    )  # fmt: skip
    shutil.rmtree(work)
    return network, meta


def _rows() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
