"""What each distillation loss is worth on CIFAR-10: a ResNet-56 teacher, small students, the same epochs for all.

    python benchmarks/quality.py [--students resnet8] [--methods kd srd …] [--seeds 0 1 2] [--epochs 6]
    python benchmarks/quality.py --table

One JSON line a run goes to results/quality.jsonl; a run that is there with the same settings is not done again, so that
the script may be killed and started as often as wanted (a killed run goes on inside, too). Teacher answers are kept in
benchmarks/.store and shared by all runs: logits for every epoch, features for the first `--feature-views` views.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgekd import data, distillation, models, plugins
from edgekd.bench import accuracy, conditions
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import Augment, Dataset, Interval, Json, ModelSpec, Part, Task, TrainOptions

from ledger import CACHE_GB  # isort: skip  # a script beside this one

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "quality.jsonl"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Method:
    """Losses as a recipe has them; weights as the methods' authors use them for CIFAR, where they tell."""

    losses: Sequence[dict[str, Any]]
    features: bool = False  # keeps intermediate outputs of the teacher, hence fewer views
    mixup: float = 0.0
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)


KD = [{"name": "kd", "weight": 0.9, "temperature": 4.0}, {"name": "ce", "weight": 0.1}]
CE_KD: list[dict[str, Any]] = [{"name": "ce"}, {"name": "kd", "temperature": 4.0}]
METHODS = {
    "none": Method((), note="cross-entropy on the labels, fresh augmentation in every epoch"),
    "kd": Method(KD),
    "kd, few views": Method(KD, features=True, note="plain kd on as few views as the feature losses get"),
    "kd, T = 1": Method([{"name": "ce"}, {"name": "kd", "temperature": 1.0}], note="srd's companions, without it"),
    "kd, no labels": Method([{"name": "kd", "temperature": 4.0}]),
    "kd standardize": Method(
        [{"name": "kd", "weight": 9.0, "temperature": 2.0, "standardize": True}, {"name": "ce", "weight": 0.1}]
    ),
    "function_matching": Method([{"name": "function_matching"}], mixup=1.0),
    "function_matching, no mixup": Method([{"name": "function_matching"}]),
    "dist": Method([{"name": "ce"}, {"name": "dist", "weight": 2.0, "temperature": 4.0}]),
    "nkd": Method([{"name": "nkd"}], note="contains its own cross-entropy"),
    "dkd": Method([{"name": "ce"}, {"name": "dkd", "temperature": 4.0, "alpha": 1.0, "beta": 2.0}]),
    "srd": Method([{"name": "ce"}, {"name": "kd", "temperature": 1.0}, {"name": "srd", "weight": 2.0}], features=True),
    "srd, head alone": Method(
        [
            {"name": "ce"},
            {"name": "kd", "temperature": 1.0},
            {"name": "srd", "weight": 2.0, "pairs": [["linear:in", "linear:in"]]},
        ],
        features=True,
        note="of ResNets: not the last maps, which take a hundred times as much to keep",
    ),
    "ce + kd": Method(CE_KD, note="the labels as heavy as the teacher"),
    "ce + kd + srd": Method([*CE_KD, {"name": "srd"}], features=True),
    "kd + srd": Method([*KD, {"name": "srd", "weight": 1.0}], features=True),
    "kd + 4 srd": Method([*KD, {"name": "srd", "weight": 4.0}], features=True),
    "kd + review": Method([*KD, {"name": "review", "weight": 1.0}], features=True),
    "kd + cosine": Method([*KD, {"name": "cosine", "weight": 1.0}], features=True),
    "kd + attention": Method([*KD, {"name": "attention", "weight": 4.0}], features=True),
    "kd + similarity": Method([*KD, {"name": "similarity", "weight": 1000.0}], features=True),
    "kd + hint": Method([*KD, {"name": "hint", "weight": 1.0}], features=True),
    "kd + ofa": Method([*KD, {"name": "ofa", "weight": 1.0}], features=True),
}


def main() -> None:
    """Run what is not there yet, seed by seed, or print the table."""
    parser = argparse.ArgumentParser(description="Distillation losses on CIFAR-10")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--students", nargs="+", default=["resnet8"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--feature-views", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    asked = parser.parse_args()
    if not asked.table:
        bench = Bench(asked)
        for seed in asked.seeds:
            for student in asked.students:
                for method in asked.methods:
                    bench.run(student, method, seed)
    print(table(rows(), asked.epochs))


