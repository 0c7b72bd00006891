"""How far a student is pruned, and by what: the [prune] table of a recipe, and its goal as people read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

from edgekd import units
from edgekd.errors import RecipeError
from edgekd.outcome import Pruning

Measure: TypeAlias = Literal["macs", "parameters", "size_bytes", "latency_ms"]
Importance: TypeAlias = Literal["magnitude", "l1", "bn_scale", "taylor", "random"]


@dataclass(frozen=True, slots=True)
class Prune:
    """How a student with model = "pruned" is cut out of its teacher; exactly one of the first four keys is the goal."""

    macs: Annotated[float, Gt(0), Lt(1)] | None = None  # part of the teacher's multiply-accumulates to keep
    parameters: Annotated[float, Gt(0), Lt(1)] | None = None  # part of the teacher's parameters to keep
    size_bytes: Annotated[int, Gt(0)] | None = None  # of the fp32 weights file, at most
    latency_ms: Annotated[float, Gt(0)] | None = None  # of one sample, fp32, one thread, measured on this machine
    importance: Importance = "magnitude"  # by which channels are ranked; magnitude: squares of weights, l1: absolute
    global_ranking: bool = True  # all channels against each other; false: each layer loses the same part
    round_to: Annotated[int, Ge(0)] = 0  # channels are kept in multiples of it; 0: what the targets' kernels like
    step: Annotated[float, Gt(0), Le(1)] = 1 / 3  # of what is left, at most so much is cut in one round
    epochs: Annotated[int, Ge(1)] = 5  # of distillation after each round but the last, which gets [distill] epochs
    ignore: tuple[str, ...] = ()  # paths of modules that are not touched; the output layer never is

    @property
    def goal(self) -> tuple[Measure, float]:
        """The measure, and what is asked for in it: a part of the teacher's, bytes or milliseconds."""
        ((measure, value),) = self.goals.items()
        return measure, value

    @property
    def goals(self) -> dict[Measure, float]:
        """Every goal that is set."""
        named: dict[Measure, float | None] = {
            "macs": self.macs, "parameters": self.parameters, "size_bytes": self.size_bytes,
            "latency_ms": self.latency_ms,
        }  # fmt: skip
        return {measure: value for measure, value in named.items() if value is not None}


def goals_of(macs: str | None, parameters: str | None, size: str | None, latency: str | None) -> dict[Measure, float]:
    """The goals of pruning that the command line sets, as it writes them: "50%", "2MB", "2ms"."""
    found: dict[Measure, float] = {}
    if macs is not None:
        found["macs"] = units.fraction(macs, "--macs")
    if parameters is not None:
        found["parameters"] = units.fraction(parameters, "--parameters")
    if size is not None:
        found["size_bytes"] = units.size_bytes(size, "--size")
    if latency is not None:
        found["latency_ms"] = units.milliseconds(latency, "--latency")
    for measure in ("macs", "parameters"):
        if found.get(measure) in (0.0, 1.0):
            raise RecipeError("it keeps nothing, or all", where=f"--{measure}", expected="a part, e.g. 50%")
    return found


_NAMES: dict[str, str] = {"macs": "multiply-accumulates", "parameters": "parameters"}
_DIGITS = (3, 5, 8)  # as few of them as tell a cost from its goal


def told(measure: Measure, value: float, significant: int = 3) -> str:
    """A cost as people read it: "0.36 ms", "2 MB", "12.1 M multiply-accumulates"."""
    if measure == "latency_ms":
        return units.plain(f"{units.digits(value, significant)} ms")
    if measure == "size_bytes":
        return units.plain(units.size(round(value), significant))
    return f"{units.plain(units.quantity(round(value), significant))} {_NAMES[measure]}"


def compared(measure: Measure, found: float, goal: float, whole: float | None = None) -> tuple[str, str]:
    """A cost and its goal, told so that they differ where they do.

    Args:
        whole: the teacher's, of which multiply-accumulates and parameters are told as a part.
    """
    texts = "", ""
    for significant in _DIGITS:
        if whole is not None and measure in _NAMES:
            parts = [units.plain(f"{units.digits(100 * each / whole, significant)} %") for each in (found, goal)]
            texts = f"{parts[0]} of the {_NAMES[measure]}", parts[1]
            differ = parts[0] != parts[1]
        else:
            texts = told(measure, found, significant), told(measure, goal, significant)
            differ = texts[0] != texts[1]
        if differ or found == goal:
            break
    return texts


def outcome(pruning: Pruning) -> str:
    """What was asked for, and what there is of it: "it took 0.351 ms …, and at most 0.36 ms was asked for"."""
    measure: Measure = pruning.measure  # type: ignore[assignment]
    whole = {"macs": pruning.macs_before, "parameters": pruning.parameters_before}.get(measure)
    found, goal = compared(measure, pruning.after, pruning.goal, whole)
    before = told(measure, pruning.before)
    if measure == "latency_ms":
        return f"it took {found} in fp32 when it was cut (its teacher {before}), and at most {goal} was asked for"
    if measure == "size_bytes":
        return f"its fp32 weights are {found} (its teacher's {before}), and at most {goal} was asked for"
    return f"at most {goal} of the {_NAMES[measure]} was asked for"
