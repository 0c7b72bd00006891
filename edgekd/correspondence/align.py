"""Which stage of the student goes with which of the teacher: a monotone alignment by stride, depth and similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgekd.correspondence.inputs import Inputs, mask_of, named, unwrapped
from edgekd.correspondence.positions import on_grid, pooled, resized_mask
from edgekd.correspondence.taps import Tap, Taps
from edgekd.correspondence.trace import undisturbed

MOST_PAIRS = 4
_STRIDE, _DEPTH, _CKA = 0.5, 0.3, 0.2  # parts of the score; the student is untrained, so its features say least
FEWEST = 16  # samples below which the noise of CKA is as large as what it measures
_MOST = 512  # samples, beyond which it changes in the third digit
_CHUNK = 32  # samples of a forward pass
_SIDE = 4  # of the grid on which samples are compared


def score(student: Tap, teacher: Tap, cka: float | None) -> float:
    """How well two taps go together, in [0, 1].

    ½ · 2^−|log2 of the ratio of strides| + 0.3 · (1 − difference of depths) + 0.2 · CKA. Vectors have equal strides.
    """
    if student.stride and teacher.stride:
        stride = 2 ** -abs(math.log2(student.stride / teacher.stride))
    else:
        stride = float(student.stride is teacher.stride)
    return _STRIDE * stride + _DEPTH * (1 - abs(student.depth - teacher.depth)) + _CKA * max(0.0, cka or 0.0)


def align(scores: Sequence[Sequence[float]], count: int) -> list[tuple[int, int]]:
    """The `count` pairs of the largest summed score that keep the order on both sides; the last two go together.

    Args:
        scores: student × teacher, not negative.
        count: at most the smaller number of the two.

    Returns:
        (student, teacher), in order.
    """
    rows, columns = len(scores), len(scores[0]) if scores else 0
    if not rows or not columns or count < 1:
        return []
    # [i][j]: the best of the first i and j, in as many pairs as rounds have passed
    before: list[list[tuple[float, tuple[tuple[int, int], ...]]]] = [[(0.0, ())] * columns for _ in range(rows)]
    for _ in range(1, count):
        best: list[list[tuple[float, tuple[tuple[int, int], ...]]]] = [[(-math.inf, ())] * columns for _ in range(rows)]
        for i in range(1, rows):
            for j in range(1, columns):
                total, chosen = before[i - 1][j - 1]
                taken = (total + scores[i - 1][j - 1], (*chosen, (i - 1, j - 1)))
                best[i][j] = max(taken, best[i - 1][j], best[i][j - 1], key=lambda entry: entry[0])
        before = best
    return [*before[rows - 1][columns - 1][1], (rows - 1, columns - 1)]


def quarters(taps: Sequence[Tap]) -> tuple[Tap, ...]:
    """Of more equal blocks than are paired, those at equal distances up to the last; stages are kept as they are."""
    count = len(taps)
    if count <= MOST_PAIRS or taps[-1].kind != "block":
        return tuple(taps)
    return tuple(taps[(part + 1) * count // MOST_PAIRS - 1] for part in range(MOST_PAIRS))


def grams(network: nn.Module, taps: Sequence[Tap], inputs: Inputs) -> dict[str, Tensor]:
    """Inner products of the samples of a probe by their features, samples × samples, by path.

    Features are averaged to 4 positions a side at most first, padding left out. Nothing where the probe is too small.
    """
    samples = min(inputs.samples, _MOST)
    if samples < FEWEST or not taps:
        return {}
    rows: dict[str, list[Tensor]] = {tap.path: [] for tap in taps}
    with undisturbed(network), torch.no_grad(), Taps(network, taps) as listening:
        for first in range(0, samples, _CHUNK):
            part = inputs.rows(first, min(_CHUNK, samples - first))
            unwrapped(network)(*part.args, **part.kwargs)
            mask = mask_of(named(network, part))
            taken = listening.take()
            for tap in taps:
                rows[tap.path].append(_compared(tap, taken[tap.path], mask))
    return {path: _gram(torch.cat(parts)) for path, parts in rows.items()}


def _compared(tap: Tap, tensor: Tensor, mask: Tensor | None) -> Tensor:
    feature = on_grid(tap, tensor.float())
    if mask is not None and len(tap.grid) == 1:
        mask = mask[:, : feature.shape[2]] if tap.ragged else mask
        mask = resized_mask(mask, feature.shape[2])
    else:
        mask = None
    # a ragged tensor has another length in each chunk: one position for all
    grid = (1,) if tap.ragged else tuple(min(side, _SIDE) for side in feature.shape[2:])
    if mask is not None:
        feature = torch.where(mask[:, None], feature, feature.new_zeros(()))
    return pooled(feature, grid, mask).flatten(1)


def _gram(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(0)
    return (rows @ rows.T).double().cpu()


def cka(first: Tensor, second: Tensor) -> float | None:
    """Linear centred kernel alignment of two Gram matrices, with the unbiased estimator of HSIC.

    HSIC(K, L) = 1/(n(n−3)) · (tr(KL) + ΣK ΣL/((n−1)(n−2)) − 2/(n−2) · Σ(KL)) with zeros on the diagonals, and
    CKA = HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)): 1 for features that are equal up to rotation and factor, about 0 for
    unrelated ones.

    Reference: Kornblith, Norouzi, Lee, Hinton: Similarity of Neural Network Representations Revisited, ICML 2019;
    Song, Smola, Gretton, Bedo, Borgwardt: Feature Selection via Dependence Maximization, JMLR 2012 (the estimator).

    Returns:
        A number of at most 1, or None where one of them does not tell samples apart.
    """
    own = _hsic(first, first) * _hsic(second, second)
    return max(-1.0, min(1.0, _hsic(first, second) / math.sqrt(own))) if own > 0 and math.isfinite(own) else None


def _hsic(first: Tensor, second: Tensor) -> float:
    n = first.shape[0]
    k, other = (matrix - matrix.diag().diag() for matrix in (first, second))
    cross = float((k.sum(0) * other.sum(0)).sum())
    both = float(k.sum() * other.sum()) / ((n - 1) * (n - 2))
    return (float((k * other).sum()) + both - 2 * cross / (n - 2)) / (n * (n - 3))
