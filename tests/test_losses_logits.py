"""Losses of outputs: known values by hand, invariances, what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from edgekd.errors import PartError
from edgekd.losses import ce, dist, dkd, function_matching, kd, mse, nkd, ofa

LABELS = torch.tensor([0, 1, 4, 2, 2, 3])
OF_CLASSES: dict[str, Callable[..., Tensor]] = {
    "function_matching": function_matching, "kd": kd, "dist": dist,
    "nkd": nkd, "dkd": dkd, "ofa": ofa,
}  # fmt: skip
OF_LABELS = {name: OF_CLASSES[name] for name in ("nkd", "dkd", "ofa")}


def _random(seed: int, batch: int = 6, classes: int = 5) -> Tensor:
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))


def _call(name: str, student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> float:
    given = (student, teacher, labels) if name in OF_LABELS else (student, teacher)
    return OF_CLASSES[name](*given, **options).item()


# ---------------------------------------------------------------- kd, function_matching


def test_kd_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/2) at T = 1: KL = 3/4 log(3/2) + 1/4 log(1/2)
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kd(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)
    assert function_matching(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    # T = 2 on doubled logits is the same divergence, times T² = 4
    assert kd(student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * expected, rel=1e-6)


def test_kd_does_not_shrink_with_the_number_of_classes() -> None:
    """`reduction="mean"` divides by the number of classes too: the same divergence must not depend on it."""
    student, teacher = _random(0, classes=4), _random(1, classes=4)
    nothing = torch.full((6, 96), -1e4)  # classes that neither believes in
    alone = kd(student, teacher).item()
    assert kd(torch.cat([student, nothing], 1), torch.cat([teacher, nothing], 1)).item() == pytest.approx(
        alone, rel=1e-5
    )
    trap = 16 * kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="none").mean()
    assert alone == pytest.approx(4 * trap.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["kd", "dkd", "function_matching"])
def test_a_class_told_as_two_halves_changes_no_divergence(name: str) -> None:
    student, teacher = _random(2), _random(3)
    halves = [
        torch.cat([z, z[:, -1:]], 1) - torch.tensor([0.0, 0, 0, 0, 1, 1]) * math.log(2) for z in (student, teacher)
    ]
    labels = LABELS.clamp(max=3)  # not the class that is told in halves
    options = {} if name == "function_matching" else {"temperature": 1.0}
    whole = _call(name, student, teacher, labels, **options)
    assert _call(name, halves[0], halves[1], labels, **options) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", sorted(OF_CLASSES))
def test_a_batch_is_the_mean_of_its_samples(name: str) -> None:
    options = {"intra": 0.0} if name == "dist" else {}
    student, teacher = _random(4), _random(5)
    single = [_call(name, student[i : i + 1], teacher[i : i + 1], LABELS[i : i + 1], **options) for i in range(6)]
    assert _call(name, student, teacher, LABELS, **options) == pytest.approx(sum(single) / 6, rel=1e-5)


@pytest.mark.parametrize("name", sorted(OF_CLASSES))
def test_constants_and_the_order_of_classes_change_nothing(name: str) -> None:
    student, teacher = _random(6), _random(7)
    before = _call(name, student, teacher, LABELS)
    shifted = student + torch.arange(6.0)[:, None]  # a constant a sample changes no softmax
    assert _call(name, shifted, teacher - 3, LABELS) == pytest.approx(before, rel=1e-4)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = _call(name, student[:, order], teacher[:, order], order.argsort()[LABELS])
    assert permuted == pytest.approx(before, rel=1e-5)


def test_kd_at_high_temperature_is_matching_logits() -> None:
    """T² · KL → mean over the batch of Σ_c (centred difference)² / (2 · classes) (Hinton et al. 2014, section 2.1)."""
    student, teacher = _random(6), _random(7)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = difference.square().sum(1).mean() / (2 * 5)
    assert kd(student, teacher, temperature=1000.0).item() == pytest.approx(limit.item(), rel=0.02)


def test_standardised_logits_have_neither_scale_nor_offset() -> None:
    student, teacher = _random(8), _random(9)
    loss = kd(student, teacher, standardize=True).item()
    assert kd(1e3 * student + 5, 1e20 * teacher, standardize=True).item() == pytest.approx(loss, rel=1e-4)
    assert kd(0.1 * teacher + 2, teacher, standardize=True).item() == pytest.approx(0, abs=1e-6)
    # (−1, 0, 1) are standardised already, and (0, 0, 3) become (−1, −1, 2) / √3
    one, other = torch.tensor([[-1.0, 0, 1]]), torch.tensor([[-1.0, -1, 2]]) / math.sqrt(3)
    expected = kd(one, other, temperature=2.0).item()
    found = kd(one, torch.tensor([[0.0, 0, 3]]), temperature=2.0, standardize=True).item()
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(PartError, match="sign"):
        kd(torch.zeros(3, 2), torch.zeros(3, 2), standardize=True)


# ---------------------------------------------------------------- dist


def test_dist_by_hand() -> None:
    # rows (1, 2, 3) / 6 against (3, 2, 1) / 6: ρ = −1 over the classes
    one, other = torch.tensor([[1.0, 2, 3]]).log(), torch.tensor([[3.0, 2, 1]]).log()
    assert dist(one, other, intra=0.0).item() == pytest.approx(2, rel=1e-6)
    # and over the batch, both rows against both rows in the other order: ρ = −1, and the second class has none
    assert dist(torch.cat([one, other]), torch.cat([other, one]), inter=0.0).item() == pytest.approx(5 / 3, rel=1e-6)
    assert dist(2 * one, 2 * other, intra=0.0, temperature=2.0).item() == pytest.approx(8, rel=1e-6)


def test_dist_asks_for_a_relation_not_for_equality() -> None:
    """A student whose probabilities are an affine function of the teacher's has nothing left to learn."""
    teacher = _random(10).softmax(1)
    student = 0.3 * teacher + 0.7 / 5
    assert dist(student.log(), teacher.log()).item() == pytest.approx(0, abs=1e-5)


