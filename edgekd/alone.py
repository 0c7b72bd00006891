"""`edgekd quantize`: a trained model quantized as it is, from a recipe or from an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from edgekd import recipe as recipes
from edgekd.errors import RecipeError, nearest
from edgekd.recipe import Recipe
from edgekd.starter import built_in
from edgekd.types import Budget, Precision, Report, Say, Target

_FIX = 'a PyTorch model is named in a recipe: [teacher] model = "my_pkg.models:build", weights = "…"'


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for: a recipe, or an ONNX file with its samples."""

    name: str
    recipe: Recipe | None
    model: Path | None
    data: Path | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    precisions: tuple[Precision, ...] | None
    budget: Budget
    seed: int

    @property
    def run(self) -> str:
        """The name of the run's folder: not that of the recipe's own run, whose results are others."""
        return self.name if self.recipe is None else f"{self.name}-quantized"


def asked(
    source: Path | None, *, data: Path | None, mean: str | None, std: str | None, precisions: Sequence[str],
    seed: int | None = None, **limits: str | None,
) -> Order:  # fmt: skip
    """The order that the words of the command line make; nothing but a recipe is read.

    Args:
        source: a recipe (.toml) or an .onnx file; None: ./edgekd.toml, else the built-in recipe.
        limits: those of `recipe.budget_of`, e.g. --max-drop.

    Raises:
        RecipeError: words that do not fit together, or no recipe.
    """
    chosen = _precisions(precisions)
    if source is None or source.suffix == ".toml":
        for option, given in (("--data", data), ("--mean", mean), ("--std", std)):
            if given is not None:
                raise RecipeError(f"{option} is for an .onnx file", where=option, fix="a recipe says it in [data]")
        read = _recipe(source)
        read = recipes.overridden(read, seed=seed, **limits)
        if chosen:
            read = replace(read, quantize=replace(read.quantize, precisions=chosen))
        return Order(read.name, read, None, None, None, None, chosen, read.budget, read.seed)
    if source.suffix != ".onnx":
        what = "it is neither a recipe nor an .onnx file"
        raise RecipeError(what, where=str(source), expected="recipe.toml or model.onnx", fix=_FIX)
    if data is None:
        fix = "--data images/ (a folder or zip of images) or --data samples.npz"
        raise RecipeError("an .onnx file is quantized with samples of yours", where="--data", fix=fix)
    budget = recipes.budget_of(Budget(), **limits)
    levels, spread = _numbers(mean, "--mean"), _numbers(std, "--std")
    return Order(source.stem, None, source, data, levels, spread, chosen, budget, seed or 0)


def quantize_alone(
    order: Order, targets: Sequence[Target], out: Path, *, store: Path, threads: int, quick: bool, say: Say
) -> Report:
    """Do what is asked for, and leave models, report and quantize.json in `out`.

    Raises:
        EdgekdError: the user's data, model, recipe or disk stands in the way.
    """
    if order.recipe is not None:
        from edgekd.pipeline import quantize

        return quantize(order.recipe, targets, out, store=store, threads=threads, quick=quick, say=say)
    from edgekd.onnx_file import Given, quantize_file

    assert order.model is not None
    assert order.data is not None
    given = Given(order.model, order.data, order.mean, order.std, order.precisions, order.budget, order.seed)
    return quantize_file(given, targets, out, threads=threads, quick=quick, say=say)


def _recipe(path: Path | None) -> Recipe:
    if path is not None:
        return recipes.load(path, alone=True)
    return recipes.load(recipes.DEFAULT_FILE, alone=True) if recipes.DEFAULT_FILE.exists() else built_in()


def _precisions(words: Sequence[str]) -> tuple[Precision, ...] | None:
    known: tuple[Precision, ...] = get_args(Precision)
    for word in words:
        if word not in known:
            raise RecipeError(
                f"'{word}' is no precision",
                where="--precision",
                expected=", ".join(known),
                nearest=nearest(word, known),
            )
    return tuple(each for each in known if each in words) or None


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"'{text}' is no list of numbers", where=option, expected="0.485,0.456,0.406") from None
