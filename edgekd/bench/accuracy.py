"""The metric of anything that runs, with intervals, and the drop against the teacher on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ModelError
from edgekd.types import Arrays, Interval, Session, Split

Z = 1.959963984540054  # 97.5 % point of the normal distribution


def predict(
    session: Session,
    split: Split,
    batch_size: int = 256,
    *,
    dense: bool = False,
    keep: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """The outputs for every sample of `split`, in its order: float32, samples × classes (× grid, where `dense`).

    Read as a stream of batches; a model with a fixed batch dimension gets that batch, the last one filled up with
    copies of its last sample. The output is "logits" where there is one of that name, else the only output.

    Args:
        keep: what is kept of the outputs of a batch, e.g. the classes of pixels, which take less memory.

    Raises:
        ModelError: the model takes other inputs than the split has, gives several outputs and none named "logits",
            one of another shape, or a value that is not finite.
    """
    fixed = {spec.shape[0] for spec in session.inputs if spec.shape and isinstance(spec.shape[0], int)}
    size = int(min(fixed)) if fixed else batch_size
    order = np.arange(len(split), dtype=np.int64)
    found: list[np.ndarray] = []
    for batch in split.batches([order[start : start + size] for start in range(0, len(order), size)]):
        count = len(batch.indices)
        logits = _logits(session, _filled(session, batch.inputs, size if fixed else count), count, dense)
        found.append(logits if keep is None else keep(logits))
    if not found:
        raise ModelError("there are no samples to predict", where=session.runtime)
    return np.concatenate(found)


def labels(split: Split, batch_size: int = 256) -> np.ndarray:
    """The label of every sample of `split`, in its order."""
    known = getattr(split, "labels", None)
    if isinstance(known, np.ndarray):
        return known
    order = np.arange(len(split), dtype=np.int64)
    batches = split.batches([order[start : start + batch_size] for start in range(0, len(order), batch_size)])
    return np.concatenate([np.asarray(batch.labels) for batch in batches])


def mean(scores: NDArray[np.float64]) -> Interval:
    """The mean of a task's scores, one a sample, with its 95 % interval.

    Wilson's where every sample is right or wrong; else the normal one, mean ± z · s / √n with s the scores' standard
    deviation, kept below 1, which is perfect, and above 0 where no score is negative. A single sample has no s:
    Wilson's stands for it.

    Raises:
        ValueError: there are no scores.
    """
    n, value = len(scores), float(scores.mean()) if len(scores) else 0.0
    if n < 2 or _binary(scores):
        return wilson(float(scores.sum()), n)
    half = Z * float(scores.std(ddof=1)) / math.sqrt(n)
    low = value - half if (scores < 0).any() else max(0.0, value - half)
    return Interval(value=value, low=low, high=max(value, min(1.0, value + half)), n=n)


def drop(teacher: NDArray[np.float64], student: NDArray[np.float64]) -> Interval:
    """The teacher's mean score minus the student's, paired on the same samples; above 0 the student is worse.

    Newcombe's interval where every sample is right or wrong; else the normal one of the samples' differences. A
    single sample says nothing of others: from -1 to 1.

    Raises:
        ValueError: they are not of the same samples, or there are none.
    """
    if len(teacher) != len(student):
        raise ValueError(f"{len(teacher)} scores against {len(student)}")
    n = len(teacher)
    if _binary(teacher) and _binary(student):
        one, two = teacher > 0.5, student > 0.5
        return paired_difference(
            both=int((one & two).sum()),
            first_only=int((one & ~two).sum()),
            second_only=int((~one & two).sum()),
            neither=int((~one & ~two).sum()),
        )
    lost = teacher - student
    value = float(lost.mean())
    if n == 1:
        return Interval(value=value, low=min(value, -1.0), high=max(value, 1.0), n=1)
    half = Z * float(lost.std(ddof=1)) / math.sqrt(n)
    return Interval(value=value, low=value - half, high=value + half, n=n)


def difference(drop: Interval, other: Interval) -> Interval:
    """How much further `other` drops than `drop`, both against one teacher on the same samples, with its interval.

    Square-and-add: low = value − √((other − its low)² + (drop's high − drop)²), high alike (Zou, Donner: Construction
    of confidence limits about effect measures, Statistics in Medicine 27, 2008), with no correlation of the two. Forms
    of one network err on the same samples, so their drops go together: it is too wide rather than too narrow.
    """
    value = other.value - drop.value
    down = math.hypot(other.value - other.low, drop.high - drop.value)
    up = math.hypot(other.high - other.value, drop.value - drop.low)
    return Interval(value=value, low=value - down, high=value + up, n=other.n)


def agreement(teacher: np.ndarray, student: np.ndarray) -> float:
    """The fraction of decisions that are the same in both, right or wrong."""
    return float((teacher == student).mean())


def _binary(scores: NDArray[np.float64]) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def wilson(hits: float, n: int) -> Interval:
    """A proportion with its 95 % score interval.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)  (Wilson, JASA, 1927)

    Raises:
        ValueError: n is 0, or hits is not within 0 and n.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"no proportion: {hits} of {n}")
    p, z2n = hits / n, Z * Z / n
    centre = (p + z2n / 2) / (1 + z2n)
    half = Z * math.sqrt(p * (1 - p) / n + z2n / (4 * n)) / (1 + z2n)
    return Interval(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)), n=n)


