"""Mixed precision: the fewest layers left in float, so that the others may be integers and accuracy holds.

What leaves int8 goes to float (float16 on TensorRT). No target here has kernels for int8 weights with 16-bit
activations, so that is not looked for.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from edgekd.quantize.bias import correct_biases
from edgekd.quantize.measured import Loss, compare
from edgekd.quantize.quantizer import within
from edgekd.quantize.ranges import set_activations
from edgekd.quantize.sensitivity import WORK, Labelled, cost, count_of, estimate, interval, take
from edgekd.quantize.simulation import Inputs, Simulation
from edgekd.types import Json, LayerSensitivity, Say, Task

SINGLES = 8  # layers that are tried alone, the most harmful ones
EVALUATIONS = 60  # at most: each makes a network and runs it over the samples
FINALISTS = 4  # at most, that are built and timed
_LEAST, _MOST = 32, 1024  # samples of an evaluation
_CORRECTING = 64  # samples that biases are corrected on
Unit: TypeAlias = "tuple[str, ...]"  # layers that go into float together


@dataclass(frozen=True, slots=True)
class Mix:
    """Layers that stay in float, and what the network costs with them there."""

    layers: tuple[str, ...]  # paths, from the input to the output
    macs: float  # part of the multiply-accumulates that is done in float
    loss: Loss

    def to_json(self) -> dict[str, Json]:
        """What the artifact keeps of it."""
        return {"layers": list(self.layers), "macs": round(self.macs, 6), "loss": self.loss.to_json()}


@dataclass(frozen=True, slots=True)
class Found:
    """The sets of layers that would do, none of which has a layer too many, and how they were come to."""

    mixes: tuple[Mix, ...]  # fewest layers first, then fewest multiply-accumulates
    rest: Mapping[str, float]  # layer → drop with it alone in float, as `sensitivity.estimate` gives it
    why: tuple[str, ...]

    def to_json(self) -> dict[str, Json]:
        """What the artifact keeps of it."""
        mixes: list[Json] = [mix.to_json() for mix in self.mixes]
        return {"mixes": mixes, "rest": dict(self.rest), "why": list(self.why)}


def search(
    simulation: Simulation,
    rows: Sequence[LayerSensitivity],
    ranging: Iterable[Inputs],
    held_out: Iterable[Labelled],
    task: Task | None,
    *,
    whole: Loss,
    max_drop: float,
    say: Say,
) -> Found:
    """Find small sets of layers that, left in float, bring the drop within `max_drop`.

    Layers are put into float in order of the damage that each does alone until the drop is within the limit (Wu,
    Judd, Zhang, Isaev, Micikevicius: Integer Quantization for Deep Learning Inference, 2020, on partial
    quantization); then each is tried back in integers, the least harmful first, and stays there where the limit
    holds. So no layer of a set can be left out. It is done in several orders, since a set of fewest layers is not
    always the fastest: by damage; by damage for each multiply-accumulate; and by blocks of neighbours, because between
    a float layer and an integer one values are converted. Which of the sets is fastest is for a clock to say.

    Args:
        simulation: what the methods of quantization came to, with every layer in integers that can be.
        rows: what `sensitivity.analyse` found.
        ranging: samples that biases are corrected on, and ranges taken from where a value has none yet.
        held_out: samples that the drop is measured on.
        whole: what `simulation` costs on all samples held out.
        max_drop: of the task's metric, against the float network.
    """
    begun = time.perf_counter()
    count = max(_LEAST, min(_MOST, int(WORK / (cost(simulation) * EVALUATIONS))))
    correcting = [inputs for inputs, _ in take(((one, None) for one in ranging), min(count, _CORRECTING))]
    trial = _Trial(simulation, correcting, take(held_out, count), task, whole, max_drop)
    rest: dict[str, float] = {}
    found: list[frozenset[str]] = []
    if not trial.holds(()):
        damage, _ = _damage(simulation, rows)
        rest = {name: _estimate(trial.loss({name})) for name in sorted(damage, key=lambda n: -damage[n])[:SINGLES]}
        found = [one for units in _orders(simulation, rows, rest) if (one := fewest(units, trial.holds, trial.spent))]
    _, macs = _damage(simulation, rows)
    mixes = [
        Mix(tuple(name for name in trial.order if name in one), sum(macs[name] for name in one), trial.loss(one))
        for one in dict.fromkeys(found)
    ]
    mixes = sorted(mixes, key=lambda mix: (len(mix.layers), mix.macs))[:FINALISTS]
    seconds = round(time.perf_counter() - begun, 2)
    say("mixed precision", step="quantize", found=len(mixes), evaluations=len(trial.known), seconds=seconds)
    return Found(tuple(mixes), rest, _why(trial, rest, mixes))


def with_float(simulation: Simulation, layers: Collection[str], ranging: Sequence[Inputs]) -> Simulation:
    """The same network with these layers in float too, with the ranges and weights that the simulation has.

    Biases that were corrected are corrected anew, because they made up for errors of layers that are exact now.
    """
    before = {layer.name for layer in simulation.layers if layer.site is None}
    made = Simulation(simulation.program, simulation.rules, before | set(layers))
    adjusted = simulation.adjusted()
    pairs = list(zip(simulation.layers, made.layers, strict=True))
    for old, new in pairs:
        weight, bias = simulation.float_weight(old), simulation.float_bias(old)
        known = made.float_bias(new)
        if not torch.equal(weight, made.float_weight(new)):
            made.rewrite(new, weight=weight)
        if bias is not None and known is not None and not torch.equal(bias, known):
            made.rewrite(new, bias=bias)
    for old, new in pairs:
        if new.site is not None and old.weight in adjusted:
            made.adjust(new, weight=adjusted[old.weight])
    made.set_ranges(simulation.ranges())
    missing = [site for site in made.sites if site.quantizer.range is None]
    if missing:
        made.observe(ranging, sites=missing)
        set_activations(made, "minmax")
        for site in missing:
            site.quantizer.seen = None
    if any(simulation.bias_path(layer) in adjusted for layer in simulation.layers):
        correct_biases(made, ranging)
    return made


@dataclass
class _Trial:
    """Evaluates sets of layers, each once."""

    simulation: Simulation
    correcting: Sequence[Inputs]
    samples: Sequence[Labelled]
    task: Task | None
    whole: Loss  # with every layer in integers, on all samples held out
    max_drop: float
    known: dict[frozenset[str], Loss] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What all sets are compared with."""
        self.wanted = [self.simulation.logits(inputs, quantized=False) for inputs, _ in self.samples]
        self.order = list(dict.fromkeys(self.simulation.quantized))
        # What these samples show less of than all of them is taken off the limit.
        self.limit = self.max_drop - max(0.0, self.whole.expected_drop - self.loss(()).expected_drop)

    def loss(self, layers: Collection[str]) -> Loss:
        """What it costs with these layers in float."""
        key = frozenset(layers)
        if key not in self.known:
            made = with_float(self.simulation, key, self.correcting)
            pairs = zip(self.wanted, self.samples, strict=True)
            self.known[key] = compare(
                ((wanted, made.logits(inputs, quantized=True), labels) for wanted, (inputs, labels) in pairs), self.task
            )
        return self.known[key]

    def holds(self, layers: Collection[str]) -> bool:
        """Is the drop within the limit with these layers in float?"""
        found = self.loss(layers)
        return found.within(self.max_drop) and found.expected_drop <= max(self.limit, 0.0)

    def spent(self) -> bool:
        """Were as many sets evaluated as may be?"""
        return len(self.known) >= EVALUATIONS


