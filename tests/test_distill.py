"""The trainer: what it learns, what it leaves alone, what it refuses, and that it resumes to the bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from edgekd.data.arrays import ArraySplit
from edgekd.data.digits import digits
from edgekd.distill import Loss, checkpoint, distill, evaluate, loop, precision, train, views
from edgekd.distill.views import TeacherViews
from edgekd.errors import DataError, EdgekdError, ModelError, PartError, RecipeError, StoreError
from edgekd.losses.ce import ce
from edgekd.losses.kd import kd
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.types import Augment, Batch, Dataset, Json, Outputs, Preprocessing, TensorSpec, TrainOptions

OPTIONS = TrainOptions(epochs=3, batch_size=128, learning_rate=0.05, precision="fp32")
HINTON: Sequence[tuple[float, Loss]] = ((0.9, partial(kd, temperature=4.0)), (0.1, ce))
AUGMENT = Augment(crop_pixels=1, flip=True, cutout_pixels=2)


class Interrupted(Exception):
    """What a test raises from `say` in place of Ctrl-C."""


class Told:
    """A `Say` that remembers, and stops the training at its `stop`-th event of a kind."""

    def __init__(self, kind: str = "", stop: int = 0) -> None:
        self.events: list[tuple[str, dict[str, Json]]] = []
        self._kind, self._stop = kind, stop

    def __call__(self, event: str, /, **fields: Json) -> None:
        self.events.append((event, fields))
        if event == self._kind and len(self.of(event)) == self._stop:
            raise Interrupted

    def of(self, event: str) -> list[dict[str, Json]]:
        return [fields for name, fields in self.events if name == event]


class Small(nn.Module):
    """A convolutional network with what is hard to resume: batch normalisation and dropout."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)
        logits: Tensor = self.linear(self.dropout(features))
        return logits


def network(data: Dataset, width: int = 8, classes: int = 10, seed: int = 0, mean: float = 0.5) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(Small(width, classes), data.inputs, Preprocessing((8, 8), (mean,), (0.5,)))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits(0)


class Streamed:
    """The same samples as another split, but not in memory as far as the trainer can see."""

    def __init__(self, split: ArraySplit) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        return self._split.batches(order)


def small(network: Network) -> Small:
    assert isinstance(network.module, Small)
    return network.module


def history(meta: dict[str, Json]) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", meta["history"])


def state(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def folder(tmp_path: Path, name: str) -> Path:
    made = tmp_path / name
    made.mkdir()
    return made


def labels(data: Dataset) -> np.ndarray:
    return next(iter(data.test.batches([np.arange(len(data.test))]))).labels


# ---------------------------------------------------------------- it learns


def test_a_student_learns_from_labels_and_from_a_teacher(data: Dataset, tmp_path: Path) -> None:
    options = replace(OPTIONS, epochs=12, learning_rate=0.2, batch_size=64)
    teacher, told = network(data, width=48), Told()
    meta = train(teacher, data, options, Augment(), seed=0, work=folder(tmp_path, "t"), say=told)
    accuracy = np.mean(evaluate(teacher, data.test).argmax(1) == labels(data))
    assert accuracy > 0.85
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
    distill(
        student, teacher, data, [(1.0, kd)], options, Augment(), seed=0, work=folder(tmp_path, "s"), say=Told()
    )  # fmt: skip
    after = np.mean(evaluate(student, data.test).argmax(1) == evaluate(teacher, data.test).argmax(1))
    assert before < 0.4
    assert after > 0.85


def test_the_file_holds_what_the_network_holds(data: Dataset, tmp_path: Path) -> None:
    trained = network(data)
    train(trained, data, OPTIONS, AUGMENT, seed=0, work=tmp_path, say=Told())
    fresh = network(data, seed=9)
    weights.load(tmp_path / "weights.safetensors", fresh.module)
    np.testing.assert_array_equal(evaluate(fresh, data.test), evaluate(trained, data.test))
    assert not trained.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.safetensors"]


def test_adamw_and_cosine(data: Dataset, tmp_path: Path) -> None:
    options = replace(OPTIONS, optimizer="adamw", schedule="cosine", learning_rate=0.02, epochs=8)
    meta = train(network(data), data, options, Augment(), seed=0, work=tmp_path, say=Told())
    losses = [row["loss"] for row in history(meta)]
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------- resume and determinism


def _run(
    data: Dataset,
    work: Path,
    say: Told,
    *,
    student: Network | None = None,
    seed: int = 0,
    options: TrainOptions = OPTIONS,
) -> dict[str, Json]:
    teacher = network(data, width=16, seed=5, mean=0.3)
    student = student or network(data)
    return distill(student, teacher, data, HINTON, options, AUGMENT, seed=seed, work=work, say=say)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("kind", "stop"), [("epoch", 1), ("epoch", 2), ("epoch", 3), ("batch", 3), ("batch", 17)])
