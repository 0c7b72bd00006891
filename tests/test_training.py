"""From a recipe to trained networks: chains, several teachers, several heads; nothing is made twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import Told

from edgekd import recipe, toml, training
from edgekd.deploy import Source
from edgekd.distillation import evaluate
from edgekd.errors import ModelError, RecipeError
from edgekd.recipe import Recipe
from edgekd.store import Store
from edgekd.training import School

# One teacher, an assistant and a student, all of one family and as small as they get.
CHAIN = """
name = "chain"
[data]
name = "own_parts:few"
[teacher]
model = "resnet8"
width = 6
[teacher.train]
epochs = 3
precision = "fp32"
compile = "off"
threads = 1
[student]
model = "resnet8"
width = 3
[distill]
epochs = 2
views = 1
precision = "fp32"
compile = "off"
threads = 1
[[distill.assistants]]
model = "resnet8"
width = 4
epochs = 1
[[loss]]
name = "kd"
[[loss]]
name = "cosine"
"""

HEADS = """
name = "heads"
[[task]]
head = "digit"
[task.data]
name = "own_parts:few"
[[task.teacher]]
model = "resnet8"
width = 4
train = {epochs = 1, precision = "fp32", compile = "off", threads = 1}

[[task]]
head = "odd"
[task.data]
name = "own_parts:odd"
[[task.teacher]]
model = "resnet8"
width = 4
weight = 2.0
train = {epochs = 1, precision = "fp32", compile = "off", threads = 1}
[[task.teacher]]
model = "resnet8"
width = 3
train = {epochs = 1, precision = "fp32", compile = "off", threads = 1}
[[task.loss]]
name = "kd"
temperature = 2.0

[student]
model = "own_parts:two_heads"
[distill]
epochs = 2
views = 1
precision = "fp32"
compile = "off"
threads = 1
"""

OWN = """
from dataclasses import replace
import numpy as np
from torch import nn
from edgekd.data.arrays import ArraySplit
from edgekd.data.digits import digits

def few(seed, of=lambda label: label, **changes):
    found = digits(seed)
    def split(which):
        batch = next(iter(which.batches([np.arange(140)])))
        return ArraySplit(batch.inputs, of(batch.labels), np.arange(len(batch.labels)))
    return replace(
        found, train=split(found.train), calibration=split(found.calibration), test=split(found.test), **changes
    )

def odd(seed):
    return few(seed, lambda label: label % 2, name="odd", classes=("even", "odd"), fingerprint="odd")

def vectors(seed):
    from edgekd.types import TensorSpec
    found = odd(seed)
    return replace(found, inputs=(TensorSpec("other", "uint8", ("batch", 8, 8, 1)),))

class Two(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(64, count) for name, count in heads.items()})
    def forward(self, x):
        return {name: head(self.body(x)) for name, head in self.heads.items()}

def two_heads(heads, inputs):
    return Two(heads)
