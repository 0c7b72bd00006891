"""Recipes: defaults filled in, unknown keys refused with the nearest, paths relative to the file, rerunnable."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import recipe
from edgekd.errors import EdgekdError, PartError, RecipeError
from edgekd.starter import BUILT_IN, built_in, init

SMALL = """
name = "plants"
[data]
name = "imagefolder"
path = "images dir"
[teacher]
model = "resnet20"
weights = "teacher.safetensors"
width = 8
[student]
model = "resnet8"
"""


def _load(folder: Path, text: str) -> recipe.Recipe:
    (folder / "edgekd.toml").write_text(text)
    return recipe.load(folder / "edgekd.toml")


def test_defaults_are_hintons_and_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    read = _load(tmp_path, SMALL)
    assert [(term.part.name, term.weight) for term in read.losses] == [("kd", 0.9), ("ce", 0.1)]
    assert read.losses[0].part.options == {"temperature": 4.0}
    assert read.teacher.weights == str(tmp_path / "teacher.safetensors")
    assert read.teacher.options == {"width": 8}
    assert read.data.options["path"] == str(tmp_path / "images dir")
    assert read.export.preprocessing


def test_the_resolved_recipe_reruns_the_same_run(tmp_path: Path) -> None:
    read = _load(tmp_path, SMALL)
    run = tmp_path / "runs" / "plants"
    run.mkdir(parents=True)
    text = read.to_toml(run)
    assert str(tmp_path) not in text
    (run / "recipe.toml").write_text(text)
    again = recipe.load(run / "recipe.toml")
    assert again.to_toml(run) == text
    assert Path(str(again.data.options["path"])).resolve() == tmp_path / "images dir"
    assert again.distill == read.distill


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[student]", "[studnet]"), "unknown key 'studnet'.*did you mean 'student'"),
        (('name = "plants"', ""), "'name' is missing"),
        (('name = "plants"', 'name = "../plants"'), "cannot name a folder"),
        (('name = "plants"', 'name = "plants"\nseed = "0"'), r"seed: \"0\" does not fit"),
        (("width = 8", "widht = 8"), "teacher: unknown option 'widht'.*did you mean 'width'"),
        (("width = 8", "mean = 1"), r"teacher.mean: 1 does not fit"),
        (('model = "resnet8"', 'model = "resnet9"'), "student: there is no 'resnet9'.*did you mean"),
        (('model = "resnet8"', 'model = "resnet8"\ntrain = {}'), "student is trained by"),
        (('name = "imagefolder"', 'name = "imagefolders"'), "there is no 'imagefolders'.*did you mean 'imagefolder'"),
        (("[student]", "[distill]\nepochs = 0\n[student]"), "distill.epochs: 0 does not fit: input should be greater"),
        (("[student]", "[distill]\nepoch = 3\n[student]"), "distill: unknown key 'epoch'.*did you mean 'epochs'"),
        (("[student]", "[budget]\nmax_accuracy_drop = 2\n[student]"), "budget.max_accuracy_drop: 2 does not fit"),
        (("[student]", '[[loss]]\nname = "kd"\ntemprature = 2\n[student]'), r"loss\[0\]: unknown option 'temprature'"),
        (("[student]", '[[loss]]\nname = "kd"\nweight = -1\n[student]'), r"loss\[0\].weight: -1 does not fit"),
        (("[student]", '[quantize]\nprecisions = ["int4"]\n[student]'), "quantize.precisions"),
        (("[student]", "[student"), "not valid TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_where_it_stands(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in SMALL
    with pytest.raises(EdgekdError, match=f"edgekd.toml.*{message}") as caught:
        _load(tmp_path, SMALL.replace(*change))
    assert isinstance(caught.value, RecipeError | PartError)
    assert "\n" not in str(caught.value) or "TOML" in str(caught.value)


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "edgekd.toml").write_text(SMALL)
    with pytest.raises(RecipeError, match=r"no such file.*did you mean 'edgekd\.toml'"):
        recipe.load(tmp_path / "edgkd.toml")


def test_the_command_line_overrides_seed_and_budget(tmp_path: Path) -> None:
    read = recipe.overridden(_load(tmp_path, SMALL), seed=7, max_drop="1%", max_latency="5ms", max_size="4MB")
    assert read.seed == 7
    assert (read.budget.max_accuracy_drop, read.budget.max_latency_ms, read.budget.max_size_bytes) == (
        0.01,
        5,
        4_000_000,
    )
    assert recipe.overridden(read, seed=None, max_drop=None, max_latency=None, max_size=None) == read


def test_the_built_in_recipe_is_valid_and_needs_no_file() -> None:
    assert built_in().data.name == "digits"
    assert 'name = "digits"' in BUILT_IN


def test_init_writes_a_recipe_that_loads_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "edgekd.toml"
    options = {
        "name": "plants",
        "data": "my images",
        "teacher": "timm.resnet18",
        "student": "resnet8",
        "target": "jetson",
    }
    init(path, **options)
    assert recipe.load(path).teacher.name == "timm.resnet18"
    before = path.read_text()
    with pytest.raises(RecipeError, match="is there already"):
        init(path, **options)
    assert path.read_text() == before
    (tmp_path / "recipes").mkdir()
    init(tmp_path / "recipes" / "own.toml", **options | {"data": str(tmp_path / "my images")})
    assert recipe.load(tmp_path / "recipes" / "own.toml").data.options["path"] == str(tmp_path / "my images")
    with pytest.raises(RecipeError, match="quote"):
        init(tmp_path / "other.toml", **(options | {"data": 'a"b'}))
