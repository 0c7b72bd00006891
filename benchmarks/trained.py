"""Networks trained on CIFAR-10 that others are quantized, pruned and compared on: four families, one teacher.

    python benchmarks/trained.py [--models mobilenetv3_small mobilenetv2 resnet20 vit]
    python benchmarks/trained.py --table

timm's networks are made for images of 224 × 224; so that something is left of 32 × 32, the first strides are one here
(weights and layers stay what timm has). The transformer has a stem of small convolutions (Xiao et al. 2021). Every
network is taught by ResNet-56, for as many epochs as let all four train within two hours on two cores.

One JSON line a training goes to results/trained.jsonl; what is there with the same settings, and whose weights are, is
not trained again, and a training that was killed goes on. Weights go to benchmarks/.store/trained/NAME.safetensors and
are the same for everybody who runs this with one thread on the same kind of machine.

References: Howard et al.: Searching for MobileNetV3, ICCV 2019. Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2,
CVPR 2018. He, Zhang, Ren, Sun: Deep Residual Learning, CVPR 2016. Xiao, Singh, Mintun, Darrell, Dollár, Girshick:
Early Convolutions Help Transformers See Better, NeurIPS 2021.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from edgekd import data, distillation, export, models, plugins
from edgekd.bench import accuracy, macs
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import Augment, Dataset, ModelSpec, Part, Task, TrainOptions

from ledger import CACHE_GB, DATA, RESULTS, STORE, Ledger  # isort: skip  # a script beside this one
from text import told  # isort: skip
from vit import Stem, say  # isort: skip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEACHER, TEACHER_FILE = "resnet56", "resnet56-cifar10.safetensors"
AUGMENT = Augment(crop_pixels=4, flip=True)  # as quality.py has it: the teacher's answers are shared
OPTIONS = TrainOptions(batch_size=128, compile="off", views=6, cache_gb=CACHE_GB, threads=1)
LOSSES: list[dict[str, Any]] = [{"name": "kd", "weight": 0.9, "temperature": 4.0}, {"name": "ce", "weight": 0.1}]


def narrow_strides(module: nn.Module, count: int) -> nn.Module:
    """The same network whose first so many strided convolutions go on pixel by pixel."""
    strided = [each for each in module.modules() if isinstance(each, nn.Conv2d) and each.stride == (2, 2)]
    for convolution in strided[:count]:
        convolution.stride = (1, 1)
    return module


def mobilenetv3_small(classes: int) -> nn.Module:
    """timm's mobilenetv3_small_100, its stem without a stride: 2 × 2 positions are left at the end."""
    return narrow_strides(timm.create_model("mobilenetv3_small_100", num_classes=classes), 1)


def mobilenetv2(classes: int) -> nn.Module:
    """timm's mobilenetv2_035 without its first two strides: 4 × 4 positions are left at the end."""
    return narrow_strides(timm.create_model("mobilenetv2_035", num_classes=classes), 2)


def vit(classes: int) -> nn.Module:
    """A vision transformer of 5 layers of width 96 on 8 × 8 patches, which small convolutions make."""
    module: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=5, num_heads=4, class_token=False,
        global_pool="avg", embed_layer=Stem, num_classes=classes,
    )  # fmt: skip
    return module


@dataclass(frozen=True)
class Trainee:
    """How a network is made and trained; the figures are the cheapest that train it well on two cores."""

    options: TrainOptions
    build: Callable[[int], nn.Module] | None = None  # None: of the zoo, by its name

    @property
    def spec(self) -> ModelSpec:
        """With the teacher's mean and std, as its answers are about the same images."""
        return ModelSpec(self.build.__name__ if self.build else "resnet20", mean=MEAN, std=STD)


_ADAM = replace(OPTIONS, optimizer="adamw", learning_rate=0.003, weight_decay=0.02)
TRAINEES: Mapping[str, Trainee] = {
    # Its depthwise convolutions are faster in fp32, the teacher is not: "auto" lets each have what it is faster in.
    "mobilenetv3_small": Trainee(replace(_ADAM, epochs=12, precision="auto"), mobilenetv3_small),
    "mobilenetv2": Trainee(replace(OPTIONS, epochs=8, learning_rate=0.1, precision="bf16"), mobilenetv2),
    "resnet20": Trainee(replace(OPTIONS, epochs=8, learning_rate=0.2, precision="bf16")),
    "vit": Trainee(replace(_ADAM, epochs=6, learning_rate=0.002, weight_decay=0.05, precision="bf16"), vit),
}


