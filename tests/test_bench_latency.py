"""Timing in turns, the comparison of two series, and the roofline."""

from __future__ import annotations

import gc
import os
import time

import numpy as np
import pytest

from edgekd.bench import roofline
from edgekd.bench.affinity import pinned
from edgekd.bench.compare import compare, median_interval, pairs, verdict
from edgekd.bench.latency import FULL, QUICK, Plan, measure, summarise
from edgekd.errors import ModelError, TargetError
from edgekd.types import Arrays, Device, Json, PowerMode, TensorSpec

SAMPLE = {"x": np.zeros((1, 2), np.float32)}
SHORT = Plan(runs=50, seconds=0.02, rounds=10, warmup_s=0.3, block_s=0.002)


class Sleeper:
    """A session that takes a known time and keeps a diary."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "float32", ("batch", 2)),)
    outputs: tuple[TensorSpec, ...] = (TensorSpec("logits", "float32", ("batch", 2)),)
    runtime = "sleeper 1"

    def __init__(self, seconds: float, diary: list[str] | None = None, name: str = "") -> None:
        self.seconds, self.diary, self.name = seconds, diary, name
        self.gc_was_on: set[bool] = set()

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        self.gc_was_on.add(gc.isenabled())
        if self.diary is not None:
            self.diary.append(self.name)
        return {"logits": np.zeros((len(inputs["x"]), 2), np.float32)}

    def close(self) -> None:
        """Nothing to close."""


def silent(event: str, /, **fields: Json) -> None:
    """A `Say` that keeps quiet."""


def test_the_ratio_of_two_known_times_is_found() -> None:
    sessions = {"slow": Sleeper(0.0006), "fast": Sleeper(0.0002)}
    timing = measure(sessions, SAMPLE, threads=1, quick=True, say=silent, plan=SHORT)
    found = compare("fast", timing.series_ns["fast"], "slow", timing.series_ns["slow"])
    assert found.ratio.value == pytest.approx(1 / 3, rel=0.25)
    assert found.verdict == "faster"
    assert compare("slow", timing.series_ns["slow"], "fast", timing.series_ns["fast"]).verdict == "slower"


def test_every_round_runs_one_block_of_every_session() -> None:
    diary: list[str] = []
    sessions = {name: Sleeper(0.0001, diary, name) for name in "abc"}
    timing = measure(sessions, SAMPLE, threads=1, quick=True, say=silent, plan=SHORT)
    rounds = {times.shape[0] for times in timing.series_ns.values()}
    assert len(rounds) == 1
    counted = sum(times.shape[1] + 1 for times in timing.series_ns.values()) * rounds.pop()
    blocks = [diary[-counted:][0]]
    for name in diary[-counted:]:
        if name != blocks[-1]:
            blocks.append(name)
    assert len(set(blocks[:3])) == 3
    assert diary[-counted:].count("a") == timing.series_ns["a"].size + len(timing.series_ns["a"])
    orders = {tuple(blocks[i : i + 3]) for i in range(0, 9, 3) if len(set(blocks[i : i + 3])) == 3}
    assert len(orders) > 1, "the order within a round never changes"


def test_as_many_runs_and_seconds_as_promised() -> None:
    assert (FULL.runs, FULL.seconds, QUICK.runs, QUICK.seconds) == (200, 2.0, 50, 0.5)
    timing = measure({"a": Sleeper(0.0001)}, SAMPLE, threads=1, quick=True, say=silent, plan=SHORT)
    assert timing.series_ns["a"].size >= SHORT.runs
    assert timing.series_ns["a"].sum() >= SHORT.seconds * 1e9


def test_quick_latency_tells_what_it_measured_under() -> None:
    session = Sleeper(0.0005)
    timing = measure({"a": session}, SAMPLE, threads=1, quick=True, say=silent)
    found = summarise(timing.series_ns["a"], threads=1, device="board", origin="device", power_mode="25W")
    assert found.p50 == pytest.approx(0.5, rel=0.2)
    assert found.low <= found.p50 <= found.high
    assert found.p50 <= found.p90 <= found.p99
    assert (found.device, found.origin, found.power_mode, found.threads) == ("board", "device", "25W", 1)
    assert found.n >= 50
    assert False in session.gc_was_on, "garbage collection stayed on while it was timed"
    assert gc.isenabled()


def test_percentiles_by_hand() -> None:
    times = np.arange(1, 102, dtype=np.int64).reshape(1, 101) * 1_000_000  # 1 to 101 ms
    found = summarise(times, threads=1, device="d", origin="host", power_mode=None)
    assert (found.p50, found.p90, found.p99, found.mean, found.n) == (51.0, 91.0, 100.0, 51.0, 101)
    assert found.low == found.high == 51.0, "one round can only be drawn as itself"


def test_the_bootstrap_depends_on_its_seed_alone() -> None:
    times = np.random.default_rng(1).normal(1.0, 0.1, (20, 10))
    assert median_interval(times, seed=3) == median_interval(times, seed=3)
    assert median_interval(times, seed=3) != median_interval(times, seed=4)
    low, high = median_interval(times)
    assert low < np.median(times) < high


def test_rounds_are_drawn_whole() -> None:
    """Runs of a round are alike, rounds differ: drawing single runs would give a far too narrow interval."""
    rounds = np.repeat(np.linspace(1, 2, 20)[:, None], 50, axis=1)
    low, high = median_interval(rounds)
    assert high - low > 0.2


def test_drift_that_meets_both_cancels_out_of_the_ratio() -> None:
    drift = np.linspace(1, 3, 40)[:, None]
    noise = np.random.default_rng(0).normal(1, 0.01, (2, 40, 10))
    one, two = ((drift * noise[i] * factor * 1e6).astype(np.int64) for i, factor in ((0, 0.8), (1, 1.0)))
    found = compare("one", one, "two", two)
    assert found.ratio.value == pytest.approx(0.8, rel=0.03)
    assert found.ratio.high - found.ratio.low < 0.12
    assert found.verdict == "faster"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.5, 0.6, "faster"),
        (0.90, 0.999, "faster"),
        (0.98, 1.02, "same"),
        (0.98, 0.99, "same"),
        (1.01, 1.02, "same"),
        (0.9, 1.1, "cannot tell"),
        (0.95, 1.0, "cannot tell"),
        (1.001, 1.2, "slower"),
    ],
)
def test_verdicts_of_ratios(low: float, high: float, expected: str) -> None:
    assert verdict(low, high) == expected


def test_series_of_different_rounds_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same rounds"):
        compare("a", np.ones((3, 2), np.int64), "b", np.ones((4, 2), np.int64))


def test_pairs_compares_each_with_those_before() -> None:
    series = {name: np.full((5, 3), 1000, np.int64) for name in "abc"}
    assert [(c.candidate, c.baseline) for c in pairs(series)] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert {c.verdict for c in pairs(series)} == {"same"}
    assert [c.baseline for c in pairs(series, [("c", "b")])] == ["b"]


def test_a_model_that_computes_nonsense_is_not_timed() -> None:
    class Broken(Sleeper):
        def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
            return {"logits": np.full((1, 2), np.nan, np.float32)}

    with pytest.raises(ModelError, match="not finite"):
        measure({"broken": Broken(0)}, SAMPLE, threads=1, quick=True, say=silent)


def test_an_unsteady_session_is_noted() -> None:
    class Erratic(Sleeper):
        def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
            self.seconds *= 1.05
            return super().__call__(inputs)

    notes: list[str] = []
    plan = Plan(runs=4, seconds=0.001, rounds=2, warmup_s=0.02, block_s=0.0001)

    def say(event: str, /, **fields: Json) -> None:
        notes.append(str(fields["text"]))

    timing = measure({"erratic": Erratic(0.0002)}, SAMPLE, threads=1, quick=True, say=say, plan=plan)
    assert any("not steady" in note for note in timing.notes)
    assert list(timing.notes) == notes


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system offers no CPU affinity")
def test_threads_are_pinned_and_set_free_again() -> None:
    before = os.sched_getaffinity(0)
    with pinned(1) as pin:
        assert pin.cpus is not None
        assert os.sched_getaffinity(0) == set(pin.cpus)
        assert len(pin.cpus) == 1
    assert os.sched_getaffinity(0) == before
    with pinned(10_000) as pin:
        assert pin.cpus is None
        assert pin.reason is not None
        assert "10000 threads" in pin.reason


MODE = PowerMode("25W", {"int8": 1e12, "fp16": 5e11}, bandwidth_bytes_per_s=1e11)


def test_roofline_by_hand() -> None:
    arithmetic = roofline.bound(10**9, 10**6, "int8", MODE)  # 2e9 / 1e12 = 2 ms; 1e6 / 1e11 = 0.01 ms
    assert arithmetic is not None
    assert arithmetic.ms == pytest.approx(2.0)
    assert arithmetic.term == "arithmetic"
    memory = roofline.bound(10**6, 10**9, "fp16", MODE)  # 0.004 ms; 10 ms
    assert memory is not None
    assert memory.ms == pytest.approx(10.0)
    assert memory.term == "memory"
    assert roofline.bound(1, 1, "fp32", MODE) is None


def test_estimates_say_where_no_peak_is_known() -> None:
    device = Device("orin", "Jetson Orin", None, (MODE,), {})
    found, reasons = roofline.estimates(10**9, 10**6, "int8", [device])
    assert [(e.device, e.mode, e.lower_bound_ms, e.predicted_ms) for e in found] == [("orin", "25W", 2.0, None)]
    assert reasons == ()
    found, reasons = roofline.estimates(10**9, 10**6, "fp32", [device])
    assert found == ()
    assert reasons == ("Jetson Orin, 25W: no peak for fp32 is known",)


def test_a_measurement_below_its_bound_is_an_error() -> None:
    times = np.full((5, 5), 1_000_000, np.int64)  # 1 ms
    measured = summarise(times, threads=1, device="orin", origin="host", power_mode=None)
    roofline.check(measured, None, where="a")
    roofline.check(measured, roofline.bound(10**8, 10**9, "int8", MODE), where="a")  # memory alone: a cache may beat it
    with pytest.raises(TargetError, match="needs 2 ms at its peak"):
        roofline.check(measured, roofline.bound(10**9, 0, "int8", MODE), where="a")
