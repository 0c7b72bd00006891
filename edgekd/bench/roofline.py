"""The least time that a device needs for a model: a lower bound, never a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgekd.errors import TargetError
from edgekd.types import Device, Estimate, Latency, PowerMode, Precision


@dataclass(frozen=True, slots=True)
class Bound:
    """Milliseconds that neither arithmetic nor memory can go below, and which of the two binds."""

    ms: float
    term: Literal["arithmetic", "memory"]
    arithmetic_ms: float
    memory_ms: float


def bound(macs: int, moved_bytes: int, precision: Precision, mode: PowerMode) -> Bound | None:
    """max(2 · MACs / peak, bytes / bandwidth) (Williams, Waterman, Patterson, CACM, 2009), or None without a peak.

    `moved_bytes`: what must pass once, weights, inputs and outputs. The memory term supposes that weights come from
    memory for every sample; a model that fits the last-level cache may beat it when it is run again and again.
    """
    peak = mode.peak_ops_per_s.get(precision)
    if not peak:
        return None
    arithmetic_ms = 2 * macs / peak * 1e3
    memory_ms = moved_bytes / mode.bandwidth_bytes_per_s * 1e3
    term: Literal["arithmetic", "memory"] = "arithmetic" if arithmetic_ms >= memory_ms else "memory"
    return Bound(max(arithmetic_ms, memory_ms), term, arithmetic_ms, memory_ms)


def estimates(
    macs: int, moved_bytes: int, precision: Precision, devices: Sequence[Device]
) -> tuple[tuple[Estimate, ...], tuple[str, ...]]:
    """The bound on every device in every mode, and a reason for each mode that has no peak for `precision`."""
    found: list[Estimate] = []
    reasons: list[str] = []
    for device in devices:
        for mode in device.modes:
            limit = bound(macs, moved_bytes, precision, mode)
            if limit is None:
                reasons.append(f"{device.title}, {mode.name}: no peak for {precision} is known")
            else:
                found.append(Estimate(device.name, mode.name, limit.ms, predicted_ms=None, low=None, high=None))
    return tuple(found), tuple(reasons)


def check(measured: Latency, limit: Bound | None, *, where: str) -> None:
    """Refuse a measurement that beats the arithmetic peak of the device; where none is known, refuse nothing.

    Only the arithmetic term is held against it, since a cache may beat the memory term (see `bound`).

    Raises:
        TargetError: the median is below the bound, so the peak, the count of operations or the clock is wrong.
    """
    if limit is not None and measured.p50 < limit.arithmetic_ms:
        raise TargetError(
            f"{measured.p50:.4g} ms measured, but {measured.device} needs {limit.arithmetic_ms:.4g} ms at its peak",
            where=where,
            expected="a measurement above the roofline bound",
            fix="correct the device's peak in its target file, or report how it was measured as a bug",
        )