def test_dist_sees_classes_of_tiny_probability() -> None:
    """A column of probabilities near 1e-9 counts as much as any other, as in the formula."""
    generator = torch.Generator().manual_seed(11)
    student, teacher = torch.randn(16, 4, generator=generator), torch.randn(16, 4, generator=generator)
    away = torch.tensor([0.0, 0, 0, -20])
    q, p = ((z + away).double().softmax(1) for z in (student, teacher))
    rho = [torch.corrcoef(torch.stack([q[:, c], p[:, c]]))[0, 1] for c in range(4)]
    expected = 1 - torch.stack(rho).mean()
    assert dist(student + away, teacher + away, inter=0.0).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((6, 2), {}, "inter = 0"),
        ((1, 5), {}, "intra = 0"),
        ((6, 5), {"inter": -1.0}, "inter"),
        ((6, 5), {"intra": math.nan}, "intra"),
    ],
)
def test_dist_refuses(shape: tuple[int, int], options: dict[str, float], says: str) -> None:
    with pytest.raises(PartError, match=says):
        dist(torch.zeros(shape), torch.zeros(shape), **options)


def test_dist_of_two_classes_or_one_row_is_the_other_half() -> None:
    teacher, student = _random(12, classes=2), _random(13, classes=2)
    assert dist(student, teacher, inter=0.0).item() > 0
    assert dist(student[:1, :], teacher[:1, :], inter=0.0, intra=0.0).item() == 0
    assert dist(_random(1, batch=1), _random(2, batch=1), intra=0.0).item() > 0


# ---------------------------------------------------------------- nkd, dkd


TEACHER = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def test_nkd_by_hand() -> None:
    # a student of no opinion: q_y = 1/4, the rest 1/3 each
    expected = math.log(4) + 0.5 * math.log(4) + 1.5 * math.log(3)
    assert nkd(torch.zeros(1, 4), TEACHER, LABELS[:1]).item() == pytest.approx(expected, rel=1e-6)
    assert nkd(torch.zeros(1, 4), TEACHER, LABELS[:1], gamma=0.0).item() == pytest.approx(1.5 * math.log(4), rel=1e-6)


def test_nkd_falls_as_the_rest_agrees_and_the_label_wins() -> None:
    """Its infimum: q̂ = p̂, q_y = 1, and γ · (entropy of p̂) is left."""
    teacher = _random(14)
    hit = torch.nn.functional.one_hot(LABELS, 5).bool()
    rest = teacher.masked_fill(hit, -math.inf).softmax(1)
    entropy = -(rest * rest.masked_fill(hit, 1).log()).sum(1).mean().item()
    best = nkd(teacher + 50 * hit, teacher, LABELS).item()
    assert best == pytest.approx(1.5 * entropy, rel=1e-4)
    for seed in range(20):
        assert nkd(teacher + 50 * hit + 0.3 * _random(seed), teacher, LABELS).item() > best
    at_teacher = nkd(teacher, teacher, LABELS).item()
    assert at_teacher == pytest.approx(best + nkd(teacher, teacher, LABELS, gamma=0.0).item(), rel=1e-4)


