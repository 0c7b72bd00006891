"""The plain PyTorch loop of distillation that tutorials show: ImageFolder, DataLoader, teacher in no_grad, fp32.

Started by ../speed.py with a settings file. With `tuned` it computes in bf16 autocast and channels last, which shows
how much of the difference is precision and layout alone.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from resnet import resnet
from task import Settings, Turns, accuracy, schedule, sgd
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


def loaders(settings: Settings) -> tuple[DataLoader[tuple[Tensor, Tensor]], DataLoader[tuple[Tensor, Tensor]]]:
    """Of training and test images."""
    crop = v2.RandomCrop(32, padding=settings.crop_pixels, padding_mode="reflect")
    normal = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(settings.mean, settings.std)]
    # the fastest of four ways to write it: 0.29 ms an image, where the older transforms take 0.36 ms
    augmented = v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip(), *normal])
    train = ImageFolder(f"{settings.images}/train", augmented)
    test = ImageFolder(f"{settings.images}/test", v2.Compose([v2.PILToTensor(), *normal]))
    return (
        DataLoader(train, settings.batch_size, shuffle=True, num_workers=settings.workers),
        DataLoader(test, 256, num_workers=settings.workers),
    )


class Training:
    """Teacher, student and the steps between them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.train, self.test = loaders(settings)
        self.teacher = resnet("resnet56", pooled=settings.tuned)
        self.teacher.load_state_dict(torch.load(f"{settings.teacher}.pt", weights_only=True))
        self.teacher.eval()
        self.student = resnet(settings.student_name, pooled=settings.tuned)
        self.student.load_state_dict(torch.load(f"{settings.student}.pt", weights_only=True))
        self.format = torch.channels_last if settings.tuned else torch.contiguous_format
        for model in (self.teacher, self.student):
            model.to(memory_format=self.format)
        self.optimizer = sgd(self.student.parameters(), settings)
        self.scheduler = schedule(self.optimizer, settings, settings.epochs * len(self.train))
        self.checkpoint = Path(settings.work) / "checkpoint.pt"
        self.epoch = 0
        if self.checkpoint.exists():
            kept = torch.load(self.checkpoint, weights_only=True)
            self.epoch = kept["epoch"]
            for name in ("student", "optimizer", "scheduler"):
                getattr(self, name).load_state_dict(kept[name])

    def save(self) -> None:
        """To go on from here when the process is killed."""
        kept = {name: getattr(self, name).state_dict() for name in ("student", "optimizer", "scheduler")}
        torch.save({**kept, "epoch": self.epoch}, self.checkpoint)

    def one_epoch(self, steps: int) -> float:
        """Mean loss of the first `steps` steps of an epoch."""
        settings, total = self.settings, 0.0
        kl = nn.KLDivLoss(reduction="batchmean")
        compute = torch.autocast("cpu", torch.bfloat16) if settings.tuned else nullcontext()
        self.student.train()
        for step, (images, labels) in enumerate(self.train):
            if step == steps:
                break
            images = images.to(memory_format=self.format)
            with compute:
                with torch.no_grad():
                    teacher = self.teacher(images)
                student = self.student(images)
            teacher, student, t = teacher.float(), student.float(), settings.temperature
            soft = kl(F.log_softmax(student / t, dim=1), F.softmax(teacher / t, dim=1)) * t**2
            loss = settings.kd * soft + settings.ce * F.cross_entropy(student, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            total += loss.item()
        return total / min(steps, len(self.train))


def main() -> None:
    """Train an epoch at each turn."""
    turns, settings = Turns(), Settings.read(sys.argv[1])
    torch.set_num_threads(settings.threads)
    training = Training(settings)
    torch.manual_seed(settings.seed * 1000 + training.epoch)
    turns.tell("ready", left=training.epoch < settings.epochs)
    while training.epoch < settings.epochs:
        turns.wait()
        loss = training.one_epoch(settings.probe or len(training.train))
        seconds = turns.elapsed_s()
        training.epoch += 1
        last = training.epoch == settings.epochs
        if not settings.probe:
            training.save()
        turns.tell("epoch", epoch=training.epoch, seconds=seconds, loss=loss, last=last)
    turns.tell("done", accuracy=accuracy(training.student, training.test))


if __name__ == "__main__":
    main()
