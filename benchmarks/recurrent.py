"""LSTM → smaller LSTM on texts: what the outputs give a student, and what the layers that `match` pairs give it.

    python benchmarks/recurrent.py [--tasks sst2 subj] [--methods none kd "kd + cosine"] [--seeds 0 1 2]
    python benchmarks/recurrent.py --table

The teachers are those of text.py (bidirectional; the tokenizer is shared, too). The student is an LSTM that reads
forwards alone, with the same initial weights, batches and epochs for every method. Each method has the learning rate
that was best for it on the held-out texts (`--learning-rates` tries others; all that was tried stays in the results).

One JSON line a training goes to results/recurrent.jsonl; what is there with the same settings is not trained again,
and a training that was killed goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from edgekd import distillation
from edgekd.distillation import Lesson, Teacher
from edgekd.recipe import loss_term
from edgekd.types import Augment, ModelSpec

from ledger import Ledger, key, spread  # isort: skip  # a script beside this one
from text import CE, OPTIONS, TASKS, Method, Texts, add_arguments, quiet, size, told  # isort: skip

STUDENT = ModelSpec("lstm", {"width": 32, "embedding": 16, "dropout": 0.3})
KD: list[dict[str, Any]] = [{"name": "kd", "weight": 0.9, "temperature": 2.0}, CE | {"weight": 0.1}]
METHODS = {
    "none": Method([CE], 0.005),
    "kd": Method(KD, 0.005),
    "kd, T = 1": Method([{"name": "kd", "temperature": 1.0}, CE], 0.005),
    "ce + kd": Method([{"name": "kd", "temperature": 2.0}, CE], 0.005),
    "kd + cosine": Method([*KD, {"name": "cosine", "weight": 1.0}], 0.005),
}


def main() -> None:
    """Run what is not there yet, seed by seed, or print the table."""
    parser = argparse.ArgumentParser(description="A smaller LSTM learns from an LSTM")
    add_arguments(parser, list(METHODS), "recurrent.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "subj"], choices=TASKS)
    parser.add_argument("--epochs", type=int, default=15)
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if not asked.table:
        texts = Texts(asked, asked.tasks)
        for seed in asked.seeds:
            for task in asked.tasks:
                for method in asked.methods:
                    for rate in asked.learning_rates or [METHODS[method].learning_rate]:
                        run(texts, ledger, asked, task, method, rate, seed)
    print(table(ledger.rows()))


def run(
    texts: Texts, ledger: Ledger, asked: argparse.Namespace, task: str, method: str, rate: float, seed: int
) -> None:
    """Train and judge one student, unless the same is there."""
    options = replace(OPTIONS, epochs=asked.epochs, learning_rate=rate, threads=asked.threads)
    found, losses = texts.data[task], METHODS[method].losses
    settings = {
        "task": task, "method": method, "losses": list(losses), "model": asdict(STUDENT), "seed": seed,
        "options": told(options), "data": found.fingerprint, "teacher_epochs": asked.teacher_epochs,
    }  # fmt: skip
    if ledger.find(settings) is not None:
        return
    teacher, network = texts.teacher(task, 0), texts.network(STUDENT, seed, task)
    work = asked.store / "recurrent" / key(settings)
    work.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    lesson = Lesson(found, texts.task, [Teacher(teacher)], [loss_term(each, method) for each in losses])
    meta: dict[str, Any] = distillation.distill_tasks(
        network, [lesson], options, Augment(), seed=seed, work=work, cache=asked.store / "answers", say=quiet
    )
    pairs = [[term["name"], term["pairs"]] for term in meta["losses"]["student"] if "pairs" in term]
    row = ledger.add(
        settings, **texts.judged({task: network}, heads=False), **size(network), pairs=pairs,
        teacher=texts.judged({task: teacher}, heads=False) | size(teacher),
        train_s=meta["train_s"], wall_s=round(time.time() - begun, 1),
    )  # fmt: skip
    shutil.rmtree(work)
    value = row["accuracy"][task]["value"]
    print(f"{task} {method} at {rate:g}, seed {seed}: {value:.4f} in {row['wall_s']} s", file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy in per cent, mean ± standard deviation over seeds, beside the teacher's."""
    lines = [
        "| task | losses | epochs | rate | parameters | accuracy | seeds | held out | teacher (parameters) |",
        "|---" * 9 + "|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        settings, options = row["settings"], row["settings"]["options"]
        group = settings["task"], settings["method"], options["epochs"], options["learning_rate"]
        groups.setdefault(group, []).append(row)
    for group, found in groups.items():
        task, teacher = group[0], found[0]["teacher"]
        figures = [spread([100 * row[name][task]["value"] for row in found]) for name in ("accuracy", "held_out")]
        above = f"{100 * teacher['accuracy'][task]['value']:.2f} ({teacher['parameters']:,})"
        cells = *group, f"{found[0]['parameters']:,}", figures[0], len(found), figures[1], above
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
