"""Losses of features: known values by hand, invariances, masks, what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edgekd.errors import PartError
from edgekd.losses import attention, cosine, hidden, hint, minilm, review, similarity, srd


def _three_heads(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    return minilm(student, teacher, mask, heads=3)


OF_POSITIONS: dict[str, Callable[..., Tensor]] = {"cosine": cosine, "hidden": hidden, "hint": hint, "srd": srd}
MASKED = OF_POSITIONS | {"minilm": _three_heads}
OF_PAIRS: dict[str, Callable[..., Tensor]] = MASKED | {"attention": attention, "similarity": similarity}
LENGTHS = (5, 2, 4)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _mask() -> Tensor:
    return torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def _rotation(seed: int, channels: int) -> Tensor:
    turn: Tensor = torch.linalg.qr(_random(seed, channels, channels)).Q
    return turn


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", sorted(OF_PAIRS))
def test_maps_are_their_positions(name: str) -> None:
    student, teacher = _random(0, 3, 18, 4, 5), _random(1, 3, 18, 4, 5)
    flat = [maps.flatten(2).transpose(1, 2) for maps in (student, teacher)]
    assert OF_PAIRS[name](student, teacher).item() == pytest.approx(OF_PAIRS[name](*flat).item(), rel=1e-6)


@pytest.mark.parametrize("name", [*sorted(OF_POSITIONS), "similarity"])
def test_vectors_are_one_position(name: str) -> None:
    student, teacher = _random(0, 6, 18), _random(1, 6, 18)
    assert OF_PAIRS[name](student, teacher).item() == OF_PAIRS[name](student[:, None], teacher[:, None]).item()


@pytest.mark.parametrize("name", sorted(OF_POSITIONS))
def test_the_order_of_positions_does_not_matter(name: str) -> None:
    student, teacher = _random(0, 3, 5, 18), _random(1, 3, 5, 18)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = OF_PAIRS[name](student[:, order], teacher[:, order])
    assert shuffled.item() == pytest.approx(OF_PAIRS[name](student, teacher).item(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(OF_PAIRS))
@pytest.mark.parametrize("shape", [(4, 5, 18), (3, 6, 18), (3, 5, 36)])
def test_features_that_do_not_fit_are_refused(name: str, shape: tuple[int, int, int]) -> None:
    free = {"attention": 2, "minilm": 2, "similarity": 1}.get(name, 3)  # how many of the three have to agree
    student, teacher = _random(0, 3, 5, 18), _random(1, *shape)
    if shape[:free] == (3, 5, 18)[:free]:
        assert math.isfinite(OF_PAIRS[name](student, teacher).item())
    else:
        with pytest.raises(PartError, match=rf"{name} compares a feature .*\(3, 5, 18\) with the teacher's"):
            OF_PAIRS[name](student, teacher)


@pytest.mark.parametrize("name", sorted(OF_PAIRS))
def test_features_without_channels_are_refused(name: str) -> None:
    with pytest.raises(PartError, match="no channels"):
        OF_PAIRS[name](torch.zeros(5), torch.zeros(5))


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("name", sorted(MASKED))
def test_a_mask_of_all_is_no_mask(name: str) -> None:
    student, teacher = _random(0, 3, 5, 18), _random(1, 3, 5, 18)
    everything = torch.ones(3, 5, dtype=torch.bool)
    assert MASKED[name](student, teacher, everything).item() == pytest.approx(
        MASKED[name](student, teacher).item(), rel=1e-6
    )


@pytest.mark.parametrize("name", sorted(MASKED))
def test_padding_at_the_end_is_as_if_it_were_not_there(name: str) -> None:
    student, teacher = _random(0, 3, 5, 18), _random(1, 3, 5, 18)
    mask = (torch.arange(5) < 3).expand(3, 5)
    short = MASKED[name](student[:, :3], teacher[:, :3])
    assert MASKED[name](student, teacher, mask).item() == pytest.approx(short.item(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(OF_POSITIONS))
def test_padding_of_several_lengths_is_dropped(name: str) -> None:
    student, teacher, mask = _random(0, 3, 5, 18), _random(1, 3, 5, 18), _mask()
    dropped = OF_POSITIONS[name](student[mask], teacher[mask])
    assert OF_POSITIONS[name](student, teacher, mask).item() == pytest.approx(dropped.item(), rel=1e-6)


def test_sentences_of_several_lengths_are_apart_in_minilm() -> None:
    student, teacher = _random(0, 3, 5, 18), _random(1, 3, 5, 18)
    alone = [n * minilm(student[i : i + 1, :n], teacher[i : i + 1, :n], heads=3).item() for i, n in enumerate(LENGTHS)]
    together = minilm(student, teacher, _mask(), heads=3).item()
    assert together == pytest.approx(sum(alone) / sum(LENGTHS), rel=1e-5)


@pytest.mark.parametrize("name", sorted(MASKED))
@pytest.mark.parametrize("junk", [0.0, 1e4, math.inf, math.nan])
def test_what_padding_holds_does_not_matter(name: str, junk: float) -> None:
    mask = _mask()
    expected = MASKED[name](_random(0, 3, 5, 18), _random(1, 3, 5, 18), mask).item()
    student, teacher = (_random(seed, 3, 5, 18).masked_fill(~mask[..., None], junk) for seed in (0, 1))
    student.requires_grad_()
    loss: Any = MASKED[name](student, teacher, mask)
    loss.backward()
    assert loss.item() == expected
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert not bool(student.grad[~mask].any())
    assert bool(student.grad[mask].any(1).all())


@pytest.mark.parametrize("name", sorted(MASKED))
def test_a_mask_of_ones_and_zeros_is_a_mask(name: str) -> None:
    """Tokenizers give int64; as an index it would pick rows 0 and 1."""
    student, teacher, mask = _random(0, 3, 5, 18), _random(1, 3, 5, 18), _mask()
    assert MASKED[name](student, teacher, mask.long()).item() == MASKED[name](student, teacher, mask).item()


@pytest.mark.parametrize("name", sorted(OF_POSITIONS))
def test_a_mask_of_maps_has_their_grid(name: str) -> None:
    student, teacher = _random(0, 3, 18, 2, 3), _random(1, 3, 18, 2, 3)
    mask = _random(2, 3, 2, 3) > 0
    flat = [maps.flatten(2).transpose(1, 2) for maps in (student, teacher)]
    assert OF_POSITIONS[name](student, teacher, mask).item() == OF_POSITIONS[name](*flat, mask.flatten(1)).item()


@pytest.mark.parametrize("name", sorted(MASKED))
@pytest.mark.parametrize(
    "mask", [torch.ones(3, 5), torch.ones(3, 4, dtype=torch.bool), torch.ones(5, dtype=torch.bool)[None]]
)
def test_masks_that_do_not_fit_are_refused(name: str, mask: Tensor) -> None:
    with pytest.raises(PartError, match=rf"{name} is given a mask of .*bool of shape \(3, 5\)"):
        MASKED[name](_random(0, 3, 5, 18), _random(1, 3, 5, 18), mask)


@pytest.mark.parametrize("name", sorted(MASKED))
def test_a_mask_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(PartError, match="counts"):
        MASKED[name](_random(0, 3, 5, 18), _random(1, 3, 5, 18), torch.zeros(3, 5, dtype=torch.bool))


# ---------------------------------------------------------------- hint, hidden, cosine


@pytest.mark.parametrize("loss", [hint, hidden])
def test_hint_and_hidden_by_hand(loss: Callable[..., Tensor]) -> None:
    student, teacher = torch.tensor([[[1.0, 2], [3, 4]]]), torch.tensor([[[1.0, 0], [3, 3]]])
    assert loss(student, teacher).item() == pytest.approx(5 / 4)
    assert loss(student, teacher, torch.tensor([[True, False]])).item() == pytest.approx(4 / 2)


def test_cosine_by_hand() -> None:
    student = torch.tensor([[3.0, 4], [1, 0], [1, 0], [2, 2]])
    teacher = torch.tensor([[4.0, 3], [0, 1], [-5, 0], [7, 7]])
    assert cosine(student, teacher).item() == pytest.approx((1 / 25 + 1 + 2 + 0) / 4, rel=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e3, 1e25])
def test_cosine_does_not_depend_on_length(size: float) -> None:
    student, teacher = _random(0, 3, 5, 18), _random(1, 3, 5, 18)
    lengths = size * (1 + _random(2, 3, 5, 1).abs())
    assert cosine(lengths * student, teacher).item() == pytest.approx(cosine(student, teacher).item(), rel=1e-5)


def test_cosine_of_nothing_gets_no_gradient() -> None:
    student, teacher = (
        torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True),
        torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
    )
    loss: Any = cosine(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx((1 + (1 - 0.6)) / 2)
    assert student.grad is not None
    assert student.grad[0].tolist() == [0, 0]
    # d/ds of −s·t/‖s‖ at (3, 4), halved: (−0.64, 0.48) / 5 / 2
    assert student.grad[1].tolist() == pytest.approx([-0.064, 0.048])


# ---------------------------------------------------------------- srd


def test_srd_by_hand() -> None:
    # both are −1 and 1 when standardised, in opposite orders: 2⁴ twice (but for ε = 1e-4)
    student, teacher = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [3.0]])
    assert srd(student, teacher).item() == pytest.approx(math.log(32), abs=1e-3)


def test_srd_does_not_depend_on_scale_and_offset() -> None:
    student, teacher = _random(0, 3, 5, 18), _random(1, 3, 5, 18)
    scales, offsets = 10 ** _random(2, 18).clamp(-0.5, 0.5), 5 * _random(3, 18)
    loss = srd(student, teacher).item()
    assert srd(scales * student + offsets, teacher).item() == pytest.approx(loss, rel=1e-2)
    assert srd(student, scales * teacher + offsets).item() == pytest.approx(loss, rel=1e-2)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e3])
def test_srd_is_the_same_for_features_of_any_size(size: float) -> None:
    student, teacher = _random(0, 64, 8), _random(1, 64, 8)
    assert srd(size * student, teacher).item() == pytest.approx(srd(student, teacher).item(), abs=1e-3)


def test_srd_of_constant_features_is_finite() -> None:
    constant = torch.ones(8, 4, requires_grad=True)
    loss: Any = srd(constant, _random(0, 8, 4))
    loss.backward()
    assert constant.grad is not None
    assert math.isfinite(loss.item())
    assert constant.grad.isfinite().all()


def test_srd_at_equality_is_finite() -> None:
    teacher = _random(0, 3, 5, 18)
    student = teacher.clone().requires_grad_()
    loss: Any = srd(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1e-4), rel=1e-6)
    assert student.grad is not None
    assert not bool(student.grad.any())
    for size in (1e-6, 1e-4, 1e-2, 1e-1):  # and the gradient on the way there does not explode
        near = (teacher + size * _random(1, 3, 5, 18)).requires_grad_()
        loss = srd(near, teacher)
        loss.backward()
        assert near.grad is not None
        assert float(near.grad.norm()) < 200


def test_srd_of_one_vector_is_refused() -> None:
    with pytest.raises(PartError, match="two samples"):
        srd(_random(0, 1, 18), _random(1, 1, 18))
    assert math.isfinite(srd(_random(0, 1, 2, 18), _random(1, 1, 2, 18)).item())  # positions count too
    with pytest.raises(PartError, match="two samples"):
        srd(_random(0, 1, 2, 18), _random(1, 1, 2, 18), torch.tensor([[True, False]]))


# ---------------------------------------------------------------- attention, similarity


def test_attention_by_hand() -> None:
    # the student looks at the first position, the teacher at the second; channels differ in number
    student, teacher = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[0.0], [-7.0]]])
    assert attention(student, teacher).item() == pytest.approx(2)
    # p = 2: (25, 0) against (9, 16), p = 1: (7, 0) against (3, 4)
    student, teacher = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.tensor([[[3.0], [4.0]]])
    assert attention(student, teacher).item() == pytest.approx(2 - 2 * 9 / math.hypot(9, 16), rel=1e-6)
    assert attention(student, teacher, p=1.0).item() == pytest.approx(2 - 2 * 3 / 5, rel=1e-6)


def test_attention_is_of_activity_alone() -> None:
    student, teacher = _random(0, 3, 5, 8), _random(1, 3, 5, 12)
    loss = attention(student, teacher).item()
    assert attention(1e15 * student.flip(2), -1e-3 * teacher).item() == pytest.approx(loss, rel=1e-5)
    assert attention(student @ _rotation(2, 8), teacher).item() == pytest.approx(loss, rel=1e-5)  # p = 2 alone


def test_attention_does_not_shrink_with_the_grid() -> None:
    student, teacher = _random(0, 3, 8, 4, 4), _random(1, 3, 8, 4, 4)
    finer = attention(*(maps.repeat_interleave(3, 2).repeat_interleave(3, 3) for maps in (student, teacher)))
    assert finer.item() == pytest.approx(attention(student, teacher).item(), rel=1e-5)


def test_attention_refuses() -> None:
    with pytest.raises(PartError, match="one position"):
        attention(_random(0, 3, 18), _random(1, 3, 18))
    for p in (0.0, 0.5, math.nan, math.inf):
        with pytest.raises(PartError, match="p = "):
            attention(_random(0, 3, 5, 18), _random(1, 3, 5, 18), p=p)


def test_similarity_by_hand() -> None:
    # the student's two samples are alike: rows (1, 1) / √2; the teacher's are orthogonal: rows (1, 0) and (0, 1)
    student, teacher = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    expected = 2 * ((1 - math.sqrt(0.5)) ** 2 + 0.5) / 4
    assert similarity(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_similarity_needs_no_projector() -> None:
    student, teacher = _random(0, 4, 5, 8), _random(1, 4, 12, 6, 6)
    loss = similarity(student, teacher).item()
    turned = (student.flatten(1) @ _rotation(2, 40)) * 1e15
    assert similarity(turned, 1e-3 * teacher).item() == pytest.approx(loss, rel=1e-4)
    assert similarity(teacher.flatten(1) @ _rotation(3, 432), teacher).item() == pytest.approx(0, abs=1e-8)


def test_similarity_of_one_sample_is_refused() -> None:
    with pytest.raises(PartError, match="two samples"):
        similarity(_random(0, 1, 5, 18), _random(1, 1, 5, 18))


# ---------------------------------------------------------------- review


def test_review_by_hand() -> None:
    # a constant difference stays in every pool, so each level gives its square
    teacher = (_random(0, 2, 3, 8, 8), _random(1, 2, 4, 2, 2), _random(2, 2, 5, 1, 1))
    student = tuple(maps + by for maps, by in zip(teacher, (1.0, 2.0, 3.0), strict=True))
    assert review(student, teacher).item() == pytest.approx(1 + 4 + 9, rel=1e-5)
    # stripes of ±1, one row wide, vanish in every pool of 8 × 8: the weight of the maps as they are is 1 of 15/8
    stripes = torch.tensor([1.0, -1.0]).repeat(4)[:, None].expand(8, 8)
    assert review([teacher[0] + stripes], [teacher[0]]).item() == pytest.approx(8 / 15, rel=1e-5)
    assert review([teacher[1] + stripes[:2, :2]], [teacher[1]]).item() == pytest.approx(2 / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([], []),
        ([(2, 3, 8, 8)], [(2, 3, 8, 8), (2, 3, 4, 4)]),
        ([(2, 3, 8, 8)], [(2, 4, 8, 8)]),
        ([(2, 3, 8, 8)], [(2, 3, 4, 4)]),
        ([(2, 64, 3)], [(2, 64, 3)]),
    ],
)
def test_levels_that_do_not_fit_are_refused(student: list[tuple[int, ...]], teacher: list[tuple[int, ...]]) -> None:
    with pytest.raises(PartError, match="review compares levels"):
        review([torch.zeros(shape) for shape in student], [torch.zeros(shape) for shape in teacher])


# ---------------------------------------------------------------- minilm


def test_minilm_by_hand() -> None:
    """Two tokens, one head of one channel; keys and values agree, queries do not."""
    # queries 0 and 0: relations (1/2, 1/2) twice; teacher's 0 and √log 3: (1/2, 1/2) and (1/4, 3/4)
    student = torch.tensor([[[0.0, 1, 2], [0.0, 3, 4]]])
    teacher = torch.tensor([[[0.0, 1, 2], [math.sqrt(math.log(3)), 3, 4]]])
    expected = (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2
    assert minilm(student, teacher, heads=1).item() == pytest.approx(expected, rel=1e-5)


def test_minilm_compares_networks_of_other_widths() -> None:
    """Relations see angles within a slice: a teacher rotated into a wider space has the same ones, at equal √d."""
    student = _random(0, 2, 6, 3 * 8)
    slices = student.reshape(2, 6, 3, 2, 4)
    turned = torch.stack([slices[:, :, :, a] @ _rotation(a, 4) for a in range(2)], 3)
    assert minilm(student, turned.flatten(2), heads=2).item() == pytest.approx(0, abs=1e-6)
    wider = torch.cat([slices, torch.zeros(2, 6, 3, 2, 12)], 4) * math.sqrt(2)  # d four times, scores times two
    assert minilm(student, wider.flatten(2), heads=2).item() == pytest.approx(0, abs=1e-6)
    assert minilm(student, turned.flatten(2), heads=4).item() > 1e-3


def test_a_sentence_of_one_token_adds_nothing_to_minilm() -> None:
    student, teacher = _random(0, 2, 4, 18), _random(1, 2, 4, 18)
    mask = torch.tensor([[True] * 4, [True] + [False] * 3])
    alone = minilm(student[:1], teacher[:1], heads=3).item()
    assert minilm(student, teacher, mask, heads=3).item() == pytest.approx(alone * 4 / 5, rel=1e-5)


def test_minilm_says_which_heads_there_may_be() -> None:
    with pytest.raises(PartError, match=r"heads = 12 for features of 24 and 36 channels.*Heads may be 1, 2, 4\."):
        minilm(_random(0, 2, 6, 24), _random(1, 2, 6, 36))
    with pytest.raises(PartError, match="heads = 0"):
        minilm(_random(0, 2, 6, 24), _random(1, 2, 6, 24), heads=0)
    with pytest.raises(PartError, match=r"20 and 24 channels; expected queries, keys and values, concatenated"):
        minilm(_random(0, 2, 6, 20), _random(1, 2, 6, 24), heads=1)
    with pytest.raises(PartError, match="tokens to each other"):
        minilm(_random(0, 2, 24), _random(1, 2, 24), heads=1)