def test_a_resumed_training_ends_with_the_same_bits(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stop: int, optimizer: str
) -> None:
    options = replace(OPTIONS, optimizer=optimizer)  # type: ignore[arg-type]
    undisturbed, resumed = folder(tmp_path, "a"), folder(tmp_path, "b")
    straight = _run(data, undisturbed, Told(), options=options)
    monkeypatch.setattr(loop, "_SAY_EVERY_S", 0.0)  # told of each step, so that it can be stopped inside an epoch
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0.0)
    student = network(data)
    with pytest.raises(Interrupted):
        _run(data, resumed, Told(kind, stop), student=student, options=options)
    assert not (resumed / "weights.safetensors").exists()
    torch.manual_seed(99)  # whatever ran in between
    told = Told()
    again = _run(data, resumed, told, student=student, options=options)
    assert len(told.of("resumed")) == 1
    assert state(resumed) == state(undisturbed)

    def rows(meta: dict[str, Json]) -> list[tuple[Json, ...]]:
        return [(row["epoch"], row["loss"], row["learning_rate"]) for row in history(meta)]

    assert rows(again) == rows(straight)


def test_a_training_killed_before_its_weights_were_checked_in_ends_the_same(data: Dataset, tmp_path: Path) -> None:
    undisturbed, killed = folder(tmp_path, "a"), folder(tmp_path, "b")
    _run(data, undisturbed, Told())
    with pytest.raises(Interrupted):
        _run(data, killed, Told("epoch", OPTIONS.epochs))
    _run(data, killed, Told())
    assert state(killed) == state(undisturbed)
    assert not (killed / checkpoint.NAME).exists()


def test_equal_seeds_equal_bytes_and_the_callers_generator_is_left_alone(data: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _run(data, folder(tmp_path, name), Told(), seed=seed)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert state(tmp_path / "a") == state(tmp_path / "b") != state(tmp_path / "c")


def test_a_streamed_split_gives_the_same_bits(data: Dataset, tmp_path: Path) -> None:
    assert isinstance(data.train, ArraySplit)
    _run(data, folder(tmp_path, "memory"), Told())
    _run(replace(data, train=Streamed(data.train)), folder(tmp_path, "streamed"), Told())
    assert state(tmp_path / "memory") == state(tmp_path / "streamed")


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None, "flip"])
def test_a_corrupt_checkpoint_is_told_and_training_starts_again(
    data: Dataset, tmp_path: Path, damage: bytes | str | None
) -> None:
    undisturbed, broken = folder(tmp_path, "a"), folder(tmp_path, "b")
    _run(data, undisturbed, Told())
    with pytest.raises(Interrupted):
        _run(data, broken, Told("epoch", 2))
    path = broken / checkpoint.NAME
    whole = path.read_bytes()
    middle = len(whole) // 2
    kept = torch.load(path, weights_only=True)["state"]["model"]["conv.weight"].contiguous().numpy().tobytes()
    if damage == "flip":
        middle = whole.index(kept) + 5  # inside the weights: what zip pads with is of no account
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    path.write_bytes(damage if isinstance(damage, bytes) else flipped if damage == "flip" else whole[:middle])
    told = Told()
    _run(data, broken, told)
    assert len(told.of("corrupt")) == 1
    assert str(path) == told.of("corrupt")[0]["path"]
    assert not told.of("resumed")
    assert state(broken) == state(undisturbed)


def test_a_checkpoint_of_another_training_is_not_gone_on_from(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        _run(data, tmp_path, Told("epoch", 2))
    told = Told()
    _run(data, tmp_path, told, options=replace(OPTIONS, learning_rate=0.1))
    assert "belongs to another training" in str(told.of("note")[0]["text"])
    assert not told.of("resumed")
    assert [row["epoch"] for row in told.of("epoch")] == [1, 2, 3]


def test_a_full_disk_is_told(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / f".{checkpoint.NAME}.partial").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="the disk is full"):
        _run(data, tmp_path, Told())


# ---------------------------------------------------------------- the teacher


