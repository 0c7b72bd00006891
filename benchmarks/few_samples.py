"""A small student on few images: which losses it learns fastest by, while it still underfits and once it does not.

    python benchmarks/few_samples.py [--epochs 40 160] [--seeds 0 1 2 3]
    python benchmarks/few_samples.py --table

204 scanned digits (0 to 3) of scikit-learn, enlarged to 20 × 24 RGB, train a student of two convolutions; 56 test it.
AdamW, a learning rate of 0.002, batches of 32: seven steps an epoch, so that 40 epochs are far too few. One JSON line a
training goes to results/few_samples.jsonl; what is there with the same settings is not trained again. All of it takes
some ten minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekd import data, distillation, models, plugins
from edgekd.bench import accuracy
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import Augment, Dataset, Json, ModelSpec, Part, Split, Task, TrainOptions

from ledger import RESULTS, STORE, Ledger, spread  # isort: skip  # a script beside this one

METHODS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "0.9 kd + 0.1 ce": [{"name": "kd", "weight": 0.9, "temperature": 4.0}, {"name": "ce", "weight": 0.1}],
    "0.9 kd + 0.1 ce + srd": [
        {"name": "kd", "weight": 0.9, "temperature": 4.0}, {"name": "ce", "weight": 0.1}, {"name": "srd"},
    ],
    "kd + ce": [{"name": "kd", "temperature": 4.0}, {"name": "ce"}],
    "kd + ce + srd": [{"name": "kd", "temperature": 4.0}, {"name": "ce"}, {"name": "srd"}],
    "kd (T = 1) + ce": [{"name": "kd", "temperature": 1.0}, {"name": "ce"}],
    "kd (T = 1) + ce + 2 srd": [{"name": "kd", "temperature": 1.0}, {"name": "ce"}, {"name": "srd", "weight": 2.0}],
}  # fmt: skip
OPTIONS = TrainOptions(
    epochs=40, batch_size=32, optimizer="adamw", learning_rate=0.002, weight_decay=0.01, precision="fp32", threads=1,
    compile="off",
)  # fmt: skip
TEACHER_EPOCHS = 8
AUGMENT = Augment(crop_pixels=2)


class Small(nn.Module):
    """Two convolutions; the mean and the maximum over positions are classified."""

    def __init__(self, classes: int, *, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width), nn.ReLU6())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Batch × 3 × height × width → batch × classes."""
        x = self.stem(x)
        x = x + self.block(x)
        logits: Tensor = self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        return logits


def main() -> None:
    """Run what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description="Distillation losses on few images")
    parser.add_argument("--epochs", nargs="+", type=int, default=[40, 160])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--results", type=Path, default=RESULTS / "few_samples.jsonl")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if not asked.table:
        bench = Bench(asked.store / "few_samples")
        for seed in asked.seeds:
            for epochs in asked.epochs:
                for method in METHODS:
                    bench.run(ledger, method, epochs, seed)
    print(table(ledger.rows()))


class Bench:
    """The images and a teacher trained on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task: Task = plugins.build("tasks", Part("classification"))
        scans = load_digits()
        for at, (image, label) in enumerate(zip(scans.images[:700], scans.target[:700], strict=True)):
            if label < 4:
                path = folder / "scans" / str(label) / f"{at}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * 15).astype(np.uint8)).convert("RGB").resize((20, 24)).save(path)
        self.data: Dataset = data.load(Part("imagefolder", {"path": str(folder / "scans")}), 0, task=self.task)
        self.teacher = self.network("timm.test_resnet", 0)
        options = replace(OPTIONS, epochs=TEACHER_EPOCHS)
        distillation.train(
            self.teacher, self.data, options, AUGMENT, task=self.task, seed=0, work=self._work(), say=quiet
        )

    def network(self, name: str, seed: int) -> Network:
        """A network for the images, its weights drawn from the seed."""
        torch.manual_seed(seed)
        return models.build(ModelSpec(name), classes=len(self.data.classes), inputs=self.data.inputs, images=True)

    def run(self, ledger: Ledger, method: str, epochs: int, seed: int) -> None:
        """Train and judge one student, unless the same is there."""
        options = replace(OPTIONS, epochs=epochs)
        settings = {
            "method": method, "losses": METHODS[method], "seed": seed, "options": asdict(options),
            "augment": asdict(AUGMENT), "teacher_epochs": TEACHER_EPOCHS, "data": self.data.fingerprint,
        }  # fmt: skip
        if ledger.find(settings) is not None:
            return
        student = self.network("few_samples:Small", seed)
        if METHODS[method]:
            distillation.distill(
                student, self.teacher, self.data, [loss_term(each, method) for each in METHODS[method]], options,
                AUGMENT, task=self.task, seed=seed, work=self._work(), cache=self.folder / "answers", say=quiet,
            )  # fmt: skip
        else:
            distillation.train(
                student, self.data, options, AUGMENT, task=self.task, seed=seed, work=self._work(), say=quiet
            )
        parts = {"train": self.data.train, "accuracy": self.data.test}
        found = {name: self.judged(student, part) for name, part in parts.items()}
        ledger.add(settings, **found, teacher=self.judged(self.teacher, self.data.test))
        print(f"{method}, {epochs} epochs, seed {seed}: {found['accuracy']:.4f}", file=sys.stderr, flush=True)

    def judged(self, network: Network, split: Split) -> float:
        """Its accuracy on a split."""
        scores = self.task.scores(distillation.evaluate(network, split), accuracy.labels(split))
        return accuracy.mean(scores).value

    def _work(self) -> Path:
        return Path(tempfile.mkdtemp())  # of seconds: nothing to go on with


def quiet(event: str, /, **fields: Json) -> None:
    """Nothing of a training is told: it takes seconds."""


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in per cent on training and test images, mean ± standard deviation over seeds."""
    lines = ["| losses | epochs | training images | test images | seeds |", "|---|---|---|---|---|"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["settings"]["options"]["epochs"], row["settings"]["method"]), []).append(row)
    for (epochs, method), found in sorted(groups.items(), key=lambda item: item[0][0]):
        figures = [spread([100 * row[name] for row in found]) for name in ("train", "accuracy")]
        lines.append(f"| {method} | {epochs} | {figures[0]} | {figures[1]} | {len(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
