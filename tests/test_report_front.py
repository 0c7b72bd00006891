"""The front of hand-made points, and what is said where nothing keeps the budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from sample_report import latency, of_values, realistic, scored, searched, variant

from edgekd import report
from edgekd.bench.accuracy import wilson
from edgekd.outcome import Nearest
from edgekd.report.nearest import counted
from edgekd.types import Budget, Estimate, Interval, Variant

TEACHER = variant("teacher", "teacher", accuracy=wilson(440, 450), size_bytes=1_000_000)


def point(
    name: str, drop: float | None, ms: float | None = None, size: int | None = 1000, **given: Any
) -> Variant:  # fmt: skip
    """A deployable variant at a place that is given by hand."""
    lost = None if drop is None else Interval(drop, drop - 0.01, drop + 0.01, 450)
    return variant(name, "onnx", target="host", accuracy=wilson(440, 450), drop=lost, size_bytes=size,
                   latency_ms=None if ms is None else latency(ms), **given)  # fmt: skip


def front(*points: Variant) -> tuple[str, ...]:
    """The ids on the front of the one target."""
    (found,) = report.fronts([TEACHER, *points], ["host"])
    return found.variants


def test_what_is_beaten_in_every_axis_is_not_on_the_front() -> None:
    a, b, c = point("a", 0.00, 2.0, 900), point("b", 0.01, 1.0, 500), point("c", 0.02, 3.0, 1000)
    assert front(a, b, c) == ("b", "a"), "by latency"
    assert front(a, b, point("small", 0.5, 9.0, 10)) == ("b", "a", "small")


def test_equal_ones_do_not_beat_each_other_and_one_better_axis_is_enough() -> None:
    assert front(point("a", 0.0, 1.0), point("b", 0.0, 1.0)) == ("a", "b")
    assert front(point("a", 0.0, 1.0), point("b", 0.0, 1.0, 999)) == ("b",)


def test_the_teacher_weights_and_what_was_not_tested_are_not_on_it() -> None:
    weights = dataclasses.replace(point("weights", -0.5, 0.1, 1), stage="student")
    untested = dataclasses.replace(point("untested", 0.0, 0.1, 1), accuracy=None)
    teacher = dataclasses.replace(point("t", -0.5, 0.1, 1), stage="teacher")
    assert front(weights, untested, teacher, point("a", 0.0, 1.0)) == ("a",)


def test_what_lacks_a_figure_is_unplaced_and_beats_nothing() -> None:
    (found,) = report.fronts([point("a", 0.0, 1.0), point("no size", -0.1, 0.1, None), point("x", None, 0.1)], ["host"])
    assert found.axes == ("drop", "latency_ms", "size_bytes")
    assert (found.variants, found.unplaced) == (("a",), ("no size", "x"))


def test_where_nothing_is_timed_multiply_accumulates_stand_for_the_time() -> None:
    (found,) = report.fronts([point("a", 0.0, macs=100), point("b", 0.1, macs=50), point("c", 0.1, macs=60)], ["host"])
    assert found.axes == ("drop", "macs", "size_bytes")
    assert found.variants == ("b", "a")
    (found,) = report.fronts([point("a", 0.0, macs=100), point("b", 0.1, 1.0, macs=50)], ["host"])
    assert (found.axes[1], found.variants, found.unplaced) == ("latency_ms", ("b",), ("a",))


def test_latencies_of_other_rounds_are_not_held_against_those_of_the_report() -> None:
    lucky = point("lucky", 0.0, 0.5)
    assert lucky.latency_ms is not None
    elsewhere = dataclasses.replace(lucky, latency_ms=dataclasses.replace(lucky.latency_ms, rounds="w8"))
    assert front(point("a", 0.0, 1.0), elsewhere) == ("a",)
    assert front(elsewhere) == ("lucky",)
    assert report.choose([point("a", 0.0, 1.0), elsewhere], Budget()) == {"host": "a"}
    assert report.choose([point("a", 0.2, 1.0), elsewhere], Budget(max_accuracy_drop=0.1)) == {"host": "lucky"}


def test_int8_is_held_against_the_float_of_its_own_student() -> None:
    own: dict[str, Any] = {"candidate": "w16"}
    other = point("host/w4/fp32", 0.3, 0.5, candidate="w4")
    ours, int8 = point("host/w16/fp32", 0.0, 2.0, **own), point("host/w16/int8", 0.0, 1.0, 500, **own)
    int8 = dataclasses.replace(int8, precision="int8", stage="quantized")
    assert report.rejections([other, ours, int8], Budget()) == {}
    assert "no faster" not in str(report.rejections([ours, int8], Budget()))
    slow = dataclasses.replace(int8, latency_ms=latency(3.0))
    assert set(report.rejections([other, ours, slow], Budget())) == {int8.id}


def nearest(budget: Budget, *rows: Variant, metric: str = "accuracy") -> Nearest:
    """What is nearest on the one target, where nothing is chosen."""
    chosen = report.choose(rows, budget)
    assert chosen == {"host": None}
    return report.nearest([TEACHER, *rows], TEACHER, budget, chosen, metric)["host"]


def test_the_nearest_says_what_it_keeps_what_it_misses_and_what_would_have_to_give() -> None:
    budget = Budget(max_accuracy_drop=0.01, max_latency_ms=5, max_size_bytes=4_000_000)
    int8 = point("host/student-int8", 0.021, 2.0, 3_000_000)
    found = nearest(budget, int8, point("host/student-fp32", 0.0, 9.0, 12_000_000))
    assert found.variant == "host/student-int8"
    assert found.says == "student-int8 meets latency and size, but drops 2.1 points where 1 is allowed"
    assert found.needs == "it would fit with --max-drop 0.021"
    assert found.excess == pytest.approx(1.1)
    given = dataclasses.replace(budget, max_accuracy_drop=0.021)
    assert report.choose([int8], given) == {"host": "host/student-int8"}, "what it needs is enough"


@pytest.mark.parametrize(
    ("budget", "given", "says", "needs"),
    [
        (Budget(max_size_bytes=1000), {"size": 4096}, "v weighs 4.10 kB where 1 kB are allowed", "--max-size 4.1kB"),
        (Budget(max_size_bytes=1000), {"size": 1001}, "weighs 1001 bytes where 1000 are allowed", "--max-size 1.01kB"),
        (Budget(max_latency_ms=1), {"ms": 2.0}, "v takes 2.00 ms where 1 ms are allowed", "--max-latency 2.02ms"),
        (Budget(max_accuracy_drop=0.01), {"drop": 0.01004}, "drops 1.004 points where 1 is", "--max-drop 0.011"),
        (Budget(max_accuracy_drop=0.0), {"drop": 0.002}, "drops 0.2 points where 0 is allowed", "--max-drop 0.002"),
        (Budget(max_memory_bytes=1000), {"peak_memory_bytes": 70_000_000}, "v needs 70.0 MB where 1 kB are allowed",
         "--max-memory 70MB"),
    ],
)  # fmt: skip
def test_each_limit_that_is_missed_is_told_in_figures(
    budget: Budget, given: dict[str, Any], says: str, needs: str
) -> None:
    row = point("host/v", given.pop("drop", 0.0), given.pop("ms", 1.0), given.pop("size", 100), **given)
    found = nearest(budget, row)
    assert says in found.says
    assert found.needs == f"it would fit with {needs}"


def test_a_bound_above_the_limit_is_told_as_the_least_it_takes() -> None:
    bounds = (Estimate("board", "15W", 9.0, None, None, None),)
    found = nearest(Budget(max_latency_ms=5), point("v", 0.0, estimates=bounds))
    assert found.says == "v takes at least 9.00 ms on every device listed where 5 ms are allowed"
    assert found.needs == "it would fit with --max-latency 9ms"


def test_the_one_that_misses_by_the_smallest_part_is_nearest_then_the_better_known_one() -> None:
    budget = Budget(max_accuracy_drop=0.02, max_size_bytes=1000, max_latency_ms=1)
    a, b = point("a", 0.03, 0.5, 100), point("b", 0.0, 0.5, 1400)
    assert nearest(budget, a, b).variant == "b", "0.4 of its size is less than 0.5 of its drop"
    untimed = point("c", 0.0, None, 1400)
    assert nearest(budget, untimed, b).variant == "b"
    found = nearest(budget, untimed)
    assert found.says == "c meets accuracy, but weighs 1.40 kB where 1 kB are allowed; of latency it cannot be told"
    assert found.needs == "it would be tried first with --max-size 1.4kB"


def test_another_metric_is_named() -> None:
    row = dataclasses.replace(point("v", 0.05), metrics={"RMSE": 1.0})
    assert (
        "drops 5.0 points of mIoU where 1 is allowed"
        in nearest(Budget(max_accuracy_drop=0.01), row, metric="mIoU").says
    )
    assert report.concluded(of_values()).nearest == {}


def test_without_a_tested_variant_nothing_is_near() -> None:
    row = dataclasses.replace(point("v", 0.0), accuracy=None)
    assert report.nearest([TEACHER, row], TEACHER, Budget(), {"host": None}) == {}


def test_of_many_variants_the_limits_are_counted() -> None:
    made = searched(budget=Budget(max_accuracy_drop=0.001, max_size_bytes=10_000))
    assert made.chosen == {"host": None}
    text = report.summary(made, Path("x"))
    assert "Nearest: " in text
    assert "of 20 variants" in text
    assert len(text.splitlines()) == 4
    assert counted([], "accuracy") == ""


def test_memory_is_judged_like_the_other_limits() -> None:
    budget = Budget(max_memory_bytes=64_000_000)
    kept = variant("v", "onnx", target="host", **scored(440, 440, 450), peak_memory_bytes=60_000_000)
    verdict = report.judge(kept, TEACHER, budget)
    assert (verdict.status, verdict.reasons) == ("met", ("peak memory: 60.0 MB; 64 MB allowed",))
    (limit,) = verdict.limits
    assert (limit.name, limit.value, limit.allowed) == ("peak_memory_bytes", 60_000_000, 64_000_000)
    assert report.judge(dataclasses.replace(kept, peak_memory_bytes=64_000_001), TEACHER, budget).status == "missed"
    unknown = dataclasses.replace(kept, peak_memory_bytes=None, missing={"peak_memory_bytes": "measured on Linux only"})
    verdict = report.judge(unknown, TEACHER, budget)
    assert (verdict.status, verdict.reasons) == (
        "cannot tell", ("peak memory: not measured (measured on Linux only); 64 MB allowed",),
    )  # fmt: skip


def test_a_verdict_has_every_limit_with_its_interval() -> None:
    host = next(v for v in realistic().variants if v.id == "host-int8")
    assert host.verdict is not None
    assert [limit.name for limit in host.verdict.limits] == ["drop", "latency_ms", "size_bytes"]
    assert [limit.reason for limit in host.verdict.limits] == list(host.verdict.reasons)
    drop, time, _ = host.verdict.limits
    assert host.drop is not None
    assert host.latency_ms is not None
    assert (drop.low, drop.high) == (host.drop.low, host.drop.high)
    assert (time.low, time.value, time.high) == (host.latency_ms.low, host.latency_ms.p50, host.latency_ms.high)
