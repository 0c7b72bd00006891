"""Distillation against torchdistill and a plain PyTorch loop: seconds an epoch, and the accuracy after the same epochs.

    python benchmarks/speed.py [--quick] [--epochs 6] [--seeds 0 1 2] [--losses …] [--competitors …]

The same teacher, initial student, images, batch size, augmentation, optimizer, schedule and loss for all; with
`--losses penultimate` or `default` edgekd compares features as well, and the peers keep their loss. Each competitor
is a process that lives through a whole training and waits for its turn; they take turns epoch by epoch, so that a
change in the machine's load meets all of them, and ratios are taken within a round. torchdistill runs in its own
environment (made once in .store/peers/venv: about 6 GB). Killed, the benchmark goes on from the epoch it was in; when
every seed is done, one JSON line is appended to results/speed.jsonl. The machine should be otherwise idle.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from edgekd.models import build
from edgekd.types import ModelSpec, TensorSpec

HERE = Path(__file__).resolve().parent
PEERS, STORE, RESULTS = HERE / "peers", HERE / ".store" / "peers", HERE / "results" / "speed.jsonl"
PYTHON = STORE / "venv" / "bin" / "python"
RUNS = {  # competitor → interpreter, script
    "torchdistill": (str(PYTHON), "torchdistill_run.py"),
    "textbook": (sys.executable, "textbook.py"),
    "textbook-tuned": (sys.executable, "textbook.py"),
    "edgekd": (sys.executable, "edgekd_run.py"),
}
TASK = {
    "batch_size": 128, "learning_rate": 0.2, "rise": 0.25, "momentum": 0.9, "weight_decay": 5e-4,
    "temperature": 4.0, "kd": 0.9, "ce": 0.1, "crop_pixels": 4, "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225], "precision": "bf16",
}  # fmt: skip
QUICK = (320, 50)  # images a class, of train and test
PROBE = 40  # steps with each number of workers
Row = dict[str, Any]


class Competitor:
    """One competitor's process, from its first epoch to its accuracy."""

    def __init__(self, name: str, settings: Row, folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        (folder / name).mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(settings | {"work": str(folder / name), "tuned": name == "textbook-tuned"}))
        interpreter, script = RUNS[name]
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [interpreter, str(PEERS / script), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, env=environment,
            )  # fmt: skip
        self.ready = self._told()
        self.over = False

    def turn(self) -> list[Row]:
        """Let it train an epoch: what it tells of it, and its accuracy where that was the last one."""
        rows = []
        if self.ready["left"]:
            assert self._process.stdin is not None
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            rows.append(self._told())
        if not rows or rows[0]["last"]:
            rows.append(self._told())
            self.over = True
        return rows

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _told(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with {self._process.wait()}; see {self.log}")
        row: Row = json.loads(line)
        return row | {"name": self.name}


def main() -> None:
    """Race over every seed, and write the result down."""
    options = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if not (STORE / "venv.made").exists():
        environment()
    teacher = options.data / "teachers" / "resnet56-cifar10.safetensors"
    keep(load_file(teacher), STORE / "teacher")
    images = pictures(options.data, QUICK if options.quick else None)
    task: Row = TASK | {"student_name": options.student, "epochs": options.epochs, "views": options.views}
    task |= {"threads": options.threads, "quick": options.quick, "run": options.run, "losses": options.losses}
    names = list(options.competitors)
    key = hashlib.sha256(json.dumps([task, options.seeds, names], sort_keys=True).encode()).hexdigest()[:12]
    if RESULTS.exists() and any(json.loads(line)["key"] == key for line in RESULTS.read_text().splitlines()):
        sys.exit(f"{RESULTS} has this already ({key}); --run 2 measures it anew")
    folder = STORE / "runs" / key
    folder.mkdir(parents=True, exist_ok=True)
    places = {
        "images": str(images), "teacher": str(STORE / "teacher"), "cache": str(folder / "cache"),
        "source": str(images if options.quick else options.data / "cifar10" / "cifar10-images.zip"),
    }  # fmt: skip
    workers = best_workers(task | places, [name for name in names if name != "edgekd"], folder)
    rows = [
        row
        for seed in options.seeds
        for row in race(task | places | {"seed": seed}, names, workers, folder / str(seed))
    ]
    result = {"key": key, "date": time.strftime("%Y-%m-%d"), **summary(rows), "seeds": options.seeds}
    result |= {"settings": task, "workers": workers, "machine": machine(), "versions": versions()}
    if not options.quick:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="distillation against torchdistill and a plain PyTorch loop")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--student", default="resnet8", choices=["resnet8", "resnet20"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--views", type=int, default=3, help="epochs after which augmented views come again (edgekd)")
    parser.add_argument(
        "--losses", choices=["same", "penultimate", "default"], default="same",
        help="of edgekd: the peers' kd; ce + kd + srd on the input of the head; what it distils by unasked, which "
        "compares the last maps as well",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="and cores")
    parser.add_argument(
        "--competitors", nargs="+", default=["torchdistill", "textbook", "edgekd"], choices=list(RUNS), metavar="NAME",
        help="textbook-tuned is the plain loop in bf16 and channels last; edgekd alone tells its accuracy",
    )  # fmt: skip
    parser.add_argument("--run", type=int, default=1, help="another number measures the same anew")
    parser.add_argument("--quick", action="store_true", help="3,200 images, one seed, no result kept: whether it runs")
    options = parser.parse_args()
    if "edgekd" not in options.competitors:
        parser.error("--competitors: edgekd is what all others are compared with; name it as well")
    options.data = options.data.resolve()
    if options.quick:
        options.seeds = options.seeds[:1]
    return options