def paired_difference(both: int, first_only: int, second_only: int, neither: int) -> Interval:
    """The difference of two proportions of the same n samples, first minus second, with its 95 % interval.

    Method 10 of Newcombe (Improved confidence intervals for the difference between binomial proportions based on
    paired data, Statistics in Medicine 17, 1998): with the Wilson limits l and u of each proportion p,
    low = D − √((p₁ − l₁)² − 2φ(p₁ − l₁)(u₂ − p₂) + (u₂ − p₂)²), high alike, where φ is the correlation of the fourfold
    table, its numerator a·d − b·c made smaller by n/2 (not below 0) where it is positive.
    Unlike Wald's interval it has a width where the two never differ.

    Raises:
        ValueError: there are no samples.
    """
    n = both + first_only + second_only + neither
    one, two = wilson(both + first_only, n), wilson(both + second_only, n)
    numerator = float(both * neither - first_only * second_only)
    if numerator > 0:
        numerator = max(0.0, numerator - n / 2)
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    phi = numerator / math.sqrt(margins) if margins else 0.0
    down = _joined(one.value - one.low, two.high - two.value, phi)
    up = _joined(two.value - two.low, one.high - one.value, phi)
    value = (first_only - second_only) / n
    return Interval(value=value, low=max(-1.0, value - down), high=min(1.0, value + up), n=n)


def _joined(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def _filled(session: Session, inputs: Arrays, size: int) -> Arrays:
    """The inputs the session asks for, made `size` samples long."""
    wanted = {spec.name: spec for spec in session.inputs}
    if set(wanted) - set(inputs):
        raise ModelError(
            f"it takes the inputs {', '.join(wanted)}, the data has {', '.join(inputs)}",
            where=session.runtime,
            fix="name the model's inputs as the data names them",
        )
    filled: dict[str, NDArray[np.generic]] = {}
    for name, spec in wanted.items():
        values = np.asarray(inputs[name])
        if values.dtype != np.dtype(spec.dtype):
            raise ModelError(
                f"input '{name}' is {spec.dtype} there, {values.dtype} in the data",
                where=session.runtime,
                fix="export with the preprocessing inside, or prepare the samples as the model was exported for",
            )
        missing = size - len(values)
        filled[name] = np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) if missing > 0 else values
    return filled


def _logits(session: Session, inputs: Arrays, count: int, dense: bool) -> NDArray[np.float32]:
    outputs = session(inputs)
    name = "logits" if "logits" in outputs else next(iter(outputs), "")
    if name != "logits" and len(outputs) != 1:
        raise ModelError(
            f"its outputs are {', '.join(outputs) or 'none'}", where=session.runtime, expected="one named 'logits'"
        )
    values = np.asarray(outputs[name], dtype=np.float32)[:count]
    if values.ndim < 2 or (values.ndim > 2) != dense or len(values) != count:
        grid = ", grid" if dense else ""
        raise ModelError(
            f"output '{name}' has the shape {values.shape}", where=session.runtime, expected=f"({count}, classes{grid})"
        )
    if not np.isfinite(values).all():
        raise ModelError(
            f"output '{name}' holds NaN or infinity",
            where=session.runtime,
            fix="where only a lower precision does so, its range is too small for this model: leave it out",
        )
    return values
