"""What teachers say: asked once, kept for every later training on the same views, and never of another image."""

from __future__ import annotations

import shutil
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
    FEATURES,
    HINTON,
    OPTIONS,
    Interrupted,
    Told,
    handwritten,
    hooks,
    network,
    of_images,
    own,
    state,
    taught,
)

from edgekd.distillation import Teacher, precision
from edgekd.distillation.answers import Answers
from edgekd.distillation.cache import MANIFEST
from edgekd.distillation.samples import Step
from edgekd.errors import RecipeError, StoreError
from edgekd.losses import kd
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.types import Augment, Dataset, LossTerm, Outputs, Part

VIEWS = replace(OPTIONS, views=2)
OVERHEAD = 500  # samples that a teacher is asked about for its shapes, and to see that what is kept is right


@pytest.fixture(scope="module")
def data() -> Dataset:
    return handwritten()


def counted(teacher: Network) -> list[int]:
    """How many samples it is asked about, call by call."""
    seen: list[int] = []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


Said = dict[tuple[int, int], bytes]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Said]:
    """What was given to the losses since it was last asked for: the bytes of all outputs by (view, sample)."""
    found: Said = {}
    asked = Answers.__call__

    def remember(self: Answers, step: Step) -> Outputs:
        outputs = asked(self, step)
        given = [outputs.logits, *outputs.features.values()]
        for at, index in enumerate(step.indices):
            key, value = (step.view, int(index)), b"".join(each[at].numpy().tobytes() for each in given)
            assert found.setdefault(key, value) == value, "it changed within a training"
        return outputs

    def take() -> Said:
        taken = dict(found)
        found.clear()
        return taken

    monkeypatch.setattr(Answers, "__call__", remember)
    return take


def folders(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob(f"*/{MANIFEST}"))


# ---------------------------------------------------------------- asked once


@pytest.mark.parametrize(
    ("views", "augment", "computed"), [(0, AUGMENT, 5), (2, AUGMENT, 2), (9, AUGMENT, 5), (0, Augment(), 1)]
)
def test_the_teacher_computes_each_view_once(
    data: Dataset, tmp_path: Path, views: int, augment: Augment, computed: int
) -> None:
    teacher, options = network(data, width=16, seed=5), replace(OPTIONS, epochs=5, views=views)
    seen = counted(teacher)
    taught(tmp_path / "s", teachers=teacher, options=options, augment=augment, cache=tmp_path / "cache")
    assert 0 <= sum(seen) - computed * len(data.train) < OVERHEAD
    seen.clear()
    taught(tmp_path / "t", teachers=teacher, options=options, augment=augment, seed=1, cache=tmp_path / "cache")
    assert sum(seen) < OVERHEAD


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"options": replace(VIEWS, batch_size=50)},
        {"options": replace(VIEWS, optimizer="adamw", learning_rate=0.01, epochs=5)},
        {"terms": [LossTerm(Part("dist")), LossTerm(Part("kd", {"temperature": 1.0}))]},
        {"student": network(handwritten(), width=5, seed=8)},
    ],
    ids=["seed", "batch size", "optimizer", "losses", "student"],
)
def test_other_trainings_are_given_the_same_bits_without_asking_again(
    data: Dataset, tmp_path: Path, said: Callable[[], Said], change: dict[str, Any]
) -> None:
    teacher = network(data, width=16, seed=5)
    taught(tmp_path / "first", teachers=teacher, options=VIEWS, cache=tmp_path / "cache")
    first, seen = said(), counted(teacher)
    taught(tmp_path / "other", teachers=teacher, cache=tmp_path / "cache", **{"options": VIEWS, **change})
    other = said()
    assert len(first) == 2 * len(data.train)
    # a last batch of one is left out, another one in each order
    assert len(other.keys() & first.keys()) >= 2 * len(data.train) - 4
    assert all(first[key] == value for key, value in other.items() if key in first)
    assert sum(seen) < OVERHEAD
    assert len(folders(tmp_path / "cache")) == 1


