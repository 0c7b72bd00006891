"""Distillation in one's own loop: plain torch modules, five lines, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trainings import hooks, own

from edgekd import Distiller
from edgekd.errors import ModelError, PartError, RecipeError
from edgekd.losses import kd
from edgekd.types import LossTerm, Part


class Plain(nn.Module):
    """A convolutional network as anybody writes one."""

    def __init__(self, width: int, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(images)).mean((2, 3)))
        return logits


@pytest.fixture(autouse=True)
def generator() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batches(count: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in which one quarter is bright, and which one that is."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(0, 4, (size,), generator=draw)
        images = 0.3 * torch.randn(size, 1, 8, 8, generator=draw)
        for at, label in enumerate(labels.tolist()):
            row, column = 4 * (label // 2), 4 * (label % 2)
            images[at, :, row : row + 4, column : column + 4] += (label + 1) / 2
        yield images, labels


def a_teacher() -> Plain:
    teacher = Plain(16, seed=1)
    optimizer = torch.optim.AdamW(teacher.parameters(), 0.01)
    for images, labels in batches(60):
        cross_entropy(teacher(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return teacher


def agreement(one: nn.Module, other: nn.Module) -> float:
    images = torch.cat([images for images, _ in batches(4)])
    with torch.no_grad():
        return float((one.eval()(images).argmax(1) == other.eval()(images).argmax(1)).float().mean())


# ---------------------------------------------------------------- five lines


@pytest.mark.parametrize(
    "losses", [["kd"], ["kd", "srd"], [{"name": "kd", "weight": 0.9, "temperature": 2.0}, "ce"], ["auto", "dist"]]
)
def test_ones_own_loop_in_five_lines(losses: list[Any]) -> None:
    teacher, student = a_teacher().train(), Plain(6, seed=2)
    before = copy.deepcopy(teacher.state_dict())
    names = set(student.state_dict())
    losses_seen = []
    probe = next(batches(1))[0]

    with Distiller(teacher, student, probe, losses) as distiller:
        optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 0.01)
        for images, labels in batches(60):
            loss = distiller(images, labels=labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses_seen.append(float(loss.detach()))
            assert distiller.logits is not None
            assert distiller.logits.shape == (len(labels), 4)
            assert not distiller.logits.requires_grad
            assert student.training

    assert losses_seen[-1] < losses_seen[0] - 0.3
    assert agreement(student, teacher) > 0.8
    assert not hooks(teacher)
    assert not hooks(student)
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(student.state_dict()) == names


def test_its_parameters_are_those_of_the_projectors_alone() -> None:
    teacher, student = Plain(16), Plain(6)
    plain = Distiller(teacher, student, torch.randn(8, 1, 8, 8), ["kd"])
    assert not list(plain.parameters())
    assert not plain.state_dict()
    assert plain.correspondence is None
    pairs = [["stem.0", "stem.0"], ["body", "body"]]
    distiller = Distiller(teacher, student, torch.randn(8, 1, 8, 8), [{"name": "hint", "pairs": pairs}])
    given = {id(parameter) for network in (teacher, student) for parameter in network.parameters()}
    shapes = sorted(tuple(parameter.shape) for parameter in distiller.parameters())
    assert shapes == [(16,), (16, 6), (32,), (32, 12)]
    assert not given & {id(parameter) for parameter in distiller.parameters()}
    assert {id(module) for module in distiller.modules()}.isdisjoint(id(module) for module in student.modules())
    for each in (plain, distiller):
        each.close()
    assert not hooks(student)


def test_auto_that_compares_nothing_warns() -> None:
    class Reader(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, width, batch_first=True), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.rnn(x)[0][:, -1])
            return logits

    with pytest.warns(UserWarning, match="outputs alone are compared: of recurrent networks no layers are"):
        Distiller(Reader(16), Reader(8), torch.randn(8, 5, 4), ["kd", "auto"]).close()


def test_looking_at_the_networks_changes_nothing() -> None:
    teacher, student = Plain(16).train(), Plain(6).train()
    student.stem.eval()
    before = copy.deepcopy(student.state_dict())
    with Distiller(teacher, student, torch.randn(8, 1, 8, 8), ["srd"]):
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
        assert [student.training, student.stem.training, student.body.training] == [True, False, True]
        assert not teacher.training


def test_the_loss_is_the_one_of_the_formula_for_any_batch() -> None:
    teacher, student = Plain(16).eval(), Plain(6, seed=3).eval()
    with Distiller(teacher, student, torch.randn(8, 1, 8, 8), [{"name": "kd", "weight": 0.5}]) as distiller:
        for size in (8, 3, 1):
            images = torch.randn(size, 1, 8, 8)
            torch.testing.assert_close(distiller(images), 0.5 * kd(student(images), teacher(images)))


def test_a_batch_under_autocast() -> None:
    with Distiller(Plain(16), Plain(6), torch.randn(8, 1, 8, 8), ["kd", "srd", "similarity"]) as distiller:
        images = torch.randn(8, 1, 8, 8)
        whole = distiller(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = distiller(images)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, whole, rtol=0.05, atol=0.05)
        half.backward()


# ---------------------------------------------------------------- other ways to call a network


@dataclass
class Answer:
    """What libraries of transformers return."""

    logits: Tensor
    loss: Tensor | None = None


class Reader(nn.Module):
    """Tokens and a mask, by keyword."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(20, 8), nn.GRU(8, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Answer:
        states, _ = self.rnn(self.embed(input_ids))
        weights = attention_mask.to(states.dtype)[..., None]
        return Answer(self.head((states * weights).sum(1) / weights.sum(1)))


