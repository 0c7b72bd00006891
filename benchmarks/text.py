"""Four tasks on texts: an ensemble of teachers for each, one small student with four heads for all.

    python benchmarks/text.py [--methods none kd] [--seeds 0 1 2]
    python benchmarks/text.py --table

The student learns from the labels alone ("none"), or from its teachers and the labels: same network, initial weights,
batches and epochs. Each method has the learning rate that was best for it on the held-out texts (`--learning-rates`
tries others; all that was tried stays in the results). The test texts are read once, at the end.

One JSON line a training goes to results/text.jsonl (teachers: text-teachers.jsonl), with figures by task; what is there
with the same settings is not trained again, and a training that was killed goes on. Teachers are kept in
benchmarks/.store.

References: Liu, He, Chen, Gao: Improving Multi-Task Deep Neural Networks via Knowledge Distillation for Natural
Language Understanding, 2019. Data: Li, Roth 2002 (TREC); Socher et al. 2013 (SST-2); Pang, Lee 2004 (subj);
Wiebe et al. 2005 (MPQA).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd import data, distillation, models, plugins
from edgekd.bench import accuracy
from edgekd.distillation import Lesson, Teacher
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import Augment, Dataset, Json, ModelSpec, Part, Split, Task, TrainOptions

from ledger import CACHE_GB, DATA, RESULTS, STORE, Ledger, key, spread  # isort: skip  # a script beside this one

TASKS = ("trec", "sst2", "subj", "mpqa")
LENGTH = 40  # ids a text; 98 of 100 texts are shorter
TEACHER = ModelSpec("lstm", {"width": 96, "embedding": 96, "bidirectional": True, "dropout": 0.5})
STUDENT = ModelSpec("lstm", {"width": 32, "embedding": 24, "bidirectional": True, "dropout": 0.3})
OPTIONS = TrainOptions(
    epochs=6, batch_size=64, optimizer="adamw", learning_rate=0.003, weight_decay=0.1, precision="fp32", compile="off",
    cache_gb=CACHE_GB,
)  # fmt: skip
EPOCHS = 12  # of the student
CE: dict[str, Any] = {"name": "ce"}


@dataclass(frozen=True)
class Method:
    """Losses as a recipe has them, and the peak learning rate that did best on the held-out texts."""

    losses: Sequence[dict[str, Any]]
    learning_rate: float


METHODS = {
    "none": Method([CE], 0.005),
    "kd": Method([{"name": "kd", "weight": 0.9, "temperature": 2.0}, CE | {"weight": 0.1}], 0.005),
    "kd, T = 1": Method([{"name": "kd", "temperature": 1.0}, CE], 0.005),
}


def main() -> None:
    """Run what is not there yet, seed by seed, or print the table."""
    parser = argparse.ArgumentParser(description="Multi-task distillation on texts")
    add_arguments(parser, list(METHODS), "text.jsonl")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--ensemble", type=int, default=2, help="teachers for each task")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if not asked.table:
        texts = Texts(asked, TASKS)
        for seed in asked.seeds:
            for method in asked.methods:
                for rate in asked.learning_rates or [METHODS[method].learning_rate]:
                    run(texts, ledger, asked, method, rate, seed)
    print(table([*Ledger(asked.teachers).rows(), *ledger.rows()]))


def add_arguments(parser: argparse.ArgumentParser, methods: list[str], results: str) -> None:
    """What the benchmarks on texts all take."""
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rates", nargs="+", type=float, help="to try, instead of each method's own")
    parser.add_argument("--teacher-epochs", type=int, default=OPTIONS.epochs)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / results)
    parser.add_argument("--teachers", type=Path, default=RESULTS / "text-teachers.jsonl", help="results of teachers")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")


class Texts:
    """The tasks with one tokenizer, read once, and their teachers, trained once."""

    def __init__(self, asked: argparse.Namespace, tasks: Sequence[str]) -> None:
        self.asked, self.teachers = asked, Ledger(asked.teachers)
        self.task: Task = plugins.build("tasks", Part("classification"))
        folder = asked.data / "text"
        shared: dict[str, Json] = {
            "corpus": [str(folder / name / "train.csv") for name in TASKS],
            "length": LENGTH,
            "vocabulary": asked.vocabulary,
        }
        parts = {name: Part("text", {"path": str(folder / name)} | shared) for name in tasks}
        self.data: dict[str, Dataset] = {name: data.load(part, 0, task=self.task) for name, part in parts.items()}

    def network(self, spec: ModelSpec, seed: int, task: str | None = None) -> Network:
        """A network for one task, or with a head for each; its initial weights are drawn from the seed."""
        torch.manual_seed(seed)
        heads = {name: len(found.classes) for name, found in self.data.items()}
        inputs = next(iter(self.data.values())).inputs
        return models.build(spec, classes=heads if task is None else heads[task], inputs=inputs, images=False)

    def teacher(self, task: str, seed: int) -> Network:
        """A teacher of one task, trained on its labels where it is not there yet."""
        options = replace(OPTIONS, epochs=self.asked.teacher_epochs, threads=self.asked.threads)
        settings = {
            "role": "teacher", "task": task, "data": self.data[task].fingerprint, "model": asdict(TEACHER),
            "options": told(options), "seed": seed,
        }  # fmt: skip
        network = self.network(TEACHER, seed, task)
        work = self.asked.store / "text" / f"{task}-{key(settings)}"
        file = work / "weights.safetensors"
        if self.teachers.find(settings) is None or not file.exists():
            work.mkdir(parents=True, exist_ok=True)
            meta = distillation.train(
                network, self.data[task], options, Augment(), task=self.task, seed=seed, work=work, say=quiet
            )
            found = self.judged({task: network}, heads=False)
            self.teachers.add(settings, **found, **size(network), train_s=meta["train_s"])
            print(f"teacher of {task}, seed {seed}: {found['accuracy'][task]['value']:.4f}", file=sys.stderr)
        weights.load(file, network.module)
        return network.eval()

    def ensemble(self, task: str, count: int) -> list[Teacher]:
        """Teachers that differ in their seed alone; how good they are together is written down, too."""
        teachers = [Teacher(self.teacher(task, seed)) for seed in range(count)]
        made = {"options": told(replace(OPTIONS, epochs=self.asked.teacher_epochs)), "model": asdict(TEACHER)}
        settings = {"role": "teachers", "task": task, "data": self.data[task].fingerprint, "count": count, **made}
        if count > 1 and self.teachers.find(settings) is None:
            found: dict[str, Any] = {}
            for name, split in self._splits(task):
                logits = [distillation.evaluate(each.network, split) for each in teachers]
                mean = np.mean([np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True)) for z in logits], axis=0)
                found[name] = {task: self._score(mean, split)}
            self.teachers.add(settings, **found)
        return teachers

    def judged(self, networks: Mapping[str, Network], *, heads: bool) -> dict[str, Any]:
        """Accuracies by task on the held-out and on the test texts."""
        found: dict[str, dict[str, Any]] = {"held_out": {}, "accuracy": {}}
        for task, network in networks.items():
            for name, split in self._splits(task):
                outputs = distillation.evaluate(network, split, head=task if heads else None)
                found[name][task] = self._score(outputs, split)
        return found

    def _splits(self, task: str) -> tuple[tuple[str, Split], ...]:
        return ("held_out", self.data[task].calibration), ("accuracy", self.data[task].test)

    def _score(self, outputs: np.ndarray, split: Split) -> dict[str, Any]:
        return asdict(accuracy.mean(self.task.scores(outputs, accuracy.labels(split))))


def run(texts: Texts, ledger: Ledger, asked: argparse.Namespace, method: str, rate: float, seed: int) -> None:
    """Train and judge one student, unless the same is there."""
    options = replace(OPTIONS, epochs=asked.epochs, learning_rate=rate, threads=asked.threads)
    losses = METHODS[method].losses
    settings = {
        "role": "student", "method": method, "losses": list(losses), "model": asdict(STUDENT), "seed": seed,
        "options": told(options), "ensemble": asked.ensemble, "teacher_epochs": asked.teacher_epochs,
        "data": {task: found.fingerprint for task, found in texts.data.items()},
    }  # fmt: skip
    if ledger.find(settings) is not None:
        return
    terms = [loss_term(each, method) for each in losses]
    lessons = [
        Lesson(found, texts.task, texts.ensemble(task, asked.ensemble), terms, task)
        for task, found in texts.data.items()
    ]
    network = texts.network(STUDENT, seed)
    work = asked.store / "text" / f"student-{key(settings)}"
    work.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    meta = distillation.distill_tasks(
        network, lessons, options, Augment(), seed=seed, work=work, cache=asked.store / "answers", say=quiet
    )
    found = texts.judged(dict.fromkeys(texts.data, network), heads=True)
    row = ledger.add(settings, **found, **size(network), train_s=meta["train_s"], wall_s=round(time.time() - begun, 1))
    shutil.rmtree(work)
    shown = {task: row["accuracy"][task]["value"] for task in texts.data}
    print(f"{method} at {rate:g}, seed {seed}: {shown} in {row['wall_s']} s", file=sys.stderr, flush=True)


def told(options: TrainOptions) -> dict[str, Any]:
    """The options that decide the result, as settings."""
    return {name: value for name, value in asdict(options).items() if name not in ("threads", "cache_gb")}


def size(network: Network) -> dict[str, int]:
    """Parameters with and without those of the embeddings."""
    whole = sum(each.numel() for each in network.module.parameters())
    tables = [module for module in network.module.modules() if isinstance(module, nn.Embedding)]
    return {
        "parameters": whole,
        "parameters_without_embeddings": whole - sum(each.weight.numel() for each in tables),
    }


def quiet(event: str, /, **fields: Json) -> None:
    """What has to be known, on stderr."""
    if event in ("note", "resumed", "corrupt"):
        print(event, fields.get("text", fields), file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy in per cent by task, mean ± standard deviation over seeds, and what the held-out texts said."""
    lines = [
        f"| network | parameters (without embeddings) | {' | '.join(TASKS)} | mean | seeds | held-out mean |",
        f"|---|---|{'---|' * len(TASKS)}---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_group(row["settings"]), []).append(row)
    for name, found in groups.items():
        first = found[0]
        sizes = f"{first['parameters']:,} ({first['parameters_without_embeddings']:,})" if "parameters" in first else ""
        cells, held_out = _cells(found, "accuracy"), _cells(found, "held_out")
        whole = spread(cells["mean"]) if "mean" in cells else ""
        shown = " | ".join(spread(cells[task]) if task in cells else "" for task in TASKS)
        count = len(cells.get("mean", next(iter(cells.values()))))
        aside = spread(held_out["mean"]) if "mean" in held_out else ""
        lines.append(f"| {', '.join(map(str, name))} | {sizes} | {shown} | {whole} | {count} | {aside} |")
    return "\n".join(lines)


def _group(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the rows of one line of the table have in common."""
    if settings["role"] == "teachers":
        return f"{settings['count']} teachers together", f"{settings['options']['epochs']} epochs"
    if settings["role"] == "teacher":
        return "one teacher", f"{settings['options']['epochs']} epochs"
    options = settings["options"]
    return f"student, {settings['method']}", f"{options['epochs']} epochs", f"rate {options['learning_rate']:g}"


def _cells(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[float]]:
    """Values in per cent, one a seed, by task, and their mean over the tasks where every seed has all of them."""
    by_seed: dict[Any, dict[str, float]] = {}
    for row in rows:
        values = {task: 100 * each["value"] for task, each in row[name].items()}
        by_seed.setdefault(row["settings"].get("seed"), {}).update(values)
    whole = [found for found in by_seed.values() if set(found) == set(TASKS)]
    cells = {task: [found[task] for found in by_seed.values() if task in found] for task in TASKS}
    if len(whole) == len(by_seed):
        cells["mean"] = [statistics.fmean(found.values()) for found in whole]
    return {task: values for task, values in cells.items() if values}


if __name__ == "__main__":
    main()