def test_dkd_by_hand() -> None:
    label = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)  # KL of (1/2, 1/2) and (1/4, 3/4)
    rest = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)  # KL of (1/2, 1/4, 1/4) and thirds
    loss = dkd(torch.zeros(1, 4), TEACHER, LABELS[:1], temperature=1.0, alpha=3.0, beta=2.0)
    assert loss.item() == pytest.approx(3 * label + 2 * rest, rel=1e-6)


def test_dkd_with_the_weights_of_kd_is_kd() -> None:
    """KL = KL of the label against the rest + (1 − p_y) · KL of the rest (Zhao et al. 2022, equation 7)."""
    student, teacher = _random(15), _random(16)
    for i in range(6):
        sure = (teacher[i] / 4).softmax(0)[LABELS[i]].item()
        apart = dkd(student[i : i + 1], teacher[i : i + 1], LABELS[i : i + 1], alpha=1.0, beta=1 - sure)
        assert apart.item() == pytest.approx(kd(student[i : i + 1], teacher[i : i + 1]).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_they_learn_from_a_teacher_that_is_sure(name: str) -> None:
    """log(1 − p_y) of a saturated softmax is −∞; as a logsumexp of the rest it is a number with a gradient."""
    teacher = torch.tensor([[200.0, 3, 1, 0]])
    student = torch.tensor([[150.0, 0, 2, 3]], requires_grad=True)
    loss: Any = OF_CLASSES[name](student, teacher, LABELS[:1], temperature=1.0)
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad is not None
    assert float(student.grad[0, 1:].abs().min()) > 0.1


def test_ofa_by_hand() -> None:
    weights = (1.5**2 - 1) + 0.25**2 + 2 * 0.125**2
    loss = ofa(torch.zeros(1, 4), TEACHER, LABELS[:1], epsilon=2.0)
    assert loss.item() == pytest.approx(weights * math.log(4), rel=1e-6)
    assert ofa(torch.zeros(1, 4), TEACHER, LABELS[:1]).item() == pytest.approx(math.log(4), rel=1e-6)


def test_ofa_is_smallest_where_it_says() -> None:
    teacher, epsilon = _random(17), 1.5
    hit = torch.nn.functional.one_hot(LABELS, 5)
    best = ((teacher.softmax(1) + hit) ** epsilon - hit).log()
    least = ofa(best, teacher, LABELS, epsilon=epsilon).item()
    for seed in range(20):
        assert ofa(best + 0.1 * _random(seed), teacher, LABELS, epsilon=epsilon).item() > least
    assert ofa(teacher, teacher, LABELS, epsilon=epsilon).item() > least


def test_ofa_takes_mixed_labels_only_where_they_cancel_out() -> None:
    student, teacher, mixed = _random(18), _random(19), _random(20).softmax(1)
    assert ofa(student, teacher, mixed).item() == ofa(student, teacher, LABELS).item()
    with pytest.raises(PartError, match="epsilon = 1"):
        ofa(student, teacher, mixed, epsilon=1.5)


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_two_classes_are_refused(name: str) -> None:
    with pytest.raises(PartError, match="2 classes one is left"):
        OF_CLASSES[name](_random(0, classes=2), _random(1, classes=2), LABELS.clamp(max=1))


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_mixed_labels_are_refused(name: str) -> None:
    with pytest.raises(PartError, match=f"{name}.*probabilities.*mixup"):
        OF_CLASSES[name](_random(0), _random(1), _random(2).softmax(1))


@pytest.mark.parametrize("name", sorted(OF_LABELS))
def test_labels_of_other_rows_are_refused(name: str) -> None:
    with pytest.raises(PartError, match=f"{name} is given labels"):
        _call(name, _random(0), _random(1), LABELS[:, None], **({"epsilon": 2.0} if name == "ofa" else {}))


@pytest.mark.parametrize("name", sorted(OF_LABELS))
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_are_the_same(name: str, dtype: torch.dtype) -> None:
    expected = _call(name, _random(0), _random(1), LABELS)
    assert _call(name, _random(0), _random(1), LABELS.to(dtype)) == expected


# ---------------------------------------------------------------- ce, mse


def test_ce_by_hand() -> None:
    student, labels = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    assert ce(student, labels).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-6)
    smoothed = (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)) / 2
    assert ce(student, labels, label_smoothing=0.2).item() == pytest.approx(smoothed, rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ce_takes_probabilities(label_smoothing: float, dtype: torch.dtype) -> None:
    student, hard = _random(0), torch.nn.functional.one_hot(LABELS, 5).to(dtype)
    indexed = ce(student, LABELS, label_smoothing=label_smoothing).item()
    assert ce(student, hard, label_smoothing=label_smoothing).item() == pytest.approx(indexed, rel=1e-6)
    mixed = 0.25 * hard + 0.75 * hard.roll(1, 0)
    both = 0.25 * indexed + 0.75 * ce(student, LABELS.roll(1), label_smoothing=label_smoothing).item()
    assert ce(student, mixed, label_smoothing=label_smoothing).item() == pytest.approx(both, rel=1e-5)


def test_ce_is_smallest_at_the_labels() -> None:
    mixed = _random(1).softmax(1)
    best = ce(mixed.log(), mixed).item()
    for seed in range(20):
        assert ce(mixed.log() + 0.1 * _random(seed), mixed).item() > best


@pytest.mark.parametrize("label_smoothing", [1.0, -0.1, math.nan])
def test_ce_refuses_a_label_smoothing(label_smoothing: float) -> None:
    with pytest.raises(PartError, match="label_smoothing"):
        ce(_random(0), LABELS, label_smoothing=label_smoothing)


def test_ce_refuses_labels_of_other_classes() -> None:
    with pytest.raises(PartError, match=r"with labels of shape \(6, 4\)"):
        ce(_random(0), _random(1, classes=4).softmax(1))
    with pytest.raises(PartError, match=r"labels of shape \(5,\)"):
        ce(_random(0), LABELS[:5])


def test_mse_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 0], [3, 3]])
    nothing = torch.full((2, 2), math.nan)  # what it is not held to is not looked at
    assert mse(student, teacher, nothing).item() == pytest.approx(5 / 4)
    assert mse(student, nothing, teacher, to="labels").item() == pytest.approx(5 / 4)


