"""Quantization-aware distillation on CIFAR-10: what it gives back of what rounding to int8 took.

    python benchmarks/qad.py [--kinds trained rescaled] [--targets host jetson] [--methods minmax auto]
    python benchmarks/qad.py --table

A network of depthwise convolutions and hard swishes (timm's mobilenetv3_small_050, its stem without a stride, taught
by ResNet-56 for six epochs) is quantized by the rules of each target, by min-max ranges and by what `method = "auto"`
comes to, and distilled anew while it rounds, as `[quantize] qad = "auto"` does it: from min-max ranges always, from
the other where that loses more than half a point.

- `trained`: the network as it is.
- `rescaled`: each channel between two layers with a ReLU between them multiplied by exp(spread · n), n normal, and
  the weights that read it divided: the same function in float, but some channels are a hundred times as wide as
  others (Nagel et al., ICCV 2019, figure 2). This is the inverse of equalisation, and no network met in the wild;
  distillation from min-max ranges has to make it good without equalisation.

A row tells the accuracy on the 5,000 test images of the simulated network in PyTorch, and of its ONNX graph on ONNX
Runtime with its rewrites on and off. One JSON line a row goes to results/qad.jsonl; what is there with the same
settings is not done again, and a training that was killed goes on. The float network is kept in benchmarks/.store/qad.

Reference: Howard et al.: Searching for MobileNetV3, ICCV 2019.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from edgekd import data, distillation, models, plugins, qad, quantize, target
from edgekd.backends.onnxruntime import onnxruntime
from edgekd.bench import accuracy
from edgekd.deploy import Calibration
from edgekd.distillation import Teacher
from edgekd.graph.edit import save
from edgekd.graph.program import capture, graph_inputs
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.quantize import state
from edgekd.quantize.equalize import find_pairs, rescale
from edgekd.quantize.ladder import Ladder
from edgekd.quantize.samples import Halves
from edgekd.quantize.simulation import Simulation
from edgekd.quantize.student import Rounded
from edgekd.recipe import loss_term
from edgekd.store import sha256_of
from edgekd.types import Augment, Dataset, LossTerm, ModelSpec, Part, Task, TrainOptions

from ledger import CACHE_GB, DATA, RESULTS, STORE, Ledger, key  # isort: skip  # a script beside this one

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = Augment(crop_pixels=4, flip=True)  # as quality.py has it: the teacher's answers are shared
KD: list[dict[str, Any]] = [{"name": "kd", "weight": 0.9, "temperature": 4.0}, {"name": "ce", "weight": 0.1}]
OPTIONS = TrainOptions(
    epochs=6, batch_size=128, optimizer="adamw", learning_rate=0.003, weight_decay=0.02, compile="off", views=6,
    cache_gb=CACHE_GB, threads=1,
)  # fmt: skip
NAME = "mobilenetv3_small_050"
MAX_DROP = 0.005


def main() -> None:
    """Do what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description="Quantization-aware distillation on CIFAR-10")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--kinds", nargs="+", default=["trained", "rescaled"], choices=["trained", "rescaled"])
    parser.add_argument("--targets", nargs="+", default=["host", "jetson"])
    parser.add_argument("--methods", nargs="+", default=["minmax", "auto"], choices=["minmax", "auto"])
    parser.add_argument("--epochs", type=int, default=1, help="of quantization-aware distillation")
    parser.add_argument("--spread", type=float, default=1.25, help="of rescaled channels")
    parser.add_argument("--results", type=Path, default=RESULTS / "qad.jsonl")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, do nothing")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if not asked.table:
        bench = Bench(asked, ledger)
        for kind in asked.kinds:
            for name in asked.targets:
                for method in asked.methods:
                    bench.run(kind, name, method)
    print(table(ledger.rows()))


