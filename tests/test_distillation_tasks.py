"""Tasks of every kind, and several of them in one student: each with its own data, teachers and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import (
    AUGMENT,
    HINTON,
    OPTIONS,
    Interrupted,
    Told,
    accuracy,
    handwritten,
    history,
    hooks,
    labels,
    network,
    of_images,
    own,
    state,
    task,
    two_heads,
    two_input_network,
    two_inputs,
)
from varied_networks import Packed

from edgekd.data.arrays import ArraySplit
from edgekd.distillation import Lesson, Teacher, distill, distill_tasks, evaluate, loop, train
from edgekd.distillation.cache import MANIFEST
from edgekd.errors import ModelError, PartError, RecipeError
from edgekd.losses import ce
from edgekd.models.network import Network
from edgekd.types import Augment, Dataset, Json, LossTerm, Part, Split, TensorSpec

HEADS = {"digit": 10, "odd": 2}


def relabelled(
    data: Dataset, of: Callable[[np.ndarray, np.ndarray], np.ndarray], classes: tuple[str, ...], keep: int
) -> Dataset:
    """Some of the same images with other labels: of(images, digits)."""

    def split(which: Split) -> ArraySplit:
        batch = next(iter(which.batches([np.arange(min(keep, len(which)))])))
        made = of(batch.inputs["image"], batch.labels)
        return ArraySplit(batch.inputs, made, np.arange(len(made)))

    return replace(
        data, name="relabelled", classes=classes, fingerprint=f"{len(classes)} {keep}", train=split(data.train),
        calibration=split(data.calibration), test=split(data.test),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digit() -> Dataset:
    return handwritten()


@pytest.fixture(scope="module")
def odd(digit: Dataset) -> Dataset:
    """Fewer samples, so that its turns are fewer too."""
    return relabelled(digit, lambda _, label: label % 2, ("even", "odd"), 500)


def lessons(digit: Dataset, odd: Dataset) -> list[Lesson]:
    """One teacher for the digits, two for whether they are odd."""
    return [
        Lesson(digit, task(), [Teacher(network(digit, width=16, seed=1))], HINTON, "digit"),
        Lesson(
            odd, task(), [Teacher(network(odd, 12, 2, seed=2), 2.0), Teacher(network(odd, 14, 2, seed=3))],
            [LossTerm(Part("kd", {"temperature": 2.0})), LossTerm(Part("cosine"), 0.5, (("conv", "conv"),))], "odd",
        ),
    ]  # fmt: skip


def run(work: Path, given: list[Lesson], student: Network, say: Told | None = None, **changes: Any) -> dict[str, Json]:
    work.mkdir(exist_ok=True)
    options = replace(OPTIONS, epochs=changes.pop("epochs", 3), views=2)
    return distill_tasks(
        student, given, options, AUGMENT, seed=0, work=work, cache=work.parent / "cache", say=say or Told()
    )


# ---------------------------------------------------------------- several heads


def test_a_student_learns_two_tasks_from_teachers_of_each(digit: Dataset, odd: Dataset, tmp_path: Path) -> None:
    given = lessons(digit, odd)
    options = replace(OPTIONS, epochs=8, learning_rate=0.2, batch_size=64)
    for number, lesson in enumerate(given):
        for at, teacher in enumerate(lesson.teachers):
            work = tmp_path / f"{number} {at}"
            work.mkdir()
            train(
                teacher.network, lesson.data, options, Augment(), task=lesson.task, seed=0, work=work, say=Told()
            )  # fmt: skip
    student, told = two_heads(digit, HEADS), Told()
    meta = run(tmp_path / "s", given, student, told, epochs=8)
    assert accuracy(student, digit, "digit") > 0.6
    assert accuracy(student, odd, "odd") > 0.7
    steps = [-(-len(lesson.data.train) // OPTIONS.batch_size) for lesson in given]
    assert meta["steps"] == 8 * sum(steps)
    assert meta["samples"] == len(digit.train) + len(odd.train)
    assert len(told.of("epoch")) == 8
    losses: Any = meta["losses"]
    assert [term["name"] for term in losses["digit"]] == ["kd", "ce"]
    assert losses["odd"][1]["pairs"] == [["conv", "conv"]]
    assert len(list((tmp_path / "cache").glob(f"*/{MANIFEST}"))) == 3
    assert not hooks(student)


def test_each_task_has_as_many_turns_as_it_has_batches_and_its_own_data(
    digit: Dataset, odd: Dataset, tmp_path: Path
) -> None:
    turns: list[tuple[str, int]] = []

    def told(name: str) -> LossTerm:
        def loss(student_logits: Tensor, labels: Tensor) -> Tensor:
            assert student_logits.shape == (len(labels), HEADS[name])
            turns.append((name, len(labels)))
            return ce(student_logits, labels)

        return own(loss)

    given = [replace(each, terms=[told(str(each.head))]) for each in lessons(digit, odd)]
    run(tmp_path / "s", given, two_heads(digit, HEADS), epochs=2)
    for name, data in (("digit", digit), ("odd", odd)):
        sizes = [size for found, size in turns if found == name]
        assert sum(sizes) == 2 * len(data.train)
    half = len(turns) // 2
    first, second = turns[:half], turns[half:]
    assert sorted(first) == sorted(second)
    assert [name for name, _ in first] != [name for name, _ in second]
    assert [name for name, _ in first] != sorted(name for name, _ in first)


@pytest.mark.parametrize(("kind", "stop"), [("epoch", 2), ("batch", 7)])
def test_a_multi_task_training_resumes_to_the_bit(
    digit: Dataset, odd: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stop: int
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run(tmp_path / "a" / "work", lessons(digit, odd), two_heads(digit, HEADS))
    monkeypatch.setattr(loop, "_SAY_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0.0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b" / "work", lessons(digit, odd), two_heads(digit, HEADS), Told(kind, stop))
    told = Told()
    run(tmp_path / "b" / "work", lessons(digit, odd), two_heads(digit, HEADS), told)
    assert len(told.of("resumed")) == 1
    assert state(tmp_path / "a" / "work") == state(tmp_path / "b" / "work")


def test_a_step_of_one_task_leaves_the_head_of_the_other_alone(digit: Dataset, tmp_path: Path) -> None:
    student = two_heads(digit, HEADS)
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    only = [Lesson(digit, task(), [Teacher(network(digit))], HINTON, "digit")]
    run(tmp_path / "s", only, student, epochs=1)
    after = student.module.state_dict()
    assert torch.equal(after["heads.odd.weight"], before["heads.odd.weight"])
    assert not torch.equal(after["heads.digit.weight"], before["heads.digit.weight"])


def test_what_does_not_fit_a_head_is_refused_before_training(digit: Dataset, odd: Dataset, tmp_path: Path) -> None:
    student, (first, second) = two_heads(digit, HEADS), lessons(digit, odd)
    for wrong, message in (
        (replace(first, head="digits"), r"no head 'digits'; it returns digit, odd.*'digit'\?"),
        (replace(first, head="odd"), "the student has 2 outputs, and the teacher 10, but digits has 10 classes"),
        (replace(first, head=None), r"the model returns dict"),
        (replace(first, teachers=[Teacher(student)]), r"the model returns dict"),
    ):
        with pytest.raises(ModelError, match=message):
            run(tmp_path / "s", [wrong, second], student)
    with pytest.raises(RecipeError, match="there is no teacher"):
        run(tmp_path / "s", [first, replace(second, teachers=[])], student)
    assert not list((tmp_path / "s").iterdir())
    assert not hooks(student)


# ---------------------------------------------------------------- other kinds of outputs


def _both(
    work: Path, name: str, data: Dataset, teacher: Network, student: Network, **options: Any
) -> tuple[np.ndarray, np.ndarray, dict[str, Json]]:
    """Scores of the student before and after it learnt from a teacher that learnt from labels."""
    kind = task(name)
    kind.check(data)
    made = replace(OPTIONS, **{"epochs": 20, "batch_size": 32, "learning_rate": 0.1} | options)
    (work / "t").mkdir()
    (work / "s").mkdir()
    meta = train(teacher, data, made, Augment(), task=kind, seed=0, work=work / "t", say=Told())
    assert history(meta)[-1]["loss"] < history(meta)[0]["loss"]
    before = kind.scores(evaluate(student, data.test), labels(data))
    meta = distill(
        student, teacher, data, kind.losses, made, Augment(), task=kind, seed=0, work=work / "s",
        cache=work / "cache", say=Told(),
    )  # fmt: skip
    return before, kind.scores(evaluate(student, data.test), labels(data)), meta


def test_values_are_learned_and_distilled(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    plain = two_inputs(300)
    inputs = next(iter(plain.train.batches([np.arange(300)]))).inputs
    wanted = np.stack([inputs["sensor"].sum(1), inputs["tokens"].mean(1) / 4], 1)
    wanted = (wanted + 0.1 * draw.normal(size=wanted.shape)).astype(np.float32)
    data = two_inputs(300, wanted, ("sum", "mean"))
    teacher, student = two_input_network(0, 2), two_input_network(1, 2)
    before, after, meta = _both(tmp_path, "regression", data, teacher, student, learning_rate=0.02)
    assert before.mean() < 0.2
    assert after.mean() > 0.8
    losses: Any = meta["losses"]
    assert [term["name"] for term in losses["student"]] == ["mse", "mse"]
    with pytest.raises(PartError, match="compares class logits, and the outputs of regression are values"):
        distill(
            student, teacher, data, HINTON, OPTIONS, Augment(), task=task("regression"), seed=0,
            work=tmp_path, cache=None, say=Told(),
        )  # fmt: skip


def test_several_labels_are_learned_and_distilled(tmp_path: Path) -> None:
    plain = two_inputs(300)
    inputs = next(iter(plain.train.batches([np.arange(300)]))).inputs
    flags = np.stack([inputs["sensor"][:, 0] > 0, inputs["tokens"][:, 0] > 6], 1).astype(np.int64)
    data = two_inputs(300, flags, ("up", "late"))
    before, after, _ = _both(tmp_path, "multilabel", data, two_input_network(0, 2), two_input_network(1, 2))
    assert before.mean() < 0.7
    assert after.mean() > 0.8


def test_points_of_a_grid_are_learned_and_distilled(digit: Dataset, tmp_path: Path) -> None:
    def ink(image: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Bright, dark, and a border that counts for nothing."""
        found = (image[..., 0] > 100).astype(np.int64)
        found[:, 0] = 255
        return found

    data = relabelled(digit, ink, ("dark", "bright"), 200)
    before, after, _ = _both(
        tmp_path, "segmentation", data, of_images(lambda: nn.Conv2d(1, 2, 3, padding=1), digit, 0),
        of_images(lambda: nn.Conv2d(1, 2, 1), digit, 1),
    )  # fmt: skip
    assert before.mean() < 0.9
    assert after.mean() > 0.9


