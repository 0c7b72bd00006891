"""ViT → CNN on CIFAR-10: a small vision transformer teaches a small convolutional network.

    python benchmarks/vit.py [--methods none kd "kd + auto"] [--seeds 0 1 2]
    python benchmarks/vit.py --table

The student learns from the labels alone, from the teacher's logits too ("kd"), from the layers that `match` pairs and
compares by itself as well ("kd + auto"), or from the last maps, too ("kd + srd"): same network, initial weights,
batches and epochs, and the learning rate that was best on the held-out images (`--learning-rates` tries others).

A transformer that learns from labels alone needs more images and epochs than two cores can give it; so its patches are
made by small convolutions (Xiao et al. 2021), and it is itself taught by ResNet-56 (Touvron et al. 2021).

One JSON line a training goes to results/vit.jsonl; what is there with the same settings is not trained again, and a
training that was killed goes on. The teacher is kept in benchmarks/.store, as are its answers.

References: Xiao, Singh, Mintun, Darrell, Dollár, Girshick: Early Convolutions Help Transformers See Better, NeurIPS
2021. Touvron, Cord, Douze, Massa, Sablayrolles, Jégou: Training Data-Efficient Image Transformers & Distillation
Through Attention, ICML 2021.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from edgekd import data, distillation, models, plugins
from edgekd.bench import accuracy
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import Augment, ModelSpec, Part, Task, TrainOptions

from ledger import CACHE_GB, DATA, RESULTS, STORE, Ledger, key, spread  # isort: skip  # a script beside this one
from text import CE, Method, told  # isort: skip

WIDTH, DEPTH, HEADS, PATCH = 96, 5, 4, 4  # of the teacher: 64 tokens
STUDENT = ModelSpec("resnet8", {"width": 4})
OPTIONS = TrainOptions(batch_size=128, precision="bf16", compile="off", weight_decay=5e-4, cache_gb=CACHE_GB)
TEACHER_OPTIONS = replace(OPTIONS, epochs=8, optimizer="adamw", learning_rate=0.002, weight_decay=0.05, views=4)
AUGMENT = Augment(crop_pixels=4, flip=True)
EPOCHS, VIEWS = 8, 4  # of the student; the answers about later epochs' images are the first ones' again
KD: list[dict[str, Any]] = [{"name": "kd", "weight": 0.9, "temperature": 4.0}, CE | {"weight": 0.1}]
TEACHER_LOSSES = KD
METHODS = {
    "none": Method([], 0.2),
    "kd": Method(KD, 0.2),
    "kd + auto": Method([*KD, {"name": "auto", "weight": 1.0}], 0.2),
    "kd + srd": Method([*KD, {"name": "srd", "weight": 1.0}], 0.2),
}


def main() -> None:
    """Run what is not there yet, seed by seed, or print the table."""
    parser = argparse.ArgumentParser(description="A vision transformer teaches a convolutional network")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--views", type=int, default=VIEWS)
    parser.add_argument("--teacher-epochs", type=int, default=TEACHER_OPTIONS.epochs)
    parser.add_argument("--teacher-views", type=int, default=TEACHER_OPTIONS.views)
    parser.add_argument("--learning-rates", nargs="+", type=float, help="to try, instead of each method's own")
    parser.add_argument("--width", type=int, default=STUDENT.options["width"], help="of the student")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "vit.jsonl")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    asked = parser.parse_args()
    if not asked.table:
        bench = Bench(asked)
        for seed in asked.seeds:
            for method in asked.methods:
                for rate in asked.learning_rates or [METHODS[method].learning_rate]:
                    bench.run(method, rate, seed)
    print(table(Ledger(asked.results).rows()))


class Stem(nn.Sequential):
    """Small convolutions in place of square patches of 4 × 4: images → tokens (batch × 64 × width) of 32 × 32."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        widths = [in_chans, embed_dim // 3, embed_dim // 2, embed_dim]
        layers: list[nn.Module] = []
        for stride, (before, after) in zip((1, 2, 2), itertools.pairwise(widths), strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
        self.num_patches = (img_size // patch_size) ** 2

    def forward(self, x: Tensor) -> Tensor:
        """(batch × channels × 32 × 32) → (batch × 64 × width)."""
        for layer in self:
            x = layer(x)
        return x.flatten(2).transpose(1, 2)


class Bench:
    """The runs, and what all of them share."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.ledger = asked, Ledger(asked.results)
        self.task: Task = plugins.build("tasks", Part("classification"))
        archive = asked.data / "cifar10" / "cifar10-images.zip"
        self.data = data.load(Part("imagefolder", {"path": str(archive)}), 0, self.task)
        self._form: dict[str, Any] = {"classes": len(self.data.classes), "inputs": self.data.inputs, "images": True}
        self.shared = {"data": self.data.fingerprint, "augment": asdict(AUGMENT)}

    @cached_property
    def teacher(self) -> Network:
        """The transformer, taught by ResNet-56 where it is not there yet."""
        asked = self.asked
        options = replace(
            TEACHER_OPTIONS, epochs=asked.teacher_epochs, views=asked.teacher_views, threads=asked.threads
        )
        settings = {
            "role": "teacher", "model": f"ViT {WIDTH} × {DEPTH}, heads {HEADS}, patch {PATCH}, convolutional stem",
            "losses": TEACHER_LOSSES, "options": told(options), "seed": 0, **self.shared,
        }  # fmt: skip
        torch.manual_seed(0)
        module = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
            class_token=False, global_pool="avg", embed_layer=Stem, num_classes=len(self.data.classes),
        )  # fmt: skip
        network = models.adopted(module, ModelSpec("ViT"), **self._form)
        work = asked.store / "vit" / f"teacher-{key(settings)}"
        file = work / "weights.safetensors"
        if self.ledger.find(settings) is None or not file.exists():
            work.mkdir(parents=True, exist_ok=True)
            path = str(asked.data / "teachers" / "resnet56-cifar10.safetensors")
            resnet = models.build(ModelSpec("resnet56", weights=path), **self._form)
            terms = [loss_term(each, "teacher") for each in TEACHER_LOSSES]
            meta = distillation.distill(
                network, resnet.eval(), self.data, terms, options, AUGMENT, task=self.task, seed=0, work=work,
                cache=asked.store / "answers", say=say,
            )  # fmt: skip
            self._add(settings, network, meta)
        weights.load(file, network.module)
        return network.eval()

    def run(self, method: str, rate: float, seed: int) -> None:
        """Train and judge one student, unless the same is there."""
        asked, losses = self.asked, METHODS[method].losses
        student = replace(STUDENT, options={"width": asked.width})
        options = replace(
            OPTIONS, epochs=asked.epochs, learning_rate=rate, threads=asked.threads, views=asked.views if losses else 0
        )
        # Without a teacher every epoch has views of its own; with one, all seeds share what it said.
        augment = replace(AUGMENT, seed=0 if losses else seed)
        settings = {
            "role": "student", "method": method, "losses": list(losses), "model": asdict(student), "seed": seed,
            "options": told(options), "teacher_epochs": asked.teacher_epochs, **self.shared, "augment": asdict(augment),
        }  # fmt: skip
        if self.ledger.find(settings) is not None:
            return
        torch.manual_seed(seed)
        network = models.build(student, **self._form)
        work = asked.store / "vit" / f"student-{key(settings)}"
        if losses:
            terms, teacher = [loss_term(each, method) for each in losses], self.teacher
            work.mkdir(parents=True, exist_ok=True)
            meta = distillation.distill(
                network, teacher, self.data, terms, options, augment, task=self.task, seed=seed, work=work,
                cache=asked.store / "answers", say=say,
            )  # fmt: skip
        else:
            work.mkdir(parents=True, exist_ok=True)
            meta = distillation.train(
                network, self.data, options, augment, task=self.task, seed=seed, work=work, say=say
            )
        self._add(settings, network, meta)
        shutil.rmtree(work)

    def _add(self, settings: dict[str, Any], network: Network, meta: dict[str, Any]) -> None:
        """Judge a network, and write it down."""
        found = {}
        for name, split in (("held_out", self.data.calibration), ("accuracy", self.data.test)):
            outputs = distillation.evaluate(network, split)
            found[name] = asdict(accuracy.mean(self.task.scores(outputs, accuracy.labels(split))))
        pairs = [[term["name"], term["pairs"]] for term in meta.get("losses", {}).get("student", []) if "pairs" in term]
        parameters = sum(each.numel() for each in network.module.parameters())
        self.ledger.add(settings, **found, parameters=parameters, train_s=meta["train_s"], pairs=pairs)
        what = settings.get("method", "teacher"), settings["options"]["learning_rate"], settings["seed"]
        print(*what, f"{found['accuracy']['value']:.4f} in {meta['train_s']} s", file=sys.stderr, flush=True)


def say(event: str, /, **fields: Any) -> None:
    """An epoch a line on stderr, and what has to be known."""
    if event in ("epoch", "note", "resumed", "corrupt"):
        shown = {name: fields[name] for name in ("epoch", "of", "loss", "seconds", "text") if name in fields}
        print(event, shown, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy in per cent, mean ± standard deviation over seeds, and what the held-out images said."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        settings = row["settings"]
        options, name = settings["options"], settings.get("method", "teacher")
        group = name, options["epochs"], options["learning_rate"], f"{row['parameters']:,}"
        groups.setdefault(group, []).append(row)
    lines = ["| network | epochs | rate | parameters | accuracy | seeds | held out |", "|---" * 7 + "|"]
    for group, found in groups.items():
        figures = [spread([100 * row[name]["value"] for row in found]) for name in ("accuracy", "held_out")]
        cells = *group, figures[0], len(found), figures[1]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