def test_named_inputs_a_mask_and_answers_that_hold_logits() -> None:
    torch.manual_seed(0)
    teacher, student = Reader(12), Reader(6)
    ids, mask = torch.randint(0, 20, (8, 5)), torch.ones(8, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    probe = {"input_ids": ids, "attention_mask": mask}
    losses: list[Any] = ["kd", {"name": "cosine", "pairs": [["rnn", "rnn"]]}]
    with Distiller(teacher, student, probe, losses) as distiller:
        before = distiller(**probe)
        other = torch.where(mask.bool(), ids, (ids + 1) % 20)  # padding counts for nothing
        torch.testing.assert_close(distiller(input_ids=other, attention_mask=mask), before)
        before.backward()
        weight = student.rnn.weight_hh_l0
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
    assert not hooks(student)


class TwoInputs(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, width), nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        values: Tensor = self.head(torch.relu(self.one(one) + self.two(two)))
        return values


def test_two_inputs_and_values() -> None:
    teacher, student = TwoInputs(8), TwoInputs(4)
    inputs = torch.randn(6, 3), torch.randn(6, 2)
    with Distiller(teacher, student, inputs, ["mse"], task="regression") as distiller:
        torch.testing.assert_close(distiller(*inputs), (student(*inputs) - teacher(*inputs)).square().mean())
    labelled = {"name": "mse", "to": "labels", "weight": 2.0}
    labels = torch.randn(6, 2)
    with Distiller(teacher, student, inputs, [labelled], task="regression") as distiller:
        expected = 2 * (student(*inputs) - labels).square().mean()
        torch.testing.assert_close(distiller(*inputs, labels=labels), expected)


def test_a_loss_of_ones_own() -> None:
    def gap(student_logits: Tensor, teacher_logits: Tensor, *, power: float = 1.0) -> Tensor:
        return (student_logits - teacher_logits).abs().pow(power).mean()

    teacher, student, images = Plain(8).eval(), Plain(6, seed=4).eval(), torch.randn(5, 1, 8, 8)
    with Distiller(teacher, student, images, [own(gap, power=2.0), LossTerm(Part("kd"), 0.5)]) as distiller:
        both = student(images), teacher(images)
        torch.testing.assert_close(distiller(images), (both[0] - both[1]).square().mean() + 0.5 * kd(*both))


# ---------------------------------------------------------------- what cannot be used


def test_networks_that_do_not_fit_are_refused() -> None:
    images = torch.randn(8, 1, 8, 8)
    with pytest.raises(ModelError, match="the student has 4 outputs, and of its teachers 7"):
        Distiller(Plain(8, 7), Plain(6), images)
    with pytest.raises(ModelError, match=r"the student returns a tuple; expected logits"):
        Distiller(Plain(8), nn.Sequential(nn.Flatten(), nn.LSTM(64, 4)), images)


def test_losses_that_cannot_be_used_are_refused() -> None:
    teacher, student, images = Plain(8), Plain(6), torch.randn(8, 1, 8, 8)
    for losses, problem, message in (
        (["kd", "srdd"], PartError, r"loss(es)?\[1\]: there is no 'srdd'.*'srd'"),
        ([{"name": "kd", "temprature": 1.0}], PartError, r"loss(es)?\[0\]: unknown option 'temprature'"),
        ([{"nome": "kd"}], RecipeError, r"losses\[0\]: 'name' is missing"),
        ([{"name": "kd", "weight": -1.0}], RecipeError, r"losses\[0\].weight: -1.0 does not fit"),
        ([], RecipeError, "no loss to distil with"),
        (["mse"], PartError, "compares values, and the outputs of classification"),
        ([{"name": "hint", "pairs": [["bodi", "body"]]}], ModelError, "'bodi'.*did you mean 'body'"),
    ):
        with pytest.raises(problem, match=message):
            Distiller(teacher, student, images, losses)
    with pytest.raises(PartError, match=r"there is no 'clasification' in tasks.*'classification'"):
        Distiller(teacher, student, images, task="clasification")
    with Distiller(teacher, student, images, ["ce"]) as distiller, pytest.raises(PartError, match=r"ce.* needs labels"):
        distiller(images)
    assert not hooks(teacher)
    assert not hooks(student)
