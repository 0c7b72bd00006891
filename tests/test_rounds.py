"""Prune, distil, prune again: rounds as steps of the store, killed and gone on with, told in the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from command_line import call
from torch import nn
from trainings import Interrupted, Told

from edgekd import pruning, recipe, report, rounds, toml, training
from edgekd import target as targets
from edgekd.errors import ModelError
from edgekd.pruning import cost
from edgekd.recipe import Recipe
from edgekd.rounds import Outcome
from edgekd.store import Store
from edgekd.training import School

RECIPE = """
name = "cut"
[data]
name = "own_parts:few"
[teacher]
model = "resnet8"
width = 8
[teacher.train]
epochs = 2
precision = "fp32"
compile = "off"
threads = 1
[student]
model = "pruned"
[prune]
macs = 0.5
round_to = 2
epochs = 1
[distill]
epochs = 2
views = 1
precision = "fp32"
compile = "off"
threads = 1
[[loss]]
name = "kd"
[[loss]]
name = "hint"
"""

OWN = """
from dataclasses import replace
import numpy as np
from edgekd.data.arrays import ArraySplit
from edgekd.data.digits import digits

def few(seed):
    found = digits(seed)
    def split(which):
        batch = next(iter(which.batches([np.arange(140)])))
        return ArraySplit(batch.inputs, batch.labels, np.arange(len(batch.labels)))
    return replace(found, train=split(found.train), calibration=split(found.calibration), test=split(found.test))
