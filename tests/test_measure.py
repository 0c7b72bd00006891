"""Rows of the report: what a task's figures become, and what stands where there are none."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import NORMAL, Small, settled

from edgekd import deploy, measure, plugins, target
from edgekd.data.npz import npz
from edgekd.deploy import Source, Workshop, int8
from edgekd.errors import DataError, PartError
from edgekd.measure import Examiner
from edgekd.recipe import TaskSpec
from edgekd.store import Store
from edgekd.types import Arrays, Artifact, Backend, Dataset, Json, Part, Split, Stage, Task

RANDOM = np.random.default_rng(0)


def made(name: str) -> Task:
    found: Task = plugins.build("tasks", Part(name))
    return found


class Heard:
    """A `Say` that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Json]]] = []

    def __call__(self, event: str, /, **fields: Json) -> None:
        self.events.append((event, fields))


def examiner(task: Task, teacher: np.ndarray, truth: np.ndarray, say: Any = None) -> Examiner:
    split: Any = None
    return Examiner(split, truth, task, task.scores(teacher, truth), task.decisions(teacher), say or Heard())


def test_a_row_has_the_tasks_figures() -> None:
    heard = Heard()
    truth = RANDOM.integers(0, 2, (40, 3))
    teacher, student = (RANDOM.normal(size=(40, 3)) + 2 * truth - 1 for _ in range(2))
    row = examiner(made("multilabel"), teacher, truth, heard).row(student, id="v", missing={"energy_mj": "none"})
    assert row.accuracy is not None
    assert row.drop is not None
    assert row.accuracy.value == pytest.approx(((student >= 0) == truth).mean())
    assert row.drop.value == pytest.approx(((teacher >= 0) == truth).mean() - row.accuracy.value)
    assert row.agreement == pytest.approx(((teacher >= 0) == (student >= 0)).mean())
    assert set(row.metrics) == {"macro F1", "exact match"}
    assert row.missing == {"energy_mj": "none"}
    assert heard.events == [("measured", {"id": "v", "metric": "label accuracy", "accuracy": row.accuracy.value})]


def test_values_do_not_agree_and_the_row_says_why() -> None:
    truth = RANDOM.normal(size=(40, 1)).astype(np.float32)
    row = examiner(made("regression"), truth, truth).row(truth + 0.1, id="v", missing={})
    assert row.agreement is None
    assert "never the same" in row.missing["agreement"]
    assert row.drop is not None
    assert row.drop.value > 0


def test_a_row_without_outputs_says_why() -> None:
    truth = np.arange(6) % 3
    row = examiner(made("classification"), np.eye(3)[truth], truth).row("it overflows", id="v", missing={"macs": "why"})
    assert (row.accuracy, row.drop, row.agreement, row.metrics) == (None, None, None, {})
    assert row.missing == {"macs": "why", **dict.fromkeys(("accuracy", "drop", "agreement"), "it overflows")}


@pytest.mark.parametrize(
    ("scores", "error", "told"),
    [
        (np.ones((6, 2)), PartError, "its scores of 6 samples have the shape (6, 2)"),
        (np.ones(7), PartError, "have the shape (7,)"),
        (np.full(6, np.nan), PartError, "or are not finite"),
        (np.ones(0), DataError, "no test sample has anything to judge"),
    ],
)
def test_scores_of_a_users_task_are_checked(scores: np.ndarray, error: type[Exception], told: str) -> None:
    truth = np.arange(6) % 3
    whole = examiner(made("classification"), np.eye(3)[truth], truth)
    odd = dataclasses.replace(whole, task=dataclasses.replace(whole.task, scores=lambda output, labels: scores))
    with pytest.raises(error) as caught:
        odd.row(np.eye(3)[truth], id="v", missing={})
    assert told in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Subject:
    data: Dataset
    task: Task
    spec: TaskSpec