class Cifar:
    """The images, the teacher and the float network, each made when it is first asked for."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store = folder, store
        self.task: Task = plugins.build("tasks", Part("classification"))

    @cached_property
    def data(self) -> Dataset:
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

    @property
    def file(self) -> Path:
        """Where the weights of the float network are, once it is trained."""
        return self.store / "qad" / f"{NAME}.safetensors"

    @cached_property
    def network(self) -> Network:
        """The float network, trained first where that was not done before."""
        file, work = self.file, self.store / "qad" / NAME
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

    def judged(self, outputs: Any) -> dict[str, Any]:
        """Accuracy on the test split."""
        return asdict(accuracy.mean(self.task.scores(outputs, accuracy.labels(self.data.test))))


class Bench(Cifar):
    """The rows, and what all of them share."""

    def __init__(self, asked: argparse.Namespace, ledger: Ledger) -> None:
        super().__init__(asked.data, asked.store)
        self.asked, self.ledger = asked, ledger

    def run(self, kind: str, name: str, method: str) -> None:
        """Quantize by a method, and distil anew from there."""
        _ = self.network  # trained, where it was not
        settings = {
            "network": sha256_of(self.file), "data": self.data.fingerprint, "kind": kind, "target": name,
            "method": method, "quantizer": quantize.VERSION, "epochs": 0,
        } | ({"spread": self.asked.spread} if kind == "rescaled" else {})  # fmt: skip
        taught = settings | {"epochs": self.asked.epochs, "qad": qad.VERSION, "rate": qad.LEARNING_RATE}
        folder = self.store / "qad" / key(taught)
        folder.mkdir(parents=True, exist_ok=True)
        rules = target.load(name).quantization
        simulation = self.simulation(kind, name)
        start = folder / "start"
        if self.ledger.find(settings) is None or not start.exists():
            halves = Halves(self.network, Calibration(self.data), True, False)
            ladder = Ladder(simulation, halves, max_drop=MAX_DROP, task=self.task)
            if method == "auto":
                ladder.climb(say)
            else:
                ladder.apply(["minmax"])
            state.save(simulation, start)
            if self.ledger.find(settings) is None:
                self.ledger.add(settings, methods=ladder.to_json(), **self.figures(simulation, folder))
        quantized = self.ledger.find(settings)
        if self.ledger.find(taught) is not None or (method == "auto" and quantized and quantize.holds(quantized)):
            return
        recovery = qad.Recovery(
            (Teacher(self.teacher),), (), self.data, Calibration(self.data), self.task,
            qad.options(OPTIONS, self.asked.epochs), AUGMENT, 0, self.store / "answers",
        )  # fmt: skip
        meta = qad.train(
            self.network, start, rules, recovery, self.losses, preprocessing=True, work=folder, say=say,
        )  # fmt: skip
        found = state.load(simulation.program, rules, folder / state.FILE)
        told = {name: meta[name] for name in ("before", "after", "kept", "train_s", "history")}
        self.ledger.add(taught, **told, **self.figures(found, folder))

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        """As the float network was taught."""
        return tuple(loss_term(each, NAME) for each in KD)

    def simulation(self, kind: str, name: str) -> Simulation:
        """The network by the rules of a target, without ranges."""
        first = next(iter(Calibration(self.data))).inputs
        args, specs = graph_inputs(self.network, first, preprocessing=True)
        program = capture(self.network, args, specs, preprocessing=True)
        simulation = Simulation(program, target.load(name).quantization)
        random = torch.Generator().manual_seed(0)
        for pair in find_pairs(simulation) if kind == "rescaled" else ():
            channels = simulation.weight(pair.first).shape[pair.first.axis]
            rescale(simulation, pair, torch.exp(self.asked.spread * torch.randn(channels, generator=random)))
        return simulation

    def figures(self, simulation: Simulation, folder: Path) -> dict[str, Any]:
        """Accuracy in float, simulated, and of the graph with the rewrites of the runtime on and off."""
        float_outputs = distillation.evaluate(self.network, self.data.test)
        simulated = distillation.evaluate(Network(Rounded(simulation), self.network.inputs, None), self.data.test)
        model, _ = quantize.write(simulation, 19)
        save(model, folder / "model.onnx")
        found = {"float": self.judged(float_outputs), "simulated": self.judged(simulated)}
        for name, rewrites in (("graph", False), ("rewritten graph", True)):
            session = onnxruntime(optimizations=rewrites).load(folder / "model.onnx", 1)
            found[name] = self.judged(accuracy.predict(session, self.data.test))
            session.close()
        return {"accuracy": found}


def say(event: str, /, **fields: Any) -> None:
    """Tell of epochs and notes."""
    if event in ("epoch", "note", "resumed"):
        told = {key: fields[key] for key in ("text", "epoch", "of", "loss", "seconds", "eta_s") if key in fields}
        print(event, told, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row, in points of accuracy: what is lost, and how far the graph is from the simulation."""
    names = ("kind", "target", "method", "epochs", "float", "int8", "lost", "graph apart", "rewritten", "seconds")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        settings, found = row["settings"], {name: 100 * each["value"] for name, each in row["accuracy"].items()}
        method = settings["method"] + (" + distilled" if settings["epochs"] else "")
        cells = [settings["kind"], settings["target"], method, settings["epochs"]]
        cells += [f"{found['float']:.2f}", f"{found['graph']:.2f}", f"{found['float'] - found['graph']:.2f}"]
        cells += [f"{found[name] - found['simulated']:+.2f}" for name in ("graph", "rewritten graph")]
        lines.append(f"| {' | '.join(map(str, [*cells, round(row.get('train_s', 0))]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