"""
HOST = targets.load("host")


@pytest.fixture(autouse=True)
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)


def read(text: str = RECIPE) -> Recipe:
    return recipe.parse(toml.loads(text), source="edgekd.toml", folder=Path())


def run(found: Recipe, store: Path, told: Told) -> tuple[School, Outcome]:
    store.mkdir(exist_ok=True)
    subjects = tuple(training.read(spec, found.seed, found.source) for spec in found.tasks)
    school = School(found, subjects, Store(store, told), store / training.ANSWERS, None, told)
    return school, rounds.student(school, [training.teachers(school, subjects[0])], [HOST])


def built(told: Told) -> list[str]:
    return [str(fields["step"]) for fields in told.of("building")]


def meta(outcome: Outcome) -> Mapping[str, Any]:
    return outcome.student.weights.meta


def test_rounds_are_steps_that_are_made_once(tmp_path: Path) -> None:
    told = Told()
    school, made = run(read(), tmp_path / "store", told)
    assert built(told) == ["teacher", "cut", "student", "cut", "student"]
    account = made.account
    assert (account.rounds, account.measure, account.round_to) == (2, "macs", 2)
    assert account.macs_after <= 0.5 * account.macs_before == account.goal
    assert account.macs_after > 0.4 * account.macs_before
    first = next(each for each in told.of("pruned"))
    part = first["macs"] / account.macs_before  # type: ignore[operator]
    assert 0.6 < part <= 0.5**0.5 + 1e-6  # two rounds of the same part, each of at most a third
    assert account.parameters_after == cost.parameters(made.student.network.module)
    assert [each.reason for each in account.left_alone if "linear" in each.layers] == ["it gives the output"]
    assert all(after < before and after % 2 == 0 for before, after in account.layers.values())
    # both distillations are the teacher's, the first one with [prune] epochs
    (teacher, *_), last = made.student.weights.parents, made.student.weights
    epochs = [fields["of"] for fields in told.of("epoch") if fields["step"] == "distill"]
    assert epochs == [1, 2, 2]
    assert made.cut.weights.key in last.parents
    between = next(
        json.loads((path / "artifact.json").read_text())
        for path in (tmp_path / "store").glob("student-*") if path != last.path
    )  # fmt: skip
    assert between["parents"][0] == teacher
    # what is compared is compared channel by channel, though the weights were trained since
    found = meta(made)["correspondence"]["student"]
    assert [pair["projector"] for pair in found["pairs"] if pair["loss"] == "hint"] == ["none"] * 3
    for pair in found["pairs"]:
        assert len(pair["channel_map"]) == pair["student"]["channels"]
    of_student = training.told(school, made.student)
    assert of_student is not None
    assert of_student.epochs == 2

    again = Told()
    _, same = run(read(), tmp_path / "store", again)
    assert built(again) == []
    assert same.account == account
    state, other = made.student.network.state_dict(), same.student.network.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    shorter = read(RECIPE.replace("epochs = 2\nviews", "epochs = 1\nviews"))
    more = Told()
    run(shorter, tmp_path / "store", more)
    assert built(more) == ["student"]
    further = Told()
    _, smaller = run(read(RECIPE.replace("macs = 0.5", "macs = 0.25")), tmp_path / "store", further)
    assert smaller.account.rounds == 4
    # two rounds are those of before, the second one with one epoch as the shorter training had it
    assert built(further) == ["cut", "student", "cut", "student"]
    ranked = Told()
    run(read(RECIPE.replace("round_to = 2", 'round_to = 2\nimportance = "taylor"')), tmp_path / "store", ranked)
    assert built(ranked) == ["cut", "student", "cut", "student"]


def test_a_killed_round_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    _, calm = run(read(), tmp_path / "calm", Told())
    seen = []
    for at in (3, 1):  # in the distillation of the first round, and of the last: the teacher has two epochs
        told = Told("epoch", at)
        with pytest.raises(Interrupted):
            run(read(), tmp_path / "disturbed", told)
        seen.append(built(told))
    told = Told()
    _, disturbed = run(read(), tmp_path / "disturbed", told)
    assert seen[0] == ["teacher", "cut", "student"]
    assert told.of("resumed")
    for one, two in ((calm.cut, disturbed.cut), (calm.student, disturbed.student)):
        assert one.weights.key == two.weights.key
        for name in (training.WEIGHTS, rounds.SHAPES):
            if (one.weights.path / name).exists():
                assert (one.weights.path / name).read_bytes() == (two.weights.path / name).read_bytes()


def test_a_goal_of_latency_is_measured_until_it_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(self: Any) -> Callable[[nn.Module], float]:
        return lambda module: cost.macs(module, self.inputs) / 1e5

    monkeypatch.setattr(rounds._Rounds, "_timer", timer)
    whole = 1.2
    found = read(RECIPE.replace("macs = 0.5", f"latency_ms = {whole * 0.4}"))
    told = Told()
    _, made = run(found, tmp_path / "store", told)
    assert made.account.after <= whole * 0.4
    assert made.account.measure == "latency_ms"
    assert made.account.rounds == built(told).count("cut") > 1
    takes = [fields["milliseconds"] for fields in told.of("pruned latency")]
    assert takes == sorted(takes, reverse=True)  # type: ignore[type-var]
    with pytest.raises(ModelError, match=r"costs 1\.[0-9]+ ms already, and 1000000 ms is the goal"):
        run(read(RECIPE.replace("macs = 0.5", "latency_ms = 1e6")), tmp_path / "store", Told())


@pytest.mark.parametrize(
    ("goal", "says"),
    [
        ("macs = 0.01", r"it still costs 54\.\d % of the multiply-accumulates, and 1 % is the goal"),
        ("size_bytes = 5000", r"it still costs \d\d\.?\d* kB, and 5 kB is the goal"),
        ("latency_ms = 0.01", r"it still costs 0\.10\d ms, and 0\.01 ms is the goal"),
    ],
)
def test_a_goal_out_of_reach_is_told_before_any_round_is_trained(
    goal: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timer(self: Any) -> Callable[[nn.Module], float]:
        return lambda module: cost.macs(module, self.inputs) / 1e6

    monkeypatch.setattr(rounds._Rounds, "_timer", timer)
    told = Told()
    text = RECIPE.replace("macs = 0.5\nround_to = 2", f"{goal}\nround_to = 8")
    with pytest.raises(ModelError, match=says) as raised:
        run(read(text), tmp_path / "store", told)
    assert built(told) == ["teacher", "cut"]
    assert raised.value.where == f"edgekd.toml: prune.{goal.partition(' ')[0]}"
    assert "multiples of less than 8 (prune.round_to); left alone are " in raised.value.fix
    assert "linear: it gives the output" in raised.value.fix


def test_a_latency_that_less_than_a_step_reaches_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth is all that can be cut, a whole step is a third, and a twentieth is asked for."""

    def timer(self: Any) -> Callable[[nn.Module], float]:
        return lambda module: cost.macs(module, self.inputs) / 1e6

    monkeypatch.setattr(rounds._Rounds, "_timer", timer)
    _, whole = run(read(), tmp_path / "store", Told())
    goal = 0.95 * whole.account.macs_before / 1e6
    ignore = '["conv1", "layer1", "layer2"]'
    found = read(RECIPE.replace("macs = 0.5", f"latency_ms = {goal}\nignore = {ignore}\nstep = 0.6"))
    _, made = run(found, tmp_path / "store", Told())
    assert 0 < made.account.after <= goal
    assert made.account.rounds == 1


