"""Where nothing keeps the budget: which variant misses it by least, and what would have to give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgekd.outcome import Limit, Nearest
from edgekd.report import figures
from edgekd.report.judge import deployable, judge, rejections
from edgekd.types import Budget, Comparison, Variant, Verdict

_NAMES = {"drop": "accuracy", "latency_ms": "latency", "size_bytes": "size", "peak_memory_bytes": "memory"}
_FLAGS = {
    "drop": "--max-drop",
    "latency_ms": "--max-latency",
    "size_bytes": "--max-size",
    "peak_memory_bytes": "--max-memory",
}


def nearest(
    variants: Sequence[Variant], teacher: Variant, budget: Budget, chosen: Mapping[str, str | None],
    metric: str = "accuracy", comparisons: Sequence[Comparison] = (),
) -> dict[str, Nearest]:  # fmt: skip
    """For each target without a choice the variant that misses the budget by least.

    What a limit is missed by is told as a part of the limit (of a drop that may be less than a point: of a point), and
    the parts are added up. Of equal ones: the one with fewer limits of which nothing can be told, then the more
    accurate one, then the smaller one. A target of which no variant has a measured accuracy has none.
    """
    refused = rejections(variants, budget, comparisons)
    found = {}
    for target in (name for name, choice in chosen.items() if choice is None):
        judged = [(v, judge(v, teacher, budget, metric)) for v in deployable(variants, target)]
        if judged:
            variant, verdict = min(judged, key=_distance)
            found[target] = _told(variant, verdict, metric, refused.get(variant.id, ""))
    return found


def counted(variants: Sequence[Variant], metric: str = "accuracy") -> str:
    """Why nothing fits, for a reader with many variants: how many of them miss which limit."""
    limits = [limit for v in variants if v.verdict is not None for limit in v.verdict.limits]
    parts = []
    for name in dict.fromkeys(limit.name for limit in limits):
        missed = sum(limit.name == name and limit.status == "missed" for limit in limits)
        unknown = sum(limit.name == name and limit.status == "cannot tell" for limit in limits)
        what = metric if name == "drop" else _NAMES[name]
        told = [f"{missed} {'misses' if missed == 1 else 'miss'} the limit of {what}"] if missed else []
        told += [f"of {unknown} it cannot be told whether they keep that of {what}"] if unknown else []
        parts += told
    return f"of {len(variants)} variants {'; '.join(parts)}" if parts else ""


def _distance(judged: tuple[Variant, Verdict]) -> tuple[float, int, float, float, str]:
    variant, verdict = judged
    excess = sum(limit.excess for limit in verdict.limits)
    unknown = sum(limit.status == "cannot tell" for limit in verdict.limits)
    accuracy = variant.accuracy.value if variant.accuracy else 0.0
    return excess, unknown, -accuracy, variant.size_bytes or math.inf, variant.id


def _told(variant: Variant, verdict: Verdict, metric: str, refused: str) -> Nearest:
    names = {**_NAMES, "drop": metric}
    by_status = {status: [each for each in verdict.limits if each.status == status] for status in ("met", "missed")}
    unknown = [each for each in verdict.limits if each.status == "cannot tell"]
    says = figures.short_name(variant)
    if by_status["met"]:
        says += f" meets {_listed([names[each.name] for each in by_status['met']])}"
    if by_status["missed"]:
        says += ", but " if by_status["met"] else " "
        says += _listed([_missed(each, variant, metric) for each in by_status["missed"]])
    if unknown:
        joint = "; " if by_status["met"] or by_status["missed"] else ": "
        says += f"{joint}of {_listed([names[each.name] for each in unknown])} it cannot be told"
    if refused and not by_status["missed"]:
        says += f"; it was turned down: {refused}"
    flags = " ".join(_give(each, variant) for each in by_status["missed"])
    needs = f"it would {'be tried first' if unknown else 'fit'} with {flags}" if flags else ""
    return Nearest(variant.id, sum(each.excess for each in verdict.limits), says, needs)


def _missed(limit: Limit, variant: Variant, metric: str) -> str:
    """The limit and what the variant has, in figures that differ: 1.004 points, where two digits would say 1.0."""
    if limit.name == "drop":
        n = variant.drop.n if variant.drop else 0
        value = limit.value or 0.0
        had, may = figures.points(value, n, signed=False), figures.limit_points(limit.allowed).partition(" ")[0]
        if float(had) <= float(may):
            had = figures.plain(f"{value * 100:.4g}")
        of = "" if metric == "accuracy" else f" of {metric}"
        return f"drops {had} points{of} where {may} {'is' if may in ('0', '1') else 'are'} allowed"
    if limit.name == "latency_ms":
        may = figures.plain(figures.milliseconds(limit.allowed))
        if limit.value is None:
            least = figures.milliseconds(limit.low or 0.0)
            return f"takes at least {least} on every device listed where {may} are allowed"
        had = figures.milliseconds(limit.value)
        had = had if had != figures.milliseconds(limit.allowed) else f"{figures.digits(limit.value, 5)} ms"
        return f"takes {had} where {may} are allowed"
    value, allowed = round(limit.value or 0), round(limit.allowed)
    had, may = figures.size(value), figures.plain(figures.size(allowed))
    if figures.size(allowed) == had:
        had, may = f"{value} bytes", f"{allowed}"
    return f"{'weighs' if limit.name == 'size_bytes' else 'needs'} {had} where {may} are allowed"


def _give(limit: Limit, variant: Variant) -> str:
    """The flag with which the variant would keep this limit, rounded towards more."""
    flag = _FLAGS[limit.name]
    if limit.name == "drop":
        return f"{flag} {math.ceil(round((limit.value or 0.0) * 1000, 6)) / 1000:g}"
    if limit.name == "latency_ms":
        least = limit.high if limit.high is not None else limit.low or 0.0
        return f"{flag} {_up(least):g}ms"
    amount = limit.value or 0.0
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            return f"{flag} {_up(amount / size):g}{unit}"
    return f"{flag} {amount:g}B"


def _up(value: float) -> float:
    """The next number of three digits that is not below `value`."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(round(value / step, 9)) * step


def _listed(parts: Sequence[str]) -> str:
    *before, last = parts
    return f"{', '.join(before)} and {last}" if before else last