def test_mse_does_not_broadcast_a_column_of_labels() -> None:
    """rows × 1 against rows would be rows × rows: every sample held to every label."""
    values, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0])
    assert mse(values, values, labels, to="labels").item() == pytest.approx(1 / 3)
    with pytest.raises(PartError, match=r"labels of shape \(3, 1\)"):
        mse(torch.zeros(3, 2), torch.zeros(3, 2), labels, to="labels")
    with pytest.raises(PartError, match=r"teacher's outputs of shape \(3, 1\)"):
        mse(torch.zeros(3, 2), torch.zeros(3, 1), labels)
    with pytest.raises(PartError, match="'teacher' or 'labels'"):
        mse(values, values, labels, to="label")  # type: ignore[arg-type]


# ---------------------------------------------------------------- what all of them refuse


@pytest.mark.parametrize("name", sorted(OF_CLASSES))
def test_other_classes_than_the_teachers_are_refused(name: str) -> None:
    with pytest.raises(PartError, match=rf"({name}|kd) compares outputs of shape \(6, 5\).*\(6, 4\).*its column"):
        _call(name, _random(0), _random(1, classes=4), LABELS)


@pytest.mark.parametrize("name", sorted(OF_CLASSES))
@pytest.mark.parametrize("shape", [(5,), (2, 5, 4, 4)])
def test_outputs_that_are_no_rows_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(PartError, match=r"rows × classes.*movedim"):
        _call(name, torch.zeros(shape), torch.zeros(shape), LABELS)


@pytest.mark.parametrize("name", [*sorted(OF_CLASSES), "ce"])
def test_no_rows_are_refused_rather_than_nan(name: str) -> None:
    nothing = torch.zeros(0, 5)
    with pytest.raises(PartError, match="no rows"):
        ce(nothing, LABELS[:0]) if name == "ce" else _call(name, nothing, nothing, LABELS[:0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["kd", "dist", "nkd", "dkd"])
def test_a_temperature_is_refused(name: str, temperature: float) -> None:
    with pytest.raises(PartError, match=f"{name} has temperature"):
        _call(name, _random(0), _random(1), LABELS, temperature=temperature)


@pytest.mark.parametrize(("name", "option"), [("nkd", "gamma"), ("dkd", "alpha"), ("dkd", "beta"), ("ofa", "epsilon")])
def test_a_negative_weight_is_refused(name: str, option: str) -> None:
    with pytest.raises(PartError, match=f"{name} has {option} = -1"):
        _call(name, _random(0), _random(1), LABELS, **{option: -1.0})
