"""The trainer: what it learns, what it leaves alone, what it refuses, and that it resumes to the bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import (
    AUGMENT,
    FEATURES,
    HINTON,
    OPTIONS,
    Interrupted,
    Streamed,
    Told,
    accuracy,
    history,
    hooks,
    network,
    own,
    small,
    state,
    task,
    taught,
    two_input_network,
    two_inputs,
)
from trainings import handwritten as digits

from edgekd.data.arrays import ArraySplit
from edgekd.distillation import checkpoint, distill, evaluate, loop, train
from edgekd.errors import DataError, EdgekdError, ModelError, RecipeError, StoreError
from edgekd.losses.ce import ce
from edgekd.losses.kd import kd
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.types import Augment, Dataset, Json, LossTerm, Part, Preprocessing, TrainOptions


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits()


def folder(tmp_path: Path, name: str) -> Path:
    made = tmp_path / name
    made.mkdir()
    return made


def trained(
    network: Network, data: Dataset, work: Path, say: Told | None = None, options: TrainOptions = OPTIONS,
    augment: Augment = AUGMENT,
) -> dict[str, Json]:  # fmt: skip
    """Train on the labels."""
    return train(network, data, options, augment, task=task(), seed=0, work=work, say=say or Told())


# ---------------------------------------------------------------- it learns


def test_a_student_learns_from_labels_and_from_a_teacher(data: Dataset, tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=12, learning_rate=0.2, batch_size=64)
    teacher, told = network(data, width=48), Told()
    meta = trained(teacher, data, folder(tmp_path, "t"), told, options, Augment())
    assert accuracy(teacher, data) > 0.85
    assert len(history(meta)) == meta["epochs"] == 12
    assert meta["precision"] == "fp32"
    assert [row["epoch"] for row in told.of("epoch")] == list(range(1, 13))
    last = told.of("epoch")[-1]
    assert {"step", "epoch", "of", "loss", "learning_rate", "samples_per_s", "eta_s"} <= last.keys()
    assert last["step"] == "train"
    assert last["eta_s"] == 0

    # on the teacher's outputs alone, without labels: the student comes to agree with the teacher
    student = network(data, width=32, seed=1)
    before = np.mean(evaluate(student, data.test).argmax(1) == evaluate(teacher, data.test).argmax(1))
    taught(
        tmp_path / "s", student=student, teachers=teacher, terms=[LossTerm(Part("kd"))], options=options,
        augment=Augment(),
    )  # fmt: skip
    after = np.mean(evaluate(student, data.test).argmax(1) == evaluate(teacher, data.test).argmax(1))
    assert before < 0.4
    assert after > 0.85


def test_the_file_holds_what_the_network_holds(data: Dataset, tmp_path: Path) -> None:
    kept = network(data)
    trained(kept, data, tmp_path)
    fresh = network(data, seed=9)
    weights.load(tmp_path / "weights.safetensors", fresh.module)
    np.testing.assert_array_equal(evaluate(fresh, data.test), evaluate(kept, data.test))
    assert not kept.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.safetensors"]


def test_adamw_and_cosine(data: Dataset, tmp_path: Path) -> None:
    options = replace(OPTIONS, optimizer="adamw", schedule="cosine", learning_rate=0.02, epochs=8)
    losses = [row["loss"] for row in history(trained(network(data), data, tmp_path, None, options, Augment()))]
    assert losses[-1] < 0.8 * losses[0]


def test_label_smoothing_of_a_teacher_is_the_losss(data: Dataset, tmp_path: Path) -> None:
    losses = [
        history(
            trained(network(data), data, folder(tmp_path, str(part)), None, replace(OPTIONS, label_smoothing=part))
        )[-1]["loss"]
        for part in (0.0, 0.3)
    ]
    assert losses[1] > losses[0] + 0.03


# ---------------------------------------------------------------- resume and determinism


@pytest.mark.parametrize("terms", [HINTON, FEATURES], ids=["logits", "features"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("kind", "stop"), [("epoch", 1), ("epoch", 3), ("batch", 3), ("batch", 17)])
def test_a_resumed_training_ends_with_the_same_bits(
    data: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stop: int,
    optimizer: str,
    terms: tuple[LossTerm, ...],
) -> None:
    options = replace(OPTIONS, optimizer=optimizer, views=2)  # type: ignore[arg-type]
    undisturbed, resumed = tmp_path / "a", tmp_path / "b"
    straight = taught(undisturbed, options=options, terms=terms, cache=tmp_path / "cache a")
    monkeypatch.setattr(loop, "_SAY_EVERY_S", 0.0)  # told of each step, so that it can be stopped inside an epoch
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0.0)
    student = network(data)
    with pytest.raises(Interrupted):
        taught(resumed, Told(kind, stop), student=student, options=options, terms=terms, cache=tmp_path / "cache b")
    assert not (resumed / "weights.safetensors").exists()
    assert not hooks(student)
    torch.manual_seed(99)  # whatever ran in between
    told = Told()
    again = taught(resumed, told, student=student, options=options, terms=terms, cache=tmp_path / "cache b")
    assert len(told.of("resumed")) == 1
    assert state(resumed) == state(undisturbed)

    def rows(meta: dict[str, Json]) -> list[tuple[Json, ...]]:
        return [(row["epoch"], row["loss"], row["learning_rate"]) for row in history(meta)]

    assert rows(again) == rows(straight)


def test_a_training_killed_before_its_weights_were_checked_in_ends_the_same(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    taught(undisturbed)
    with pytest.raises(Interrupted):
        taught(killed, Told("epoch", OPTIONS.epochs))
    taught(killed)
    assert state(killed) == state(undisturbed)
    assert not (killed / checkpoint.NAME).exists()


@pytest.mark.parametrize("terms", [HINTON, FEATURES], ids=["logits", "features"])
def test_equal_seeds_equal_bytes_and_the_callers_generator_is_left_alone(
    tmp_path: Path, terms: tuple[LossTerm, ...]
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        taught(tmp_path / name, terms=terms, seed=seed)
        if name == "a":
            assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert state(tmp_path / "a") == state(tmp_path / "b") != state(tmp_path / "c")


def test_a_streamed_split_gives_the_same_bits(data: Dataset, tmp_path: Path) -> None:
    assert isinstance(data.train, ArraySplit)
    taught(tmp_path / "memory")
    taught(tmp_path / "streamed", data=replace(data, train=Streamed(data.train)))
    assert state(tmp_path / "memory") == state(tmp_path / "streamed")


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None, "flip"])
def test_a_corrupt_checkpoint_is_told_and_training_starts_again(tmp_path: Path, damage: bytes | str | None) -> None:
    undisturbed, broken = tmp_path / "a", tmp_path / "b"
    taught(undisturbed)
    with pytest.raises(Interrupted):
        taught(broken, Told("epoch", 2))
    path = broken / checkpoint.NAME
    whole = path.read_bytes()
    middle = len(whole) // 2
    kept = torch.load(path, weights_only=True)["state"]["trained"]["0.conv.weight"].contiguous().numpy().tobytes()
    if damage == "flip":
        middle = whole.index(kept) + 5  # inside the weights: what zip pads with is of no account
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    path.write_bytes(damage if isinstance(damage, bytes) else flipped if damage == "flip" else whole[:middle])
    told = Told()
    taught(broken, told)
    assert len(told.of("corrupt")) == 1
    assert str(path) == told.of("corrupt")[0]["path"]
    assert not told.of("resumed")
    assert state(broken) == state(undisturbed)


@pytest.mark.parametrize(
    "change",
    [
        {"options": replace(OPTIONS, learning_rate=0.1)},
        {"terms": [LossTerm(Part("kd"), 0.5), LossTerm(Part("ce"), 0.1)]},
        {"terms": [LossTerm(Part("kd", {"temperature": 2.0}), 0.9), LossTerm(Part("ce"), 0.1)]},
        {"terms": FEATURES},
        {"augment": replace(AUGMENT, seed=1)},
        {"teachers": network(digits(), width=16, seed=6)},
        {"seed": 1},
    ],
)
def test_a_checkpoint_of_another_training_is_not_gone_on_from(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(Interrupted):
        taught(tmp_path, Told("epoch", 2))
    told = Told()
    taught(tmp_path, told, **change)
    assert "belongs to another training" in str(told.of("note")[0]["text"])
    assert not told.of("resumed")
    assert [row["epoch"] for row in told.of("epoch")] == [1, 2, 3]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / f".{checkpoint.NAME}.partial").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="the disk is full"):
        taught(tmp_path)


# ---------------------------------------------------------------- the teacher


def test_the_teacher_is_used_as_it_is_and_left_as_it_was(data: Dataset, tmp_path: Path) -> None:
    teacher = network(data, width=16, seed=5, mean=0.3)
    teacher.train()  # as a careless caller leaves it
    small(teacher).conv.eval()
    before = copy.deepcopy(teacher.module.state_dict())
    modes = [module.training for module in teacher.modules()]
    seen: list[Tensor] = []

    def spy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        assert not teacher_logits.requires_grad
        assert teacher_logits.shape == student_logits.shape
        seen.append(teacher_logits)
        return kd(student_logits, teacher_logits)

    taught(tmp_path, teachers=teacher, terms=[own(spy), *FEATURES], augment=Augment())
    after = teacher.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "running statistics moved"
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not hooks(teacher)
    # in eval mode, with its own normalisation: what evaluate gives for the same samples, in the order of the epoch
    alone = np.sort(evaluate(teacher, data.train)[:, 0])
    per_epoch = math.ceil(len(data.train) / OPTIONS.batch_size)
    np.testing.assert_allclose(np.sort(torch.cat(seen[:per_epoch])[:, 0].numpy()), alone, atol=2e-3)


def test_teacher_and_student_see_the_same_image(data: Dataset, tmp_path: Path) -> None:
    """A frozen student that is the teacher itself has a loss of 0, whatever the augmentation."""

    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)
            self.idle = nn.Parameter(torch.tensor(0.0))
            self.linear.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(x.flatten(1)) + self.idle
            return logits

    teacher = Network(Still(), data.inputs, Preprocessing((8, 8), (0.5,), (0.5,)))
    meta = taught(tmp_path, student=copy.deepcopy(teacher), teachers=teacher, terms=[LossTerm(Part("kd"))])
    assert all(abs(row["loss"]) < 1e-6 for row in history(meta))


@pytest.mark.parametrize("terms", [HINTON, FEATURES], ids=["logits", "features"])
def test_the_checkpoint_holds_no_teacher_and_no_code(
    data: Dataset, tmp_path: Path, terms: tuple[LossTerm, ...]
) -> None:
    with pytest.raises(Interrupted):
        taught(tmp_path, Told("epoch", 1), terms=terms)
    kept = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["state"]
    teacher = network(data, width=16, seed=5)
    shapes = {tuple(value.shape) for group in ("trained", "average") for value in kept[group].values()}
    assert tuple(small(teacher).conv.weight.shape) not in shapes
    own_names = {f"0.{name}" for name in network(data).module.state_dict()}
    assert own_names <= set(kept["trained"])
    assert (own_names == set(kept["trained"])) == (terms == HINTON)  # the projectors are trained too, and no more
    assert set(kept["average"]) <= set(network(data).module.state_dict())
    assert (tmp_path / checkpoint.NAME).stat().st_size < 120_000


def test_projectors_are_left_out_of_the_weights(data: Dataset, tmp_path: Path) -> None:
    student = network(data)
    meta = taught(tmp_path, student=student, terms=FEATURES)
    assert set(weights.read(tmp_path / "weights.safetensors")) == set(student.module.state_dict())
    assert not hooks(student)
    losses = [row["loss"] for row in history(meta)]
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("teacher_classes", "student_classes", "role"), [(12, 10, "teacher"), (10, 7, "student")])
def test_other_numbers_of_classes_are_refused_before_training(
    data: Dataset, tmp_path: Path, teacher_classes: int, student_classes: int, role: str
) -> None:
    teacher, student, told = network(data, classes=teacher_classes), network(data, classes=student_classes), Told()
    with pytest.raises(ModelError, match=rf"the {role} has (12|7) outputs.*digits has 10 classes"):
        taught(tmp_path, told, student=student, teachers=teacher)
    assert not told.events
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="12 outputs"):
        trained(network(data, classes=12), data, tmp_path)


def test_weights_that_are_not_finite_are_refused_at_the_start(data: Dataset, tmp_path: Path) -> None:
    broken = network(data)
    with torch.no_grad():
        small(broken).linear.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"the teacher's 'linear\.weight'"):
        taught(tmp_path, teachers=broken)
    with pytest.raises(ModelError, match=r"'linear\.weight' holds values that are not finite"):
        trained(broken, data, tmp_path)
    assert not list(tmp_path.iterdir())


def _from_step(first: int, value: float) -> LossTerm:
    calls = iter(range(10**6))

    def loss(student_logits: Tensor, labels: Tensor) -> Tensor:
        return ce(student_logits, labels) * (value if next(calls) >= first else 1.0)

    return own(loss)


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_checkpoint(data: Dataset, tmp_path: Path) -> None:
    per_epoch = math.ceil(len(data.train) / OPTIONS.batch_size)
    told, student = Told(), network(data)
    with pytest.raises(
        EdgekdError, match=rf"the loss is nan in epoch 2, step 4 of {per_epoch}, at learning rate"
    ) as caught:
        taught(tmp_path, told, student=student, terms=[_from_step(per_epoch + 3, math.nan)])
    assert "learning_rate" in caught.value.fix
    assert caught.value.where == "distill"
    kept = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["state"]
    assert kept["step"] == per_epoch
    assert all(value.isfinite().all() for value in kept["trained"].values())
    assert [row["epoch"] for row in told.of("epoch")] == [1]
    assert not (tmp_path / "weights.safetensors").exists()
    assert not hooks(student)


def test_weights_that_stop_being_finite_in_the_last_step_are_told(data: Dataset, tmp_path: Path) -> None:
    last = OPTIONS.epochs * math.ceil(len(data.train) / OPTIONS.batch_size) - 1

    def loss(student_logits: Tensor, labels: Tensor) -> Tensor:
        value = ce(student_logits, labels)
        if next(calls) == last:
            value.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
        return value

    calls = iter(range(10**6))
    with pytest.raises(EdgekdError, match="is no longer finite in epoch 3"):
        taught(tmp_path, terms=[own(loss)])
    assert not (tmp_path / "weights.safetensors").exists()


def test_options_that_cannot_be_used_are_refused(data: Dataset, tmp_path: Path) -> None:
    student = network(data)
    run = partial(taught, tmp_path, student=student)
    with pytest.raises(RecipeError, match="no loss"):
        run(terms=[])
    with pytest.raises(RecipeError, match=r"label_smoothing.*\[\[loss\]\]"):
        run(options=replace(OPTIONS, label_smoothing=0.1))
    with pytest.raises(RecipeError, match="crop_pixels is 8"):
        run(augment=Augment(crop_pixels=8))
    with pytest.raises(RecipeError, match="there is no teacher"):
        distill(student, [], data, HINTON, OPTIONS, AUGMENT, task=task(), seed=0, work=tmp_path, cache=None, say=Told())
    with pytest.raises(RecipeError, match=r"views.*\[distill\]"):
        trained(student, data, tmp_path, None, replace(OPTIONS, views=2))
    assert not hooks(student)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- data that is no image, odd sizes


def test_inputs_that_are_no_image(tmp_path: Path) -> None:
    data, options, told = two_inputs(200), replace(OPTIONS, epochs=20, batch_size=32, learning_rate=0.5), Told()
    teacher, student = two_input_network(0), two_input_network(1)
    trained(teacher, data, folder(tmp_path, "t"), told, options)
    assert "no images" in str(told.of("note")[0]["text"])
    taught(tmp_path / "s", data=data, student=student, teachers=teacher, options=options, augment=Augment())
    assert evaluate(student, data.test).shape == (200, 3)
    assert accuracy(student, data) > 0.95


@pytest.mark.parametrize(("count", "batch_size", "steps", "seen"), [(9, 4, 2, 8), (10, 4, 3, 10), (3, 64, 1, 3)])
def test_only_a_last_batch_of_one_is_left_out(
    tmp_path: Path, count: int, batch_size: int, steps: int, seen: int
) -> None:
    sizes: list[int] = []

    def count_them(student_logits: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(labels))
        return ce(student_logits, labels)

    options = replace(OPTIONS, epochs=1, batch_size=batch_size)
    meta = taught(
        tmp_path, data=two_inputs(count), student=two_input_network(0), teachers=two_input_network(0),
        terms=[own(count_them)], options=options, augment=Augment(),
    )  # fmt: skip
    assert meta["steps"] == steps == len(sizes)
    assert sum(sizes) == seen


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 training sample"):
        trained(two_input_network(0), two_inputs(1), tmp_path, augment=Augment())


def test_every_sample_once_an_epoch_in_another_order(data: Dataset, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def remember(student_logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return ce(student_logits, labels)

    taught(tmp_path, terms=[own(remember)], options=replace(OPTIONS, epochs=2), augment=Augment())
    first, second = torch.cat(seen[: len(seen) // 2]), torch.cat(seen[len(seen) // 2 :])
    whole = next(iter(data.train.batches([np.arange(len(data.train))]))).labels
    assert torch.equal(first.sort().values, torch.from_numpy(np.sort(whole)))
    assert torch.equal(second.sort().values, first.sort().values)
    assert not torch.equal(first, second)


def test_a_network_of_images_learns_from_mixed_ones_without_labels(data: Dataset, tmp_path: Path) -> None:
    """Function matching: the teacher is asked about the very mixtures that the student sees."""
    options = replace(OPTIONS, epochs=10, learning_rate=0.2)
    teacher = network(data, width=32)
    trained(teacher, data, folder(tmp_path, "t"), None, options, Augment())
    student = network(data, width=16, seed=3)
    terms = [LossTerm(Part("function_matching"))]
    taught(tmp_path / "s", student=student, teachers=teacher, terms=terms, options=options, augment=Augment(mixup=1.0))
    assert accuracy(student, data) > 0.7


def test_a_number_of_threads_is_used_while_training_and_put_back(data: Dataset, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: set[int] = set()
    try:
        results = []
        for name, outside in (("one", 1), ("two", 2)):
            torch.set_num_threads(outside)
            place = folder(tmp_path, name)

            def say(event: str, /, **fields: Json) -> None:
                seen.add(torch.get_num_threads())

            train(network(data), data, OPTIONS, AUGMENT, task=task(), seed=0, work=place, say=say)
            assert torch.get_num_threads() == outside
            results.append(state(place))
        assert results[0] == results[1]
        assert seen == {1}
    finally:
        torch.set_num_threads(before)