@pytest.mark.parametrize("terms", [HINTON, FEATURES], ids=["logits", "features"])
def test_a_training_from_a_full_cache_ends_with_the_same_bits(tmp_path: Path, terms: tuple[LossTerm, ...]) -> None:
    for name in ("cold", "warm"):
        taught(tmp_path / name, terms=terms, options=VIEWS, cache=tmp_path / "cache")
    assert state(tmp_path / "cold") == state(tmp_path / "warm")


def test_what_is_kept_is_what_the_teacher_says_of_the_students_own_images(data: Dataset, tmp_path: Path) -> None:
    teacher, student = network(data, width=16, seed=5).eval(), network(data)
    kept: list[Tensor] = []
    live: list[Tensor] = []

    def remember(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        kept.append(teacher_logits)
        return kd(student_logits, teacher_logits)

    def ask(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            live.append(teacher(*inputs).detach())

    student.register_forward_pre_hook(ask)
    options = replace(OPTIONS, views=1)
    taught(
        tmp_path / "s", student=student, teachers=teacher, terms=[own(remember)], options=options,
        cache=tmp_path / "cache",
    )  # fmt: skip
    torch.testing.assert_close(torch.cat(kept), torch.cat(live), atol=2e-3, rtol=1e-3)


def test_features_are_kept_beside_logits_that_were_there(
    data: Dataset, tmp_path: Path, said: Callable[[], Said]
) -> None:
    teacher, options = network(data, width=16, seed=5), VIEWS
    taught(tmp_path / "logits", teachers=teacher, options=options, cache=tmp_path / "cache")
    first = said()
    taught(tmp_path / "features", teachers=teacher, terms=FEATURES, options=options, cache=tmp_path / "cache")
    second, seen = said(), counted(teacher)
    size = 4 * 10  # of a sample's logits, in float32
    assert all(second[key][:size] == value for key, value in first.items())
    taught(tmp_path / "again", teachers=teacher, terms=FEATURES, options=options, seed=4, cache=tmp_path / "cache")
    assert said() == second
    assert sum(seen) < OVERHEAD
    (folder,) = folders(tmp_path / "cache")
    assert len([path for path in folder.iterdir() if path.name != MANIFEST]) == 3 * 2  # tensors, views


def test_several_teachers_have_a_cache_each(data: Dataset, tmp_path: Path) -> None:
    teachers = [network(data, width=16, seed=seed) for seed in (5, 6)]
    seen = [counted(each) for each in teachers]
    run = [Teacher(each, weight) for each, weight in zip(teachers, (2.0, 1.0), strict=True)]
    taught(tmp_path / "a", teachers=run, options=VIEWS, cache=tmp_path / "cache")
    assert len(folders(tmp_path / "cache")) == 2
    for calls in seen:
        assert 0 <= sum(calls) - 2 * len(data.train) < OVERHEAD
        calls.clear()
    # one of them alone, and both with other weights: nothing is asked again
    taught(tmp_path / "b", teachers=teachers[1], options=VIEWS, cache=tmp_path / "cache")
    taught(tmp_path / "c", teachers=[Teacher(each) for each in teachers], options=VIEWS, cache=tmp_path / "cache")
    assert max(map(sum, seen)) < 2 * OVERHEAD
    assert len(folders(tmp_path / "cache")) == 2
    assert len({state(tmp_path / name) for name in "abc"}) == 3


# ---------------------------------------------------------------- never of anything else


@pytest.mark.parametrize(
    "change",
    [
        {"teachers": network(handwritten(), width=16, seed=6, mean=0.3)},
        {"teachers": network(handwritten(), width=16, seed=5, mean=0.4)},
        {"augment": replace(AUGMENT, seed=1)},
        {"augment": replace(AUGMENT, flip=False)},
        {"augment": replace(AUGMENT, mixup=0.5), "terms": [LossTerm(Part("kd"))]},
        {"options": replace(VIEWS, precision="bf16")},
        {"data": replace(handwritten(), fingerprint="other")},
    ],
    ids=["weights", "preprocessing", "augment seed", "flip", "mixup", "precision", "data"],
)
def test_whatever_changes_what_a_teacher_says_has_another_cache(
    data: Dataset, tmp_path: Path, change: dict[str, Any]
) -> None:
    options = replace(VIEWS, epochs=1)
    taught(tmp_path / "a", options=options, cache=tmp_path / "cache")
    taught(tmp_path / "b", cache=tmp_path / "cache", **{"options": options, **change})
    assert len(folders(tmp_path / "cache")) == 2


def test_a_cache_that_was_tampered_with_is_refused(data: Dataset, tmp_path: Path) -> None:
    taught(tmp_path / "a", options=VIEWS, cache=tmp_path / "cache")
    (folder,) = folders(tmp_path / "cache")
    (path,) = folder.glob("logits*.1")
    rows = np.fromfile(path, np.uint16).reshape(len(data.train), -1)
    rows[:, [0, 1]] = rows[:, [1, 0]]
    rows.tofile(path)
    student, teacher = network(data), network(data, width=16, seed=5, mean=0.3)
    with pytest.raises(StoreError, match=r"not what it says now.*'logits'.*view 1.*[Rr]emove this folder"):
        taught(tmp_path / "b", student=student, teachers=teacher, options=VIEWS, cache=tmp_path / "cache")
    assert not hooks(student)
    assert not hooks(teacher)
    shutil.rmtree(folder)
    taught(tmp_path / "b", options=VIEWS, cache=tmp_path / "cache")
    assert state(tmp_path / "a") == state(tmp_path / "b")


@pytest.mark.parametrize("options", [VIEWS, replace(VIEWS, cache_gb=0.0)])
def test_nothing_is_kept_where_nothing_is_to_be_kept(data: Dataset, tmp_path: Path, options: Any) -> None:
    cache = tmp_path / "cache" if not options.cache_gb else None
    teacher = network(data, width=16, seed=5)
    seen = counted(teacher)
    taught(tmp_path / "s", teachers=teacher, options=options, cache=cache)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["weights.safetensors"]
    assert not (tmp_path / "cache").exists()
    assert 0 <= sum(seen) - OPTIONS.epochs * len(data.train) < OVERHEAD


def test_a_limit_of_disk_changes_no_bit(data: Dataset, tmp_path: Path) -> None:
    taught(tmp_path / "all", options=VIEWS, cache=tmp_path / "cache")
    told, view = Told(), 2 * 10 * len(data.train)
    limited = replace(VIEWS, cache_gb=1.5 * view / 1e9)
    taught(tmp_path / "one", told, options=limited, cache=tmp_path / "small cache")
    assert ["from view 1 on" in str(note["text"]) for note in told.of("note")] == [True]
    assert sum(path.stat().st_size for path in folders(tmp_path / "small cache")[0].glob("logits*")) == view
    assert state(tmp_path / "all") == state(tmp_path / "one")


@pytest.mark.parametrize("terms", [HINTON, FEATURES], ids=["logits", "features"])
def test_a_cache_lost_while_a_training_is_stopped_is_filled_again(tmp_path: Path, terms: tuple[LossTerm, ...]) -> None:
    options = replace(VIEWS, epochs=5)
    taught(tmp_path / "a", terms=terms, options=options, cache=tmp_path / "cache")
    with pytest.raises(Interrupted):
        taught(tmp_path / "b", Told("epoch", 3), terms=terms, options=options, cache=tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost")
    told = Told()
    taught(tmp_path / "b", told, terms=terms, options=options, cache=tmp_path / "lost")
    assert told.of("resumed")
    # computed again in other batches: equal up to the rounding to float16
    one, other = (weights.read(tmp_path / name / "weights.safetensors") for name in "ab")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-2, rtol=1e-2)


def test_a_teacher_computes_as_its_cache_was_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles: list[str] = []

    def measured(run: Callable[[precision.Computed], None], device: torch.device) -> precision.Choice:
        run("bf16")
        roles.append("measured")
        return precision.Choice("bf16", "measured")

    monkeypatch.setattr(precision, "measured", measured)
    options, told = replace(VIEWS, epochs=1, precision="auto"), Told()
    taught(tmp_path / "a", options=options, cache=tmp_path / "cache")
    taught(tmp_path / "b", told, options=options, seed=1, cache=tmp_path / "cache")
    assert len(roles) == 3  # the student twice, the teacher once
    assert [(fields["step"], fields["reason"]) for fields in told.of("precision")] == [
        ("distill", "measured"), ("teacher", "as its cache was filled"),
    ]  # fmt: skip


# ---------------------------------------------------------------- outputs moved in place of inputs


class Pointwise(nn.Module):
    """It sees every pixel by itself, so that its maps move exactly as its images do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 6, 1), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.conv(x).relu().mean((2, 3)))
        return logits


MOVED = replace(VIEWS, teacher_augment="output", epochs=4)
ALIGNED = (LossTerm(Part("kd")), LossTerm(Part("cosine"), 1.0, (("conv", "conv"),)))


def test_outputs_of_an_equivariant_teacher_are_moved_and_computed_once(data: Dataset, tmp_path: Path) -> None:
    teacher, student = of_images(Pointwise, data, 1), network(data)
    seen, told, live = counted(teacher), Told(), of_images(Pointwise, data, 1).eval()
    pairs: list[tuple[Tensor, Tensor]] = []
    images: list[Tensor] = []

    def compare(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        if images:
            batch = live.prepare(images[-1])[0]
            wanted = live.module.conv(batch).detach()  # type: ignore[operator]
            wanted = nn.functional.adaptive_avg_pool2d(wanted, 4).flatten(2).transpose(1, 2)
            pairs.append((teacher_feature, wanted))
        return (student_feature.mean() - teacher_feature.detach().mean()).square()

    student.register_forward_pre_hook(lambda module, inputs: images.append(inputs[0]) if module.training else None)
    terms = [LossTerm(Part("kd")), own(compare, pairs=[["conv", "conv"]])]
    taught(
        tmp_path / "s", told, student=student, teachers=teacher, terms=terms, options=MOVED, augment=Augment(flip=True),
        cache=tmp_path / "cache",
    )  # fmt: skip
    (note,) = [str(note["text"]) for note in told.of("note")]
    assert note.startswith("equivariance of the teacher (cosine, at least 0.98): logits 1.0000, conv 1.0000")
    assert 0 <= sum(seen) - len(data.train) < 2 * OVERHEAD
    (folder,) = folders(tmp_path / "cache")
    assert {path.suffix for path in folder.iterdir() if path.name != MANIFEST} == {".0"}
    trained = [(found, wanted) for found, wanted in pairs if found.shape == wanted.shape and len(found) > 4]
    assert len(trained) >= MOVED.epochs * 10
    for found, wanted in trained:
        torch.testing.assert_close(found, wanted, atol=5e-3, rtol=5e-3)


def test_outputs_of_a_teacher_that_is_not_equivariant_are_refused_with_the_figure(
    data: Dataset, tmp_path: Path
) -> None:
    class Fixed(nn.Sequential):
        """What it says depends on where in the image things are."""

        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 10))

    teacher, student, told = of_images(Fixed, data), network(data), Told()
    with pytest.raises(RecipeError, match=r"'logits' does not move with its images: cosine 0\.\d{4}.*at least 0\.98"):
        taught(tmp_path, told, student=student, teachers=teacher, options=MOVED, augment=Augment(flip=True))
    assert "logits 0." in str(told.of("note")[0]["text"])
    assert not hooks(student)
    assert not hooks(teacher)


def test_augmentation_that_changes_what_is_in_an_image_is_refused_at_the_outputs(data: Dataset, tmp_path: Path) -> None:
    student, teacher = network(data), of_images(Pointwise, data)
    with pytest.raises(RecipeError, match="cutout_pixels and mixup cannot be applied to a teacher's outputs"):
        taught(
            tmp_path, student=student, teachers=teacher, terms=ALIGNED, options=MOVED,
            augment=Augment(cutout_pixels=2, mixup=1.0),
        )  # fmt: skip
    assert not hooks(student)
    assert not hooks(teacher)