"""


@pytest.fixture(autouse=True)
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)


def read(text: str, folder: Path) -> Recipe:
    return recipe.parse(toml.loads(text), source="edgekd.toml", folder=folder)


def run(found: Recipe, store: Path) -> tuple[School, list[tuple[Source, ...]], Source, Told]:
    """Train the teachers and the student of a recipe."""
    told = Told()
    store.mkdir(exist_ok=True)
    subjects = tuple(training.read(spec, found.seed, found.source) for spec in found.tasks)
    school = School(found, subjects, Store(store, told), store / training.ANSWERS, None, told)
    teachers = [training.teachers(school, subject) for subject in subjects]
    return school, teachers, training.student(school, teachers), told


def built(told: Told) -> list[str]:
    return [str(fields["step"]) for fields in told.of("building")]


def meta(source: Source) -> Mapping[str, Any]:
    return source.weights.meta


def state(source: Source) -> bytes:
    return (source.weights.path / training.WEIGHTS).read_bytes()


# ---------------------------------------------------------------- a chain


def test_a_chain_is_trained_link_by_link_and_never_twice(tmp_path: Path) -> None:
    found = read(CHAIN, tmp_path)
    _, ((teacher,),), student, told = run(found, tmp_path / "store")
    assert built(told) == ["teacher", "student", "student"]
    folders = (path for path in (tmp_path / "store").glob("student-*") if not path.is_symlink())
    (assistant,) = (path for path in folders if path != student.weights.path)
    assert student.weights.parents == (assistant.name.removeprefix("student-"),)
    manifest = json.loads((assistant / "artifact.json").read_text())
    assert manifest["parents"] == [teacher.weights.key]
    assert (manifest["meta"]["epochs"], meta(student)["epochs"]) == (1, 2)
    # each link compares layers of its own two networks, and learns from the link above it
    assert manifest["meta"]["losses"]["student"][1]["pairs"] == meta(student)["losses"]["student"][1]["pairs"]
    assert len(list((tmp_path / "store" / training.ANSWERS).glob("*/manifest.json"))) == 2
    assert not student.network.training

    _, _, again, told = run(found, tmp_path / "store")
    assert built(told) == []
    assert again.weights.key == student.weights.key
    shorter = replace(found, assistants=(replace(found.assistants[0], epochs=2),))
    assert built(run(shorter, tmp_path / "store")[3]) == ["student", "student"]
    direct = replace(found, assistants=())
    assert built(run(direct, tmp_path / "store")[3]) == ["student"]


def test_pairs_that_a_recipe_names_are_of_the_student_alone(tmp_path: Path) -> None:
    """An assistant of another kind has no such layers: it is matched anew."""
    text = CHAIN.replace('name = "cosine"', 'name = "cosine"\npairs = [["body", "layer3"]]').replace(
        '[student]\nmodel = "resnet8"\nwidth = 3', '[student]\nmodel = "own_parts:plain"'
    )
    (tmp_path / "own_parts.py").write_text(
        OWN
        + """
def plain(classes, inputs):
    body = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
    from collections import OrderedDict
    return nn.Sequential(OrderedDict(body=body, flat=nn.Flatten(), head=nn.Linear(64, classes)))
