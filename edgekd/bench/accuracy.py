"""Accuracy of anything that runs, with intervals, and the drop against the teacher on the same samples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ModelError
from edgekd.types import Arrays, Interval, Session, Split

Z = 1.959963984540054  # 97.5 % point of the normal distribution


def predict(session: Session, split: Split, batch_size: int = 256) -> NDArray[np.float32]:
    """The logits of every sample of `split`, in its order: samples × classes.

    Read as a stream of batches; a model with a fixed batch dimension gets that batch, the last one filled up with
    copies of its last sample. The output is "logits" where there is one of that name, else the only output.

    Raises:
        ModelError: the model takes other inputs than the split has, gives several outputs and none named "logits",
            one of another shape, or a value that is not finite.
    """
    fixed = {spec.shape[0] for spec in session.inputs if spec.shape and isinstance(spec.shape[0], int)}
    size = int(min(fixed)) if fixed else batch_size
    order = np.arange(len(split), dtype=np.int64)
    found: list[NDArray[np.float32]] = []
    for batch in split.batches([order[start : start + size] for start in range(0, len(order), size)]):
        count = len(batch.indices)
        found.append(_logits(session, _filled(session, batch.inputs, size if fixed else count), count))
    if not found:
        raise ModelError("there are no samples to predict", where=session.runtime)
    return np.concatenate(found)


def labels(split: Split, batch_size: int = 256) -> NDArray[np.int64]:
    """The class index of every sample of `split`, in its order."""
    order = np.arange(len(split), dtype=np.int64)
    batches = split.batches([order[start : start + batch_size] for start in range(0, len(order), batch_size)])
    return np.concatenate([np.asarray(batch.labels, dtype=np.int64) for batch in batches])


def accuracy(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> Interval:
    """The fraction of samples whose largest logit is the label's, with its Wilson interval."""
    hits = _hits(logits, truth)
    return wilson(int(hits.sum()), len(hits))


def drop(
    teacher_logits: NDArray[np.float32], student_logits: NDArray[np.float32], truth: NDArray[np.int64]
) -> Interval:
    """Accuracy of the teacher minus that of the student, paired on the same samples; above 0 the student is worse."""
    teacher, student = _hits(teacher_logits, truth), _hits(student_logits, truth)
    return paired_difference(
        both=int((teacher & student).sum()),
        first_only=int((teacher & ~student).sum()),
        second_only=int((~teacher & student).sum()),
        neither=int((~teacher & ~student).sum()),
    )


def agreement(teacher_logits: NDArray[np.float32], student_logits: NDArray[np.float32]) -> float:
    """The fraction of samples for which both predict the same class, right or wrong."""
    return float((teacher_logits.argmax(axis=1) == student_logits.argmax(axis=1)).mean())


def wilson(hits: int, n: int) -> Interval:
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


def _hits(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> NDArray[np.bool_]:
    if len(logits) != len(truth):
        raise ValueError(f"{len(logits)} predictions for {len(truth)} labels")
    hits: NDArray[np.bool_] = logits.argmax(axis=1) == truth
    return hits


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


def _logits(session: Session, inputs: Arrays, count: int) -> NDArray[np.float32]:
    outputs = session(inputs)
    name = "logits" if "logits" in outputs else next(iter(outputs), "")
    if name != "logits" and len(outputs) != 1:
        raise ModelError(
            f"its outputs are {', '.join(outputs) or 'none'}", where=session.runtime, expected="one named 'logits'"
        )
    values = np.asarray(outputs[name], dtype=np.float32)[:count]
    if values.ndim != 2 or len(values) != count:
        raise ModelError(
            f"output '{name}' has the shape {values.shape}", where=session.runtime, expected=f"({count}, classes)"
        )
    if not np.isfinite(values).all():
        raise ModelError(
            f"output '{name}' holds NaN or infinity",
            where=session.runtime,
            fix="where only a lower precision does so, its range is too small for this model: leave it out",
        )
    return values
