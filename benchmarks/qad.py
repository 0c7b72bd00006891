"""Quantization-aware distillation on CIFAR-10: what it gives back of what rounding to int8 took.

    python benchmarks/qad.py [--targets host jetson] [--epochs 2]
    python benchmarks/qad.py --table

A network of depthwise convolutions and hard swishes (timm's mobilenetv3_small_050, its stem without a stride, taught
by ResNet-56 for six epochs) is quantized by the rules of each target: by min-max ranges, by what `method = "auto"`
comes to, and by quantization-aware distillation from either. Each result is the accuracy on the 5,000 test images, of
the simulated network in PyTorch and of its ONNX graph on ONNX Runtime with its rewrites on and off: they must agree.

One JSON line a result goes to results/qad.jsonl; what is there with the same settings is not done again, and a
training that was killed goes on. The float network is kept in benchmarks/.store/qad.

Reference: Howard et al.: Searching for MobileNetV3, ICCV 2019.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from edgekd import data, distillation, models, plugins
from edgekd.bench import accuracy
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import Augment, ModelSpec, Part, Task, TrainOptions

from ledger import CACHE_GB, DATA, RESULTS, STORE, Ledger  # isort: skip  # a script beside this one

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = Augment(crop_pixels=4, flip=True)  # as quality.py has it: the teacher's answers are shared
KD: list[dict[str, Any]] = [{"name": "kd", "weight": 0.9, "temperature": 4.0}, {"name": "ce", "weight": 0.1}]
OPTIONS = TrainOptions(
    epochs=6, batch_size=128, optimizer="adamw", learning_rate=0.003, weight_decay=0.02, compile="off", views=6,
    cache_gb=CACHE_GB, threads=1,
)  # fmt: skip
NAME = "mobilenetv3_small_050"


class Cifar:
    """The images, the teacher and the float network, each made when it is first asked for."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store = folder, store
        self.task: Task = plugins.build("tasks", Part("classification"))

    @cached_property
    def data(self) -> Any:
        """50,000 images, of which 512 are held out of training, and 5,000 to test on."""
        archive = self.folder / "cifar10" / "cifar10-images.zip"
        return data.load(Part("imagefolder", {"path": str(archive)}), 0, task=self.task)

    @cached_property
    def teacher(self) -> Network:
        """ResNet-56."""
        path = str(self.folder / "teachers" / "resnet56-cifar10.safetensors")
        spec = ModelSpec("resnet56", weights=path, mean=MEAN, std=STD)
        return models.build(spec, classes=len(self.data.classes), inputs=self.data.inputs, images=True).eval()

    def untrained(self) -> Network:
        """The network with weights drawn from seed 0."""
        torch.manual_seed(0)
        module = timm.create_model(NAME, num_classes=len(self.data.classes))
        stem = next(each for each in module.modules() if isinstance(each, nn.Conv2d))
        stem.stride = (1, 1)
        spec = ModelSpec(NAME, mean=MEAN, std=STD)
        return models.adopted(module, spec, classes=len(self.data.classes), inputs=self.data.inputs, images=True)

    @cached_property
    def network(self) -> Network:
        """The float network, trained first where that was not done before."""
        file, work = self.store / "qad" / f"{NAME}.safetensors", self.store / "qad" / NAME
        network = self.untrained()
        if not file.exists():
            work.mkdir(parents=True, exist_ok=True)
            meta = distillation.distill(
                network, self.teacher, self.data, [loss_term(each, NAME) for each in KD], OPTIONS, AUGMENT,
                task=self.task, seed=0, work=work, cache=self.store / "answers", say=say,
            )  # fmt: skip
            (work / "weights.safetensors").replace(file)
            print(NAME, f"trained in {meta['train_s']} s", file=sys.stderr, flush=True)
        weights.load(file, network.module)
        return network.eval()

    def judged(self, network: Network) -> dict[str, Any]:
        """Accuracy on the test split."""
        outputs = distillation.evaluate(network, self.data.test)
        return asdict(accuracy.mean(self.task.scores(outputs, accuracy.labels(self.data.test))))


def say(event: str, /, **fields: Any) -> None:
    """Tell of epochs and notes."""
    if event in ("epoch", "note", "resumed"):
        told = {key: fields[key] for key in ("text", "epoch", "of", "loss", "seconds", "eta_s") if key in fields}
        print(event, told, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cifar = Cifar(DATA, STORE)
    print(cifar.judged(cifar.network))
