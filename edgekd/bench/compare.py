"""Whether one model is faster than another, told with an interval."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekd.types import Comparison, Interval

SAME_WITHIN = 0.03  # a difference nobody deploys for; also what a quiet machine repeats within
_RESAMPLES = 1000


def compare(
    candidate: str, candidate_ns: NDArray[np.int64], baseline: str, baseline_ns: NDArray[np.int64], *, seed: int = 0
) -> Comparison:
    """The ratio of two medians, candidate / baseline, with its 95 % bootstrap interval and a verdict.

    Both series (rounds × runs) come from the same interleaved rounds; the same rounds are drawn for both, so what
    slowed the machine down for a while cancels out of the ratio.

    Verdict, with the interval [low, high]: "same" where it lies within 3 % of 1 (a difference may be real there but
    too small to matter); else "faster" where high < 1, "slower" where low > 1; else "cannot tell".

    Raises:
        ValueError: the series have different numbers of rounds.
    """
    if len(candidate_ns) != len(baseline_ns):
        raise ValueError(f"not measured in the same rounds: {len(candidate_ns)} and {len(baseline_ns)}")
    drawn = _drawn(len(candidate_ns), seed)
    ratios = _medians(candidate_ns, drawn) / _medians(baseline_ns, drawn)
    value = float(np.median(candidate_ns) / np.median(baseline_ns))
    low, high = (float(edge) for edge in np.percentile(ratios, [2.5, 97.5]))
    low, high = min(low, value), max(high, value)
    ratio = Interval(value=value, low=low, high=high, n=len(candidate_ns))
    return Comparison(candidate=candidate, baseline=baseline, ratio=ratio, verdict=verdict(low, high))


def pairs(
    series_ns: Mapping[str, NDArray[np.int64]], wanted: Iterable[tuple[str, str]] | None = None, *, seed: int = 0
) -> tuple[Comparison, ...]:
    """Compare each (candidate, baseline) of `wanted`, or every variant with every one before it."""
    if wanted is None:
        wanted = ((later, earlier) for earlier, later in itertools.combinations(series_ns, 2))
    return tuple(compare(a, series_ns[a], b, series_ns[b], seed=seed) for a, b in wanted)


def verdict(low: float, high: float) -> Literal["faster", "same", "slower", "cannot tell"]:
    """What the 95 % interval of a ratio of latencies says about the numerator; see `compare`."""
    if low >= 1 / (1 + SAME_WITHIN) and high <= 1 + SAME_WITHIN:
        return "same"
    if high < 1:
        return "faster"
    if low > 1:
        return "slower"
    return "cannot tell"


def median_interval(values: NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median over all runs, drawing whole rounds (rows) with replacement."""
    medians = _medians(values, _drawn(len(values), seed))
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def _drawn(rounds: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, rounds, size=(_RESAMPLES, rounds))


def _medians(values: NDArray[np.int64] | NDArray[np.float64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([np.median(values[rows]) for rows in drawn], dtype=np.float64)
