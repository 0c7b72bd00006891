"""From min-max ranges to learned rounding: the cheapest way to int8 that holds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.graph.program import reason
from edgekd.quantize.bias import correct_biases
from edgekd.quantize.equalize import equalize
from edgekd.quantize.measured import Loss, measure
from edgekd.quantize.ranges import set_activations, set_weights
from edgekd.quantize.rounding import learn_rounding
from edgekd.quantize.samples import Halves
from edgekd.quantize.simulation import Inputs, Simulation, Snapshot
from edgekd.quantize.walk import gather
from edgekd.types import Json, QuantizationMethod, Say, Task

RANGES: tuple[QuantizationMethod, ...] = ("minmax", "percentile", "mse")
SECONDS = 120.0  # after which no further layer's rounding is learned


@dataclass(frozen=True, slots=True)
class Attempt:
    """One set of methods, and what it costs on the samples held out."""

    methods: tuple[str, ...]
    seconds: float
    loss: Loss | None  # None: it could not be done
    problem: str | None = None  # why not

    def to_json(self, *, kept: bool, max_drop: float) -> dict[str, Json]:
        """The figures, for what the report tells."""
        figures = {} if self.loss is None else self.loss.to_json() | {"within": self.loss.within(max_drop)}
        found: dict[str, Json] = {"methods": list(self.methods), "kept": kept, "seconds": round(self.seconds, 2)}
        return found | figures | ({} if self.problem is None else {"problem": self.problem})


def best_of(attempts: Sequence[Attempt], max_drop: float) -> int:
    """Which attempt is the best: within `max_drop` if one is, and of those the nearest to the float network."""
    done = [(at, one.loss) for at, one in enumerate(attempts) if one.loss is not None]
    return min(done, key=lambda each: (not each[1].within(max_drop), each[1].divergence))[0]


def as_json(attempts: Sequence[Attempt], max_drop: float) -> list[Json]:
    """Everything tried, in order, with the best marked."""
    best = best_of(attempts, max_drop)
    return [one.to_json(kept=at == best, max_drop=max_drop) for at, one in enumerate(attempts)]


class Ladder:
    """Tries methods on one simulation, cheapest first, and leaves it with the best of them.

    `auto` goes on until the loss is within `max_drop` (`Loss.within`): min-max ranges; ranges by percentile and by
    squared error; bias correction on the best of these; equalisation, with ranges and bias correction anew; learned
    rounding on the best of all. Of what was tried it keeps what is within, and of several that with the smallest
    divergence of the logits, which tells finely where a few hundred decisions tell coarsely.
    """

    def __init__(self, simulation: Simulation, samples: Halves, *, max_drop: float, task: Task | None) -> None:
        self.simulation, self.samples = simulation, samples
        self.max_drop, self.task = max_drop, task
        self.attempts: list[Attempt] = []
        self.states: list[Snapshot | None] = []
        self.start = simulation.snapshot()
        self.observed = 0  # samples that ranges came from

    def climb(self, say: Say, *, seconds: float = SECONDS) -> None:
        """Try until it holds; the simulation is left with the best.

        Args:
            seconds: no layer's rounding is begun later than that.
        """
        steps: list[tuple[str, Callable[[], None]]] = [
            ("ranges", self._ranges),
            ("bias", self._bias),
            ("equalize", self._equalized),
            ("rounding", lambda: self._rounded(seconds)),
        ]
        self._observe(histograms=False)
        self._try(("minmax",), lambda: self._set("minmax"))
        for name, step in steps:
            if self._holds():
                break
            say("not yet within max_drop", step="quantize", next=name, expected_drop=self._figure())
            step()
        self._settle()

    def apply(self, methods: Sequence[QuantizationMethod], *, seconds: float = SECONDS) -> None:
        """Do what is named and nothing else: equalisation first, then ranges, biases, rounding."""
        ranging = next((name for name in methods if name in RANGES), "minmax")

        def work() -> None:
            if "equalize" in methods:
                equalize(self.simulation)
            self._observe(histograms=ranging != "minmax")
            self._set(ranging)
            if "bias" in methods:
                correct_biases(self.simulation, self._gathered())
            if "rounding" in methods:
                learn_rounding(self.simulation, self._gathered(), seconds=seconds)

        named = [name for name in ("equalize", ranging, "bias", "rounding") if name == ranging or name in methods]
        self._try(tuple(named), work, careful=False)
        self._settle()

    @property
    def samples_used(self) -> int:
        """Of both halves; a single sample is both of them."""
        loss = self.attempts[self.best].loss
        held_out = 0 if loss is None else loss.samples
        return 1 if self.observed == held_out == 1 else self.observed + held_out

    @property
    def best(self) -> int:
        """Which attempt is the best so far."""
        return best_of(self.attempts, self.max_drop)

    def to_json(self) -> list[Json]:
        """Everything tried, in order."""
        return as_json(self.attempts, self.max_drop)

    # ---------------------------------------------------------------- the rungs

    def _ranges(self) -> None:
        self._observe(histograms=True)
        for name in RANGES[1:]:
            self._try((name,), functools.partial(self._set, name))

    def _bias(self) -> None:
        self._from_best()
        self._try((*self.attempts[self.best].methods, "bias"), self._correct)

    def _equalized(self) -> None:
        self.simulation.restore(self.start)
        if not equalize(self.simulation):
            return
        self._observe(histograms=True)
        rewritten = self.simulation.snapshot()
        for name in RANGES:

            def work(name: str = name) -> None:
                self.simulation.restore(rewritten)
                self._set(name)
                self._correct()

            self._try(("equalize", name, "bias"), work)

    def _rounded(self, seconds: float) -> None:
        self._from_best()
        methods = tuple(name for name in self.attempts[self.best].methods if name != "bias")

        def work() -> None:
            learn_rounding(self.simulation, self._gathered(), seconds=seconds)

        self._try((*methods, "rounding"), work)

    # ---------------------------------------------------------------- what they are made of

    def _try(self, methods: tuple[str, ...], work: Callable[[], None], *, careful: bool = True) -> None:
        begun = time.perf_counter()
        loss = problem = None
        try:
            work()
            loss = measure(self.simulation, self.samples.held_out, self.task)
        except MemoryError:
            raise
        except Exception as error:  # an operator that a method does not know must not cost what was found before
            if not careful or not self.attempts:
                raise
            problem = reason(error)
        self.attempts.append(Attempt(methods, time.perf_counter() - begun, loss, problem))
        self.states.append(None if loss is None else self.simulation.snapshot())

    def _observe(self, *, histograms: bool) -> None:
        self.observed = self.simulation.observe(self.samples.ranging, histograms=histograms)

    def _set(self, name: str) -> None:
        set_activations(self.simulation, name)
        set_weights(self.simulation, "mse" if name == "mse" else "minmax")

    def _correct(self) -> None:
        correct_biases(self.simulation, self._gathered())

    def _gathered(self) -> list[Inputs]:
        return gather(self.simulation, self.samples.ranging)

    def _from_best(self) -> None:
        state = self.states[self.best]
        assert state is not None
        self.simulation.restore(state)

    def _settle(self) -> None:
        self._from_best()
        for site in self.simulation.sites:
            site.quantizer.seen = None

    def _holds(self) -> bool:
        loss = self.attempts[self.best].loss
        return loss is not None and loss.within(self.max_drop)

    def _figure(self) -> float:
        loss = self.attempts[self.best].loss
        return float("nan") if loss is None else round(loss.expected_drop, 5)


def holds(meta: Mapping[str, Any]) -> bool:
    """Whether what was kept is within `max_drop`; `meta` is what `quantize` gave."""
    return any(one["kept"] and one.get("within", False) for one in meta.get("methods", ()))


def told(attempts: Sequence[Mapping[str, Any]]) -> str:
    """What was tried and what was kept, as one sentence of the report."""
    lines = []
    for one in attempts:
        name = " + ".join(one["methods"])
        if "problem" in one:
            lines.append(f"{name} failed: {one['problem']}")
            continue
        changed = "" if one["changed"] is None else f", {one['changed']:.1%} of decisions changed"
        drop = "" if one["drop"] is None else f", measured {one['drop']:.2%} ± {one['drop_error']:.2%}"
        kept = "kept: " if one["kept"] else ""
        noise = "no error" if one["sqnr_db"] is None else f"{one['sqnr_db']:.1f} dB"
        lines.append(f"{kept}{name}: expected drop {one['expected_drop']:.2%}{drop}{changed}, {noise}")
    samples = next(one["samples"] for one in attempts if "samples" in one)
    return f"quantization tried on {samples} calibration samples held out: {'; '.join(lines)}"
