"""Every loss once more: slow, plain, in float64, from the formula of its paper, with nothing of edgekd's in it.

Arrays are as the losses get them; features are batch × positions × channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Kept = NDArray[np.bool_] | None


def softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max())
    shares: Floats = powers / powers.sum()
    return shares


def divergence(target: Floats, guess: Floats) -> float:
    """Kullback-Leibler, target ‖ guess."""
    return float(sum(p * math.log(p / q) for p, q in zip(target, guess, strict=True) if p > 0))


def kd(student: Floats, teacher: Floats, *, temperature: float = 4.0, standardize: bool = False) -> float:
    if standardize:
        student, teacher = (
            np.stack([(row - row.mean()) / row.std(ddof=1) for row in side]) for side in (student, teacher)
        )
    rows = [
        divergence(softmax(t / temperature), softmax(s / temperature)) for s, t in zip(student, teacher, strict=True)
    ]
    return temperature**2 * float(np.mean(rows))


def function_matching(student: Floats, teacher: Floats) -> float:
    return kd(student, teacher, temperature=1.0)


def ce(student: Floats, labels: NDArray[np.generic], *, label_smoothing: float = 0.0) -> float:
    classes = student.shape[1]
    truths = np.eye(classes)[labels.astype(np.int64)] if labels.ndim == 1 else labels.astype(np.float64)
    truths = (1 - label_smoothing) * truths + label_smoothing / classes
    return float(np.mean([-(truth * np.log(softmax(row))).sum() for row, truth in zip(student, truths, strict=True)]))


def dist(
    student: Floats, teacher: Floats, *, temperature: float = 1.0, inter: float = 1.0, intra: float = 1.0
) -> float:
    q, p = (np.stack([softmax(row / temperature) for row in side]) for side in (student, teacher))
    of_samples = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    of_classes = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return float(temperature**2 * (inter * (1 - of_samples) + intra * (1 - of_classes)))


def nkd(student: Floats, teacher: Floats, labels: Indices, *, temperature: float = 1.0, gamma: float = 1.5) -> float:
    total = 0.0
    for s, t, y in zip(student, teacher, labels, strict=True):
        believed, log_q = softmax(t)[y], math.log(softmax(s)[y])
        total += -log_q - believed * log_q
        q, p = (softmax(np.delete(row, y) / temperature) for row in (s, t))
        total += -gamma * temperature**2 * float((p * np.log(q)).sum())
    return total / len(student)


def dkd(
    student: Floats,
    teacher: Floats,
    labels: Indices,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 2.0,
) -> float:
    total = 0.0
    for s, t, y in zip(student, teacher, labels, strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        target = divergence(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
        q, p = np.delete(q, y), np.delete(p, y)
        total += alpha * target + beta * divergence(p / p.sum(), q / q.sum())
    return total / len(student) * temperature**2


def ofa(student: Floats, teacher: Floats, labels: Indices, *, epsilon: float = 1.0) -> float:
    total = 0.0
    for s, t, y in zip(student, teacher, labels, strict=True):
        q, p = softmax(s), softmax(t)
        for c in range(len(q)):
            hit = 1.0 if c == y else 0.0
            total -= ((p[c] + hit) ** epsilon - hit) * math.log(q[c])
    return total / len(student)


def mse(student: Floats, teacher: Floats, labels: Floats, *, to: str = "teacher") -> float:
    return float(np.mean((student - (teacher if to == "teacher" else labels)) ** 2))


def kept_rows(feature: Floats, mask: Kept) -> Floats:
    """The vectors of all positions that count, one below the other."""
    kept = np.ones(feature.shape[:2], bool) if mask is None else mask
    return np.stack([feature[b, n] for b, n in np.argwhere(kept)])


def hint(student: Floats, teacher: Floats, mask: Kept = None) -> float:
    return float(np.mean((kept_rows(student, mask) - kept_rows(teacher, mask)) ** 2))


def hidden(student: Floats, teacher: Floats, mask: Kept = None) -> float:
    return hint(student, teacher, mask)


def cosine(student: Floats, teacher: Floats, mask: Kept = None) -> float:
    rows = zip(kept_rows(student, mask), kept_rows(teacher, mask), strict=True)
    return float(np.mean([1 - s @ t / math.sqrt((s @ s) * (t @ t)) for s, t in rows]))


def srd(student: Floats, teacher: Floats, mask: Kept = None) -> float:
    s, t = (  # published with 1e-4 alone under the root: see the loss
        (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-4 * rows.var(0).mean())
        for rows in (kept_rows(student, mask), kept_rows(teacher, mask))
    )
    return math.log(1e-4 + (np.abs(s - t) ** 4).sum())


def attention(student: Floats, teacher: Floats, *, p: float = 2.0) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = [np.array([sum(abs(x) ** p for x in vector) for vector in side]) for side in (s, t)]
        s, t = (a / np.linalg.norm(a) for a in maps)
        total += float(((s - t) ** 2).sum())
    return total / len(student)


def similarity(student: Floats, teacher: Floats) -> float:
    batch = len(student)
    alike = []
    for side in (student, teacher):
        gram = np.array([[float((a * b).sum()) for b in side] for a in side])
        alike.append(np.stack([row / np.linalg.norm(row) for row in gram]))
    return float(((alike[0] - alike[1]) ** 2).sum()) / batch**2


def pooled(maps: Floats, side: int) -> Floats:
    """Adaptive average pooling: cell i of `side` covers ⌊i·n/side⌋ up to ⌈(i+1)·n/side⌉."""
    height, width = maps.shape[2:]
    out = np.zeros((*maps.shape[:2], side, side))
    for i in range(side):
        for j in range(side):
            down = slice(i * height // side, -(-(i + 1) * height // side))
            across = slice(j * width // side, -(-(j + 1) * width // side))
            out[:, :, i, j] = maps[:, :, down, across].mean((2, 3))
    return out


def review(student: Sequence[Floats], teacher: Sequence[Floats]) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        parts, weights = [float(np.mean((s - t) ** 2))], [1.0]
        for side in (4, 2, 1):
            if side < min(s.shape[2:]):
                parts.append(float(np.mean((pooled(s, side) - pooled(t, side)) ** 2)))
                weights.append(weights[-1] / 2)
        total += sum(p * w for p, w in zip(parts, weights, strict=True)) / sum(weights)
    return total


def minilm(student: Floats, teacher: Floats, mask: Kept = None, *, heads: int = 12) -> float:
    kept = np.ones(student.shape[:2], bool) if mask is None else mask
    total, tokens = 0.0, int(kept.sum())
    for s, t, count in zip(student, teacher, kept, strict=True):
        for part in range(3):
            for head in range(heads):
                relations = []
                for side in (s[count], t[count]):
                    width = side.shape[1] // 3
                    d = width // heads
                    x = side[:, part * width + head * d : part * width + (head + 1) * d]
                    relations.append([softmax(np.array([a @ b for b in x]) / math.sqrt(d)) for a in x])
                total += sum(divergence(p, q) for q, p in zip(*relations, strict=True)) / heads
    return total / tokens


_ALL = (
    attention, ce, cosine, dist, dkd, function_matching, hidden, hint,
    kd, minilm, mse, nkd, ofa, review, similarity, srd,
)  # fmt: skip
FORMULAS: dict[str, Callable[..., float]] = {formula.__name__: formula for formula in _ALL}
