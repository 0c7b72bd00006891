"""What of a recipe's student can be searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd import recipe as recipes
from edgekd import toml
from edgekd.errors import EdgekdError, RecipeError
from edgekd.goals import Prune
from edgekd.recipe import Recipe, pruned
from edgekd.search.space import Space, changed, listed, space, trained_for


def recipe(student: str, **options: Any) -> Recipe:
    """The smallest recipe with this student."""
    table = toml.loads('name = "x"\n[data]\nname = "digits"\n[teacher]\nmodel = "resnet8"\n')
    table["student"] = {"model": student, **options}
    return recipes.parse(table, source="edgekd.toml", folder=Path.cwd())


@pytest.mark.parametrize(
    ("student", "options", "low", "high", "own"),
    [("resnet8", {}, 4, 32, 16), ("resnet8", {"width": 12}, 3, 24, 12), ("dscnn", {}, 0.25, 2, 1),
     ("dscnn", {"width": 0.4}, 0.1, 0.8, 0.4), ("resnet8", {"width": 1}, 1, 2, 1)],
)  # fmt: skip
def test_widths_are_eighths_of_the_recipes_own(
    student: str, options: dict[str, Any], low: float, high: float, own: float
) -> None:
    given = recipe(student, **options)
    found = space(given)
    assert found.kind == "width"
    assert (found.values[0], found.values[-1], found.values[found.own]) == (low, high, own)
    assert list(found.values) == sorted(set(found.values))
    made = [changed(given, found, at).student.options["width"] for at in range(len(found.values))]
    assert made == [pytest.approx(value) for value in found.values]
    assert {type(value) for value in made} == {int if student == "resnet8" else float}
    assert changed(given, found, found.own).student.options["width"] == own


def test_widths_that_a_library_has_names_for() -> None:
    given = recipe("timm.mobilenetv3_small_100")
    found = space(given)
    assert found.kind == "multiplier"
    assert {0.5, 0.75, 1.0} <= set(found.values)
    at = found.values.index(0.75)
    assert changed(given, found, at).student.name == "timm.mobilenetv3_small_075"
    assert found.name(at) == "w0.75"


def test_a_builder_of_ones_own_with_a_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ownwidth.py").write_text(
        "def build(classes, inputs, *, width: int = 8): ...\ndef bare(classes): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert space(recipe("ownwidth:build")).values == tuple(map(float, range(2, 17)))
    with pytest.raises(EdgekdError, match=r"ownwidth:bare has no width .* keyword-only option 'width'"):
        space(recipe("ownwidth:bare"))


@pytest.mark.parametrize("student", ["timm.resnet18", "torchvision.resnet18"])
def test_a_model_without_a_width_is_told_what_else_there_is(student: str) -> None:
    with pytest.raises(EdgekdError, match=r"no width that could be searched.*model = \"pruned\""):
        space(recipe(student))


def test_given_weights_are_of_one_width() -> None:
    with pytest.raises(RecipeError, match="weights"):
        space(recipe("resnet8", weights="w.safetensors"))


def test_how_much_pruning_keeps_is_searched_where_the_student_is_cut_out_of_its_teacher() -> None:
    given = pruned(recipe("resnet8"), {"size_bytes": 1000})
    found = space(given)
    assert (found.kind, found.values[0], found.values[-1]) == ("macs", 0.1, 0.9)
    assert found.values[found.own] == 0.5, "the recipe says nothing of MACs"
    assert changed(given, found, 0).prune == Prune(macs=0.1)
    assert found.name(0) == "macs0.1"
    own = space(pruned(recipe("resnet8"), {"macs": 0.33}))
    assert own.values[own.own] == 0.33


def test_the_first_ones_are_the_recipes_own_and_an_even_spread() -> None:
    found = Space("width", tuple(map(float, range(4, 33, 2))), 6)
    assert found.spread(1) == [6]
    assert found.spread(4) == [6, 2, 5, 9]
    assert Space("width", (1.0, 2.0), 1).spread(5) == [1, 0]
    assert (found.free(6, [6]), found.free(6, [5, 6]), found.free(0, [0, 1])) == (5, 7, 2)
    assert Space("width", (1.0, 2.0), 1).free(0, [0, 1]) is None
    assert listed(found.options(0)) == "width 4"


def test_a_shorter_training_is_never_a_longer_one() -> None:
    given = recipe("resnet8")
    assert trained_for(given, 5).distill.epochs == 5
    assert trained_for(given, None) == trained_for(given, 99) == given