def test_the_teacher_is_used_as_it_is_and_left_as_it_was(data: Dataset, tmp_path: Path) -> None:
    teacher = network(data, width=16, seed=5, mean=0.3)
    teacher.train()  # as a careless caller leaves it
    small(teacher).conv.eval()
    before = copy.deepcopy(teacher.module.state_dict())
    modes = [module.training for module in teacher.modules()]
    seen: list[Tensor] = []

    def spy(student: Outputs, given: Outputs, _: Tensor) -> Tensor:
        assert not given.logits.requires_grad
        assert given.logits.shape == student.logits.shape
        seen.append(given.logits)
        return kd(student, given, _)

    distill(network(data), teacher, data, [(1.0, spy)], OPTIONS, Augment(), seed=0, work=tmp_path, say=Told())
    after = teacher.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "running statistics moved"
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # in eval mode, with its own normalisation: what evaluate gives for the same samples, in the order of the epoch
    alone = np.sort(evaluate(teacher, data.train)[:, 0])
    per_epoch = math.ceil(len(data.train) / OPTIONS.batch_size)
    np.testing.assert_allclose(np.sort(torch.cat(seen[:per_epoch])[:, 0].numpy()), alone, atol=2e-3)


def test_teacher_and_student_see_the_same_image(data: Dataset, tmp_path: Path) -> None:
    """A frozen student that is the teacher itself has a loss of 0, whatever the augmentation."""

    class Still(nn.Module):
        def __init__(self, bias: float) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)
            self.idle = nn.Parameter(torch.tensor(bias))
            self.linear.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(x.flatten(1)) + self.idle
            return logits

    preprocessing = Preprocessing((8, 8), (0.5,), (0.5,))
    teacher = Network(Still(0.0), data.inputs, preprocessing)
    student = copy.deepcopy(teacher)
    meta = distill(student, teacher, data, [(1.0, kd)], OPTIONS, AUGMENT, seed=0, work=tmp_path, say=Told())
    assert all(abs(row["loss"]) < 1e-6 for row in history(meta))


def test_the_checkpoint_holds_no_teacher_and_no_code(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        _run(data, tmp_path, Told("epoch", 1))
    kept = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["state"]
    teacher = network(data, width=16, seed=5)
    shapes = {tuple(value.shape) for group in ("model", "average") for value in kept[group].values()}
    assert tuple(small(teacher).conv.weight.shape) not in shapes
    assert set(kept["model"]) == set(network(data).module.state_dict())
    assert (tmp_path / checkpoint.NAME).stat().st_size < 60_000


# ---------------------------------------------------------------- views that come again


def _counted(teacher: Network) -> list[int]:
    seen: list[int] = []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize(
    ("asked", "augment", "computed"), [(0, AUGMENT, 5), (2, AUGMENT, 2), (9, AUGMENT, 5), (0, Augment(), 1)]
)
def test_the_teacher_computes_each_view_once(
    data: Dataset, tmp_path: Path, asked: int, augment: Augment, computed: int
) -> None:
    teacher, options = network(data, width=16, seed=5), replace(OPTIONS, epochs=5, teacher_views=asked)
    seen = _counted(teacher)
    distill(network(data), teacher, data, HINTON, options, augment, seed=0, work=tmp_path, say=Told())
    assert sum(seen) - 2 == computed * len(data.train)  # two samples to count its classes
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_kept_outputs_are_the_live_ones(data: Dataset, tmp_path: Path) -> None:
    """In whatever order and batches the samples come again: what the teacher says about the student's own images."""
    teacher, student = network(data, width=16, seed=5).eval(), network(data)
    kept: list[Tensor] = []
    live: list[Tensor] = []

    def remember(student: Outputs, given: Outputs, labels: Tensor) -> Tensor:
        kept.append(given.logits)
        return kd(student, given, labels)

    def ask(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            live.append(teacher(*inputs).detach())

    student.register_forward_pre_hook(ask)
    options = replace(OPTIONS, teacher_views=1)
    distill(student, teacher, data, [(1.0, remember)], options, AUGMENT, seed=0, work=tmp_path, say=Told())
    torch.testing.assert_close(torch.cat(kept), torch.cat(live), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("lost", [False, True])
def test_a_training_with_views_resumes_to_the_bit(data: Dataset, tmp_path: Path, lost: bool) -> None:
    options = replace(OPTIONS, epochs=6, teacher_views=2)
    undisturbed, resumed = folder(tmp_path, "a"), folder(tmp_path, "b")
    _run(data, undisturbed, Told(), options=options)
    for stop in (1, 2):
        with pytest.raises(Interrupted):
            _run(data, resumed, Told("epoch", stop), options=options)
    if lost:
        (resumed / views.NAME).write_bytes(b"cut short")
    _run(data, resumed, Told(), options=options)
    if not lost:
        assert state(resumed) == state(undisturbed)
    else:  # computed again in other batches: equal up to the rounding to float16
        one, other = (weights.read(each / "weights.safetensors") for each in (undisturbed, resumed))
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, atol=1e-2, rtol=1e-2)


def test_views_are_refused_without_a_teacher(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="teacher_views"):
        train(network(data), data, replace(OPTIONS, teacher_views=2), AUGMENT, seed=0, work=tmp_path, say=Told())


def test_kept_outputs_survive_float16(tmp_path: Path) -> None:
    kept = TeacherViews(tmp_path, (2, 5, 3), fresh=True)
    assert kept.take(1, np.array([0])) is None
    given = np.array([[1e6, -1e6, 0.1]], np.float32)
    again = kept.put(1, np.array([3]), given)
    assert np.isfinite(again).all()
    assert again[0, 2] == pytest.approx(0.1, rel=1e-3)
    kept.flush()
    other = TeacherViews(tmp_path, (2, 5, 3), fresh=False)
    np.testing.assert_array_equal(other.take(1, np.array([3])), again)
    assert other.take(0, np.array([3])) is None
    assert other.take(1, np.array([3, 4])) is None
    assert TeacherViews(tmp_path, (2, 6, 3), fresh=False).take(1, np.array([3])) is None


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("teacher_classes", "student_classes", "role"), [(12, 10, "teacher"), (10, 7, "student")])
def test_other_numbers_of_classes_are_refused_before_training(
    data: Dataset, tmp_path: Path, teacher_classes: int, student_classes: int, role: str
) -> None:
    teacher, student, told = network(data, classes=teacher_classes), network(data, classes=student_classes), Told()
    with pytest.raises(ModelError, match=rf"the {role} has (12|7) outputs.*digits has 10 classes"):
        distill(student, teacher, data, HINTON, OPTIONS, AUGMENT, seed=0, work=tmp_path, say=told)
    assert not told.events
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="12 outputs"):
        train(network(data, classes=12), data, OPTIONS, AUGMENT, seed=0, work=tmp_path, say=told)