# ------------------------------------------------------------ what is there before the clock runs


def environment() -> None:
    """torchdistill's own environment."""
    STORE.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(STORE / "venv")], check=True)
    subprocess.run([str(PYTHON), "-m", "pip", "install", "-r", str(PEERS / "requirements.txt")], check=True)
    (STORE / "venv.made").touch()


def pictures(data: Path, only: tuple[int, int] | None) -> Path:
    """The zip file as a folder, since the peers' ImageFolder reads no zip files.

    All of it is read once, so that no competitor's first epoch waits for a disk.
    """
    folder = STORE / ("images" if only is None else "images-quick")
    made = folder / "made"
    if not made.exists():
        counts: dict[str, int] = {}
        with zipfile.ZipFile(data / "cifar10" / "cifar10-images.zip") as archive:
            for name in archive.namelist():
                place = name.rpartition("/")[0]
                counts[place] = counts.get(place, 0) + 1
                if only is not None and counts[place] > only[place.startswith("test")]:
                    continue
                (folder / place).mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(archive.read(name))
        made.touch()
    for file in folder.rglob("*.*"):
        file.read_bytes()
    return folder


def keep(state: dict[str, torch.Tensor], path: Path) -> None:
    """Weights in the two forms that competitors read."""
    if not path.with_suffix(".pt").exists():
        save_file(state, path.with_suffix(".safetensors"))
        torch.save(state, path.with_suffix(".pt"))


def initial_student(base: Row, seed: int) -> str:
    """The same initial weights for all."""
    path = STORE / f"{base['student_name']}-{seed}"
    torch.manual_seed(seed)
    inputs = (TensorSpec("image", "uint8", ("batch", 32, 32, 3)),)
    student = build(ModelSpec(base["student_name"]), classes=10, inputs=inputs, images=True)
    keep({name: value.contiguous() for name, value in student.module.state_dict().items()}, path)
    return str(path)


def best_workers(base: Row, names: Iterable[str], folder: Path) -> dict[str, int]:
    """The number of DataLoader workers, of 0, 1 and 2, with which each peer is fastest here; measured in turns."""
    path = folder / "workers.json"
    found: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        if name in found:
            continue
        settings = base | {
            "seed": 0,
            "epochs": 3,
            "probe": 5 if base["quick"] else PROBE,
            "student": initial_student(base, 0),
        }
        trials = [Competitor(name, settings | {"workers": n}, folder / f"probe-{n}") for n in range(3)]
        times: dict[int, list[float]] = {n: [] for n in range(3)}
        for _ in range(3):  # the first of the three is the warm-up
            for n, trial in enumerate(trials):
                times[n].append(trial.turn()[0]["seconds"])
        for trial in trials:
            trial.stop()
        found[name] = min(times, key=lambda n: min(times[n][1:]))
        print(name, {n: [round(s, 2) for s in t] for n, t in times.items()}, "->", found[name], flush=True)
        path.write_text(json.dumps(found))
    return found


# ------------------------------------------------------------ the race


