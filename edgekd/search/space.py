"""What a search may change in a recipe's student: how wide it is, or how much of its teacher it keeps."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

from edgekd import plugins
from edgekd.errors import PartError, RecipeError
from edgekd.recipe import PRUNED, Recipe
from edgekd.types import Part

_EIGHTHS = range(2, 17)  # widths from a quarter of the recipe's to twice as wide
_KEPT = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))  # parts of the teacher's MACs: 0.1, 0.15, … 0.9
Kind: TypeAlias = Literal["width", "multiplier", "macs"]


@dataclass(frozen=True, slots=True)
class Space:
    """The values of the one thing that is searched, from the smallest; `own` is where the recipe's stands among them.

    kind: "width" is an option of the student's model; "multiplier" the end of its name, as libraries have it
        (mobilenetv3_small_075); "macs" the part of the teacher's multiply-accumulates that pruning keeps.
    """

    kind: Kind
    values: tuple[float, ...]
    own: int

    def name(self, at: int) -> str:
        """The candidate in the ids of its variants: w12, w0.75, macs0.5."""
        return f"{'macs' if self.kind == 'macs' else 'w'}{self.values[at]:g}"

    def options(self, at: int) -> dict[str, float]:
        """What is changed, for the report."""
        return {self.kind: self.values[at]}

    def spread(self, count: int) -> list[int]:
        """The recipe's own, and others that lie evenly between the smallest and the largest: what is tried first."""
        places = [round((len(self.values) - 1) * (2 * step + 1) / (2 * count)) for step in range(count)]
        return list(dict.fromkeys([self.own, *places]))[:count]

    def free(self, at: int, taken: Sequence[int]) -> int | None:
        """The place nearest to `at` that is not taken; of two as near the smaller one."""
        left = [place for place in range(len(self.values)) if place not in taken]
        return min(left, key=lambda place: (abs(place - at), place), default=None)


def space(recipe: Recipe) -> Space:
    """What can be searched in this recipe.

    Raises:
        RecipeError: its student has neither a width nor a goal of pruning.
    """
    student = recipe.student
    if student.name == PRUNED:
        return _pruning(recipe)
    where = f"{recipe.source}: student"
    fixed = "weights" if student.weights is not None else "pretrained" if "pretrained" in student.options else None
    if fixed is not None:
        raise RecipeError(
            f"it starts from given weights ('{fixed}'), which are of one width",
            where=where, fix='leave them out, or search over model = "pruned" with [prune] macs',
        )  # fmt: skip
    return _widths(recipe) or _multipliers(student.name) or _nothing(recipe)


def changed(recipe: Recipe, found: Space, at: int) -> Recipe:
    """The recipe with the value of one candidate."""
    value, student = found.values[at], recipe.student
    if found.kind == "width":
        whole = isinstance(_width(recipe), int)
        given = dict(student.options) | {"width": int(value) if whole else value}
        return replace(recipe, student=replace(student, options=given))
    if found.kind == "multiplier":
        stem = student.name[: -len(_ending(student.name))]
        return replace(recipe, student=replace(student, name=f"{stem}{round(value * 100):03d}"))
    goals: dict[str, Any] = dict.fromkeys(("parameters", "size_bytes", "latency_ms")) | {"macs": value}
    assert recipe.prune is not None
    return replace(recipe, prune=replace(recipe.prune, **goals))


def trained_for(recipe: Recipe, epochs: int | None) -> Recipe:
    """The recipe with other epochs of its student; assistants keep theirs."""
    if epochs is None or epochs >= recipe.distill.epochs:
        return recipe
    return replace(recipe, distill=replace(recipe.distill, epochs=epochs))


def _widths(recipe: Recipe) -> Space | None:
    """Eighths of the recipe's width: whole numbers where the model takes such."""
    width = _width(recipe)
    if width is None or isinstance(width, bool) or width <= 0:
        return None
    parts = [width * eighth / 8 for eighth in _EIGHTHS]
    values = [float(round(part)) for part in parts if round(part) >= 1] if isinstance(width, int) else parts
    values = sorted({*values, float(width)})
    return Space("width", tuple(values), values.index(float(width)))


def _width(recipe: Recipe) -> int | float | None:
    """The student's width: the recipe's, else the model's own."""
    student = recipe.student
    bound = plugins.bind("models", Part(student.name, student.options), where=f"{recipe.source}: student")
    function = bound.func if isinstance(bound, partial) else bound
    parameter = inspect.signature(function).parameters.get("width")
    if parameter is None or parameter.kind is not parameter.KEYWORD_ONLY:
        return None
    own = student.options.get("width", parameter.default)
    return own if isinstance(own, (int, float)) else None


def _multipliers(name: str) -> Space | None:
    """The widths that a library has of one architecture under names of their own: timm.mobilenetv3_small_075."""
    ending = _ending(name)
    if not ending or not name.startswith("timm."):
        return None
    import timm

    stem = name.removeprefix("timm.")[: -len(ending)]
    found = (re.fullmatch(rf"{re.escape(stem)}(\d{{3}})", each) for each in timm.list_models(f"{stem}*"))
    values = sorted({int(match[1]) / 100 for match in found if match})
    own = int(ending) / 100
    return Space("multiplier", tuple(values), values.index(own)) if len(values) > 1 and own in values else None


def _ending(name: str) -> str:
    match = re.search(r"_(\d{3})$", name)
    return match[1] if match else ""


def _pruning(recipe: Recipe) -> Space:
    assert recipe.prune is not None  # a recipe of a pruned student has a goal
    own = recipe.prune.macs
    values = sorted({*_KEPT, *([own] if own is not None else [])})
    return Space("macs", tuple(values), values.index(own if own is not None else 0.5))


def _nothing(recipe: Recipe) -> Space:
    name = recipe.student.name
    raise PartError(
        f"{name} has no width that could be searched",
        where=f"{recipe.source}: student",
        expected="a model with a keyword-only option 'width', or one whose widths have names of their own",
        fix='name another model, give your own builder a keyword `width`, or search over model = "pruned"',
    )


def listed(options: Mapping[str, float]) -> str:
    """What was changed, in words: "width 12"."""
    return ", ".join(f"{key} {value:g}" for key, value in options.items())
