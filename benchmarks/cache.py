"""What the cache of teachers' answers promises, measured on images that are streamed from a folder.

    python benchmarks/cache.py [replay] [memory] [--images 4000]

replay: the same images are read in batches of several sizes, by several numbers of workers, in other orders, over
views that come again. Counted are the samples that do not look the same to the last bit, and the answers that are not
the same to the last bit. Students are trained with the cache cold and warm, with and without workers: weights that are
the same to the last bit have the same hash.

memory: a student is trained on features, of which the cache holds several times what the process may take beyond what
a training without them took. The limit is real: RLIMIT_AS, so that a mapping or an allocation beyond it fails. The
control keeps the same features in memory under the same limit, and fails.

One JSON line a measurement goes to results/cache.jsonl. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd import data, distillation, models, plugins
from edgekd.distillation import Teacher
from edgekd.distillation.answers import Answers
from edgekd.distillation.job import Course, Job
from edgekd.distillation.objective import Objective, Term
from edgekd.distillation.samples import Samples
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.store import sha256_of
from edgekd.types import Augment, Dataset, Json, LossTerm, ModelSpec, Part, Task, TrainOptions

from ledger import DATA, RESULTS, STORE, Ledger  # isort: skip  # a script beside this one

AUGMENT = Augment(crop_pixels=4, flip=True)
READINGS = ((128, 0), (128, 2), (32, 1), (200, 2), (500, 0))  # batch size, workers
OPTIONS = TrainOptions(batch_size=128, learning_rate=0.05, precision="fp32", compile="off", threads=1, cache_gb=100.0)
FEATURE = "layer1"  # 16 × 32 × 32 values of both networks: 32 KB a sample


def main() -> None:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(description="Promises of the cache of teachers' answers")
    parser.add_argument("parts", nargs="*", help="replay, memory; left out: both")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--images", type=int, default=4000, help="that are read in several ways")
    parser.add_argument("--memory-images", type=int, default=10_000, help="of the training under a limit")
    parser.add_argument("--views", type=int, default=8, help="of this training")
    parser.add_argument("--allowed-mb", type=int, default=600, help="memory that it may take beyond a training without")
    parser.add_argument("--results", type=Path, default=RESULTS / "cache.jsonl")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--child", choices=["train", "control"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        measured = {"train": trained, "control": control}[asked.child]
        print(json.dumps(measured(extracted(asked, asked.memory_images), asked.views, asked.allowed_mb)))
        return
    ledger = Ledger(asked.results)
    for part in asked.parts or ("replay", "memory"):
        rows = replay(extracted(asked, asked.images), ledger) if part == "replay" else memory(asked, ledger)
        for row in rows:
            print(json.dumps({name: value for name, value in row.items() if name != "environment"}), flush=True)


@dataclass(frozen=True)
class Images:
    """A folder of images, and the teacher that is asked about them."""

    folder: Path
    weights: Path

    def streamed(self, workers: int) -> Dataset:
        """The images, none of which stays in memory."""
        part = Part("imagefolder", {"path": str(self.folder), "memory_bytes": 0, "workers": workers})
        return data.load(part, 0, task())

    def teacher(self, of: Dataset) -> Network:
        """ResNet-56, trained."""
        return _network(of, ModelSpec("resnet56", weights=str(self.weights)))

    def student(self, of: Dataset) -> Network:
        """ResNet-8 with its initial weights."""
        return _network(of, ModelSpec("resnet8"))

    def train(self, of: Dataset, root: Path, work: Path, terms: Sequence[LossTerm], views: int) -> dict[str, Any]:
        """Train a student through all views twice; `root` gets the answers and `work` its weights."""
        work.mkdir()
        options = replace(OPTIONS, epochs=2 * views, views=views)
        return distillation.distill(
            self.student(of), self.teacher(of), of, terms, options, AUGMENT,
            task=task(), seed=0, work=work, cache=root, say=quiet,
        )  # fmt: skip


def extracted(asked: argparse.Namespace, images: int) -> Images:
    """A folder with so many of CIFAR-10's training images, as many of each class, and a tenth to test on."""
    store = asked.store / "cache"
    folder, archive = store / f"images-{images}", asked.data / "cifar10" / "cifar10-images.zip"
    if not folder.exists():
        store.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=store))
        with zipfile.ZipFile(archive) as found:
            names = sorted(name for name in found.namelist() if name.endswith(".jpg"))
            for part, count in (("train/", images), ("test/", images // 10)):
                own = [name for name in names if part in name]
                found.extractall(partial, [own[at] for at in np.linspace(0, len(own) - 1, count).astype(int)])
        partial.rename(folder)
    return Images(folder, asked.data / "teachers" / "resnet56-cifar10.safetensors")


# ---------------------------------------------------------------- replay


def replay(images: Images, ledger: Ledger, views: int = 2) -> Iterator[dict[str, Any]]:
    """Samples and answers that differ between ways of reading, then weights that do."""
    with tempfile.TemporaryDirectory(dir=images.folder.parent) as scratch:
        root = Path(scratch)
        first: Reading | None = None
        for seed, (batch_size, workers) in enumerate(READINGS):
            options = replace(OPTIONS, batch_size=batch_size, views=views)
            begun = time.time()
            found = read(images, root / "shared", options, workers, seed)
            seconds = time.time() - begun
            anew = read(images, root / f"alone-{seed}", replace(options, views=1), workers, seed)
            first = first or found
            apart = np.abs(anew.answers[0] - first.answers[0])
            settings: dict[str, Any] = {
                "part": "replay", "views": views, "epochs": 2 * views, "batch_size": batch_size, "workers": workers,
                "order_seed": seed, "augment": asdict(AUGMENT), "images": found.looks.shape[1],
            }  # fmt: skip
            yield ledger.add(
                settings, compared=found.looks.size, answers_computed=found.computed, wall_s=round(seconds, 1),
                samples_that_differ=int((found.looks != first.looks).sum()),
                answers_that_differ=int((found.answers != first.answers).any(axis=2).sum()),
                share_of_answers_that_differ_when_filled_anew=float(apart.any(axis=1).mean()),
                largest_difference_when_filled_anew=float(apart.max()),
            )  # fmt: skip
        yield from _weights(images, ledger, root, views)


def _weights(images: Images, ledger: Ledger, root: Path, views: int) -> Iterator[dict[str, Any]]:
    """Weights of students that were trained with the cache cold and warm, and with workers."""
    terms, hashes = [loss_term("kd", "cache.py")], list[str]()
    for at, (cache, state, workers) in enumerate(
        (("one", "cold", 0), ("one", "warm", 0), ("one", "warm", 2), ("two", "cold", 1))
    ):
        meta = images.train(images.streamed(workers), root / cache, root / f"work-{at}", terms, views)
        hashes.append(sha256_of(root / f"work-{at}" / "weights.safetensors"))
        (teacher,) = meta["teachers"]
        settings = {"part": "weights", "cache": state, "workers": workers, "views": views, "epochs": 2 * views}
        yield ledger.add(
            settings | {"images": meta["samples"]}, weights_sha256=hashes[-1], equal_to_first=hashes[-1] == hashes[0],
            answers_asked=teacher["asked"], answers_recalled=teacher["recalled"], train_s=meta["train_s"],
        )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What was read: views × samples hashes, views × samples × classes answers, and how many the teacher computed."""

    looks: np.ndarray
    answers: np.ndarray
    computed: int


def read(images: Images, root: Path, options: TrainOptions, workers: int, seed: int) -> Reading:
    """Read every view twice, in another order each time, and ask the teacher about it.

    Raises:
        SystemExit: a sample or an answer was not the same when its view came again.
    """
    of = images.streamed(workers)
    teacher, home = images.teacher(of), torch.device("cpu")
    course = Course(None, of, task(), (Teacher(teacher),), Objective([Term(kd)], task(), len(of.classes)))
    job = Job("distill", images.student(of), (course,), options, AUGMENT, seed, root, root, quiet)
    samples = Samples(of, AUGMENT, batch_size=options.batch_size, views=options.views, seed=seed, device=home)
    answers = Answers(job, course, course.teachers[0], (), samples, home)
    looks = np.zeros((options.views, len(of.train)), "S64")
    said = np.zeros((*looks.shape, len(of.classes)), np.float32)
    teacher.eval()
    answers.choose(None, next(samples.epoch(0)))
    for epoch in range(2 * options.views):
        for step in samples.epoch(epoch):
            hashes = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in step.inputs["image"]]
            at, look, given = (step.view, step.indices), np.array(hashes, "S64"), answers(step).logits.numpy()
            if epoch >= options.views and not (np.array_equal(looks[at], look) and np.array_equal(said[at], given)):
                sys.exit(f"{options.batch_size} × {workers} workers: epoch {epoch + 1} is not what its view was before")
            looks[at], said[at] = look, given
    told: Any = answers.json()
    answers.close()
    return Reading(looks, said, told["asked"] - told["recalled"])


# ---------------------------------------------------------------- memory


def memory(asked: argparse.Namespace, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Training and its control, each in a process of its own."""
    for child in ("train", "control"):
        options = {"data": asked.data, "memory-images": asked.memory_images, "views": asked.views}
        command = [sys.executable, str(Path(__file__)), "--child", child, "--store", str(asked.store)]
        command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        command += ["--allowed-mb", str(asked.allowed_mb)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        settings = {"part": "memory", "what": child, "images": asked.memory_images, "views": asked.views}
        found = json.loads(done.stdout.splitlines()[-1])
        yield ledger.add(settings | {"allowed_mb": asked.allowed_mb}, **found)


def trained(images: Images, views: int, allowed_mb: int) -> dict[str, Any]:
    """Train on features through all views twice under the limit."""
    of = images.streamed(0)
    terms = [loss_term("kd", "cache.py"), loss_term({"name": "hint", "pairs": [[FEATURE, FEATURE]]}, "cache.py")]
    with tempfile.TemporaryDirectory(dir=images.folder.parent) as scratch:
        # What torch loads late, and what any training takes, comes before the limit.
        images.train(of, Path(scratch) / "none", Path(scratch) / "first", terms[:1], 1)
        before = limited(allowed_mb)
        meta = images.train(of, Path(scratch) / "answers", Path(scratch) / "work", terms, views)
        (teacher,), after = meta["teachers"], _status()
        files = [file for file in (Path(scratch) / "answers").rglob("*") if file.is_file()]
        cache_mb = round(sum(file.stat().st_size for file in files) / 1e6)
    return {
        "outcome": "trained", "cache_mb": cache_mb, "cache_is_times_the_allowed": round(cache_mb / allowed_mb, 1),
        "resident_before_mb": before["VmRSS"], "peak_resident_mb": after["VmHWM"],
        "address_space_before_mb": before["VmSize"], "peak_address_space_mb": after["VmPeak"],
        "answers_asked": teacher["asked"], "answers_recalled": teacher["recalled"], "train_s": meta["train_s"],
    }  # fmt: skip


def control(images: Images, views: int, allowed_mb: int) -> dict[str, Any]:
    """Keep in memory what the cache would hold, under the same limit."""
    count = len(images.streamed(0).train)
    before, kept = limited(allowed_mb), list[np.ndarray]()
    try:
        for _ in range(views):
            kept.append(np.ones((count, 16, 32, 32), np.float16))
        outcome = "kept it all"
    except MemoryError:
        outcome = f"MemoryError in view {len(kept) + 1} of {views}"
    return {"outcome": outcome, "resident_before_mb": before["VmRSS"], "peak_resident_mb": _status()["VmHWM"]}


def limited(allowed_mb: int) -> dict[str, int]:
    """Allow this process so many megabytes more than it has; gives what it has."""
    torch.set_num_threads(1)
    now = _status()
    limit = (now["VmSize"] + allowed_mb) * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return now


def _status() -> dict[str, int]:
    """Figures of this process's memory, in megabytes."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm")]
    return {name.rstrip(":"): round(int(value) * 1024 / 1e6) for name, value, _ in lines}


def task() -> Task:
    """One class an image."""
    built: Task = plugins.build("tasks", Part("classification"))
    return built


def kd(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """A loss that asks for the teacher's logits."""
    return (student_logits - teacher_logits).square().mean()


def quiet(event: str, /, **fields: Json) -> None:
    """What has to be known, on stderr."""
    if event in ("note", "corrupt"):
        print(event, fields, file=sys.stderr, flush=True)


def _network(of: Dataset, spec: ModelSpec) -> Network:
    torch.manual_seed(0)
    return models.build(spec, classes=len(of.classes), inputs=of.inputs, images=True)


if __name__ == "__main__":
    main()