"""
    )
    _, _, student, told = run(read(text, tmp_path), tmp_path / "store")
    assert built(told) == ["teacher", "student", "student"]
    assert meta(student)["losses"]["student"][1]["pairs"] == [["body", "layer3"]]


def test_the_resolved_recipe_names_every_pair_and_trains_the_same_weights(tmp_path: Path) -> None:
    found = read(CHAIN, tmp_path)
    school, _, student, _ = run(found, tmp_path / "store")
    resolved = training.resolved(school, student)
    assert resolved.tasks[0].losses is not None
    pairs = {term.part.name: term.pairs for term in resolved.tasks[0].losses}
    assert pairs["kd"] is None
    assert ("layer3", "layer3") in (pairs["cosine"] or ())
    text = resolved.to_toml(tmp_path)
    assert '"layer3"' in text
    _, _, again, _ = run(read(text, tmp_path), tmp_path / "other store")
    assert state(again) == state(student)


def test_auto_is_resolved_to_what_it_chose(tmp_path: Path) -> None:
    text = CHAIN.replace('name = "cosine"', 'name = "auto"\nweight = 0.5')
    school, _, student, _ = run(replace(read(text, tmp_path), assistants=()), tmp_path / "store")
    losses = training.resolved(school, student).tasks[0].losses
    assert losses is not None
    assert losses[0].part.name == "kd"
    assert all(term.part.name != "auto" and term.pairs for term in losses[1:])
    assert len(losses) > 1

    written, before = read(training.resolved(school, student).to_toml(tmp_path), tmp_path), state(student)
    _, _, again, told = run(written, tmp_path / "store")
    assert built(told) == []  # the recipe that was left behind finds the same student
    assert again.weights.key == student.weights.key
    (tmp_path / "store" / f"student-{student.weights.key}" / training.WEIGHTS).write_bytes(b"broken")
    _, _, mended, told = run(written, tmp_path / "store")
    assert built(told) == ["student"]
    assert state(mended) == before


# ---------------------------------------------------------------- keys


def test_a_limit_of_disk_is_no_part_of_a_key_but_keeping_nothing_is(tmp_path: Path) -> None:
    found = replace(read(CHAIN, tmp_path), assistants=())
    keys = []
    for limit in (4.0, 2.0, 0.0):
        each = replace(found, distill=replace(found.distill, cache_gb=limit))
        keys.append(run(each, tmp_path / "store")[2].weights.key)
    assert keys[0] == keys[1] != keys[2]


def test_whatever_else_changes_a_student_changes_its_key(tmp_path: Path) -> None:
    found = replace(read(CHAIN, tmp_path), assistants=())
    spec = found.task
    assert spec.losses is not None
    distill = replace(found.distill, epochs=1)
    found = replace(found, distill=distill, tasks=(replace(spec, losses=spec.losses[:1]),))
    spec = found.task
    assert spec.losses is not None
    first = run(found, tmp_path / "store")[2].weights.key
    others = [
        replace(found, distill=replace(distill, views=2)),
        replace(found, distill=replace(distill, batch_size=64)),
        replace(found, augment=replace(found.augment, seed=1, crop_pixels=1)),
        replace(found, tasks=(replace(spec, losses=(replace(spec.losses[0], weight=0.5),)),)),
        replace(found, tasks=(replace(spec, losses=None),)),
        replace(found, tasks=(replace(spec, teachers=(*spec.teachers, replace(spec.teachers[0], weight=2.0))),)),
        replace(found, student=replace(found.student, mean=(0.4,))),
    ]
    keys = {run(each, tmp_path / "store")[2].weights.key for each in others}
    assert len(keys | {first}) == 8


def test_given_weights_are_saved_as_they_are_and_found_by_their_content(tmp_path: Path) -> None:
    text = CHAIN.split("[[distill.assistants]]")[0]
    _, ((teacher,),), student, _ = run(read(text, tmp_path), tmp_path / "store")
    keys = []
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "w.safetensors").write_bytes(state(teacher))
        given = text.replace("width = 6", 'width = 6\nweights = "w.safetensors"')
        _, ((taken,),), other, told = run(read(given, folder), tmp_path / "store")
        keys.append((taken.weights.key, other.weights.key))
        assert taken.weights.step == "weights"
        for one, two in zip(taken.network.parameters(), teacher.network.parameters(), strict=True):
            assert torch.equal(one, two)
    assert keys[0] == keys[1]
    assert built(told) == []
    # what is kept of the one teacher serves the other, which says the same
    assert len(list((tmp_path / "store" / training.ANSWERS).glob("*/manifest.json"))) == 1
    assert state(other) == state(student)


# ---------------------------------------------------------------- several heads


def test_each_head_has_its_data_its_teachers_and_its_losses(tmp_path: Path) -> None:
    found = read(HEADS, tmp_path)
    school, teachers, student, told = run(found, tmp_path / "store")
    assert built(told) == ["teacher", "teacher", "teacher", "student"]
    assert [len(each) for each in teachers] == [1, 2]
    assert student.weights.parents == tuple(source.weights.key for each in teachers for source in each)
    losses = meta(student)["losses"]
    assert [term["name"] for term in losses["digit"]] == ["ce", "kd", "srd"]  # the default
    assert [(term["name"], term["temperature"]) for term in losses["odd"]] == [("kd", 2.0)]
    for subject, classes in zip(school.subjects, (10, 2), strict=True):
        outputs = evaluate(student.network, subject.data.test, head=subject.spec.head)
        assert outputs.shape == (len(subject.data.test), classes)
    resolved = training.resolved(school, student)
    assert [[term.part.name for term in task.losses or ()] for task in resolved.tasks] == [["ce", "kd", "srd"], ["kd"]]
    assert resolved.tasks[1].head == "odd"
    # the weight of one teacher of one task is part of what the student is
    first, second = found.tasks
    other = replace(second, teachers=(replace(second.teachers[0], weight=1.0), second.teachers[1]))
    assert built(run(replace(found, tasks=(first, other)), tmp_path / "store")[3]) == ["student"]


def test_what_cannot_be_one_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"edgekd\.toml: task: the inputs of 'odd' are .*'other'"):
        run(read(HEADS.replace("own_parts:odd", "own_parts:vectors"), tmp_path), tmp_path / "store")
    assert not list((tmp_path / "store").glob("teacher-*"))  # it is known before anything is trained
    assistants = HEADS + '[[distill.assistants]]\nmodel = "resnet8"\n'
    with pytest.raises(RecipeError, match=r"edgekd\.toml: distill\.assistants: assistants stand between"):
        run(read(assistants, tmp_path), tmp_path / "store")


def test_a_student_that_cannot_be_built_is_known_before_its_teachers_are_trained(tmp_path: Path) -> None:
    text = HEADS.replace("own_parts:two_heads", "resnet8")
    with pytest.raises(ModelError, match="it has one head, and several tasks are asked for"):
        run(read(text, tmp_path), tmp_path / "store")
    assert not list((tmp_path / "store").glob("teacher-*"))