def test_rounds_end_where_a_later_timing_finds_the_goal_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cut is timed just over the goal; after its distillation the machine is calmer, and it is within."""
    told = Told()

    def timer(self: Any) -> Callable[[nn.Module], float]:
        return lambda module: cost.macs(module, self.inputs) * (0.97 if told.of("pruned latency") else 1)

    monkeypatch.setattr(rounds._Rounds, "_timer", timer)
    text = RECIPE.replace("[prune]", "[prune]\nstep = 0.34")
    _, first = run(read(text.replace("0.5", "0.66")), tmp_path / "store", Told())
    goal = 0.99 * first.account.macs_after
    _, made = run(read(text.replace("macs = 0.5", f"latency_ms = {goal}")), tmp_path / "store", told)
    assert made.account.rounds == 2
    assert made.account.macs_after == first.account.macs_after
    assert made.account.after == 0.97 * made.account.macs_after <= goal
    assert [each.reason for each in made.account.left_alone if "linear" in each.layers] == ["it gives the output"]


@pytest.mark.slow
def test_latency_is_that_of_the_runtime(tmp_path: Path) -> None:
    found = read(RECIPE)
    school, made = run(found, tmp_path / "store", Told())
    measured = rounds._Rounds(
        replace(school, recipe=read(RECIPE.replace("macs = 0.5", "latency_ms = 1.0"))),
        read(RECIPE.replace("macs = 0.5", "latency_ms = 1.0")).prune,  # type: ignore[arg-type]
        made.cut, [targets.load("jetson")],
    )  # fmt: skip
    assert "latency is that of this machine's CPU" in measured.notes[0]
    assert 0 < measured._timer()(made.cut.network.module) < 50


def test_the_verb_leaves_weights_shapes_and_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = RECIPE.replace('model = "pruned"', 'model = "resnet8"\nwidth = 4')
    start = plain.index("[prune]")
    Path("edgekd.toml").write_text(plain[:start] + plain[plain.index("[distill]") :])
    assert call("prune", "--macs", "70%", "-o", "out", "--json") == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert json.loads(Path("out/prune.json").read_text()) == document
    assert document["pruning"]["goal"] / document["pruning"]["macs_before"] == pytest.approx(0.7)
    assert document["pruning"]["round_to"] == HOST.pruning.channel_multiple == 8
    assert "of the multiply-accumulates and" in told.err
    assert "out/prune.json" in told.err.splitlines()[-1]
    assert "multiples of 8; at most 70 % of the multiply-accumulates was asked for" in told.err
    from edgekd.models.resnet import resnet8
    from edgekd.types import TensorSpec

    specs = (TensorSpec("image", "uint8", ("batch", 8, 8, 1)),)
    student = pruning.restore(resnet8(10, specs, width=8), "out/student.shapes.json", "out/student.safetensors")
    assert cost.parameters(student) == document["pruning"]["parameters_after"]
    again = recipe.load(Path("out/recipe.toml"))
    assert again.student.name == "pruned"
    assert again.prune is not None
    assert again.prune.macs == 0.7
    assert call("prune", "-o", "out") == 2
    assert "there is no goal to prune for" in capsys.readouterr().err
    assert call("prune", "--macs", "1%", "-o", "out") == 2
    assert "nine tenths" in capsys.readouterr().err


@pytest.mark.slow
def test_compress_tells_what_was_cut_and_deploys_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("edgekd.toml").write_text(RECIPE.replace("epochs = 2\nviews", "epochs = 1\nviews"))
    assert call("compress", "--target", "host", "--quick") in (0, 3)
    out = tmp_path / "runs" / "cut"
    document = json.loads((out / "report.json").read_text())
    jsonschema.validate(document, report.schema())
    rows = {row["id"]: row for row in document["variants"]}
    assert set(rows) == {
        "teacher", "student", "pruned", "host/teacher-fp32", "host/student-fp32", "host/student-int8",
    }  # fmt: skip
    assert rows["pruned"]["stage"] == "pruned"
    assert rows["pruned"]["parameters"] == rows["student"]["parameters"] < rows["teacher"]["parameters"]
    told = document["pruning"]
    assert told["rounds"] == 2
    assert rows["host/student-fp32"]["macs"] == told["macs_after"]
    assert rows["host/student-fp32"]["macs"] < 0.55 * rows["host/teacher-fp32"]["macs"]
    page = (out / "report.md").read_text()
    assert "The student was cut out of its teacher in 2 rounds, by magnitude" in page
    assert "Left alone: linear (it gives the output)" in page
    assert report.load(out).pruning is not None