PADDED = (TensorSpec("ids", "int64", ("batch", 6)), TensorSpec("mask", "int64", ("batch", 6)))


def padded(value: int, longest: int = 6) -> Dataset:
    """Sentences of several lengths, with this value where there are no words."""
    draw, count = np.random.default_rng(0), 200
    label, lengths = draw.integers(0, 3, count), draw.integers(2, longest + 1, count)
    lengths[0] = 6
    mask = (np.arange(6) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask, label[:, None] * 5 + draw.integers(0, 5, (count, 6)), value)
    split = ArraySplit({"ids": ids, "mask": mask}, label, np.arange(count))
    return Dataset("padded", PADDED, tuple("abcde"), split, split, split, images=False, fingerprint="padded")


def test_features_as_long_as_the_longest_of_a_batch_are_not_kept(tmp_path: Path) -> None:
    """A packed sequence has another length in each batch: its features are asked for anew."""

    def made(width: int) -> Network:
        torch.manual_seed(width)
        return Network(Packed(width), PADDED, None)

    with torch.random.fork_rng():
        told = Told()
        meta = distill(
            made(6), made(12), padded(0, 3), [LossTerm(Part("kd")), LossTerm(Part("cosine"), 1.0, (("rnn", "rnn"),))],
            replace(OPTIONS, batch_size=20, learning_rate=0.2), Augment(), task=task(), seed=0, work=tmp_path,
            cache=tmp_path / "cache", say=told,
        )  # fmt: skip
    assert history(meta)[-1]["loss"] < history(meta)[0]["loss"]
    assert any("'rnn'" in str(note["text"]) and "not kept" in str(note["text"]) for note in told.of("note"))
    assert not list((tmp_path / "cache").glob("*/rnn*"))