def race(base: Row, names: list[str], workers: dict[str, int], folder: Path) -> list[Row]:
    """Every competitor's epochs and accuracy with one seed, in turns; from where an interrupted race stood."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    over = {row["name"] for row in rows if row["event"] == "done"}
    round_ = 1 + max((row["round"] for row in rows), default=0)
    settings = base | {"student": initial_student(base, base["seed"])}
    running: list[Competitor] = []

    def write(told: Iterable[Row]) -> None:
        with path.open("a") as file:
            for row in told:
                rows.append(row | {"seed": base["seed"], "round": round_, "load": round(os.getloadavg()[0], 2)})
                file.write(json.dumps(rows[-1]) + "\n")
                print({name: value for name, value in rows[-1].items() if name != "meta"}, flush=True)

    try:
        for name in names:
            if name not in over:
                running.append(Competitor(name, settings | {"workers": workers.get(name, 0)}, folder))
                write([running[-1].ready])
        while left := [each for each in running if not each.over]:
            for place in range(len(left)):
                write(left[(place + round_) % len(left)].turn())  # another one begins in every round
            round_ += 1
    finally:
        for each in running:
            each.stop()
    return rows


# ------------------------------------------------------------ what came of it


def summary(rows: list[Row]) -> Row:
    """Seconds an epoch and accuracies of each competitor, and how many times as fast edgekd was in the same rounds."""
    epochs = [row for row in rows if row["event"] == "epoch" and not row.get("resumed")]
    done = [row for row in rows if row["event"] == "done"]
    ours = {(row["seed"], row["round"]): row for row in epochs if row["name"] == "edgekd"}
    read_s = [row["read_s"] for row in rows if row["name"] == "edgekd" and row["event"] == "ready"]
    found: Row = {"seconds": {}, "accuracy": {}, "speed_up": {}, "read_s": spread(read_s)}
    for state, cold in (("first view", True), ("kept view", False)):
        found["seconds"][f"edgekd, {state}"] = spread(row["seconds"] for row in ours.values() if row["cold"] == cold)
    for name in sorted({row["name"] for row in epochs} - {"edgekd"}):
        theirs = {(row["seed"], row["round"]): row for row in epochs if row["name"] == name}
        found["seconds"][name] = spread(row["seconds"] for row in theirs.values())
        both = [(row["seconds"], ours[at]) for at, row in theirs.items() if at in ours]
        first = [their_s / (own["seconds"] + read_s[0]) for their_s, own in both if own["cold"] and own["epoch"] == 1]
        found["speed_up"][name] = {
            "kept view": spread(their_s / own["seconds"] for their_s, own in both if not own["cold"]),
            "first view": spread(their_s / own["seconds"] for their_s, own in both if own["cold"]),
            "first epoch and reading": spread(first),
            "whole training": whole(theirs, ours, read_s[0]),
        }
    for row in done:
        found["accuracy"].setdefault(row["name"], {})[str(row["seed"])] = row["accuracy"]
    found["mean_accuracy"] = {name: statistics.mean(each.values()) for name, each in found["accuracy"].items()}
    found["load"] = spread(row["load"] for row in epochs)
    return found


def whole(theirs: dict[tuple[int, int], Row], ours: dict[tuple[int, int], Row], read_s: float) -> dict[str, float]:
    """By seed: all epochs of the one by all of the other and its reading; the first seed finds an empty cache.

    A seed in which an epoch was not timed whole, because the benchmark was interrupted, is left out.
    """
    found = {}
    for seed in sorted({at[0] for at in theirs}):
        sides = [{row["epoch"]: row["seconds"] for at, row in rows.items() if at[0] == seed} for rows in (theirs, ours)]
        if sides[0].keys() == sides[1].keys():
            found[str(seed)] = sum(sides[0].values()) / (read_s + sum(sides[1].values()))
    return found


def spread(values: Iterable[float]) -> Row | None:
    """Median, smallest and largest; None of nothing."""
    found = list(values)
    if not found:
        return None
    return {"median": statistics.median(found), "low": min(found), "high": max(found), "n": len(found)}


def machine() -> Row:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model or platform.processor(), "cores_there": os.cpu_count(), "system": platform.platform()}


def versions() -> Row:
    """Of what is compared."""
    told = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    names = ["torchdistill", "torch", "torchvision"]
    theirs = subprocess.run([str(PYTHON), "-c", told, *names], stdout=subprocess.PIPE, text=True, check=True)
    own = {name: version(name) for name in ("edgekd", "torch", "torchvision")}
    return {"python": platform.python_version(), "own": own, "torchdistill's": json.loads(theirs.stdout)}


if __name__ == "__main__":
    main()
