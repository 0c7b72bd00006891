"""Latency of several models, measured in turns in one process, so that drift of the machine meets all of them alike.

Protocol, for every session: warm up until steady; then rounds, each of which runs one block of every session in a
new random order; the first run of a block is not counted (the caches still hold another model); rounds go on until
every session has its number of runs and its time. Garbage collection is off and threads are pinned meanwhile.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekd.bench.affinity import pinned
from edgekd.bench.compare import median_interval
from edgekd.errors import ModelError
from edgekd.types import Arrays, Latency, Origin, Say, Session

STEADY_SPREAD = 0.03  # medians of the last STEADY_BLOCKS blocks lie within so much of each other
STEADY_BLOCKS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure: at least `runs` and `seconds` for each session, in at least `rounds` rounds."""

    runs: int
    seconds: float
    rounds: int
    warmup_s: float  # at least STEADY_BLOCKS blocks, at most so long
    block_s: float  # a warm-up block lasts at least so long


FULL = Plan(runs=200, seconds=2.0, rounds=40, warmup_s=5.0, block_s=0.1)
QUICK = Plan(runs=50, seconds=0.5, rounds=10, warmup_s=1.0, block_s=0.03)


@dataclass(frozen=True, slots=True)
class Timing:
    """What was timed: for each session an array of nanoseconds, rounds × runs of a block; all have the same rounds."""

    series_ns: Mapping[str, NDArray[np.int64]]
    cpus: tuple[int, ...] | None  # the threads were pinned to, None where that was not possible
    notes: tuple[str, ...]  # what was not as it should be


def measure(
    sessions: Mapping[str, Session],
    sample: Arrays,
    *,
    threads: int,
    quick: bool,
    say: Say,
    seed: int = 0,
    plan: Plan | None = None,
) -> Timing:
    """Time every session in interleaved rounds.

    Args:
        sessions: the models by id, loaded with `threads` threads.
        sample: one batch by input name, as the sessions take it.
        threads: how many CPUs the process is pinned to while it measures, where the system allows it.
        quick: 50 runs and 0.5 s each instead of 200 runs and 2 s.
        say: told "note" where the machine was not steady or threads could not be pinned.
        seed: of the order within each round.
        plan: other lengths than those two.

    Raises:
        ModelError: a session gives a value that is not finite on the sample.
    """
    plan = plan or (QUICK if quick else FULL)
    notes: list[str] = []
    for name, session in sessions.items():
        _finite(name, session(sample))
    with pinned(threads) as pin, _no_garbage_collection():
        if pin.reason:
            notes.append(f"threads were not pinned: {pin.reason}")
        block_runs: dict[str, int] = {}
        for name, session in sessions.items():
            run_s, steady = _warm_up(session, sample, plan)
            block_runs[name] = math.ceil(max(plan.runs, plan.seconds / run_s) / plan.rounds)
            if not steady:
                notes.append(
                    f"{name}: not steady after {plan.warmup_s:g} s of warming up (block medians differ by more than "
                    f"{STEADY_SPREAD:.0%}); other work on the machine, or its clock, disturbs the measurement"
                )
        series = _rounds(sessions, sample, block_runs, plan, np.random.default_rng(seed))
    for note in notes:
        say("note", text=note)
    return Timing(series_ns=series, cpus=pin.cpus, notes=tuple(notes))


def summarise(
    times_ns: NDArray[np.int64], *, threads: int, device: str, origin: Origin, power_mode: str | None, seed: int = 0
) -> Latency:
    """Percentiles (linear between neighbours), mean and the 95 % interval of the median, in milliseconds.

    The interval is a bootstrap over whole rounds, since runs of one round are not independent of each other
    (block bootstrap: Künsch, Annals of Statistics, 1989).
    """
    times_ms = np.asarray(times_ns, dtype=np.float64) / 1e6
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, [50, 90, 99]))
    low, high = median_interval(times_ms, seed=seed)
    return Latency(
        p50=p50, p90=p90, p99=p99, mean=float(times_ms.mean()), n=times_ms.size, low=min(low, p50), high=max(high, p50),
        origin=origin, device=device, threads=threads, power_mode=power_mode,
    )  # fmt: skip


def _rounds(
    sessions: Mapping[str, Session],
    sample: Arrays,
    block_runs: Mapping[str, int],
    plan: Plan,
    random: np.random.Generator,
) -> dict[str, NDArray[np.int64]]:
    names = list(sessions)
    blocks: dict[str, list[NDArray[np.int64]]] = {name: [] for name in names}
    spent_s = dict.fromkeys(names, 0.0)
    done = 0
    while done < plan.rounds or min(spent_s.values(), default=plan.seconds) < plan.seconds:
        for position in random.permutation(len(names)):
            name = names[position]
            sessions[name](sample)
            block = _block(sessions[name], sample, block_runs[name])
            blocks[name].append(block)
            spent_s[name] += int(block.sum()) / 1e9
        done += 1
    return {name: np.stack(found) for name, found in blocks.items()}


def _block(session: Session, sample: Arrays, runs: int) -> NDArray[np.int64]:
    clock = time.perf_counter_ns
    times = np.empty(runs, dtype=np.int64)
    for run in range(runs):
        begun = clock()
        session(sample)
        times[run] = clock() - begun
    return times


def _warm_up(session: Session, sample: Arrays, plan: Plan) -> tuple[float, bool]:
    """Seconds for one run at the end, and whether the medians of the last blocks agreed."""
    medians_s: list[float] = []
    begun = time.perf_counter()
    runs = 3
    while True:
        block = _block(session, sample, runs)
        medians_s.append(max(float(np.median(block)) / 1e9, 1e-9))
        runs = max(3, math.ceil(plan.block_s / medians_s[-1]))
        last = medians_s[-STEADY_BLOCKS:]
        # the first block is left out: it may hold one-time work, such as choosing an algorithm
        if len(medians_s) > STEADY_BLOCKS and max(last) <= min(last) * (1 + STEADY_SPREAD):
            return last[-1], True
        if len(medians_s) > STEADY_BLOCKS and time.perf_counter() - begun > plan.warmup_s:
            return last[-1], False


def _finite(name: str, outputs: Arrays) -> None:
    for key, values in outputs.items():
        if not np.isfinite(np.asarray(values, dtype=np.float64)).all():
            raise ModelError(
                f"output '{key}' is not finite",
                where=name,
                fix="the timing of a model that computes nonsense is worth nothing; look at its accuracy first",
            )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