def fewest(
    units: Sequence[Unit], holds: Callable[[frozenset[str]], bool], spent: Callable[[], bool]
) -> frozenset[str] | None:
    """The layers of the shortest beginning of `units` that holds, less the units that it does not need.

    None where only all of them hold, or where it is `spent` before one does.
    """
    size, failed, most = 1, 0, len(units) - 1  # the shortest known to hold, the longest known not to
    while size > most or not holds(_layers(units[:size])):
        if size >= most or spent():
            return None
        failed, size = size, min(size * 2, most)
    while size - failed > 1 and not spent():
        middle = (size + failed) // 2
        size, failed = (middle, failed) if holds(_layers(units[:middle])) else (size, middle)
    kept = list(units[:size])
    again = True
    while again:
        again = False
        for unit in reversed(kept):
            rest = [other for other in kept if other is not unit]
            if not spent() and holds(_layers(rest)):
                kept, again = rest, True
    return _layers(kept)


def _orders(simulation: Simulation, rows: Sequence[LayerSensitivity], rest: Mapping[str, float]) -> list[list[Unit]]:
    """Layers, or blocks of neighbours, in the orders in which they are put into float; each order once."""
    damage, macs = _damage(simulation, rows)
    names = list(damage)

    def worst_first(units: Sequence[Unit], key: Callable[[Unit], float]) -> list[Unit]:
        return sorted(units, key=key, reverse=True)

    alone = [(name,) for name in names]
    recovered = {name: -value for name, value in rest.items()}
    found = [
        worst_first(alone, lambda unit: damage[unit[0]]),
        sorted(worst_first(alone, lambda unit: damage[unit[0]]), key=lambda unit: -recovered.get(unit[0], -math.inf)),
        worst_first(alone, lambda unit: damage[unit[0]] / max(macs[unit[0]], 1e-4)),
    ]
    deepest = max((name.count(".") for name in names), default=0)
    for depth in range(deepest, 0, -1):
        grouped = itertools.groupby(names, lambda name, depth=depth: ".".join(name.split(".")[:depth]))  # type: ignore[misc]
        units = [tuple(part) for _, part in grouped]
        if 1 < len(units) < len(names):
            found.append(worst_first(units, lambda unit: sum(damage[name] for name in unit)))
            break
    return [order for index, order in enumerate(found) if order not in found[:index]]


