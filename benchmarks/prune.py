"""Pruning and distillation on CIFAR-10: ResNet-56 at 50 % and 25 % of its multiply-accumulates.

    python benchmarks/prune.py [--parts 0.5 0.25] [--seeds 0] [--epochs 8] [--losses layers]
    python benchmarks/prune.py --table

Each student is made as a recipe with model = "pruned" makes it, in rounds; every round is a step of a store, so that
the script may be killed and goes on inside a round, and the smaller student begins with the larger one's first round.
One JSON line a student goes to results/prune.jsonl: accuracy, its drop against the teacher (paired on the same images),
what is left of MACs and parameters, and the latency of both fp32 graphs on ONNX Runtime, one thread, in turns.

Goals: a drop of at most 0.5 point at 50 % of the MACs, and of 1.5 points at 25 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import distillation, export, plugins, rounds, training
from edgekd import recipe as recipes
from edgekd import target as targets
from edgekd.bench import accuracy, compare, conditions, latency
from edgekd.deploy import Source
from edgekd.models.network import Network
from edgekd.pruning import VERSION
from edgekd.recipe import Recipe
from edgekd.store import MANIFEST, Store
from edgekd.training import School, Subject
from edgekd.types import Backend

from ledger import CACHE_GB, DATA, RESULTS, STORE, Ledger  # isort: skip  # scripts beside this one
from quality import KD, MEAN, STD, quiet  # isort: skip

LEDGER = Ledger(RESULTS / "prune.jsonl")
VIEWS = 6  # of every image, as quality.py and takd.py have them: what the teacher says of them is shared
LOSSES: dict[str, list[dict[str, Any]]] = {
    "outputs": KD,  # as `auto` has it of a pruned copy
    "layers": [  # as `auto` has it of two convolutional networks
        {"name": "ce"},
        {"name": "kd", "temperature": 1.0},
        {"name": "srd", "weight": 2.0, "pairs": [["layer3", "layer3"], ["linear:in", "linear:in"]]},
    ],
}
GOALS = {0.5: 0.005, 0.25: 0.015}  # part of the MACs → accuracy that may be lost
HOST = targets.load("host")


def main() -> None:
    """Make what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description="Pruning on CIFAR-10")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--parts", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--round-epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--losses", default="outputs", choices=list(LOSSES))
    parser.add_argument("--importance", default="taylor")
    parser.add_argument("--local", action="store_true", help="each layer loses the same part")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what is there, make nothing")
    asked = parser.parse_args()
    for seed in () if asked.table else asked.seeds:
        for part in asked.parts:
            make(asked, part, seed)
    print(table())


def made_of(asked: argparse.Namespace, part: float, seed: int) -> Recipe:
    """The recipe of one student."""
    document: dict[str, Any] = {
        "name": "prune", "seed": seed,
        "data": {"name": "imagefolder", "path": str(asked.data / "cifar10" / "cifar10-images.zip")},
        "teacher": {
            "model": "resnet56", "weights": str(asked.data / "teachers" / "resnet56-cifar10.safetensors"),
            "mean": list(MEAN), "std": list(STD),
        },
        "student": {"model": "pruned"},
        "prune": {
            "macs": part, "importance": asked.importance, "global_ranking": not asked.local,
            "round_to": asked.round_to, "epochs": asked.round_epochs,
        },
        "loss": LOSSES[asked.losses],
        "distill": {
            "epochs": asked.epochs, "learning_rate": asked.learning_rate, "precision": "bf16",
            "threads": asked.threads, "views": VIEWS, "cache_gb": CACHE_GB, "compile": "off",
        },
        "augment": {"crop_pixels": 4, "flip": True},
    }  # fmt: skip
    return recipes.parse(document, source="benchmarks/prune.py", folder=Path())


