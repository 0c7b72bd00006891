"""The search on the command line: on real small data where marked slow, its order and its errors otherwise."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from command_line import call, run
from sample_report import latency, scored, variant
from search_worker import WIDTHS, opened

from edgekd import cli, report
from edgekd import target as targets
from edgekd.clock import Deadline
from edgekd.errors import ModelError
from edgekd.recipe import SearchPlan
from edgekd.search import candidate as making
from edgekd.search import run as searching
from edgekd.search.candidate import Found, contenders
from edgekd.types import Budget, Variant

RECIPE = """
name = "small"
[data]
name = "digits"
[teacher]
model = "resnet8"
width = 8
[teacher.train]
epochs = 3
precision = "fp32"
threads = 1
compile = "off"
[student]
model = "resnet8"
width = 4
[distill]
epochs = 2
precision = "fp32"
threads = 1
compile = "off"
[quantize]
precisions = ["int8"]
[budget]
max_accuracy_drop = 1.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small recipe, to work in."""
    (tmp_path / "edgekd.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- real: trained and measured


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two candidates were tried."""
    place = tmp_path_factory.mktemp("search")
    (place / "edgekd.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert call("compress", "--search", "2", "--quick", "--target", "host") == 0
    return place


@pytest.mark.slow
def test_the_report_has_every_candidate_and_a_front(done: Path) -> None:
    out = done / "runs" / "small"
    document = json.loads((out / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, report.schema())
    found = report.load(out)
    assert found.search is not None
    names = [each.name for each in found.search.candidates]
    assert names[0] == "w4"
    assert len(names) == 2
    rows = {row.id: row for row in found.variants}
    wanted = {"teacher", "host/teacher-fp32"}
    wanted |= {f"{name}/student" for name in names}
    wanted |= {f"host/{name}/student-{precision}" for name in names for precision in ("fp32", "int8")}
    assert set(rows) == wanted
    for name, row in rows.items():
        if row.target == "host":
            assert row.latency_ms is not None
            assert row.latency_ms.rounds is None, "every candidate of two is a finalist"
            assert row.path
            assert (out / row.path).stat().st_size == row.size_bytes
        assert row.candidate == (name.split("/")[-2] if "student" in name else None)
    (front,) = found.pareto
    assert set(front.variants) <= set(rows)
    assert front.axes == ("drop", "latency_ms", "size_bytes")
    assert found.chosen["host"] in front.variants
    compared = {(each.candidate, each.baseline) for each in found.comparisons}
    assert ("host/w4/student-int8", "host/w4/student-fp32") in compared
    assert (f"host/{names[1]}/student-int8", "host/teacher-fp32") in compared
    assert (f"host/{names[1]}/student-int8", "host/w4/student-int8") not in compared
    assert call("bundle", "verify", str(out / "bundles" / "host")) == 0


@pytest.mark.slow
def test_the_chosen_one_can_be_made_alone(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    chosen = report.load(done / "runs" / "small").chosen["host"]
    assert chosen is not None
    made = (done / "runs" / "small" / "chosen.toml").read_text(encoding="utf-8")
    assert f"width = {chosen.split('/')[1][1:]}" in made
    code, _, shown = run(capsys, "compress", "runs/small/chosen.toml", "-o", "alone", "--quick", "-v")
    assert code == 0
    assert "student" in shown


@pytest.mark.slow
def test_the_same_command_trains_nothing_and_tries_nothing_again(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    before = (done / "runs" / "small" / "search.log").read_text(encoding="utf-8")
    code, told, shown = run(capsys, "compress", "--search", "2", "--quick", "--json", "-v")
    assert code == 0
    assert "building" not in shown
    assert "candidate " not in shown
    after = (done / "runs" / "small" / "search.log").read_text(encoding="utf-8")
    assert after.count('"found"') == before.count('"found"') == 2
    assert len(json.loads(told)["search"]["candidates"]) == 2


@pytest.mark.slow
def test_a_time_budget_that_is_up_ends_with_a_whole_report(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    command = (
        "compress",
        "--search",
        "9",
        "--quick",
        "--time-budget",
        "1s",
        "--max-size",
        "1kB",
        "--json",
        "-o",
        "short",
    )
    code, told, _ = run(capsys, *command)
    assert code == cli.NO_VARIANT
    found = json.loads(told)
    assert [each["name"] for each in found["search"]["candidates"]] == ["w4"], "one is needed"
    assert any(note.startswith("left out: 7 of 8 candidates (it needs about ") for note in found["notes"])
    assert any("was passed by" in note for note in found["notes"])
    assert found["nearest"]["host"]["says"].endswith("where 1 kB are allowed")
    assert (done / "short" / "bundles" / "host" / "edgekd.json").exists()


@pytest.mark.slow
def test_short_trainings_are_told_and_the_best_is_trained_in_full_by_two_processes(done: Path) -> None:
    (done / "longer.toml").write_text(RECIPE.replace('name = "small"', 'name = "longer"'))
    command = [sys.executable, "-m", "edgekd", "compress", "longer.toml", "--search", "3", "--search-epochs", "1",
               "--search-storage", "shared.log", "--target", "jetson", "-o"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    both = [subprocess.Popen([*command, name], cwd=done, env=env, stderr=subprocess.PIPE, text=True) for name in "ab"]
    for process in both:
        _, told = process.communicate(timeout=600)
        assert process.returncode == 0, told
    for name in "ab":
        found = report.load(done / name)
        assert found.search is not None
        epochs = {each.name: each.epochs for each in found.search.candidates}
        full = [each for each in epochs if not each.endswith("-1epochs")]
        assert len(full) == 1
        assert sorted(epochs.values()) == [1, 1, 1, 2]
        assert epochs[full[0]] == 2
        assert found.search.objectives == ("drop", "macs", "size_bytes")
        assert any("nothing can be timed on jetson here" in note for note in found.notes)
        assert all(row.latency_ms is None for row in found.variants)


# ---------------------------------------------------------------- the order of a search, with candidates out of air


def row(name: str, precision: Any, *, lost: int, ms: float | None, size: int) -> Variant:
    """A variant of a candidate on the host."""
    stage: Any = "onnx" if precision == "fp32" else "quantized"
    return variant(
        f"host/{name}/student-{precision}", stage, target="host", precision=precision, candidate=name, macs=size,
        latency_ms=None if ms is None else latency(ms, rounds=name), size_bytes=size, **scored(440 - lost, 440, 450),
    )  # fmt: skip


def found_of(name: str, *, lost: int = 0, ms: float | None = 1.0, size: int = 1000, teacher_ms: float = 4.0) -> Found:
    """What is remembered of a candidate that nobody trained."""
    rows = (
        row(name, "fp32", lost=lost, ms=ms, size=size),
        row(name, "int8", lost=lost + 1, ms=ms and ms / 2, size=size // 3),
    )
    return Found(name, {"width": 1.0}, 5, 10.0, rows, {"host": teacher_ms} if ms else {}, {"host": ()})


def test_what_is_remembered_is_what_comes_back(tmp_path: Path) -> None:
    found = found_of("w8")
    text = json.dumps(found.to_json())
    assert Found.of_json(json.loads(text)) == found


class Air:
    """Candidates whose figures follow from their place, without a training; and a clock that they make pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 10.0, refuse: Sequence[int] = ()) -> None:
        self.now_s, self.seconds, self.refused, self.made = 0.0, seconds, refuse, list[int]()
        monkeypatch.setattr(making, "trained", self.trained)
        monkeypatch.setattr(making, "examined", self.examined)

    def trained(self, lab: Any, at: int, epochs: int | None) -> tuple[Any, Any]:
        """Time passes."""
        self.now_s += self.seconds
        if at in self.refused:
            raise ModelError("it cannot be built", where=f"width {at}")
        return None, None

    def examined(self, lab: Any, at: int, school: Any, made: Any, begun_s: float) -> Found:
        """Wider is better, slower and larger."""
        self.made.append(at)
        found = found_of(WIDTHS.name(at), lost=3 * (15 - at), ms=0.1 * (at + 1), size=1000 * (at + 1))
        return dataclasses.replace(found, seconds=self.seconds)


def lab(budget: Budget, plan: SearchPlan, deadline: Deadline) -> Any:
    """As much of a lab as trials need that are out of air."""
    recipe = SimpleNamespace(budget=budget, distill=SimpleNamespace(epochs=5))
    run = SimpleNamespace(
        recipe=recipe, task=SimpleNamespace(metric="accuracy"), deadline=deadline, say=lambda *a, **k: None
    )
    return SimpleNamespace(run=run, space=WIDTHS, plan=plan, targets=[targets.load("host")])


AXES = ("drop", "latency_ms", "size_bytes")


def test_candidates_are_made_until_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    air, trials = Air(monkeypatch), opened(str(tmp_path / "x.log"), 6, objectives=3)
    searching._try_all(lab(Budget(), SearchPlan(6), Deadline()), trials, AXES)
    assert len(set(air.made)) == 6
    searching._try_all(lab(Budget(), SearchPlan(6), Deadline()), opened(str(tmp_path / "x.log"), 6, objectives=3), AXES)
    assert len(air.made) == 6, "the same storage: nothing is tried again"


def test_no_candidate_is_begun_that_would_not_be_done_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    air, trials = Air(monkeypatch), opened(str(tmp_path / "x.log"), 6, objectives=3)
    deadline = Deadline(36.0, lambda: air.now_s)
    searching._try_all(lab(Budget(), SearchPlan(6), deadline), trials, AXES)
    assert len(air.made) == 3, "a fourth of 10 s would end after 36 s"
    assert deadline.left_out == [
        "left out: 3 of 6 candidates (it needs about 13 s); 6 s were left of the time budget of 36 s"
    ]
    assert deadline.remaining_s() == 6


def test_a_candidate_that_cannot_be_is_told_and_the_recipes_own_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = opened(str(tmp_path / "x.log"), 5, objectives=3)
    Air(monkeypatch, refuse=[at for at in range(16) if at != WIDTHS.own])
    searching._try_all(lab(Budget(), SearchPlan(5), Deadline()), trials, AXES)
    refused = [each.refused for each in trials.finished()]
    assert refused[0] is None
    assert all(why and "it cannot be built" in why for why in refused[1:])
    Air(monkeypatch, refuse=[WIDTHS.own])
    with pytest.raises(ModelError):
        searching._try_all(
            lab(Budget(), SearchPlan(5), Deadline()), opened(str(tmp_path / "y.log"), 5, objectives=3), AXES
        )


def test_the_optimiser_goes_where_the_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    air, trials = Air(monkeypatch), opened(str(tmp_path / "x.log"), 9, objectives=3)
    budget = Budget(max_accuracy_drop=0.05)  # kept by places from 8 on
    searching._try_all(lab(budget, SearchPlan(9), Deadline()), trials, AXES)
    feasible = [at for at in air.made[3:] if at >= 8]
    assert len(feasible) >= 4, air.made


def test_finalists_are_the_front_and_what_a_short_timing_may_have_hidden() -> None:
    small, wide = found_of("small", lost=9, ms=0.5, size=500), found_of("wide", lost=0, ms=2.0, size=4000)
    close = found_of("close", lost=0, ms=2.05, size=4000)
    far = found_of("far", lost=9, ms=3.0, size=9000)
    on, near = contenders([small, wide, close, far], "host", ())
    assert (sorted(on), near) == (["small", "wide"], ["close"])
    # a candidate that was timed while the machine was twice as slow is held against the teacher of that time
    slow = found_of("far", lost=0, ms=3.0, size=4000, teacher_ms=8.0)
    assert "far" in contenders([small, wide, slow], "host", ())[0]
    untimed = [
        found_of(name, lost=lost, ms=None, size=size)
        for name, lost, size in (("a", 0, 900), ("b", 5, 300), ("c", 9, 900))
    ]
    assert sorted(contenders(untimed, "host", ())[0]) == ["a", "b"]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--search", "0"), "--search: 0 is too few; expected a number from 1"),
        (("--search", "2", "--search-epochs", "0"), "--search-epochs: 0 is too few"),
        (("--search-epochs", "2"), "--search-epochs: there is no search"),
        (("--search-storage", "x.log"), "--search-storage: there is no search"),
        (("--search", "2", "--search-storage", "nosuch://x"), "--search-storage nosuch://x: it cannot be opened"),
        (("--time-budget", "soon"), "--time-budget: 'soon' is not understood"),
        (("--max-memory", "lots"), "--max-memory: 'lots' is not understood"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_trained(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    code, _, shown = run(capsys, "compress", *words)
    assert code == cli.USER_ERROR
    assert says in shown
    assert len(shown.strip().splitlines()) == 1
    assert not (folder / ".edgekd").exists()


def test_a_student_without_a_width_is_told_before_anything_is_trained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "edgekd.toml").write_text(RECIPE.replace('model = "resnet8"\nwidth = 4', 'model = "timm.resnet18"'))
    code, _, shown = run(capsys, "compress", "--search", "2")
    assert code == cli.USER_ERROR
    assert "timm.resnet18 has no width" in shown


def test_without_optuna_the_extra_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, shown = run(capsys, "compress", "--search", "2")
    assert code == cli.USER_ERROR
    assert "pip install 'edgekd[search]'" in shown
