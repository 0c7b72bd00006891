"""How far the simulated network is from the float one, on samples that no range was taken from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgekd import plugins
from edgekd.quantize.simulation import Inputs, Simulation
from edgekd.types import Json, Part, Task


@dataclass(frozen=True, slots=True)
class Loss:
    """What quantization costs, on `samples` samples held out; all but `drop` without labels."""

    samples: int
    sqnr_db: float  # of the logits: 10 · log10(mean square of the float ones / mean square of the difference)
    divergence: float  # mean KL(float ‖ quantized) in nats; of a task of values: squared error / variance
    changed: float | None  # fraction of decisions that are others; None: the task decides nothing
    expected_drop: float  # of the metric, were the float network's own probabilities true
    drop: float | None  # of the metric on labels, paired on the same samples; None: no labels
    drop_error: float | None  # standard error of `drop`

    def within(self, max_drop: float) -> bool:
        """Is the drop at most so much, as far as these samples can tell?

        Both must hold: `expected_drop`, which has little noise, is; and `drop`, where it is known, is not larger by
        more than its standard error (of 256 samples two changed decisions are 0.8 ± 0.6 points).
        """
        if not self.expected_drop <= max_drop:
            return False
        return self.drop is None or self.drop_error is None or self.drop - self.drop_error <= max_drop

    def to_json(self) -> dict[str, Json]:
        """The figures, rounded for people; `sqnr_db` is None where there is no error at all."""
        rounded = {key: finite(value) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return rounded | ({"sqnr_db": None} if self.sqnr_db == math.inf else {})


def finite(value: float) -> float:
    """Four digits, and a number that JSON knows: outputs that are not finite have a worst value instead."""
    return float(f"{min(max(value, -1e3), 1e3):.4g}") if not math.isnan(value) else 1e3


@dataclass
class _Sums:
    """Sums over samples, one batch after the other: nothing of a batch is kept but its scores."""

    samples: int = 0
    signal: float = 0.0
    noise: float = 0.0
    divergence: float = 0.0
    changed: float = 0.0
    expected: float = 0.0
    drops: list[np.ndarray] = field(default_factory=list)  # a number for each labelled sample
    moments: Tensor | None = None  # of values: sum, sum of squares and sum of squared errors by output


def task_of(shape: Sequence[int | str]) -> Task:
    """What an output of this shape is for where nobody says: classes where it has several columns, else values."""
    decides = len(shape) == 2 and shape[1] != 1
    task: Task = plugins.build("tasks", Part("classification" if decides else "regression"))
    return task


def measure(
    simulation: Simulation, batches: Iterable[tuple[Inputs, np.ndarray | None]], task: Task | None = None
) -> Loss:
    """Compare the simulated logits with the float ones.

    The expected drop is the mean of p(float decision) - p(quantized decision) under the float network's
    probabilities p: a decision that changes between two nearly equal classes costs little, and a network that is
    surer than it is right makes the figure too large rather than too small.

    Args:
        batches: inputs with their labels, or None.
        task: what the logits are for; None: one class for each sample.
    """
    both = (
        (simulation.logits(inputs, quantized=False), simulation.logits(inputs, quantized=True), labels)
        for inputs, labels in batches
    )
    return compare(both, task)


def compare(batches: Iterable[tuple[Tensor, Tensor, np.ndarray | None]], task: Task | None = None) -> Loss:
    """Compare logits that are there: wanted ones, found ones, and labels or None, batch by batch."""
    sums = _Sums()
    for wanted, found, labels in batches:
        _add(sums, wanted, found, task)
        if labels is not None and task is not None and not task.values:
            scores = [task.scores(output.numpy(), labels) for output in (wanted, found)]
            sums.drops.append(scores[0] - scores[1])
    return _loss(sums, task)


def _add(sums: _Sums, wanted: Tensor, found: Tensor, task: Task | None) -> None:
    wanted, found = (each.double() if each.dim() > 1 else each.double()[:, None] for each in (wanted, found))
    count = len(wanted)
    sums.samples += count
    sums.signal += float(wanted.square().sum())
    sums.noise += float((wanted - found).square().sum())
    if task is not None and task.values:
        parts = torch.stack([wanted, wanted.square(), (wanted - found).square()]).flatten(2).sum((1,))
        sums.moments = parts if sums.moments is None else sums.moments + parts
        return
    if task is not None and task.labels == "flags":
        chances, log_wanted, log_found = _flags(wanted, found)
        costs = torch.where((wanted > 0) != (found > 0), (2 * torch.sigmoid(wanted) - 1).abs(), 0.0)
        changed = ((wanted > 0) != (found > 0)).double()
    else:
        log_wanted, log_found = torch.log_softmax(wanted, 1), torch.log_softmax(found, 1)
        chances = log_wanted.exp()
        before, after = wanted.argmax(1, keepdim=True), found.argmax(1, keepdim=True)
        costs = chances.gather(1, before) - chances.gather(1, after)
        changed = (before != after).double()
    sums.divergence += count * float((chances * (log_wanted - log_found)).sum(1).mean())
    sums.changed += count * float(changed.mean())
    sums.expected += count * float(costs.mean())


def _flags(wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of both answers to each label, and their logarithms, along dimension 1."""
    logs = [
        torch.stack([torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)], 1) for z in (wanted, found)
    ]
    return logs[0].exp(), logs[0], logs[1]


def _loss(sums: _Sums, task: Task | None) -> Loss:
    count = max(sums.samples, 1)
    divergence, changed, expected = sums.divergence / count, sums.changed / count, sums.expected / count
    if sums.moments is not None:
        total, squares, errors = sums.moments / count
        divergence = expected = float((errors / (squares - total.square()).clamp(min=1e-12)).mean())
    if not math.isfinite(sums.noise):
        divergence, expected, sqnr = math.inf, math.inf, -math.inf
    elif sums.noise > 0:
        sqnr = 10 * math.log10(sums.signal / sums.noise) if sums.signal > 0 else -math.inf
    else:
        sqnr = math.inf
    drop = error = None
    if sums.drops:
        drops = np.concatenate(sums.drops)
        drop, error = float(drops.mean()), float(drops.std() / math.sqrt(len(drops)))
    values = task is not None and task.values
    return Loss(sums.samples, sqnr, divergence, None if values else changed, expected, drop, error)