def main() -> None:
    """Train what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description="Networks trained on CIFAR-10")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--models", nargs="+", default=list(TRAINEES), choices=list(TRAINEES), metavar="MODEL")
    parser.add_argument("--results", type=Path, default=RESULTS / "trained.jsonl")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, train nothing")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if not asked.table:
        cifar = Cifar(asked.data)
        for name in asked.models:
            train(cifar, name, ledger, asked.store)
    print(table(ledger.rows()))


class Cifar:
    """The images and their teacher, each read when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task: Task = plugins.build("tasks", Part("classification"))

    @cached_property
    def data(self) -> Dataset:
        """50,000 images, of which 512 are held out of training, and 5,000 to test on."""
        archive = self.folder / "cifar10" / "cifar10-images.zip"
        return data.load(Part("imagefolder", {"path": str(archive)}), 0, task=self.task)

    @cached_property
    def teacher(self) -> Network:
        """ResNet-56."""
        path = str(self.folder / "teachers" / TEACHER_FILE)
        return models.build(ModelSpec(TEACHER, weights=path, mean=MEAN, std=STD), **self._form).eval()

    @property
    def _form(self) -> dict[str, Any]:
        return {"classes": len(self.data.classes), "inputs": self.data.inputs, "images": True}

    def network(self, name: str, file: Path | None = None) -> Network:
        """A trainee: untrained, its weights drawn from seed 0, or in eval mode with the weights of a file."""
        trainee = TRAINEES[name]
        torch.manual_seed(0)
        if trainee.build is None:
            network = models.build(trainee.spec, **self._form)
        else:
            network = models.adopted(trainee.build(len(self.data.classes)), trainee.spec, **self._form)
        if file is None:
            return network
        weights.load(file, network.module)
        return network.eval()


def path(cifar: Cifar, name: str, store: Path) -> Path:
    """Where the weights of a trained network, or of the teacher, are.

    Raises:
        SystemExit: it was not trained yet.
    """
    file = cifar.folder / "teachers" / TEACHER_FILE if name == TEACHER else place(store, name)
    if not file.exists():
        sys.exit(f"{name} is not trained yet: run `python benchmarks/trained.py --models {name}` first")
    return file


def trained(cifar: Cifar, name: str, store: Path) -> Network:
    """A trained network, or the teacher, ready to use.

    Raises:
        SystemExit: it was not trained yet.
    """
    file = path(cifar, name, store)
    return cifar.teacher if name == TEACHER else cifar.network(name, file)


def place(store: Path, name: str) -> Path:
    """Where the weights of a trainee go."""
    return store / "trained" / f"{name}.safetensors"


def train(cifar: Cifar, name: str, ledger: Ledger, store: Path) -> None:
    """Train and judge one network, unless the same is there."""
    trainee, file = TRAINEES[name], place(store, name)
    settings = {
        "model": name, "losses": LOSSES, "options": told(trainee.options), "augment": asdict(AUGMENT), "seed": 0,
        "data": cifar.data.fingerprint,
    }  # fmt: skip
    if ledger.find(settings) is not None and file.exists():
        return
    network, work = cifar.network(name), store / "trained" / name
    work.mkdir(parents=True, exist_ok=True)
    meta = distillation.distill(
        network, cifar.teacher, cifar.data, [loss_term(each, name) for each in LOSSES], trainee.options, AUGMENT,
        task=cifar.task, seed=0, work=work, cache=store / "answers", say=say,
    )  # fmt: skip
    (work / "weights.safetensors").replace(file)
    found = {}
    for key, split in (("held_out", cifar.data.calibration), ("accuracy", cifar.data.test)):
        outputs = distillation.evaluate(network, split)
        found[key] = asdict(accuracy.mean(cifar.task.scores(outputs, accuracy.labels(split))))
    parameters = sum(each.numel() for each in network.module.parameters())
    ledger.add(settings, **found, parameters=parameters, macs=macs_of(network, cifar.data), train_s=meta["train_s"])
    shutil.rmtree(work)
    print(name, f"{found['accuracy']['value']:.4f} in {meta['train_s']} s", file=sys.stderr, flush=True)


def macs_of(network: Network, of: Dataset) -> int | None:
    """Multiply-accumulates for one image, counted on the graph that is deployed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float.onnx"
        stored = next(iter(of.calibration.batches([np.arange(2)]))).inputs
        export.export(network, stored, opset=18, preprocessing=True, path=file)
        return macs.count(file).macs


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a network: the last result of each."""
    lines = ["| network | parameters | MACs | epochs | seconds | accuracy | held out |", "|---" * 7 + "|"]
    for row in {row["settings"]["model"]: row for row in rows}.values():
        shown = [f"{100 * row[key]['value']:.2f}" for key in ("accuracy", "held_out")]
        cells = [row["settings"]["model"], f"{row['parameters']:,}", f"{row['macs'] or 0:,}"]
        cells += [str(row["settings"]["options"]["epochs"]), f"{row['train_s']:.0f}", *shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