def test_a_masked_sequence_is_distilled_by_its_features(tmp_path: Path) -> None:
    """Padding is told by an input named mask: what stands there changes nothing."""

    class Sequence(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.rnn, self.head = (
                nn.Embedding(20, 8),
                nn.GRU(8, width, batch_first=True),
                nn.Linear(width, 5),
            )

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            states = self.rnn(self.embed(ids))[0]
            weights = mask.to(states.dtype)[..., None]
            logits: Tensor = self.head((states * weights).sum(1) / weights.sum(1))
            return logits

    def made(width: int) -> Network:
        torch.manual_seed(width)
        return Network(Sequence(width), PADDED, None)

    with torch.random.fork_rng():
        results = []
        for value in (19, 7):
            work = tmp_path / str(value)
            work.mkdir()
            student = made(6)
            distill(
                student, made(12), padded(value), [LossTerm(Part("cosine"), 1.0, (("rnn", "rnn"),))],
                replace(OPTIONS, epochs=2, batch_size=50), Augment(), task=task(), seed=0, work=work, cache=None,
                say=Told(),
            )  # fmt: skip
            results.append(student.module.state_dict())
    for name in ("rnn.weight_hh_l0", "rnn.weight_ih_l0"):
        torch.testing.assert_close(results[0][name], results[1][name])
