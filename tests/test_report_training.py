"""What a training leaves behind, as the report takes it: losses, the layers they compare, where answers came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainings import HINTON, Told, handwritten, network, own, taught

from edgekd import training
from edgekd.deploy import Source
from edgekd.recipe import parse
from edgekd.store import Store
from edgekd.training import School
from edgekd.types import Artifact, Json, LossTerm, Part

TABLE: dict[str, Any] = {
    "name": "x", "data": {"name": "digits"}, "teacher": {"model": "resnet20"}, "student": {"model": "resnet8"},
}  # fmt: skip


def school(folder: Path, table: dict[str, Any] = TABLE) -> School:
    """A recipe with its data read; the network that is told of is another one."""
    recipe, say = parse(table, source="a test", folder=folder), Told()
    subjects = tuple(training.read(spec, recipe.seed, recipe.source) for spec in recipe.tasks)
    return School(recipe, subjects, Store(folder, say), folder, None, say)


def trained(meta: dict[str, Json]) -> Source:
    """As the store gives it: through JSON."""
    kept = json.loads(json.dumps(meta))
    return Source(network(handwritten()), Artifact("student", "key", Path(), kept))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("told")


def test_chosen_losses_and_the_layers_they_compare_are_told(folder: Path) -> None:
    meta = taught(folder / "auto", terms=(*HINTON, LossTerm(Part("auto"), 0.5)))
    told = training.told(school(folder), trained(meta))
    assert told is not None
    assert (told.teachers, told.assistants, told.epochs, told.recalled) == (("resnet20",), (), 3, None)
    assert told.precision == "fp32"
    assert told.seconds == meta["train_s"]
    (matched,) = training.matched(school(folder), trained(meta))
    assert (matched.head, matched.family) == (None, "same")
    used = [pair for pair in matched.pairs if pair.weight]
    assert {(p.loss, p.weight) for p in used} == {(term.part.name, term.weight) for term in told.losses[2:]}
    assert [(p.student.path, p.teacher.path) for p in used] == [
        paths for term in told.losses[2:] for paths in term.pairs or ()
    ]
    assert all(layer.channels > 0 and 0 <= layer.depth <= 1 for p in used for layer in (p.student, p.teacher))


def test_named_pairs_are_told_too(folder: Path) -> None:
    meta = taught(folder / "named", terms=(*HINTON, LossTerm(Part("cosine"), 2.0, (("conv", "conv"),))))
    (matched,) = training.matched(school(folder), trained(meta))
    (pair,) = matched.pairs
    assert (pair.student.path, pair.teacher.path, pair.loss, pair.weight) == ("conv", "conv", "cosine", 2.0)
    assert (pair.student.channels, pair.student.grid, pair.projector) == (8, (4, 4), "8>16")
    assert matched.family is None


def test_losses_of_outputs_tell_no_layers_and_answers_of_another_training_are_counted(folder: Path) -> None:
    cache = folder / "answers"
    first, second = (taught(folder / name, seed=seed, cache=cache) for seed, name in enumerate(("first", "second")))
    assert training.matched(school(folder), trained(first)) == ()
    found = [training.told(school(folder), trained(each)) for each in (first, second)]
    assert [each.recalled for each in found if each is not None] == [0, 1]


def test_who_did_not_teach_is_not_named(folder: Path) -> None:
    between = TABLE | {"distill": {"assistants": [{"model": "resnet32"}, {"model": "resnet20"}]}}
    meta = taught(folder / "chain")
    told = training.told(school(folder, between), trained(meta))
    assert told is not None
    assert told.assistants == ("resnet32", "resnet20")
    alone = taught(folder / "alone", terms=(LossTerm(Part("ce")),))
    told = training.told(school(folder, between), trained(alone))
    assert told is not None
    assert (told.teachers, told.assistants, told.recalled) == ((), (), None)


def test_the_layers_of_each_head_are_told_under_its_name(folder: Path) -> None:
    tasks = [{"head": head, "data": TABLE["data"], "teacher": TABLE["teacher"]} for head in ("topic", "mood")]
    several = {"task": tasks} | {key: value for key, value in TABLE.items() if key in ("name", "student")}
    meta = taught(folder / "heads", terms=(LossTerm(Part("cosine"), 1.0, (("conv", "conv"),)),))
    found: Any = meta["correspondence"]
    told = training.matched(school(folder, several), trained({"correspondence": {"mood": found["student"]}}))
    assert [each.head for each in told] == ["mood"]


def test_a_loss_of_ones_own_is_told_by_its_name(folder: Path) -> None:
    def loss(projected_feature: Any, teacher_feature: Any) -> Any:
        return (projected_feature - teacher_feature.detach()).square().mean()

    term = own(loss)
    meta = taught(folder / "own", terms=(LossTerm(term.part, 0.5, (("conv", "conv"),)),))
    (matched,) = training.matched(school(folder), trained(meta))
    assert matched.pairs[0].loss == term.part.name
    assert training.resolved(school(folder), trained(meta)).tasks[0].losses == (
        LossTerm(term.part, 0.5, (("conv", "conv"),)),
    )
