"""The tasks: what losses see, how outputs are judged, which labels are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, r2_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid

from edgekd import data, plugins
from edgekd.data.samples import Reading, wrapped
from edgekd.data.splits import Pool, array_pool, assemble
from edgekd.errors import DataError, ModelError
from edgekd.losses.ce import ce
from edgekd.losses.kd import kd
from edgekd.recipe import AUTO
from edgekd.types import Dataset, LabelForm, Part, Task, TensorSpec

RANDOM = np.random.default_rng(0)
NAMES = ("classification", "multilabel", "regression", "segmentation")


def made(name: str, **options: Any) -> Task:
    found: Task = plugins.build("tasks", Part(name, options))
    return found


def dataset(labels: np.ndarray, classes: tuple[str, ...], form: LabelForm) -> Dataset:
    """Labels beside inputs of noise."""
    x = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    return assemble(
        "mine", (TensorSpec("x", "float32", ("batch", 3)),), classes, array_pool({"x": x}, labels), None,
        images=False, seed=0, test_fraction=0.2, calibration=None, where="mine", form=form,
    )  # fmt: skip


def test_every_task_is_found_and_whole() -> None:
    assert set(plugins.names("tasks")) == set(NAMES)
    for name in NAMES:
        task = made(name)
        assert task.name == name
        for term in (task.label_loss, *task.losses):
            if term.part.name != AUTO:
                plugins.bind("losses", term.part)
        assert all(term.weight > 0 for term in task.losses)
        assert task.values == (task.labels == "values")
        assert task.dense == (task.labels == "maps")


# ---------------------------------------------------------------- rows


def test_rows_of_a_class_are_the_samples() -> None:
    output, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    rows, of_rows = made("classification").rows(output, labels)
    assert rows is output
    assert of_rows is labels
    values, targets = torch.randn(5, 2), torch.randn(5, 2)
    assert made("regression").rows(values, targets) == (values, targets)


def test_rows_of_several_labels_make_every_loss_binary() -> None:
    rows_of = made("multilabel").rows
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    labels = torch.from_numpy(RANDOM.integers(0, 2, (6, 4)))
    rows, of_rows = rows_of(student, labels)
    assert rows.shape == (24, 2)
    assert of_rows is not None
    assert of_rows.dtype == torch.int64
    binary = binary_cross_entropy_with_logits(student, labels.double())
    torch.testing.assert_close(cross_entropy(rows, of_rows), binary)
    torch.testing.assert_close(ce(rows, of_rows), binary.float())
    # kd is the divergence of the two Bernoulli distributions of every label, softened
    temperature = 3.0
    p, q = (torch.sigmoid(z / temperature) for z in (teacher, student))
    wanted = p * (p.log() - logsigmoid(student / temperature)) + (1 - p) * ((1 - p) / (1 - q)).log()
    found = kd(rows, rows_of(teacher, labels)[0], temperature=temperature)
    torch.testing.assert_close(found.double(), wanted.mean() * temperature**2, atol=1e-5, rtol=1e-5)
    assert rows_of(student, None)[1] is None


def test_rows_of_mixed_labels_are_probabilities() -> None:
    student, held = torch.randn(6, 4), torch.rand(6, 4)
    rows, of_rows = made("multilabel").rows(student, held)
    assert of_rows is not None
    torch.testing.assert_close(ce(rows, of_rows), binary_cross_entropy_with_logits(student, held))


@pytest.mark.parametrize("grid", [(4, 5), (7,)], ids=["pixels", "frames"])
def test_rows_of_a_map_are_its_points_without_the_ignored_ones(grid: tuple[int, ...]) -> None:
    task = made("segmentation", ignore_index=9)
    output = torch.randn(3, 6, *grid)
    labels = torch.from_numpy(RANDOM.integers(0, 6, (3, *grid)))
    labels[0, 0], labels[2] = 9, 9
    rows, of_rows = task.rows(output, labels)
    assert of_rows is not None
    assert len(rows) == len(of_rows) == int((labels != 9).sum())
    torch.testing.assert_close(ce(rows, of_rows), cross_entropy(output, labels, ignore_index=9))
    assert task.rows(output, None)[0].shape == (labels.numel(), 6)
    with pytest.raises(ModelError, match="Let the model end with an interpolation"):
        task.rows(output[..., :-1], labels)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_through_rows(name: str) -> None:
    output = torch.randn(2, 3, *((4, 4) if name == "segmentation" else ()), requires_grad=True)
    (gradient,) = torch.autograd.grad(made(name).rows(output, None)[0].square().sum(), output)
    assert bool((gradient != 0).all())


# ---------------------------------------------------------------- judging


def test_a_class_is_right_or_wrong() -> None:
    task, labels = made("classification"), RANDOM.integers(0, 5, 200)
    output = RANDOM.normal(size=(200, 7)).astype(np.float32)
    output[np.arange(200), labels] += 1
    scores, decided = task.scores(output, labels), task.decisions(output)
    assert set(scores) == {0.0, 1.0}
    assert scores.mean() == pytest.approx(accuracy_score(labels, decided))
    there = np.union1d(labels, decided)
    assert task.metrics(output, labels)["macro F1"] == pytest.approx(
        f1_score(labels, decided, average="macro", labels=there, zero_division=0)
    )


def test_labels_are_judged_one_by_one() -> None:
    task, labels = made("multilabel"), RANDOM.integers(0, 2, (100, 6))
    output = (RANDOM.normal(size=(100, 6)) + 2 * labels - 1).astype(np.float32)
    decided = output >= 0
    scores = task.scores(output, labels)
    assert scores.shape == (100,)
    assert scores.mean() == pytest.approx((decided == labels).mean())
    found = task.metrics(output, labels)
    assert found["macro F1"] == pytest.approx(f1_score(labels, decided, average="macro"))
    assert found["exact match"] == pytest.approx(accuracy_score(labels, decided))
    nothing = task.metrics(np.full((3, 2), -1.0), np.zeros((3, 2), np.int64))
    assert nothing == {"exact match": 1.0}, "F1 of labels that never come up is no number"


def test_values_are_judged_by_what_they_explain() -> None:
    task = made("regression")
    labels = (RANDOM.normal(size=(150, 3)) * (1, 10, 1000)).astype(np.float32)
    output = labels + (RANDOM.normal(size=(150, 3)) * (0.5, 5, 100)).astype(np.float32)
    scores = task.scores(output, labels)
    assert scores.shape == (150,)
    assert scores.mean() == pytest.approx(r2_score(labels, output))
    assert task.scores(labels, labels).mean() == 1
    mean = np.repeat(labels.mean(0, keepdims=True), 150, 0)
    assert task.scores(mean, labels).mean() == pytest.approx(0, abs=1e-6)
    found = task.metrics(output[:, :1], labels[:, :1])
    assert found["RMSE"] == pytest.approx(float(np.sqrt(((output - labels)[:, 0] ** 2).mean())), rel=1e-5)
    assert found["MAE"] == pytest.approx(float(np.abs(output - labels)[:, 0].mean()), rel=1e-5)
    with pytest.raises(DataError, match="value 1 is 4 in every sample"):
        task.scores(output[:, :2], np.stack([labels[:, 0], np.full(150, 4, np.float32)], 1))


def test_maps_are_judged_point_by_point() -> None:
    task = made("segmentation")
    labels = RANDOM.integers(0, 4, (10, 6, 6)).astype(np.uint8)
    output = RANDOM.normal(size=(10, 5, 6, 6)).astype(np.float32)
    np.put_along_axis(output, labels[:, None].astype(np.int64), 1.5, axis=1)
    labels[:, 0], labels[3] = 255, 255
    scores, decided = task.scores(output, labels), task.decisions(output)
    judged = labels != 255
    assert len(scores) == 9, "a sample of ignored points alone has no score"
    assert scores[0] == pytest.approx((decided == labels)[0, 1:].mean())
    wanted = jaccard_score(labels[judged], decided[judged], average="macro", labels=np.unique(decided[judged]))
    assert task.metrics(output, labels)["mIoU"] == pytest.approx(wanted)
    with pytest.raises(ModelError, match="grid of 3 × 6, the labels of 6 × 6"):
        task.scores(output[:, :, :3], labels)


def test_decided_maps_are_judged_as_the_outputs_they_came_from() -> None:
    task = made("segmentation")
    labels = RANDOM.integers(0, 4, (5, 6, 6))
    output = RANDOM.normal(size=(5, 4, 6, 6)).astype(np.float32)
    decided = task.decisions(output)
    assert decided.dtype == np.uint8
    assert task.decisions(decided) is decided
    assert (task.scores(decided, labels) == task.scores(output, labels)).all()
    assert task.metrics(decided, labels) == task.metrics(output, labels)
    assert task.decisions(np.zeros((1, 300, 2), np.float32)).dtype == np.int32


# ---------------------------------------------------------------- labels

CLASSES = np.arange(60) % 3
FLAGS = RANDOM.integers(0, 2, (60, 3))
MAPS = RANDOM.integers(0, 3, (60, 4, 4)).astype(np.uint8)
VALUES = RANDOM.normal(size=(60, 2)).astype(np.float32)


def good(name: str) -> Dataset:
    """Data that a task takes."""
    abc = ("a", "b", "c")
    forms: dict[str, tuple[np.ndarray, tuple[str, ...], LabelForm]] = {
        "classification": (CLASSES, abc, "classes"),
        "multilabel": (FLAGS, abc, "flags"),
        "regression": (VALUES, abc[:2], "values"),
        "segmentation": (MAPS, abc, "maps"),
    }
    return dataset(*forms[name])


@pytest.mark.parametrize("of", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_task_takes_its_own_labels_alone(name: str, of: str) -> None:
    task, given = made(name), good(of)
    if name == of:
        task.check(given)
    elif {name, of} != {"segmentation", "multilabel"} or name == "multilabel":  # flags are maps of a grid too
        with pytest.raises(DataError, match=r"^mine: labels are .*\[task\] name"):
            task.check(given)


@pytest.mark.parametrize(
    ("name", "labels", "form", "told"),
    [
        ("classification", CLASSES - 1, "maps", "training labels name no class, the first is -1"),
        ("multilabel", FLAGS * 2, "flags", "labels are neither 0 nor 1, the first is 2"),
        ("multilabel", FLAGS[:, :2], "flags", "labels have 2 columns, but there are 3 names of labels"),
        ("segmentation", MAPS + 1, "maps", "points of training labels name no class, the first is 3"),
    ],
)
def test_wrong_labels_are_told(name: str, labels: np.ndarray, form: LabelForm, told: str) -> None:
    with pytest.raises(DataError) as caught:
        made(name).check(dataset(labels, ("a", "b", "c"), form))
    assert told in str(caught.value)


def test_an_ignored_number_is_no_class() -> None:
    with pytest.raises(DataError, match="ignore_index is 2, which is a class too: 'c'"):
        made("segmentation", ignore_index=2).check(good("segmentation"))
    with_holes = MAPS.astype(np.int64) - 1
    made("segmentation", ignore_index=-1).check(dataset(with_holes, ("a", "b"), "maps"))
    with pytest.raises(DataError, match=r"name no class, the first is -1.*ignore_index says"):
        made("segmentation").check(dataset(with_holes, ("a", "b"), "maps"))


def test_a_split_of_ones_own_is_looked_at_too() -> None:
    class Own:
        def __init__(self, labels: np.ndarray) -> None:
            self._inner = array_pool({"x": np.zeros((len(labels), 1), np.float32)}, labels).take(np.arange(60))

        def __len__(self) -> int:
            return 60

        batches = property(lambda self: self._inner.batches)

    given = good("regression")
    parts = {name: Own(FLAGS) for name in ("train", "calibration", "test")}
    mine = Dataset(given.name, given.inputs, given.classes, **parts, images=False, fingerprint="")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="labels are int64 of shape"):
        made("regression").check(mine)


# ---------------------------------------------------------------- reading labels for a task


def saved(path: Path, **arrays: np.ndarray) -> Part:
    np.savez(path / "data.npz", **arrays)  # type: ignore[arg-type]  # numpy types allow_pickle with the arrays
    return Part("npz", {"path": str(path / "data.npz")})


X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "labels", "dtype", "shape", "classes"),
    [
        ("classification", CLASSES, "int64", (), ("0", "1", "2")),
        ("multilabel", FLAGS.astype(bool), "int64", (3,), ("0", "1", "2")),
        ("multilabel", FLAGS.astype(np.float32), "int64", (3,), ("0", "1", "2")),
        ("regression", VALUES.astype(np.float64), "float32", (2,), ("y0", "y1")),
        ("regression", VALUES[:, 0], "float32", (1,), ("y",)),
        ("regression", CLASSES, "float32", (1,), ("y",)),
        ("segmentation", MAPS, "uint8", (4, 4), ("0", "1", "2")),
        (
            "segmentation",
            np.where(RANDOM.random(MAPS.shape) < 0.1, 255, MAPS).astype(np.uint16),
            "int64",
            (4, 4),
            ("0", "1", "2"),
        ),
    ],
)
def test_labels_of_a_file_are_read_as_the_task_takes_them(
    tmp_path: Path, name: str, labels: np.ndarray, dtype: str, shape: tuple[int, ...], classes: tuple[str, ...]
) -> None:
    found = data.load(saved(tmp_path, x=X, y=labels), 0, made(name))
    assert found.classes == classes
    (batch,) = found.test.batches([np.arange(len(found.test))])
    assert (str(batch.labels.dtype), batch.labels.shape) == (dtype, (12, *shape))
    assert found.notes == ()
    listed = [(torch.randn(4), label) for label in labels]
    again = wrapped(listed, "mine", Reading(0, labels=made(name).labels))
    assert again.classes == classes
    assert next(iter(again.train.batches([np.arange(2)]))).labels.shape == (2, *shape)


def test_label_maps_of_images_may_be_images(tmp_path: Path) -> None:
    from PIL import Image

    def sample(i: int) -> tuple[Any, Any]:
        return Image.fromarray(np.full((4, 4, 3), i, np.uint8)), Image.fromarray(MAPS[i])

    found = wrapped([sample(i) for i in range(60)], "mine", Reading(0, labels="maps"))
    (batch,) = found.train.batches([np.arange(3)])
    assert found.images
    assert batch.labels.shape == batch.inputs["image"].shape[:3]
    with pytest.raises(DataError, match=r"label of sample 59 has shape \(2, 2\).*images and their label maps together"):
        wrapped(
            [*map(sample, range(59)), (sample(59)[0], np.zeros((2, 2), np.uint8))], "mine", Reading(0, labels="maps")
        )


def test_names_and_the_recipes_word_come_first(tmp_path: Path) -> None:
    part = saved(tmp_path, x=X, y=FLAGS, classes=np.array(["sun", "rain", "snow"]))
    assert data.load(part, 0, made("multilabel")).classes == ("sun", "rain", "snow")
    told = Part("npz", dict(part.options) | {"labels": "values"})
    assert data.load(told, 0, made("regression")).classes == ("sun", "rain", "snow")
    with pytest.raises(DataError, match="there are 3 names for 1 columns"):
        data.load(saved(tmp_path, x=X, y=VALUES[:, 0], classes=np.array(["a", "b", "c"])), 0, made("regression"))


@pytest.mark.parametrize(
    ("name", "labels", "told"),
    [
        ("classification", VALUES[:, 0], 'Set [task] name = "regression" where they are values to predict'),
        ("classification", FLAGS, 'or say with [task] name what they are: "multilabel"'),
        ("classification", MAPS, 'Say with [task] name what they are: "multilabel", "segmentation"'),
        ("multilabel", CLASSES, "expected samples × labels, as numbers"),
        ("multilabel", FLAGS + 1, "labels are neither 0 nor 1, the first is 2"),
        ("regression", MAPS, "expected one number a sample, or samples × values"),
        ("regression", np.array(["a"] * 60), "labels are <U1 of shape (60, 1)"),
        ("regression", np.where(VALUES > 0, np.inf, VALUES), "labels are NaN or infinite"),
        ("regression", np.ones((60, 1)), "the value 'y' is 1 in every training sample"),
        ("segmentation", CLASSES, "expected an integer class index for each point"),
        ("segmentation", MAPS * 0, "there is 1 class (0)"),
        ("segmentation", MAPS.astype(np.int64) - 1, "the first is -1"),
    ],
)
def test_labels_that_a_task_does_not_take(tmp_path: Path, name: str, labels: np.ndarray, told: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(saved(tmp_path, x=X, y=labels), 0, made(name))
    assert told in str(caught.value)


def test_what_is_hard_to_learn_is_noted(tmp_path: Path) -> None:
    (note,) = data.load(saved(tmp_path, x=X, y=VALUES[:, 0] * 50 + 300), 0, made("regression")).notes
    assert re.search(
        r"the value 'y' has mean (2\d\d|3\d\d)\S* and standard deviation [45]\d.*: a network learns \(y - ", note
    )
    flags = FLAGS.copy()
    flags[:, 1] = 0
    notes = data.load(saved(tmp_path, x=X, y=flags), 0, made("multilabel")).notes
    assert notes == ("1 labels have no training sample: '1'", "1 labels have no test sample: '1'")


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    def print_of(labels: np.ndarray) -> str:
        return data.load(saved(tmp_path, x=X, y=labels), 0, made("regression")).fingerprint

    assert print_of(VALUES) == print_of(VALUES)
    changed = VALUES.copy()
    changed[7, 1] += 1e-4
    assert print_of(changed) != print_of(VALUES)
    assert print_of(VALUES.reshape(60, 1, 2)[:, 0]) == print_of(VALUES)


def test_a_part_that_does_not_ask_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
def asks(seed, *, labels):
    assert labels == "flags"
    return [([float(i)], [i % 2, 1]) for i in range(40)]
def quiet(seed, labels="mine"):
    assert labels == "mine"
    return [([float(i)], i % 2) for i in range(40)]
"""
    (tmp_path / "own_labels_here.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert data.load(Part("own_labels_here:quiet"), 0, made("classification")).classes == ("0", "1")
    assert data.load(Part("own_labels_here:quiet"), 0).classes == ("0", "1")
    assert data.load(Part("own_labels_here:asks"), 0, made("multilabel")).classes == ("0", "1")
    with pytest.raises(DataError, match="labels are int64 of shape"):
        data.load(Part("digits"), 0, made("multilabel"))


def test_streamed_labels_are_known_without_reading() -> None:
    from edgekd.data.streams import StreamedSplit

    class Never:
        inputs = (TensorSpec("x", "float32", ("batch", 3)),)

        def read(self, row: int) -> dict[str, np.ndarray]:
            raise AssertionError(row)

    def take(rows: np.ndarray) -> StreamedSplit:
        return StreamedSplit(Never(), CLASSES, rows, 0)

    given = assemble(
        "mine", Never.inputs, ("a", "b", "c"), Pool(CLASSES, [bytes([i]) for i in range(60)], take), None,
        images=False, seed=0, test_fraction=0.2, calibration=None, where="mine",
    )  # fmt: skip
    made("classification").check(given)


def test_a_users_own_task() -> None:
    """What docs call a task of one's own: any callable that returns a Task."""
    import dataclasses

    def halves(*, of: float = 2.0) -> Task:
        def scores(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
            return made("classification").scores(output, labels) / of

        return dataclasses.replace(made("classification"), name="halves", scores=scores)

    task = halves()
    rows: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] = task.rows
    assert rows(torch.zeros(1, 2), None)[1] is None
    assert task.scores(np.eye(2), np.array([0, 1])).tolist() == [0.5, 0.5]