def test_weights_that_are_not_finite_are_refused_at_the_start(data: Dataset, tmp_path: Path) -> None:
    broken = network(data)
    with torch.no_grad():
        small(broken).linear.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"the teacher's 'linear\.weight'"):
        distill(network(data), broken, data, HINTON, OPTIONS, AUGMENT, seed=0, work=tmp_path, say=Told())
    with pytest.raises(ModelError, match=r"'linear\.weight' holds values that are not finite"):
        train(broken, data, OPTIONS, AUGMENT, seed=0, work=tmp_path, say=Told())
    assert not list(tmp_path.iterdir())


def _from_step(first: int, value: float) -> Loss:
    calls = iter(range(10**6))

    def loss(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        return ce(student, teacher, labels) * (value if next(calls) >= first else 1.0)

    return loss


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_checkpoint(data: Dataset, tmp_path: Path) -> None:
    per_epoch = math.ceil(len(data.train) / OPTIONS.batch_size)
    told = Told()
    with pytest.raises(
        EdgekdError, match=rf"the loss is nan in epoch 2, step 4 of {per_epoch}, at learning rate"
    ) as caught:
        distill(
            network(data), network(data), data, [(1.0, _from_step(per_epoch + 3, math.nan))], OPTIONS, AUGMENT,
            seed=0, work=tmp_path, say=told,
        )  # fmt: skip
    assert "learning_rate" in caught.value.fix
    assert caught.value.where == "distill"
    kept = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["state"]
    assert kept["step"] == per_epoch
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert [row["epoch"] for row in told.of("epoch")] == [1]
    assert not (tmp_path / "weights.safetensors").exists()


def test_weights_that_stop_being_finite_in_the_last_step_are_told(data: Dataset, tmp_path: Path) -> None:
    last = OPTIONS.epochs * math.ceil(len(data.train) / OPTIONS.batch_size) - 1

    def loss(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        value = ce(student, teacher, labels)
        if next(calls) == last:
            value.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]  # infinite gradient
        return value

    calls = iter(range(10**6))
    with pytest.raises(EdgekdError, match="is no longer finite in epoch 3"):
        distill(network(data), network(data), data, [(1.0, loss)], OPTIONS, AUGMENT, seed=0, work=tmp_path, say=Told())
    assert not (tmp_path / "weights.safetensors").exists()


def test_losses_that_cannot_be_used_are_refused(data: Dataset, tmp_path: Path) -> None:
    run = partial(distill, network(data), network(data), data, seed=0, work=tmp_path, say=Told())
    with pytest.raises(RecipeError, match="no loss"):
        run([], OPTIONS, AUGMENT)
    with pytest.raises(PartError, match="weights of its own"):
        run([(1.0, nn.Linear(2, 2))], OPTIONS, AUGMENT)
    with pytest.raises(RecipeError, match="label_smoothing"):
        run(HINTON, replace(OPTIONS, label_smoothing=0.1), AUGMENT)
    with pytest.raises(RecipeError, match="crop_pixels is 8"):
        run(HINTON, OPTIONS, Augment(crop_pixels=8))


# ---------------------------------------------------------------- data that is no image, odd sizes


class TokensAndSensor(nn.Module):
    """Two inputs of different types: integer tokens and a float window."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8 + 4, 3)

    def forward(self, sensor: Tensor, tokens: Tensor) -> Tensor:
        logits: Tensor = self.linear(torch.cat([self.embedding(tokens).mean(1), sensor], 1))
        return logits


def _two_inputs(count: int) -> Dataset:
    draw = np.random.default_rng(0)
    label = draw.integers(0, 3, count)
    inputs: dict[str, np.ndarray] = {
        "tokens": (label[:, None] * 5 + draw.integers(0, 5, (count, 6))).astype(np.int64),
        "sensor": draw.normal(size=(count, 4)).astype(np.float32),
    }
    split = ArraySplit(inputs, label.astype(np.int64), np.arange(count))
    specs = (TensorSpec("tokens", "int64", ("batch", 6)), TensorSpec("sensor", "float32", ("batch", 4)))
    return Dataset("two", specs, ("a", "b", "c"), split, split, split, images=False, fingerprint="two")


def _two_input_network(seed: int) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # the module takes them in another order than the data names them: they are matched by name
        specs = (TensorSpec("sensor", "float32", ("batch", 4)), TensorSpec("tokens", "int64", ("batch", 6)))
        return Network(TokensAndSensor(), specs, None)


def test_inputs_that_are_no_image(tmp_path: Path) -> None:
    data, options, told = _two_inputs(200), replace(OPTIONS, epochs=20, batch_size=32, learning_rate=0.5), Told()
    teacher, student = _two_input_network(0), _two_input_network(1)
    train(teacher, data, options, AUGMENT, seed=0, work=folder(tmp_path, "t"), say=told)
    assert "no images" in str(told.of("note")[0]["text"])
    distill(student, teacher, data, HINTON, options, Augment(), seed=0, work=folder(tmp_path, "s"), say=Told())
    assert evaluate(student, data.test).shape == (200, 3)
    assert np.mean(evaluate(student, data.test).argmax(1) == labels(data)) > 0.95


@pytest.mark.parametrize(("count", "batch_size", "steps", "seen"), [(9, 4, 2, 8), (10, 4, 3, 10), (3, 64, 1, 3)])
def test_only_a_last_batch_of_one_is_left_out(
    tmp_path: Path, count: int, batch_size: int, steps: int, seen: int
) -> None:
    sizes: list[int] = []

    def count_them(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        sizes.append(len(labels))
        return ce(student, teacher, labels)

    options = replace(OPTIONS, epochs=1, batch_size=batch_size)
    meta = distill(
        _two_input_network(0), _two_input_network(0), _two_inputs(count), [(1.0, count_them)], options, Augment(),
        seed=0, work=tmp_path, say=Told(),
    )  # fmt: skip
    assert meta["steps"] == steps == len(sizes)
    assert sum(sizes) == seen


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 training sample"):
        train(_two_input_network(0), _two_inputs(1), OPTIONS, Augment(), seed=0, work=tmp_path, say=Told())


def test_every_sample_once_an_epoch_in_another_order(data: Dataset, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def remember(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        seen.append(labels)
        return ce(student, teacher, labels)

    options = replace(OPTIONS, epochs=2)
    distill(
        network(data), network(data), data, [(1.0, remember)], options, Augment(), seed=0, work=tmp_path, say=Told()
    )
    first, second = torch.cat(seen[: len(seen) // 2]), torch.cat(seen[len(seen) // 2 :])
    whole = next(iter(data.train.batches([np.arange(len(data.train))]))).labels
    assert torch.equal(first.sort().values, torch.from_numpy(np.sort(whole)))
    assert torch.equal(second.sort().values, first.sort().values)
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- precision


def _measured(monkeypatch: pytest.MonkeyPatch, fp32_s: float, bf16_s: float | Callable[[], float]) -> precision.Choice:
    clock = [0.0]
    monkeypatch.setattr("edgekd.distill.precision.time.perf_counter", lambda: clock[0])

    def run(computed: precision.Computed) -> None:
        took_s = fp32_s if computed == "fp32" else bf16_s
        clock[0] += took_s() if callable(took_s) else took_s

    return precision.measured(run, torch.device("cpu"))


def test_bf16_has_to_earn_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _measured(monkeypatch, 0.116, 0.100).precision == "bf16"
    chosen = _measured(monkeypatch, 0.114, 0.100)
    assert chosen.precision == "fp32"
    assert "1.14x" in chosen.reason
    assert "114 ms" in chosen.reason
    slow_start = iter([9.0] + [0.1] * 20)
    assert _measured(monkeypatch, 0.2, lambda: next(slow_start)).precision == "bf16"


def test_a_network_that_bf16_cannot_run_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> float:
        raise RuntimeError("not implemented for 'BFloat16'\nmore")

    chosen = _measured(monkeypatch, 0.1, refuse)
    assert chosen == precision.Choice("fp32", "bf16 does not run: not implemented for 'BFloat16'")


def test_the_choice_is_told_kept_and_not_measured_again(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, precision="auto")
    measured: list[precision.Computed] = []

    def choose(run: Callable[[precision.Computed], None], device: torch.device) -> precision.Choice:
        run("fp32")
        run("bf16")
        measured.append("bf16")
        return precision.Choice("bf16", "measured")

    monkeypatch.setattr(precision, "measured", choose)
    told = Told("epoch", 1)
    with pytest.raises(Interrupted):
        _run(data, tmp_path, told, options=options)
    assert [fields["step"] for fields in told.of("precision")] == ["distill", "teacher"]
    monkeypatch.setattr(precision, "measured", None)
    meta = _run(data, tmp_path, Told(), options=options)
    assert len(measured) == 2
    assert meta["precision"] == meta["teacher_precision"] == "bf16"
    assert meta["precision_reason"] == "measured"
    # the measurement leaves no trace: a training that is asked for bf16 gives the same bits
    _run(data, folder(tmp_path, "asked"), Told(), options=replace(OPTIONS, precision="bf16"))
    assert state(tmp_path) == state(tmp_path / "asked")


# ---------------------------------------------------------------- evaluate


def test_evaluate_gives_the_splits_logits_in_order(data: Dataset) -> None:
    tested = network(data)
    tested.train()
    small(tested).norm.eval()
    found = evaluate(tested, data.test, batch_size=100)
    assert found.dtype == np.float32
    assert found.shape == (len(data.test), 10)
    assert tested.training
    assert small(tested).conv.training
    assert not small(tested).norm.training
    batch = next(iter(data.test.batches([np.arange(7)])))
    tested.eval()
    with torch.no_grad():
        expected = tested(torch.from_numpy(batch.inputs["image"]))
    np.testing.assert_allclose(found[:7], expected.numpy(), atol=1e-5)
    empty = ArraySplit({"image": np.zeros((0, 8, 8, 1), np.uint8)}, np.zeros(0, np.int64), np.arange(0))
    with pytest.raises(DataError, match="no samples"):
        evaluate(tested, empty)


def test_a_model_that_gives_no_logits_is_refused(data: Dataset) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    preprocessing = Preprocessing((8, 8), (0.5,), (0.5,))
    with pytest.raises(ModelError, match="returns tuple"):
        evaluate(Network(Two(), data.inputs, preprocessing), data.test)
    with pytest.raises(ModelError, match=r"a tensor of shape \(256, 1, 8, 8\)"):
        evaluate(Network(nn.Identity(), data.inputs, preprocessing), data.test)


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

            train(network(data), data, replace(OPTIONS, threads=1), AUGMENT, seed=0, work=place, say=say)
            assert torch.get_num_threads() == outside
            results.append(state(place))
        assert results[0] == results[1]
        assert seen == {1}
    finally:
        torch.set_num_threads(before)
