"""What every competitor of the speed comparison is given, and how it takes its turns. Needs torch alone."""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, slots=True)
class Settings:
    """One training, the same for all competitors but for the last block."""

    images: str  # folder with train/<class>/*.jpg and test/<class>/*.jpg
    teacher: str  # weights without extension: .pt and .safetensors stand beside each other
    student: str  # initial weights, likewise
    student_name: str
    work: str  # the competitor's own folder: checkpoints
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float  # peak of a straight rise over `rise` of the steps and a straight fall to 0
    rise: float
    momentum: float  # Nesterov's
    weight_decay: float  # of weights with more than one dimension
    temperature: float
    kd: float
    ce: float
    crop_pixels: int
    mean: list[float]
    std: list[float]
    threads: int
    workers: int = 0  # of the DataLoader
    probe: int = 0  # only time so many steps
    tuned: bool = False  # textbook: bf16 autocast and channels last
    source: str = ""  # edgekd: the zip file or folder
    cache: str = ""  # edgekd: where teacher outputs are kept
    views: int = 0  # edgekd
    losses: Literal["same", "penultimate", "default"] = "same"  # edgekd: the loss of all, or as ../speed.py says
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # edgekd

    @classmethod
    def read(cls, path: str) -> Settings:
        """From the JSON file that the driver wrote."""
        given: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})

    def rate(self, steps: int) -> Callable[[int], float]:
        """Step → the part of the peak learning rate; of the middle of the step, so that none is wasted on 0."""

        def part(step: int) -> float:
            done, rise = step + 0.5, self.rise * steps
            return done / rise if done < rise else max(0.0, (steps - done) / (steps - rise))

        return part


def sgd(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.SGD:
    """SGD with Nesterov momentum; biases and normalisation layers do not decay. torch chooses the implementation."""
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, settings.learning_rate, settings.momentum, nesterov=True)


def schedule(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> LambdaLR:
    """The learning rate of each of `steps` steps."""
    return LambdaLR(optimizer, settings.rate(steps))


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Fraction of the test images that are right."""
    model.eval()
    found = [(model(images).argmax(1) == labels) for images, labels in loader]
    return float(torch.cat(found).double().mean())


class Turns:
    """The competitor's end of the line to the driver: "go" comes in, one JSON object a line goes out.

    Whatever a library prints goes to stderr meanwhile.
    """

    def __init__(self) -> None:
        self._out: TextIO = sys.stdout
        sys.stdout = sys.stderr
        self._began_s = 0.0
        # The compiler, which the first optimizer makes torch import: a second and a half that no epoch should wait for.
        importlib.import_module("torch._dynamo")
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: not to go on when the driver is killed

    def tell(self, event: str, **more: object) -> None:
        """One line to the driver."""
        print(json.dumps({"event": event, **more}), file=self._out, flush=True)

    def wait(self) -> None:
        """Until it is this competitor's turn; the time runs from here."""
        if not sys.stdin.readline():
            raise SystemExit("the driver has gone")
        self._began_s = time.perf_counter()

    def elapsed_s(self) -> float:
        """Since the turn began."""
        return time.perf_counter() - self._began_s
