"""Tiny networks, data and losses for the tests of distillation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from edgekd import plugins
from edgekd.data.arrays import ArraySplit
from edgekd.data.digits import digits
from edgekd.distillation import Teacher, distill, evaluate
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import (
    Augment,
    Batch,
    Dataset,
    Json,
    LossTerm,
    Part,
    Preprocessing,
    Task,
    TensorSpec,
    TrainOptions,
)

OPTIONS = TrainOptions(epochs=3, batch_size=128, learning_rate=0.05, precision="fp32", threads=1, compile="off")
AUGMENT = Augment(crop_pixels=1, flip=True, cutout_pixels=2)
HINTON = (LossTerm(Part("kd"), 0.9), LossTerm(Part("ce"), 0.1))
FEATURES = (LossTerm(Part("kd"), 0.9), LossTerm(Part("cosine"), 2.0, (("conv", "conv"), ("linear:in", "linear:in"))))


class Interrupted(Exception):
    """What a test raises from `say` in place of Ctrl-C."""


class Told:
    """A `Say` that remembers, and stops the training at its `stop`-th event of a kind."""

    def __init__(self, kind: str = "", stop: int = 0) -> None:
        self.events: list[tuple[str, dict[str, Json]]] = []
        self._kind, self._stop = kind, stop

    def __call__(self, event: str, /, **fields: Json) -> None:
        self.events.append((event, fields))
        if event == self._kind and len(self.of(event)) == self._stop:
            raise Interrupted

    def of(self, event: str) -> list[dict[str, Json]]:
        return [fields for name, fields in self.events if name == event]


# ---------------------------------------------------------------- networks


class Small(nn.Module):
    """A convolutional network with what is hard to resume: batch normalisation and dropout."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)
        logits: Tensor = self.linear(self.dropout(features))
        return logits


class TwoHeads(nn.Module):
    """One body, an output for each task."""

    def __init__(self, heads: Mapping[str, int], width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.heads = nn.ModuleDict({name: nn.Linear(4 * width, count) for name, count in heads.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)
        return {name: head(features) for name, head in self.heads.items()}


class TokensAndSensor(nn.Module):
    """Two inputs of different types: integer tokens and a float window."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8 + 4, outputs)

    def forward(self, sensor: Tensor, tokens: Tensor) -> Tensor:
        logits: Tensor = self.linear(torch.cat([self.embedding(tokens).mean(1), sensor], 1))
        return logits


def network(data: Dataset, width: int = 8, classes: int = 10, seed: int = 0, mean: float = 0.5) -> Network:
    return of_images(lambda: Small(width, classes), data, seed, mean)


def two_heads(data: Dataset, heads: Mapping[str, int], seed: int = 0) -> Network:
    return of_images(lambda: TwoHeads(heads), data, seed)


def of_images(module: Callable[[], nn.Module], data: Dataset, seed: int = 0, mean: float = 0.5) -> Network:
    """A module for the data's images, with the initial weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(module(), data.inputs, Preprocessing((8, 8), (mean,), (0.5,)))


def two_input_network(seed: int, outputs: int = 3) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # the module takes them in another order than the data names them: they are matched by name
        specs = (TensorSpec("sensor", "float32", ("batch", 4)), TensorSpec("tokens", "int64", ("batch", 6)))
        return Network(TokensAndSensor(outputs), specs, None)


def small(network: Network) -> Small:
    assert isinstance(network.module, Small)
    return network.module


def hooks(module: nn.Module) -> int:
    """How many hooks there are anywhere in a module."""
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


# ---------------------------------------------------------------- data


@cache
def handwritten() -> Dataset:
    """Digits: 8 × 8 grey pixels, ten classes, about 1,300 to train on."""
    return digits(0)


class Streamed:
    """The same samples as another split, but not in memory as far as the trainer can see."""

    def __init__(self, split: ArraySplit) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        return self._split.batches(order)


def two_inputs(count: int, labels: np.ndarray | None = None, classes: Sequence[str] = ("a", "b", "c")) -> Dataset:
    """Tokens and a sensor window that tell one of three classes; or those inputs with other labels."""
    draw = np.random.default_rng(0)
    label = draw.integers(0, 3, count)
    inputs: dict[str, np.ndarray] = {
        "tokens": (label[:, None] * 5 + draw.integers(0, 5, (count, 6))).astype(np.int64),
        "sensor": draw.normal(size=(count, 4)).astype(np.float32),
    }
    split = ArraySplit(inputs, label.astype(np.int64) if labels is None else labels, np.arange(count))
    specs = (TensorSpec("tokens", "int64", ("batch", 6)), TensorSpec("sensor", "float32", ("batch", 4)))
    return Dataset("two", specs, tuple(classes), split, split, split, images=False, fingerprint=f"two {len(classes)}")


def labels(data: Dataset) -> np.ndarray:
    return next(iter(data.test.batches([np.arange(len(data.test))]))).labels


def accuracy(network: Network, data: Dataset, head: str | None = None) -> float:
    """On the test split."""
    return float(np.mean(evaluate(network, data.test, head=head).argmax(1) == labels(data)))


# ---------------------------------------------------------------- losses and tasks


def task(name: str = "classification") -> Task:
    found: Task = plugins.build("tasks", Part(name))
    return found


def own(loss: Callable[..., Tensor], weight: float = 1.0, **options: Any) -> LossTerm:
    """A test's own loss, named as a user names theirs: package.module:callable."""
    module = sys.modules.setdefault("losses_of_this_test", ModuleType("losses_of_this_test"))
    name = f"loss{len(vars(module))}"
    setattr(module, name, loss)
    return loss_term({"name": f"{module.__name__}:{name}", "weight": weight, **options}, "loss")


# ---------------------------------------------------------------- trainings


def taught(
    work: Path,
    say: Told | None = None,
    *,
    data: Dataset | None = None,
    student: Network | None = None,
    teachers: Network | Sequence[Teacher] | None = None,
    terms: Sequence[LossTerm] = HINTON,
    options: TrainOptions = OPTIONS,
    augment: Augment = AUGMENT,
    seed: int = 0,
    cache: Path | None = None,
) -> dict[str, Json]:
    """A short distillation, each part of which may be another one."""
    data = data or handwritten()
    work.mkdir(exist_ok=True)
    return distill(
        student or network(data), teachers or network(data, width=16, seed=5, mean=0.3), data, terms, options, augment,
        task=task(), seed=seed, work=work, cache=cache, say=say or Told(),
    )  # fmt: skip


def history(meta: Mapping[str, Json]) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", meta["history"])


def state(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()
