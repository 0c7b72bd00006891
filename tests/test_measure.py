"""Rows of the report: what a task's figures become, and what stands where there are none."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from networks import NORMAL, Small, settled

from edgekd import measure, plugins
from edgekd.data.npz import npz
from edgekd.deploy import Source, Workshop
from edgekd.errors import DataError, PartError
from edgekd.measure import Examiner
from edgekd.recipe import TaskSpec
from edgekd.store import Store
from edgekd.types import Artifact, Dataset, Json, Part, Split, Stage, Task

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
