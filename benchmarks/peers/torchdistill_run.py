"""torchdistill at the same task: its box, driven by a configuration file and the loop that its examples have.

Started by ../speed.py, in torchdistill's own environment, with a settings file. Two things are kinder to it than its
example: the teacher is put in eval mode (nothing in torchdistill does so; batch statistics would be slower, and not
what the other competitors compute), and the evaluation after each epoch is left out of the time.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import torch
from task import Settings, Turns, accuracy
from torchdistill.common import main_util, yaml_util  # type: ignore[import-not-found]  # of the peer's environment
from torchdistill.core.distillation import get_distillation_box  # type: ignore[import-not-found]
from torchdistill.misc.log import MetricLogger, SmoothedValue, set_basic_log_config  # type: ignore[import-not-found]
from torchdistill.models.registry import get_model  # type: ignore[import-not-found]

HERE = Path(__file__).resolve().parent


def configuration(settings: Settings, path: str) -> dict[str, Any]:
    """The experiment as torchdistill reads it."""
    images = sum(1 for _ in Path(settings.images, "train").glob("*/*"))
    given = {name: json.dumps(v) if isinstance(v, list) else v for name, v in asdict(settings).items()}
    given |= {"settings": path, "steps": settings.epochs * math.ceil(images / settings.batch_size)}
    written = Path(settings.work) / "experiment.yaml"
    written.write_text(Template((HERE / "torchdistill.yaml").read_text()).substitute(given))
    found: dict[str, Any] = yaml_util.load_yaml_file(str(written))
    return found


class Training:
    """The box, and how far it has come."""

    def __init__(self, settings: Settings, path: str) -> None:
        self.config = configuration(settings, path)
        main_util.import_dependencies(self.config["dependencies"])
        main_util.set_seed(settings.seed)
        models = self.config["models"]
        teacher, student = (self._model(models[role]) for role in ("teacher_model", "student_model"))
        teacher.eval()
        self.box = get_distillation_box(
            teacher, student, self.config["datasets"], self.config["train"], torch.device("cpu"), None, False, 1
        )
        self.checkpoint = models["student_model"]["dst_ckpt"]
        self.epoch = 0
        if Path(self.checkpoint).exists():
            box = self.box
            main_util.load_ckpt(self.checkpoint, box.student_model, box.optimizer, box.lr_scheduler)
            self.epoch = box.lr_scheduler.last_epoch // len(box.train_data_loader)
            main_util.set_seed(settings.seed * 1000 + self.epoch)

    @staticmethod
    def _model(config: dict[str, Any]) -> torch.nn.Module:
        model: torch.nn.Module = get_model(config["key"], **config["kwargs"])
        main_util.load_ckpt(config["src_ckpt"], model=model, strict=True)
        return model

    def save(self) -> None:
        """To go on from here when the process is killed."""
        main_util.save_ckpt(
            self.box.student_model, self.box.optimizer, self.box.lr_scheduler, 0.0, None, self.checkpoint
        )

    def one_epoch(self, steps: int) -> float:
        """Mean loss of the first `steps` steps of an epoch."""
        box = self.box
        box.pre_epoch_process(epoch=self.epoch)
        metrics = MetricLogger(delimiter="  ")
        metrics.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        rows = metrics.log_every(box.train_data_loader, self.config["train"]["log_freq"], f"Epoch: [{self.epoch}]")
        for images, labels, more in islice(rows, steps):
            loss = box.forward_process(images, labels, more)
            box.post_forward_process(loss=loss)
            metrics.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        box.post_epoch_process()
        return float(metrics.meters["loss"].global_avg)


def main() -> None:
    """Train an epoch at each turn."""
    turns, settings = Turns(), Settings.read(sys.argv[1])
    torch.set_num_threads(settings.threads)
    set_basic_log_config()
    training = Training(settings, sys.argv[1])
    turns.tell("ready", left=training.epoch < settings.epochs)
    while training.epoch < settings.epochs:
        turns.wait()
        loss = training.one_epoch(settings.probe or len(training.box.train_data_loader))
        seconds = turns.elapsed_s()
        training.epoch += 1
        last = training.epoch == settings.epochs
        if not settings.probe:
            training.save()
        turns.tell("epoch", epoch=training.epoch, seconds=seconds, loss=loss, last=last)
    turns.tell("done", accuracy=accuracy(training.box.student_model, training.box.val_data_loader))


if __name__ == "__main__":
    main()