class Cifar:
    """The data and its teacher, read once."""

    def __init__(self, folder: Path) -> None:
        self.task: Task = plugins.build("tasks", Part("classification"))
        archive = folder / "cifar10" / "cifar10-images.zip"
        self.data: Dataset = data.load(Part("imagefolder", {"path": str(archive)}), 0, task=self.task)
        self.teacher = self.network("resnet56", 0, str(folder / "teachers" / "resnet56-cifar10.safetensors"))
        self.truth = accuracy.labels(self.data.test)

    def network(self, name: str, seed: int, weights: str | None = None) -> Network:
        """A network for CIFAR-10, its initial weights drawn from the seed."""
        torch.manual_seed(seed)
        spec = ModelSpec(name, weights=weights, mean=MEAN, std=STD)
        return models.build(spec, classes=len(self.data.classes), inputs=self.data.inputs, images=True)

    def judged(self, network: Network) -> Interval:
        """Its accuracy on the test split."""
        return accuracy.mean(self.task.scores(distillation.evaluate(network, self.data.test), self.truth))


class Bench(Cifar):
    """The runs, and the settings that all of them share."""

    def __init__(self, asked: argparse.Namespace) -> None:
        super().__init__(asked.data)
        self.asked = asked
        self.done = {json.dumps(row["settings"], sort_keys=True) for row in rows()}

    def run(self, student: str, method: str, seed: int) -> None:
        """Train and judge one student, unless the same is there."""
        asked, how = self.asked, METHODS[method]
        views = asked.feature_views if how.features else asked.epochs
        options = TrainOptions(
            epochs=asked.epochs, learning_rate=asked.learning_rate, precision="bf16", threads=asked.threads,
            views=views if how.losses else 0, cache_gb=CACHE_GB, compile="off",
        )  # fmt: skip
        augment = Augment(crop_pixels=4, flip=True, mixup=how.mixup, seed=0 if how.losses else seed)
        kept = {key: value for key, value in asdict(options).items() if key not in ("threads", "cache_gb")}
        settings: dict[str, Json] = {
            "student": student, "method": method, "losses": list(how.losses), "seed": seed,
            "options": kept, "augment": asdict(augment), "edgekd": distillation.VERSION,
        }  # fmt: skip
        name = json.dumps(settings, sort_keys=True)
        if name in self.done:
            return
        network = self.network(student, seed)
        work = HERE / ".store" / "quality" / f"{student}-{method.replace(' ', '_').replace(',', '')}-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        begun = time.time()
        if how.losses:
            terms = [loss_term(table, method) for table in how.losses]
            meta = distillation.distill(
                network, self.teacher, self.data, terms, options, augment, task=self.task, seed=seed, work=work,
                cache=HERE / ".store" / "answers", say=quiet,
            )  # fmt: skip
        else:
            meta = distillation.train(
                network, self.data, options, augment, task=self.task, seed=seed, work=work, say=quiet
            )
        found = self.judged(network)
        row = {
            "settings": settings, "accuracy": asdict(found), "parameters": sum(p.numel() for p in network.parameters()),
            "train_s": meta["train_s"], "wall_s": round(time.time() - begun, 1), "pairs": _pairs(meta),
            "environment": {"cpu": conditions.device_name(), "torch": torch.__version__},
        }  # fmt: skip
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(work)
        print(f"{student} {method} seed {seed}: {found.value:.4f} in {row['wall_s']} s", file=sys.stderr, flush=True)


def _pairs(meta: dict[str, Any]) -> list[Any]:
    return [[term["name"], term["pairs"]] for term in meta.get("losses", {}).get("student", []) if "pairs" in term]


def quiet(event: str, /, **fields: Json) -> None:
    """An epoch a line on stderr, and what has to be known."""
    if event in ("epoch", "note", "resumed", "corrupt"):
        shown = {key: fields[key] for key in ("epoch", "of", "loss", "seconds", "text") if key in fields}
        print(event, shown, file=sys.stderr, flush=True)


def rows() -> list[dict[str, Any]]:
    """Every result that is there."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def table(found: Sequence[dict[str, Any]], epochs: int) -> str:
    """Mean accuracy, its standard deviation over seeds, and the gain over no teacher and over plain kd, in points."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in found:
        if row["settings"]["options"]["epochs"] == epochs:
            key = row["settings"]["student"], row["settings"]["method"]
            cells.setdefault(key, []).append(100 * row["accuracy"]["value"])
    lines = [
        "| student | method | accuracy | ± over seeds | seeds | over none | over kd |",
        "|---|---|---|---|---|---|---|",
    ]
    means = {key: statistics.fmean(values) for key, values in cells.items()}
    for (student, method), mean in sorted(means.items(), key=lambda item: (item[0][0], -item[1])):
        values = cells[student, method]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        gains = [f"{mean - means[student, base]:+.2f}" if (student, base) in means else "" for base in ("none", "kd")]
        lines.append(f"| {student} | {method} | {mean:.2f} | {spread} | {len(values)} | {gains[0]} | {gains[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
