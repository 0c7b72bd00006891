"""Distillation losses: known values by hand, invariances, gradients, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgekd import plugins
from edgekd.errors import PartError
from edgekd.losses.ce import ce
from edgekd.losses.kd import kd
from edgekd.types import Outputs, Part

LABELS = torch.tensor([0, 1])


def _random(seed: int, batch: int = 6, classes: int = 5) -> Tensor:
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))


def test_kd_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2) at T = 1: KL = 3/4 log(3/2) + 1/4 log(1/2)
    teacher = Outputs(torch.tensor([[math.log(3.0), 0.0]]))
    student = Outputs(torch.zeros(1, 2))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd(student, teacher, LABELS[:1], temperature=1.0).item() == pytest.approx(expected, rel=1e-6)
    # T = 2 on doubled logits is the same divergence, times T² = 4
    doubled = Outputs(2 * teacher.logits)
    assert kd(student, doubled, LABELS[:1], temperature=2.0).item() == pytest.approx(4 * expected, rel=1e-6)


def test_kd_is_the_formula() -> None:
    student, teacher, temperature = _random(0), _random(1), 4.0
    p, q = (torch.softmax(logits.double() / temperature, 1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert kd(Outputs(student), Outputs(teacher), LABELS).item() == pytest.approx(expected.item(), rel=1e-5)


def test_kd_does_not_shrink_with_the_number_of_classes() -> None:
    """`reduction="mean"` divides by the number of classes too: the same divergence must not depend on it."""
    student, teacher = _random(0, classes=4), _random(1, classes=4)
    nothing = torch.full((6, 96), -1e4)  # classes that neither believes in
    more = kd(Outputs(torch.cat([student, nothing], 1)), Outputs(torch.cat([teacher, nothing], 1)), LABELS)
    assert more.item() == pytest.approx(kd(Outputs(student), Outputs(teacher), LABELS).item(), rel=1e-5)


def test_kd_batch_is_the_mean_of_its_samples() -> None:
    student, teacher = _random(2), _random(3)
    single = [kd(Outputs(s[None]), Outputs(t[None]), LABELS).item() for s, t in zip(student, teacher, strict=True)]
    assert kd(Outputs(student), Outputs(teacher), LABELS).item() == pytest.approx(sum(single) / len(single), rel=1e-5)


def test_kd_is_minimal_at_the_teacher_and_invariant() -> None:
    teacher = _random(4)
    shifted = teacher + torch.arange(6.0)[:, None]  # a constant a sample changes no softmax
    assert kd(Outputs(shifted), Outputs(teacher), LABELS).item() == pytest.approx(0, abs=1e-5)
    student = _random(5)
    loss = kd(Outputs(student), Outputs(teacher), LABELS)
    assert loss.item() > 0.1
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = kd(Outputs(student[:, order]), Outputs(teacher[:, order]), LABELS)
    assert permuted.item() == pytest.approx(loss.item(), rel=1e-5)


def test_kd_at_high_temperature_is_matching_logits() -> None:
    """T² · KL → mean over the batch of Σ_c (centred difference)² / (2 · classes) (Hinton et al. 2014, section 2.1)."""
    student, teacher = _random(6), _random(7)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = difference.square().sum(1).mean() / (2 * 5)
    assert kd(Outputs(student), Outputs(teacher), LABELS, temperature=1000.0).item() == pytest.approx(
        limit.item(), rel=0.02
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_kd_refuses_a_temperature(temperature: float) -> None:
    with pytest.raises(PartError, match="temperature"):
        kd(Outputs(_random(0)), Outputs(_random(1)), LABELS, temperature=temperature)


def test_ce_by_hand() -> None:
    student = Outputs(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))
    nobody = Outputs(torch.full((2, 2), math.nan))  # the teacher is not looked at
    assert ce(student, nobody, LABELS).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)
    smoothed = (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)) / 2
    assert ce(student, nobody, LABELS, label_smoothing=0.2).item() == pytest.approx(smoothed, rel=1e-6)


def test_ce_refuses_a_label_smoothing() -> None:
    with pytest.raises(PartError, match="label_smoothing"):
        ce(Outputs(_random(0)), Outputs(_random(0)), LABELS, label_smoothing=1.0)


@pytest.mark.parametrize("name", sorted(plugins.names("losses")))
@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_loss_is_finite_for_extreme_logits(name: str, size: float, dtype: torch.dtype) -> None:
    loss = plugins.bind("losses", Part(name))
    student = torch.tensor([[size, -size, 0.0], [-size, size, size]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-size, size, 0.0], [size, -size, 0.0]], dtype=dtype)
    value = loss(Outputs(student), Outputs(teacher), LABELS)
    value.backward()
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert math.isfinite(value.item())
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", sorted(plugins.names("losses")))
def test_every_loss_moves_the_student_alone(name: str) -> None:
    loss = plugins.bind("losses", Part(name))
    student, teacher = _random(8, batch=2).requires_grad_(), _random(9, batch=2).requires_grad_()
    loss(Outputs(student), Outputs(teacher), LABELS).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert float(student.grad.abs().sum()) > 0
    step = Outputs(student.detach() - 0.1 * student.grad)
    before = loss(Outputs(student.detach()), Outputs(teacher.detach()), LABELS)
    assert loss(step, Outputs(teacher.detach()), LABELS).item() < before.item()


@pytest.mark.parametrize("name", sorted(plugins.names("losses")))
def test_every_loss_takes_what_inference_mode_gave(name: str) -> None:
    loss = plugins.bind("losses", Part(name))
    with torch.inference_mode():
        teacher = _random(9, batch=2)
    student = _random(8, batch=2).requires_grad_()
    loss(Outputs(student), Outputs(teacher.clone()), LABELS).backward()
    assert student.grad is not None