def _damage(simulation: Simulation, rows: Sequence[LayerSensitivity]) -> tuple[dict[str, float], dict[str, float]]:
    """Of each layer in integers: the divergence that it makes alone, and its part of the multiply-accumulates.

    Values between layers count for the layer before them, since they are integers only where that is.
    """
    names = list(dict.fromkeys(simulation.quantized))
    damage, macs = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    before: list[str] = []
    for row in rows:
        if row.kind != "value":
            before = [name for name in names if within(name, {row.layer})]
        for name in before:
            damage[name] = max(damage[name], row.divergence)
            macs[name] += row.macs / len(before)
    return damage, macs


def _estimate(loss: Loss) -> float:
    return estimate(loss.expected_drop, interval(loss))


def _layers(units: Iterable[Unit]) -> frozenset[str]:
    return frozenset(name for unit in units for name in unit)


def _why(trial: _Trial, rest: Mapping[str, float], mixes: Sequence[Mix]) -> tuple[str, ...]:
    measured = "" if trial.whole.drop is None else f" (measured {trial.whole.drop:.2%})"
    drop = f"the expected drop is {trial.whole.expected_drop:.2%}{measured}, and {trial.max_drop:.2%} is allowed"
    tried = f"{len(trial.known) - 1} sets of float layers were tried on {count_of(trial.samples)} calibration samples"
    told = [f"with every layer in int8 {drop}; {tried} held out"]
    best = min(rest, key=lambda name: rest[name], default=None)
    if best is not None:
        told.append(f"{best} alone in float leaves {rest[best]:.2%}")
    if not mixes and trial.holds(()):
        told.append("on these samples the drop is within the limit as it is, so that no layer can be named")
    elif not mixes:
        told.append(
            f"no set was found before {EVALUATIONS} had been tried"
            if trial.spent()
            else "only all layers in float hold"
        )
    elif trial.spent():
        told.append(f"the search stopped after {EVALUATIONS} sets: a layer too many may be among them")
    return tuple(told)
