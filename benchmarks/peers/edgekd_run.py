"""edgekd at the same task, through its Python API: one call of `distill`, whose `say` waits for the next turn.

Started by ../speed.py with a settings file. Its time of an epoch holds all that edgekd does in it: reading and
augmenting, checkpoints, filling the cache; in the first turn also what comes before the first step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from task import Settings, Turns

from edgekd.data.imagefolder import imagefolder
from edgekd.distillation import default_losses, distill, evaluate
from edgekd.models import build, weights
from edgekd.models.network import Network
from edgekd.tasks.classification import classification
from edgekd.types import Augment, Dataset, Json, LossTerm, ModelSpec, Part, Task, TrainOptions

CALIBRATION = 10  # edgekd holds out at least one training image a class; the others train on these ten as well


def network(name: str, path: str, settings: Settings, data: Dataset) -> Network:
    """A model with its weights and normalisation."""
    spec = ModelSpec(name, weights=f"{path}.safetensors", mean=tuple(settings.mean), std=tuple(settings.std))
    return build(spec, classes=len(data.classes), inputs=data.inputs, images=True)


class Training:
    """One call of `distill`, an epoch a turn."""

    def __init__(self, turns: Turns, settings: Settings) -> None:
        self.turns, self.settings = turns, settings
        began_s = time.perf_counter()
        self.data = imagefolder(0, path=settings.source, calibration=CALIBRATION)
        self.read_s = time.perf_counter() - began_s
        self.teacher = network("resnet56", settings.teacher, settings, self.data)
        self.student = network(settings.student_name, settings.student, settings, self.data)
        self.work, self.cache = Path(settings.work), Path(settings.cache)
        self.resumed = False
        self.kept = self._kept()

    def run(self) -> dict[str, Json]:
        """Train to the end; what distill tells of it."""
        s = self.settings
        task = classification()
        options = TrainOptions(
            epochs=s.epochs, batch_size=s.batch_size, learning_rate=s.learning_rate, momentum=s.momentum,
            weight_decay=s.weight_decay, schedule="onecycle", ema_decay=0.0, precision=s.precision,
            threads=s.threads, views=s.views,
        )  # fmt: skip
        augment = Augment(crop_pixels=s.crop_pixels, flip=True)
        return distill(
            self.student, self.teacher, self.data, self.terms(task), options, augment,
            task=task, seed=s.seed, work=self.work, cache=self.cache, say=self.say,
        )  # fmt: skip

    def terms(self, task: Task) -> tuple[LossTerm, ...]:
        """The loss: the peers', or one that compares features as well."""
        s = self.settings
        if s.losses == "default":
            return default_losses(task)
        if s.losses == "penultimate":
            head = LossTerm(Part("srd", {}), 2.0, pairs=(("linear:in", "linear:in"),))
            return LossTerm(Part("ce", {})), LossTerm(Part("kd", {"temperature": 1.0})), head
        return LossTerm(Part("kd", {"temperature": s.temperature}), s.kd), LossTerm(Part("ce", {}), s.ce)

    def say(self, event: str, /, **fields: Json) -> None:
        """An epoch is told to the driver; the next one waits for its turn."""
        if event == "resumed":
            self.resumed = True
        elif event == "epoch":
            seconds, kept = self.turns.elapsed_s(), self._kept()
            last = fields["epoch"] == self.settings.epochs
            self.turns.tell(
                "epoch", epoch=fields["epoch"], seconds=seconds, loss=fields["loss"],
                cold=kept > self.kept, resumed=self.resumed, last=last,
            )  # fmt: skip
            self.kept, self.resumed = kept, False
            if not last:
                self.turns.wait()
        elif event != "batch":
            print(event, fields, file=sys.stderr)

    def accuracy(self) -> float:
        """Fraction of the test images that are right."""
        logits = evaluate(self.student, self.data.test)
        (batch,) = self.data.test.batches([np.arange(len(self.data.test))])
        return float((logits.argmax(1) == batch.labels).mean())

    def _kept(self) -> int:
        """How many views the cache holds or has begun: a file each."""
        return sum(1 for _ in self.cache.glob("*/logits*"))


def main() -> None:
    """Train an epoch at each turn."""
    turns, settings = Turns(), Settings.read(sys.argv[1])
    training = Training(turns, settings)
    done = training.work / "weights.safetensors"
    left = not done.exists() or (training.work / "last.pt").exists()
    turns.tell("ready", left=left, read_s=training.read_s, images=len(training.data.train))
    meta: dict[str, Json] = {}
    if not left:
        weights.load(done, training.student.module)  # killed between its end and telling it
    else:
        turns.wait()
        meta = training.run()
        meta.pop("history")
    turns.tell("done", accuracy=training.accuracy(), meta=meta)


if __name__ == "__main__":
    main()