def make(asked: argparse.Namespace, part: float, seed: int) -> None:
    """One student, unless the same is there."""
    recipe = made_of(asked, part, seed)
    kept = {key: value for key, value in asdict(recipe.distill).items() if key not in ("threads", "cache_gb")}
    settings = {
        "model": "resnet56", "part": part, "seed": seed, "prune": asdict(recipe.prune) if recipe.prune else None,
        "losses": LOSSES[asked.losses], "distill": kept, "augment": asdict(recipe.augment), "pruning": VERSION,
    }  # fmt: skip
    if LEDGER.find(settings) is not None:
        return
    store = STORE / "prune"
    store.mkdir(parents=True, exist_ok=True)
    # seeds of the split are always 0: the data, and with them the teacher's kept answers, are the same for all
    subjects = (training.read(recipe.task, 0, recipe.source),)
    school = School(recipe, subjects, Store(store, quiet), STORE / "answers", None, quiet)
    teachers = training.teachers(school, subjects[0])
    found = rounds.student(school, [teachers], [HOST])
    teacher, student = teachers[0].network, found.student.network
    truth = accuracy.labels(subjects[0].data.test)
    scores = [
        subjects[0].task.scores(distillation.evaluate(each, subjects[0].data.test), truth)
        for each in (teacher, found.cut.network, student)
    ]
    account = asdict(found.account)
    row = LEDGER.add(
        settings, teacher=asdict(accuracy.mean(scores[0])), cut=asdict(accuracy.mean(scores[1])),
        accuracy=asdict(accuracy.mean(scores[2])), drop=asdict(accuracy.drop(scores[0], scores[2])),
        macs=account["macs_after"] / account["macs_before"],
        parameters=account["parameters_after"] / account["parameters_before"], pruning=account,
        latency=timed(subjects[0], teachers[0], student), train_s=_seconds(store, found.student),
    )  # fmt: skip
    print(f"{part} seed {seed}: {row['accuracy']['value']:.4f}", file=sys.stderr, flush=True)


def timed(subject: Subject, teacher: Source, student: Network) -> dict[str, Any]:
    """Both graphs in fp32 on ONNX Runtime, one thread, in turns; ratio < 1: the student is faster."""
    backend: Backend = plugins.build("backends", HOST.backend)
    stored = next(iter(subject.data.calibration.batches([np.arange(1)]))).inputs
    sessions = {}
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        for name, network in (("teacher", teacher.network), ("student", student)):
            path = Path(folder) / f"{name}.onnx"
            export.export(network.cpu(), stored, opset=HOST.opset, preprocessing=True, path=path)
            sessions[name] = backend.load(path, 1)
        timing = latency.measure(sessions, stored, threads=1, quick=False, say=quiet)
        for session in sessions.values():
            session.close()
    pairs = [asdict(each) for each in compare.pairs(timing.series_ns)]
    medians = {name: float(np.median(series)) / 1e6 for name, series in timing.series_ns.items()}
    return {
        "p50_ms": medians, "ratio": medians["student"] / medians["teacher"], "comparisons": pairs,
        "notes": list(timing.notes), "device": conditions.device_name(),
    }  # fmt: skip


def _seconds(store: Path, student: Source) -> float:
    """Of all distillations that led to a student."""
    found: dict[str, Any] = {path.name.rpartition("-")[2]: path for path in store.glob("*-*")}
    seconds, keys, seen = 0.0, [student.weights.key], set[str]()
    while keys:
        key = keys.pop()
        if key in seen or key not in found:
            continue
        seen.add(key)
        manifest = json.loads((found[key] / MANIFEST).read_text(encoding="utf-8"))
        seconds += float(manifest["meta"].get("train_s", 0.0))
        keys += manifest["parents"]
    return round(seconds, 1)


def table() -> str:
    """What every student lost, and what it gained."""
    lines = [
        "| MACs | parameters | losses | epochs | accuracy | drop, points (95 %) | goal | before distilling | faster |",
        "|---" * 9 + "|",
    ]
    for row in LEDGER.rows():
        drop, goal = row["drop"], GOALS.get(row["settings"]["part"])
        losses = " + ".join(f"{each.get('weight', 1):g} {each['name']}" for each in row["settings"]["losses"])
        epochs = row["settings"]["distill"]["epochs"]
        lines.append(
            f"| {row['macs']:.1%} | {row['parameters']:.1%} | {losses} | {epochs} | {row['accuracy']['value']:.4f} "
            f"(teacher {row['teacher']['value']:.4f}) | {100 * drop['value']:+.2f} "
            f"({100 * drop['low']:+.2f} to {100 * drop['high']:+.2f}) | {f'{100 * goal:.1f}' if goal else ''} | "
            f"{row['cut']['value']:.4f} | {1 / row['latency']['ratio']:.2f}× (MACs {1 / row['macs']:.2f}×) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
