"""Pairs on one grid, projectors, alignment and similarity, each by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from edgekd.correspondence import Adapter, Pair, Tap
from edgekd.correspondence.align import align, cka, quarters, score
from edgekd.correspondence.choice import given, suited
from edgekd.correspondence.positions import resized_mask
from edgekd.correspondence.projectors import Exit, Fusion, Projection, projection
from edgekd.correspondence.pruned import channel_map, is_copy
from edgekd.errors import ModelError, PartError


def _tap(layout: str, grid: tuple[int, ...] = (), channels: int = 4, **more: Any) -> Tap:
    return Tap("place", layout, (), channels, more.pop("depth", 1.0), more.pop("stride", 1.0), grid=grid, **more)


def _pair(student: Tap, teacher: Tap, **more: Any) -> Pair:
    return Pair(student, teacher, "hint", 1.0, None, 1.0, **more)


MAP = _tap("BCHW", (8, 8))


# ---------------------------------------------------------------- one grid


def test_maps_on_one_grid_are_only_turned_round() -> None:
    student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)
    mine, theirs, mask = _pair(MAP, _tap("BCHW", (8, 8), 6)).aligned(student, teacher)
    assert torch.equal(mine, student.flatten(2).transpose(1, 2))
    assert torch.equal(theirs, teacher.flatten(2).transpose(1, 2))
    assert mask is None


def test_the_larger_map_is_averaged_to_the_smaller() -> None:
    student, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)
    mine, theirs, _ = _pair(MAP, _tap("BCHW", (4, 4))).aligned(student, teacher)
    assert torch.equal(mine, adaptive_avg_pool2d(student, 4).flatten(2).transpose(1, 2))
    assert torch.equal(theirs, teacher.flatten(2).transpose(1, 2))
    back, pooled, _ = _pair(_tap("BCHW", (4, 4)), MAP).aligned(teacher, student)
    assert torch.equal(back, theirs)
    assert torch.equal(pooled, mine)


def test_tokens_are_a_grid_without_those_before_it() -> None:
    tokens, maps = torch.randn(2, 66, 4), torch.randn(2, 4, 8, 8)
    mine, theirs, _ = _pair(MAP, _tap("BNC", (8, 8), prefix=2)).aligned(maps, tokens)
    assert torch.equal(theirs, tokens[:, 2:])
    assert torch.equal(mine, maps.flatten(2).transpose(1, 2))
    larger, smaller = _pair(MAP, _tap("BNC", (8, 8), prefix=2)).maps(maps, torch.randn(2, 146, 4))
    assert larger.shape == (2, 4, 8, 8)
    assert smaller.shape == (2, 4, 12, 12)  # another size than the probe's
    wide = _pair(MAP, _tap("BNC", (4, 8))).maps(maps, torch.randn(2, 128, 4))[1]
    assert wide.shape == (2, 4, 8, 16)
    with pytest.raises(ModelError, match="65 tokens are no grid"):
        _pair(MAP, _tap("BNC", (8, 8))).aligned(maps, torch.randn(2, 65, 4))


def test_channels_may_come_last() -> None:
    maps = torch.randn(2, 4, 8, 8)
    mine, theirs, _ = _pair(MAP, _tap("BHWC", (8, 8))).aligned(maps, maps.permute(0, 2, 3, 1))
    assert torch.equal(mine, theirs)
    first, second = _pair(MAP, _tap("BHWC", (8, 8))).maps(maps, maps.permute(0, 2, 3, 1))
    assert torch.equal(first, second)
    with pytest.raises(ModelError, match="expected layout BHWC"):
        _pair(MAP, _tap("BHWC", (8, 8))).aligned(maps, maps[0])


def test_grids_that_are_not_alike_are_averaged_away() -> None:
    maps, vector, sequence = torch.randn(2, 4, 8, 8), torch.randn(2, 4), torch.randn(2, 5, 4)
    mine, theirs, _ = _pair(MAP, _tap("BC")).aligned(maps, vector)
    assert mine.shape == theirs.shape == (2, 1, 4)
    torch.testing.assert_close(mine[:, 0], maps.mean((2, 3)))
    mine, theirs, _ = _pair(MAP, _tap("BNC", (5,))).aligned(maps, sequence)
    torch.testing.assert_close(theirs[:, 0], sequence.mean(1))
    assert mine.shape == (2, 1, 4)


def test_padding_is_in_no_average() -> None:
    pair = _pair(_tap("BNC", (3,)), _tap("BNC", (6,)))
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    teacher[1, 3:] = math.nan  # padding may hold anything
    mine, theirs, kept = pair.aligned(student, teacher, mask)
    assert kept is not None
    assert kept.tolist() == [[True, True, True], [True, True, False]]
    torch.testing.assert_close(theirs[0], teacher[0].reshape(3, 2, 4).mean(1))
    torch.testing.assert_close(theirs[1, 0], teacher[1, :2].mean(0))
    torch.testing.assert_close(theirs[1, 1], teacher[1, 2])
    assert torch.equal(mine, student)
    vectors = _pair(_tap("BC"), _tap("BNC", (6,))).aligned(torch.randn(2, 4), teacher, mask)
    torch.testing.assert_close(vectors[1][1, 0], teacher[1, :3].mean(0))
    assert vectors[2] is None


def test_a_ragged_sequence_is_as_long_as_its_longest() -> None:
    pair = _pair(_tap("BNC", (6,), ragged=True), _tap("BNC", (6,)))
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    student, teacher = torch.randn(2, 4, 4), torch.randn(2, 6, 4)
    mine, theirs, kept = pair.aligned(student, teacher, mask)
    assert kept is not None
    assert torch.equal(mine, student)
    assert torch.equal(theirs, teacher[:, :4])
    assert torch.equal(kept, mask[:, :4])


def test_a_mask_on_other_positions() -> None:
    mask = torch.tensor([[True, False, False, False]])
    assert resized_mask(mask, 2).tolist() == [[True, False]]
    assert resized_mask(mask, 8).tolist() == [[True, True, *[False] * 6]]


def test_channels_that_count() -> None:
    pair = _pair(_tap("BCHW", (2, 2), 2), MAP, channel_map=(3, 1), projector="none")
    student, teacher = torch.randn(2, 2, 2, 2), torch.randn(2, 4, 2, 2)
    _, theirs, _ = pair.aligned(student, teacher)
    assert torch.equal(theirs, teacher[:, [3, 1]].flatten(2).transpose(1, 2))
    assert torch.equal(pair.maps(student, teacher)[1], teacher[:, [3, 1]])
    assert pair.target_channels == 2


# ---------------------------------------------------------------- projectors


def test_a_projection_begins_as_the_identity_where_it_can() -> None:
    x = torch.randn(2, 5, 4)
    assert torch.equal(Projection(4, 4)(x), x)
    assert Projection(4, 6)(x).shape == (2, 5, 6)
    exact = projection(_pair(MAP, _tap("BCHW", (8, 8), 6), channel_map=(0, 2, 4, 5), projector="none"))
    assert not list(exact.parameters())
    half = projection(_pair(MAP, _tap("BNC", (5,), 6), channel_map=(0, 1, 2)))
    assert half(x).shape == (2, 5, 3)


def test_an_exit_does_not_see_padding() -> None:
    leave, feature = Exit(4, 3), torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    logits = leave(feature, mask)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[1], leave(feature[1:, :2])[0])
    torch.testing.assert_close(logits[0], leave(feature[:1])[0])


def test_fusion_gives_the_teachers_shapes_and_reaches_every_level() -> None:
    fusion = Fusion([(4, 6), (8, 12), (16, 24)])
    levels = [torch.randn(2, 4, 16, 16), torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)]
    for level in levels:
        level.requires_grad_()
    sizes = [(8, 8), (8, 8), (2, 2)]
    fused = fusion(levels, sizes)
    assert [tuple(maps.shape) for maps in fused] == [(2, 6, 8, 8), (2, 12, 8, 8), (2, 24, 2, 2)]
    fused[0].square().sum().backward()
    assert all(level.grad is not None and bool(level.grad.any()) for level in levels)  # the deeper ones come down
    deepest = fusion([level.detach() for level in levels], sizes)[2]
    other = fusion([torch.zeros_like(levels[0]), torch.zeros_like(levels[1]), levels[2].detach()], sizes)[2]
    assert torch.equal(deepest, other)


def test_an_adapter_makes_what_a_loss_asks_for() -> None:
    pair = _pair(MAP, _tap("BCHW", (4, 4), 6))
    student, teacher = {"place": torch.randn(2, 4, 8, 8, requires_grad=True)}, {"place": torch.randn(2, 6, 4, 4)}
    adapter = Adapter([pair, pair], {"projected_feature", "teacher_feature", "labels", "student_logits"})
    calls = adapter(student, teacher)
    assert [set(call) for call in calls] == [{"projected_feature", "teacher_feature"}] * 2
    calls[0]["projected_feature"].sum().backward()
    assert student["place"].grad is not None
    assert len(list(adapter.parameters())) == 4
    assert not list(Adapter([pair], {"student_feature", "teacher_feature", "mask"}).parameters())
    (exits,) = Adapter([pair], {"exit_logits"}, classes=3)(student, teacher)
    assert exits["exit_logits"].shape == (2, 3)
    (fused,) = Adapter([pair, pair], {"fused_features", "teacher_features"})(student, teacher)
    assert [tuple(maps.shape) for maps in fused["fused_features"]] == [(2, 6, 4, 4)] * 2
    assert all(torch.equal(maps, teacher["place"]) for maps in fused["teacher_features"])
    with pytest.raises(PartError, match="no classes"):
        Adapter([pair], {"exit_logits"})


# ---------------------------------------------------------------- alignment


def _best(scores: list[list[float]], count: int) -> float:
    """By trying all."""
    rows, columns = len(scores), len(scores[0])
    return scores[-1][-1] + max(
        sum(scores[i][j] for i, j in zip(mine, theirs, strict=True))
        for mine in itertools.combinations(range(rows - 1), count - 1)
        for theirs in itertools.combinations(range(columns - 1), count - 1)
    )


@pytest.mark.parametrize("seed", range(6))
def test_alignment_is_the_best_of_all_monotone_ones(seed: int) -> None:
    scores = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)).tolist()
    for count in (1, 2, 3, 4):
        pairs = align(scores, count)
        assert len(pairs) == count
        assert pairs[-1] == (4, 6)
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs))
        assert sum(scores[i][j] for i, j in pairs) == pytest.approx(_best(scores, count))
    assert align([], 3) == []


def test_score_by_hand() -> None:
    student, teacher = _tap("BCHW", (8, 8), depth=0.5, stride=4.0), _tap("BCHW", (8, 8), depth=0.75, stride=8.0)
    assert score(student, teacher, 0.5) == pytest.approx(0.5 / 2 + 0.3 * 0.75 + 0.2 * 0.5)
    assert score(student, student, None) == pytest.approx(0.8)
    assert score(_tap("BC", stride=None), _tap("BC", stride=None), 1.0) == pytest.approx(1.0)
    assert score(_tap("BC", stride=None), student, -1.0) == pytest.approx(0.3 * 0.5)


def test_of_many_blocks_those_at_the_quarters() -> None:
    blocks = [_tap("BNC", (5,), kind="block", depth=(at + 1) / 12) for at in range(12)]
    assert [round(tap.depth * 12) for tap in quarters(blocks)] == [3, 6, 9, 12]
    assert quarters(blocks[:3]) == tuple(blocks[:3])
    stages = [_tap("BCHW", (8, 8), kind="stage")] * 6
    assert len(quarters(stages)) == 6


def _gram(rows: Tensor) -> Tensor:
    rows = rows.double() - rows.double().mean(0)
    return rows @ rows.T


def test_cka() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(64, 20, generator=generator), torch.randn(64, 500, generator=generator)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=generator))[0]
    assert cka(_gram(first), _gram(3 * first @ rotation + 1)) == pytest.approx(1, abs=1e-4)
    unrelated = cka(_gram(first), _gram(second))
    assert unrelated is not None
    assert abs(unrelated) < 0.1  # without the correction it is 0.45
    assert cka(_gram(first), _gram(torch.zeros(64, 3))) is None


# ---------------------------------------------------------------- pruned copies and choices


def test_channels_of_a_copy() -> None:
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(3, a, 3), nn.Conv2d(a, b, 3)) for a, b in ((8, 16), (5, 7)))
    kept, out = torch.tensor([7, 0, 3, 2, 5]), torch.tensor([9, 1, 4, 15, 0, 3, 8])
    of_teacher, of_student = dict(teacher.named_parameters()), dict(student.named_parameters())
    assert is_copy(teacher, student)
    assert not is_copy(student, teacher)
    assert channel_map(teacher, student, ("1.weight", 0)) is None
    with torch.no_grad():
        of_student["0.weight"].copy_(of_teacher["0.weight"][kept])
        of_student["1.weight"].copy_(of_teacher["1.weight"][out][:, kept])
    assert channel_map(teacher, student, ("0.weight", 0)) == tuple(kept.tolist())
    assert channel_map(teacher, student, ("1.weight", 0)) == tuple(out.tolist())
    assert channel_map(teacher, student, ("1.weight", 1)) == tuple(kept.tolist())
    assert channel_map(teacher, student, None) is None
    with torch.no_grad():
        of_student["1.weight"].zero_()
        of_teacher["1.weight"].zero_()
    assert channel_map(teacher, student, ("1.weight", 0)) is None  # all alike


def test_what_a_pair_is_suited_for() -> None:
    vector = _pair(_tap("BC"), _tap("BC"))
    maps = _pair(MAP, MAP, role="last")
    assert suited([vector, maps], "attention") == (given(maps, "attention", 1.0),)  # a vector is no map
    assert [pair.role for pair in suited([vector, maps], "srd")] == ["chosen", "last"]
    relations = _pair(_tap("BNC", (5,), 3 * 32), _tap("BNC", (5,), 3 * 48))
    assert given(relations, "minilm", 1.0).options == {"heads": 8}
    assert given(relations, "cosine", 1.0).options == {}
