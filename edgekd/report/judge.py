"""Whether a variant keeps the budget, and which one to deploy.

How limits are decided:
- Accuracy, or the metric of another task: the limit is a fraction of it, so the measured drop decides. Where its
  interval crosses the limit the reason says so: the test set is then too small to promise the same for other samples.
  Asking for the whole interval would turn down every variant on a test set of some hundred samples, the perfect ones
  too.
- Latency: a median can be measured again, so its whole interval must lie on one side; else "cannot tell".
- Size: exact. Peak memory: one process that was watched, held to the limit as it is.
- What was not measured cannot be told; but a roofline bound above the limit, on every device and mode, is a miss.

How one is chosen: among the variants of a target that keep the budget, none turned down for int8 that brings nothing,
or that loses a lot where nobody said how much it may.
Where none is known to keep it, among those of which it cannot be told, since a board can only be measured with a
bundle on it: such a choice is provisional, and its verdict says "cannot tell". Never chosen are a variant that misses a
limit, one whose accuracy was not measured, and the teacher, which is what one has without edgekd.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from edgekd.bench import accuracy
from edgekd.outcome import Limit
from edgekd.report import figures
from edgekd.types import Budget, Comparison, Status, Variant, Verdict

_LEAST_DROP = 0.01  # a point: what a drop is told as a part of where none, or less than one, is allowed
# What int8 may lose against float where the budget does not say: a point of the metric. MLPerf Inference asks quantized
# networks for 99 % of float's accuracy, too (Reddi et al., MLPerf Inference Benchmark, ISCA 2020).
_UNASKED_LOSS = 0.01
_TIE = 1.03  # medians closer than this are one latency: accuracy decides
# Sessions of the same float kernels differ by where their memory lies: by 6 % for an LSTM that no form had changed.
_SAME_KERNELS = 1.1
_FLOAT = ("fp32", "fp16")
_STAGES = ("onnx", "quantized", "engine")  # what can be deployed, the furthest last


def judge(variant: Variant, teacher: Variant, budget: Budget, metric: str = "accuracy") -> Verdict:
    """The verdict on one variant, with a reason for each limit of the budget; see the module for the rules."""
    return _judge(variant, budget, metric, is_teacher=variant.id == teacher.id)


def _judge(variant: Variant, budget: Budget, metric: str = "accuracy", *, is_teacher: bool = False) -> Verdict:
    limits: list[Limit] = []
    if budget.max_accuracy_drop is not None:
        limits.append(_drop(variant, budget.max_accuracy_drop, metric, is_teacher=is_teacher))
    if budget.max_latency_ms is not None:
        limits.append(_latency(variant, budget.max_latency_ms))
    if budget.max_size_bytes is not None:
        limits.append(_size(variant, budget.max_size_bytes))
    if budget.max_memory_bytes is not None:
        limits.append(_memory(variant, budget.max_memory_bytes))
    if not limits:
        return Verdict("met", ("the budget sets no limit",))
    found = {limit.status for limit in limits}
    order: tuple[Status, ...] = ("missed", "cannot tell", "met")
    status = next(status for status in order if status in found)
    return Verdict(status, tuple(limit.reason for limit in limits), tuple(limits))


def rejections(variants: Sequence[Variant], budget: Budget, comparisons: Sequence[Comparison] = ()) -> dict[str, str]:
    """Variant id → why it does not earn its place: int8 that is worse or no faster than float on the same target.

    Held against each of them are float variants of the same student and target that do not miss the budget themselves
    (one that is too large is no alternative).

    - Where the budget has no limit of the drop, none may lose more than a point for certain against the best of them:
      a point of accuracy, or a hundredth of the metric of another task.
    - int8 and dynamic int8 must be faster; weight-only int8, which computes in float, must be smaller and not slower:
      than the fastest of them with the same runtime, measured under the same conditions. Where both were timed in the
      same interleaved rounds the interval of their ratio decides, else whether their intervals are apart.
    """
    found: dict[str, str] = {}
    for variant in variants:
        if variant.precision in _FLOAT or variant.target is None:
            continue
        rivals = [
            rival
            for rival in variants
            if rival.precision in _FLOAT
            and rival.stage in _STAGES
            and (rival.target, rival.candidate) == (variant.target, variant.candidate)
            and _judge(rival, budget).status != "missed"
        ]
        reason = _worse(variant, rivals) if budget.max_accuracy_drop is None else None
        reason = reason or _no_gain(variant, rivals, comparisons)
        if reason:
            place = {"w8": "int8 weights must earn their", "dynamic": "dynamic int8 must earn its"}
            found[variant.id] = f"{place.get(variant.precision, 'int8 must earn its')} place: {reason}"
    return found


def choose(
    variants: Sequence[Variant], budget: Budget, comparisons: Sequence[Comparison] = ()
) -> dict[str, str | None]:
    """Target → id of the variant to deploy there, None where every one misses the budget.

    Of those that may be chosen (see the module), and of these the ones that were timed in the report's own rounds
    where there are some: the lowest measured latency; medians that cannot be told apart, or
    differ by less than 3 %, are a tie, which the higher accuracy wins, then the smaller file. Where no latency was
    measured on the target, the smallest file; then the higher accuracy.
    """
    turned_down = rejections(variants, budget, comparisons)
    chosen: dict[str, str | None] = {}
    for target in dict.fromkeys(v.target for v in variants if v.target is not None):
        offered = [v for v in deployable(variants, target) if v.id not in turned_down]
        for status in ("met", "cannot tell"):
            allowed = [v for v in offered if _judge(v, budget).status == status]
            if allowed:
                chosen[target] = _best(allowed).id
                break
        else:
            chosen[target] = None
    return chosen


def deployable(variants: Sequence[Variant], target: str) -> list[Variant]:
    """The variants of a target that could be chosen: no weights, not the teacher, and none of unknown accuracy."""
    return [v for v in variants if v.target == target and v.stage in _STAGES and v.accuracy is not None]


def _best(allowed: Sequence[Variant]) -> Variant:
    timed = [v for v in allowed if v.latency_ms is not None]
    # Of a search: what was timed elsewhere was beaten there, and figures of two rounds are not held against each other.
    timed = [v for v in timed if v.latency_ms is not None and v.latency_ms.rounds is None] or timed
    if not timed:
        return min(allowed, key=lambda v: (_size_key(v), -_accuracy(v), -_STAGES.index(v.stage), v.id))
    fastest = min(timed, key=_p50)
    assert fastest.latency_ms is not None
    limit = max(fastest.latency_ms.high, fastest.latency_ms.p50 * _TIE)
    tied = [v for v in timed if v.latency_ms is not None and min(v.latency_ms.low, v.latency_ms.p50) <= limit]
    return min(tied, key=lambda v: (-_accuracy(v), _size_key(v), _p50(v), -_STAGES.index(v.stage), v.id))


def _comparable(rival: Variant, variant: Variant) -> bool:
    one, two = rival.latency_ms, variant.latency_ms
    if one is None or two is None or rival.runtime != variant.runtime:
        return False
    return (one.device, one.threads, one.power_mode, one.origin, one.rounds) == (
        two.device,
        two.threads,
        two.power_mode,
        two.origin,
        two.rounds,
    )


def _worse(variant: Variant, rivals: Iterable[Variant]) -> str | None:
    """What it loses against the best of its rivals, where that is too much for certain."""
    drops = [(rival.drop, rival) for rival in rivals if rival.drop is not None]
    if variant.drop is None or not drops:
        return None
    least, rival = min(drops, key=lambda each: each[0].value)
    lost = accuracy.difference(least, variant.drop)
    if lost.low <= _UNASKED_LOSS:
        return None
    return (
        f"it loses {figures.points(lost.value, lost.n, signed=False)} points {figures.points_interval(lost)} against "
        f"{rival.id} in {rival.precision}, and without a limit of the drop (--max-drop) "
        f"{figures.limit_points(_UNASKED_LOSS)} is let pass"
    )


def _no_gain(variant: Variant, rivals: Iterable[Variant], comparisons: Iterable[Comparison]) -> str | None:
    """What it does not bring that its precision is for, where both were measured under the same conditions."""
    timed = [rival for rival in rivals if _comparable(rival, variant)]
    if not timed:
        return None
    missing = _no_smaller if variant.precision == "w8" else _no_faster
    return missing(variant, min(timed, key=_p50), comparisons)


def _no_faster(variant: Variant, rival: Variant, comparisons: Iterable[Comparison]) -> str | None:
    ours, theirs = variant.latency_ms, rival.latency_ms
    assert ours is not None
    assert theirs is not None
    verdict, ratio = _against(variant, rival, comparisons)
    if verdict == "faster":
        return None
    told = {"slower": f"{ratio:.2f}{figures.TIMES} slower than", "same": "no faster than"}
    return (
        f"at {figures.milliseconds(ours.p50)} {figures.latency_interval(ours)} it is "
        f"{told.get(verdict, 'not shown to be faster than')} {rival.id} in {rival.precision} at "
        f"{figures.milliseconds(theirs.p50)} {figures.latency_interval(theirs)}"
    )


def _no_smaller(variant: Variant, rival: Variant, comparisons: Iterable[Comparison]) -> str | None:
    verdict, ratio = _against(variant, rival, comparisons)
    if variant.size_bytes is not None and rival.size_bytes is not None and variant.size_bytes >= rival.size_bytes:
        why = f"at {figures.size(variant.size_bytes)} it is no smaller than"
    elif verdict == "slower" and ratio > _SAME_KERNELS:
        why = f"it is {ratio:.2f}{figures.TIMES} slower than"
    else:
        return None
    return f"{why} {rival.id} in {rival.precision}"


def _against(variant: Variant, rival: Variant, comparisons: Iterable[Comparison]) -> tuple[str, float]:
    for found in comparisons:
        if (found.candidate, found.baseline) == (variant.id, rival.id):
            return found.verdict, found.ratio.value
        if (found.candidate, found.baseline) == (rival.id, variant.id):
            turned: Mapping[str, str] = {"faster": "slower", "slower": "faster"}
            return turned.get(found.verdict, found.verdict), 1 / found.ratio.value
    ours, theirs = variant.latency_ms, rival.latency_ms
    assert ours is not None
    assert theirs is not None
    verdict = "faster" if ours.high < theirs.low else "slower" if ours.low > theirs.high else "cannot tell"
    return verdict, ours.p50 / theirs.p50


def _drop(variant: Variant, limit: float, metric: str, *, is_teacher: bool) -> Limit:
    allowed = f"{figures.limit_points(limit)} allowed"
    if is_teacher:
        return Limit("drop", "met", limit, 0.0, None, None, 0.0, f"{metric}: the teacher itself; {allowed}")
    drop = variant.drop
    if drop is None:
        text = f"{metric} drop: not measured ({_why(variant, 'drop', 'accuracy')}); {allowed}"
        return Limit("drop", "cannot tell", limit, None, None, None, 0.0, text)
    status: Status = "met" if drop.value <= limit + 1e-12 else "missed"
    text = f"{metric} drop: {figures.points(drop.value, drop.n, signed=False)} points "
    text += f"{figures.points_interval(drop)} on {drop.n:,} samples; {allowed}"
    if status == "met" and drop.high > limit:
        text += "; the interval reaches beyond the limit, so other samples may show a larger drop"
    if status == "missed" and drop.low <= limit:
        text += "; the interval reaches below the limit, so more samples might show a smaller drop"
    excess = (drop.value - limit) / max(limit, _LEAST_DROP) if status == "missed" else 0.0
    return Limit("drop", status, limit, drop.value, drop.low, drop.high, excess, text)


def _latency(variant: Variant, limit: float) -> Limit:
    allowed = f"{figures.plain(figures.milliseconds(limit))} allowed"
    latency = variant.latency_ms
    if latency is not None and latency.origin != "estimate":
        status: Status = "met" if latency.high <= limit else "missed" if latency.low > limit else "cannot tell"
        text = f"latency: {figures.milliseconds(latency.p50)} {figures.latency_interval(latency)} on {latency.device}"
        crossing = "; the interval holds the limit: measure longer, or on a quieter machine"
        text = f"{text}; {allowed}" + (crossing if status == "cannot tell" else "")
        excess = (latency.p50 - limit) / limit if status == "missed" else 0.0
        return Limit("latency_ms", status, limit, latency.p50, latency.low, latency.high, excess, text)
    bounds = [estimate.lower_bound_ms for estimate in variant.estimates]
    if bounds and min(bounds) > limit:
        least = figures.milliseconds(min(bounds))
        text = f"latency: not measured, but at least {least} on every device listed (roofline); {allowed}"
        excess = (min(bounds) - limit) / limit
        return Limit("latency_ms", "missed", limit, None, min(bounds), None, excess, text)
    text = f"latency: not measured ({_why(variant, 'latency_ms')}); {allowed}"
    return Limit("latency_ms", "cannot tell", limit, None, None, None, 0.0, text)


def _size(variant: Variant, limit: int) -> Limit:
    return _bytes("size_bytes", "size", variant.size_bytes, limit, f"not known ({_why(variant, 'size_bytes')})")


def _memory(variant: Variant, limit: int) -> Limit:
    unknown = f"not measured ({_why(variant, 'peak_memory_bytes')})"
    return _bytes("peak_memory_bytes", "peak memory", variant.peak_memory_bytes, limit, unknown)


def _bytes(
    name: Literal["size_bytes", "peak_memory_bytes"], what: str, value: int | None, limit: int, unknown: str
) -> Limit:
    """An exact figure: the size of a file, or the largest growth of a process that was watched."""
    allowed = f"{figures.plain(figures.size(limit))} allowed"
    if value is None:
        return Limit(name, "cannot tell", float(limit), None, None, None, 0.0, f"{what}: {unknown}; {allowed}")
    text = f"{what}: {figures.size(value)}"
    if figures.size(limit) == figures.size(value) and value != limit:
        text, allowed = f"{what}: {value} bytes", f"{limit} bytes allowed"
    status: Status = "met" if value <= limit else "missed"
    excess = max(0.0, value / limit - 1)
    return Limit(name, status, float(limit), float(value), None, None, excess, f"{text}; {allowed}")


def _why(variant: Variant, *names: str) -> str:
    return next((variant.missing[name] for name in names if name in variant.missing), "no reason was recorded")


def _p50(variant: Variant) -> float:
    return variant.latency_ms.p50 if variant.latency_ms else float("inf")


def _accuracy(variant: Variant) -> float:
    return variant.accuracy.value if variant.accuracy else 0.0


def _size_key(variant: Variant) -> float:
    return variant.size_bytes if variant.size_bytes is not None else float("inf")