def test_networks_are_held_against_the_first_teacher(tmp_path: Any) -> None:
    images = RANDOM.integers(0, 256, (100, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "data.npz", image=images, y=np.arange(100) % 5)
    data = npz(0, path=str(tmp_path / "data.npz"))

    def source(seed: int) -> Source:
        torch.manual_seed(seed)
        return Source(settled(Small(), data.inputs, NORMAL), Artifact("weights", "0", tmp_path))

    sources: dict[Stage, Source] = {"teacher": source(0), "student": source(1)}
    shop = Workshop(Store(tmp_path / "store", Heard()), data, True, None, Heard())
    task = made("classification")
    held, (teacher, student) = measure.weights_rows(sources, shop, task)
    split: Split = held.test
    assert len(held.scores) == len(held.decisions) == len(split) == 20
    assert teacher.drop is not None
    assert (teacher.drop.value, teacher.agreement) == (0, 1)
    assert student.agreement is not None
    assert student.agreement < 1
    spec = TaskSpec(None, Part("classification"), Part("npz"), (), None)
    found: Any = measure.task_figures(Subject(data, task, spec), [sources["teacher"]], sources["student"].network)
    assert (found["metric"], found["head"]) == ("accuracy", None)
    assert teacher.accuracy is not None
    assert found["teachers"][0]["accuracy"] == dataclasses.asdict(teacher.accuracy)
    assert found["student"]["agreement"] == student.agreement
    assert student.drop is not None
    assert found["student"]["drop"] == dataclasses.asdict(student.drop)


@dataclasses.dataclass
class Slow:
    """A FAKE session that takes as long as its file says."""

    seconds: float
    runtime: str = "fake"
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        return {"logits": np.zeros((1, 2), np.float32)}

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(("milliseconds", "best"), [((2, 8), 0), ((8, 2), 1), ((8, 8, 2), 2)])
def test_of_several_files_the_fastest_is_told(
    milliseconds: tuple[int, ...], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_one_sample", lambda source, shop: {"x": np.zeros((1, 2), np.float32)})
    backend = Backend("fake", lambda: None, lambda *_: Path(), lambda file, threads: Slow(float(file.stem) / 1e3))
    files = [Path(f"{each}.onnx") for each in milliseconds]
    nothing: Any = None
    shop = Workshop(nothing, nothing, True, None, Heard())
    index, told = measure.fastest(backend, files, nothing, shop=shop, threads=1, quick=True)
    assert index == best
    assert told.startswith(f"of {len(files)} sets of layers in float that hold, it ")
    assert ("none is faster" in told) == (best == 0)


def choice(monkeypatch: pytest.MonkeyPatch, kept: dict[str, tuple[bool, float]], timed: Any) -> int8.Mixed | None:
    """What `deploy` takes of sets of layers (joined by spaces) that hold or not, with such a drop on all samples."""
    sets: list[Json] = [{"layers": [*name.split()], "macs": 1 / len(name)} for name in kept]
    found: dict[str, Json] = {"mixed": {"mixes": sets, "why": ["it was so"]}}

    def graph(name: str) -> deploy.Graph:
        within, drop = kept[name]
        methods: list[Json] = [{"kept": True, "within": within, "expected_drop": drop}]
        artifact = Artifact("int8", name, Path(), {"methods": methods})
        return deploy.Graph("student-int8-mixed", "quantized", "int8", artifact, Path(name), Path(name), None, ())

    monkeypatch.setattr(int8, "_quantized", lambda shop, target, before, source, layers: graph(" ".join(layers)))
    artifact = Artifact("int8", "", Path(), found)
    plain = deploy.Graph("student-int8", "quantized", "int8", artifact, Path(), Path(), None, ())
    backend: Any = Backend("fake", lambda: None, lambda *_: Path(), lambda file, threads: Slow(0.0))
    nothing: Any = None
    return int8._mixed(nothing, target.load("host"), backend, plain, plain, nothing, timed)


def test_of_sets_of_float_layers_the_fastest_that_holds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def timed(backend: Any, files: Any, source: Any) -> tuple[int, str]:
        asked.append([file.name for file in files])
        return 1, "it is the fastest"

    kept = {"a": (False, 0.02), "a b": (True, 0.001), "a c dd": (True, 0.002)}
    found = choice(monkeypatch, kept, timed)
    assert found is not None
    assert asked == [["a b", "a c dd"]], "only those that hold are timed"
    assert found.layers == ("a", "c", "dd")
    assert found.ready.notes[-1] == "student-int8-mixed has a, c, dd in float: it was so; it is the fastest"
    elsewhere = choice(monkeypatch, kept, None)
    assert elsewhere is not None
    assert elsewhere.layers == ("a", "c", "dd"), "where nothing can be timed: fewest multiply-accumulates in float"
    alone = choice(monkeypatch, {"a": (False, 0.02), "a b": (True, 0.001)}, timed)
    assert alone is not None
    assert (alone.layers, len(asked)) == (("a", "b"), 1)
    none = choice(monkeypatch, {"a": (False, 0.03), "a b": (False, 0.02)}, timed)
    assert none is not None
    assert none.layers == ("a", "b")
    assert "no set of layers in float is within the limit" in none.ready.notes[-1]
    assert choice(monkeypatch, {}, timed) is None
