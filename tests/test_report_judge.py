"""Verdicts and choices, case by case."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from sample_report import latency, of_values, realistic, scored, variant

from edgekd.bench.accuracy import wilson
from edgekd.report import choose, judge, rejections, rejudged
from edgekd.report.render import markdown
from edgekd.types import Budget, Comparison, Estimate, Interval, Report, Variant

TEACHER = variant("teacher", "teacher", accuracy=wilson(440, 450), size_bytes=1_000_000, latency_ms=latency(1.0))


POINT, FIVE_MS = Budget(max_accuracy_drop=0.01), Budget(max_latency_ms=5)


def made(name: str, hits: int = 440, size_bytes: int | None = 1000, **given: Any) -> Variant:
    """A deployable variant for the target "host"."""
    given = {"target": "host", "runtime": "ort", "size_bytes": size_bytes} | scored(hits, 440, 450) | given
    return variant(name, given.pop("stage", "quantized" if given.get("precision") == "int8" else "onnx"), **given)


def dropping(value: float, low: float, high: float, n: int = 450) -> dict[str, Any]:
    """A given drop."""
    return {"drop": Interval(value, low, high, n)}


@pytest.mark.parametrize(
    ("budget", "given", "status", "says"),
    [
        (Budget(), {}, "met", "the budget sets no limit"),
        (POINT, dropping(0.002, -0.004, 0.008), "met", "0.2 points [−0.4, +0.8] on 450 samples"),
        (POINT, dropping(0.01, 0.0, 0.02), "met", "reaches beyond the limit"),
        (POINT, dropping(0.011, 0.0, 0.02), "missed", "reaches below the limit"),
        (POINT, dropping(0.05, 0.03, 0.07), "missed", "5.0 points [+3.0, +7.0]"),
        (Budget(max_accuracy_drop=0.0), dropping(-0.004, -0.02, 0.01), "met", "−0.4 points"),
        (POINT, {"drop": None}, "cannot tell", "no reason was recorded"),
        (POINT, {"drop": None, "missing": {"drop": "no test split"}}, "cannot tell", "no test split"),
        (FIVE_MS, {"latency_ms": latency(4.0)}, "met", "4.00 ms [3.96, 4.04] on AMD EPYC; 5 ms allowed"),
        (FIVE_MS, {"latency_ms": latency(6.0)}, "missed", "6.00 ms"),
        (FIVE_MS, {"latency_ms": latency(4.99)}, "cannot tell", "the interval holds the limit"),
        (FIVE_MS, {"latency_ms": None}, "cannot tell", "latency: not measured"),
        (FIVE_MS, {"latency_ms": latency(1.0, origin="estimate")}, "cannot tell", "not measured"),
        (Budget(max_size_bytes=1000), {"size_bytes": 1000}, "met", "size: 1 kB; 1 kB allowed"),
        (Budget(max_size_bytes=1_000_000), {"size_bytes": 1_000_001}, "missed", "1000001 bytes; 1000000 bytes allowed"),
        (Budget(max_size_bytes=1000), {"size_bytes": None}, "cannot tell", "size: not known"),
    ],
)  # fmt: skip
def test_verdicts(budget: Budget, given: dict[str, Any], status: str, says: str) -> None:
    found = judge(made("v", **given), TEACHER, budget)
    assert found.status == status
    assert len(found.reasons) == 1
    assert says.replace("1 kB;", "1.00 kB;") in found.reasons[0]


def test_one_miss_outweighs_what_cannot_be_told() -> None:
    budget = Budget(max_accuracy_drop=0.01, max_latency_ms=5, max_size_bytes=10_000)
    found = judge(made("v", drop=None, latency_ms=latency(9.0)), TEACHER, budget)
    assert found.status == "missed"
    assert [reason.split(":")[0] for reason in found.reasons] == ["accuracy drop", "latency", "size"]
    assert judge(made("v", drop=None, latency_ms=latency(1.0)), TEACHER, budget).status == "cannot tell"


def test_a_bound_above_the_limit_on_every_device_is_a_miss() -> None:
    bounds = tuple(Estimate("board", mode, ms, None, None, None) for mode, ms in (("15W", 9.0), ("25W", 6.0)))
    assert judge(made("v", estimates=bounds), TEACHER, Budget(max_latency_ms=5)).status == "missed"
    assert judge(made("v", estimates=bounds), TEACHER, Budget(max_latency_ms=7)).status == "cannot tell"


def test_the_teacher_keeps_its_own_accuracy() -> None:
    assert judge(TEACHER, TEACHER, Budget(max_accuracy_drop=0)).status == "met"


def test_the_lowest_latency_is_chosen_within_the_budget() -> None:
    rows = [
        TEACHER,
        made("slow", latency_ms=latency(3.0)),
        made("fast", latency_ms=latency(2.0)),
        made("faster but wrong", 400, latency_ms=latency(1.0)),
    ]
    assert choose(rows, Budget(max_accuracy_drop=0.01)) == {"host": "fast"}
    assert choose(rows, Budget()) == {"host": "faster but wrong"}
    assert choose(rows, Budget(max_latency_ms=0.5)) == {"host": None}


def test_latencies_that_cannot_be_told_apart_are_a_tie_for_accuracy() -> None:
    rows = [TEACHER, made("a", 438, latency_ms=latency(2.0)), made("b", 440, latency_ms=latency(2.02))]
    assert choose(rows, Budget()) == {"host": "b"}
    rows[2] = made("b", 440, latency_ms=latency(2.2))
    assert choose(rows, Budget()) == {"host": "a"}
    rows[2] = made("b", 438, latency_ms=latency(2.0), size_bytes=10)
    assert choose(rows, Budget()) == {"host": "b"}


def test_without_latency_the_smallest_file_is_chosen_then_the_more_accurate() -> None:
    rows = [TEACHER, made("big", size_bytes=2000), made("small", 430, size_bytes=900)]
    assert choose(rows, Budget()) == {"host": "small"}
    rows.append(made("as small", 435, size_bytes=900))
    assert choose(rows, Budget()) == {"host": "as small"}


def test_a_choice_is_provisional_where_nothing_is_known_to_keep_the_budget() -> None:
    budget = Budget(max_accuracy_drop=0.01, max_latency_ms=5)
    rows = [TEACHER, made("a", size_bytes=900), made("b", 400, size_bytes=10)]
    assert choose(rows, budget) == {"host": "a"}, "b misses the drop, of a it cannot be told"
    rows.append(made("c", size_bytes=5000, latency_ms=latency(4.0)))
    assert choose(rows, budget) == {"host": "c"}, "c is known to keep it"


def test_the_teacher_and_weights_are_never_chosen() -> None:
    rows = [dataclasses.replace(TEACHER, target="host"), made("weights", stage="student")]
    assert choose(rows, Budget()) == {"host": None}
    assert choose([TEACHER], Budget()) == {}


def test_what_was_not_tested_is_not_chosen() -> None:
    untested = made("v", accuracy=None, drop=None)
    assert choose([TEACHER, untested], Budget()) == choose([TEACHER, untested], POINT) == {"host": None}


def test_each_target_gets_its_own() -> None:
    rows = [TEACHER, made("h"), made("j", target="jetson"), made("j2", target="jetson", size_bytes=1)]
    assert choose(rows, Budget()) == {"host": "h", "jetson": "j2"}


def test_a_stale_verdict_is_not_believed() -> None:
    rows = [TEACHER, dataclasses.replace(made("v", 400), verdict=judge(made("v", 400), TEACHER, Budget()))]
    assert choose(rows, Budget(max_accuracy_drop=0.01)) == {"host": None}


def int8(p50: float, **given: Any) -> Variant:
    """An int8 variant."""
    return made("int8", precision="int8", size_bytes=300, latency_ms=latency(p50, **given))


@pytest.mark.parametrize(
    ("p50", "says"),
    [
        (1.2, None),
        (2.6, "1.30× slower than float"),
        (2.0, "not shown to be faster than float"),
        (1.985, "not shown to be"),
    ],
)
def test_int8_must_earn_its_place(p50: float, says: str | None) -> None:
    rows = [TEACHER, made("float", latency_ms=latency(2.0)), int8(p50)]
    found = rejections(rows, Budget())
    assert set(found) == ({"int8"} if says else set())
    if says:
        assert says in found["int8"]
        assert "2.00 ms [1.98, 2.02]" in found["int8"]
    assert choose(rows, Budget()) == {"host": "float" if says else "int8"}


def test_the_interleaved_ratio_decides_where_there_is_one() -> None:
    rows = [TEACHER, made("float", latency_ms=latency(2.0, spread=0.2)), int8(1.8, spread=0.2)]
    assert "int8" in rejections(rows, Budget()), "their intervals overlap"
    faster = Comparison("int8", "float", Interval(0.9, 0.88, 0.92, 40), "faster")
    assert rejections(rows, Budget(), [faster]) == {}
    turned = Comparison("float", "int8", Interval(1.11, 1.08, 1.14, 40), "slower")
    assert rejections(rows, Budget(), [turned]) == {}
    same = Comparison("int8", "float", Interval(0.99, 0.98, 1.0, 40), "same")
    assert "it is no faster than float in fp32" in rejections(rows, Budget(), [same])["int8"]


def test_int8_is_not_held_against_what_could_not_be_deployed_or_was_measured_elsewhere() -> None:
    slow = int8(2.6)
    assert rejections([TEACHER, made("float", latency_ms=latency(2.0)), slow], Budget(max_size_bytes=500)) == {}
    assert choose([TEACHER, made("float", latency_ms=latency(2.0)), slow], Budget(max_size_bytes=500)) == {
        "host": "int8"
    }
    assert rejections([TEACHER, made("float", latency_ms=latency(2.0, device="other")), slow], Budget()) == {}
    assert rejections([TEACHER, made("float", target="jetson", latency_ms=latency(2.0)), slow], Budget()) == {}
    assert rejections([TEACHER, made("float", runtime="other", latency_ms=latency(2.0)), slow], Budget()) == {}
    assert rejections([TEACHER, made("float"), slow], Budget()) == {}


def test_fp16_is_a_rival_too_and_the_fastest_float_counts() -> None:
    rows = [
        TEACHER,
        made("fp32", latency_ms=latency(3.0)),
        made("fp16", precision="fp16", latency_ms=latency(2.0)),
        int8(2.5),
    ]
    assert "fp16 in fp16" in rejections(rows, Budget())["int8"]


@pytest.mark.parametrize(
    ("precision", "p50", "size_bytes", "says"),
    [
        ("dynamic", 1.2, 300, None),
        ("dynamic", 2.0, 300, "dynamic int8 must earn its place"),
        ("w8", 2.0, 300, None),
        ("w8", 2.12, 300, None),  # the same kernels, in other memory
        ("w8", 2.6, 300, "int8 weights must earn their place: it is 1.30× slower than float"),
        ("w8", 1.2, 1000, "int8 weights must earn their place: at 1.00 kB it is no smaller than float"),
    ],
)
def test_each_form_of_int8_must_earn_its_place_in_its_own_way(
    precision: Any, p50: float, size_bytes: int, says: str | None
) -> None:
    given = made("v", stage="quantized", precision=precision, size_bytes=size_bytes, latency_ms=latency(p50))
    found = rejections([TEACHER, made("float", latency_ms=latency(2.0)), given], Budget())
    assert set(found) == ({"v"} if says else set())
    assert (says or "") in found.get("v", "")


@pytest.mark.parametrize("precision", ["int8", "w8", "dynamic"])
@pytest.mark.parametrize("timed", [True, False])
def test_a_form_of_int8_that_ruins_the_network_is_turned_down_without_a_budget(precision: Any, timed: bool) -> None:
    given: dict[str, Any] = {"stage": "quantized", "precision": precision, "size_bytes": 300}
    given |= {"latency_ms": latency(1.0) if timed else None}
    rows = [TEACHER, made("float", latency_ms=latency(2.0) if timed else None), made("v", 50, **given)]
    found = rejections(rows, Budget())["v"]
    assert "must earn" in found
    assert "it loses 86.7 points [+" in found
    assert "against float in fp32, and without a limit of the drop (--max-drop) 1 point is let pass" in found
    assert choose(rows, Budget()) == {"host": "float"}
    assert choose(rows, Budget(max_latency_ms=5)) == {"host": "float"}, "a budget of other limits"
    assert rejections(rows, Budget(max_accuracy_drop=1.0)) == {}, "the user's limit rules, whatever it is"
    assert choose(rows, Budget(max_accuracy_drop=1.0)) == {"host": "v"}


@pytest.mark.parametrize(
    ("lost", "turned_down"),
    [
        ((0.011, 0.0, 0.022), False),  # more than a point, and perhaps less
        ((0.03, 0.0101, 0.05), False),  # its own interval is beyond a point; float's has a width, too
        ((0.03, 0.025, 0.035), True),
        ((0.009, 0.008, 0.0095), False),  # certain, and less than a point
    ],
)
def test_what_is_not_certainly_lost_turns_nothing_down(lost: tuple[float, float, float], turned_down: bool) -> None:
    rows = [TEACHER, made("float", **dropping(0.0, -0.003, 0.003)), made("v", precision="int8", **dropping(*lost))]
    assert ("v" in rejections(rows, Budget())) is turned_down


def test_int8_is_held_against_the_best_float_of_its_own_student_that_could_be_deployed() -> None:
    bad = made("v", 400, precision="int8", size_bytes=300)
    lossy = made("lossy", 400, precision="fp16", size_bytes=400)  # as bad as int8
    good = made("good", size_bytes=1000)
    assert set(rejections([TEACHER, lossy, good, bad], Budget())) == {"v"}
    assert "against good in fp32" in rejections([TEACHER, lossy, good, bad], Budget())["v"]
    assert rejections([TEACHER, lossy, bad], Budget()) == {}, "the student is bad, not its int8"
    assert rejections([TEACHER, lossy, good, bad], Budget(max_size_bytes=500)) == {}, "what is too large is no choice"
    assert rejections([TEACHER, dataclasses.replace(good, candidate="w4"), bad], Budget()) == {}
    assert rejections([TEACHER, dataclasses.replace(good, target="jetson"), bad], Budget()) == {}
    assert rejections([TEACHER, dataclasses.replace(good, stage="student"), bad], Budget()) == {}
    assert rejections([TEACHER, good, dataclasses.replace(bad, drop=None)], Budget()) == {}


def test_values_are_held_to_a_hundredth_of_their_metric() -> None:
    found = rejected(of_values(), Budget())
    assert set(found) == {"host-int8"}
    assert "it loses 110.5 points [+79.3, +139.3] against host-fp32" in found["host-int8"]
    assert rejudged(of_values(), Budget()).chosen == {"host": "host-fp32"}
    assert "int8 must earn its place: it loses 110.5 points" in markdown(rejudged(of_values(), Budget()))


def rejected(report: Report, budget: Budget) -> dict[str, str]:
    """What a report turns down with another budget."""
    return rejections(report.variants, budget, report.comparisons)


def test_int8_weights_are_chosen_where_a_size_is_asked_for() -> None:
    given = made("w8", stage="quantized", precision="w8", size_bytes=300, latency_ms=latency(2.0))
    rows = [TEACHER, made("float", latency_ms=latency(2.0)), given]
    assert choose(rows, Budget(max_size_bytes=500)) == {"host": "w8"}
    assert choose(rows, Budget()) == {"host": "w8"}, "the same latency and accuracy: the smaller file"


def test_the_realistic_report_chooses_as_described() -> None:
    assert realistic().chosen == {"host": "host-int8", "jetson": "jetson-fp16"}
