"""Outputs moved in place of images: exact where the network is equivariant, refused where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad

from edgekd.distillation.augment import augmented, geometry
from edgekd.distillation.equivariance import agreement, check, moved
from edgekd.errors import RecipeError
from edgekd.types import Augment

MOVES = Augment(crop_pixels=2, flip=True)
SAMPLES = np.arange(40)


def images(height: int = 12, width: int = 16) -> Tensor:
    """Smooth pictures: noise alone would not survive pooling."""
    noise = torch.rand(40, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(noise, (height, width), mode="bilinear", align_corners=False)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("view", [0, 1])
def test_a_map_of_full_size_moves_as_the_image_does(view: int) -> None:
    x = images()
    found = moved({"map": first(x), "vector": first(x).mean((2, 3))}, SAMPLES, view, MOVES, (12, 16))
    torch.testing.assert_close(found["map"], first(augmented(x, SAMPLES, view, MOVES)), atol=1e-5, rtol=0)
    assert torch.equal(found["vector"], first(x).mean((2, 3)))


def test_a_shift_of_a_stride_is_a_shift_of_a_cell() -> None:
    """Inside the image, where no reflection is: crops by multiples of the stride are exact."""
    x = images(32, 32)
    cells = avg_pool2d(first(x), 4)
    options = Augment(crop_pixels=4)
    found = moved({"map": cells}, SAMPLES, 0, options, (32, 32))["map"]
    right = avg_pool2d(first(augmented(x, SAMPLES, 0, options)), 4)
    place = geometry(SAMPLES, 0, options)
    whole = (place.rows % 4 == 0) & (place.columns % 4 == 0)
    assert whole.sum() >= 2
    torch.testing.assert_close(found[whole][..., 1:-1, 1:-1], right[whole][..., 1:-1, 1:-1], atol=1e-5, rtol=0)
    error, unmoved = (float((each - right)[..., 1:-1, 1:-1].abs().mean()) for each in (found, cells))
    assert error < 0.3 * unmoved, "in between, interpolated"


def test_an_equivariant_teacher_passes_and_the_figure_is_told() -> None:
    symmetric = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16  # so that mirrors do not matter
    kernel = symmetric.expand(3, 1, 3, 3)

    def teacher(x: Tensor) -> dict[str, Tensor]:
        blurred = conv2d(pad(first(x), (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
        return {"stem": blurred, "stage": avg_pool2d(blurred, 2), "logits": blurred.mean((2, 3))}

    figures = agreement(teacher, images(), SAMPLES, MOVES)
    assert set(figures) == {"stem", "stage", "logits"}
    assert figures["stem"] > 0.999
    assert min(figures.values()) >= 0.98
    check(figures)


def test_a_teacher_that_knows_positions_is_refused_with_the_figure() -> None:
    positions = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    figures = agreement(lambda x: {"tokens": first(x) + positions, "ok": first(x)}, images(), SAMPLES, MOVES)
    assert figures["ok"] > 0.999
    assert figures["tokens"] < 0.98
    with pytest.raises(RecipeError, match=f"'tokens' does not move with its images: cosine {figures['tokens']:.4f}"):
        check(figures)
    with pytest.raises(RecipeError, match="cosine nan"):
        check({"broken": float("nan")})


@pytest.mark.parametrize("key", ["cutout_pixels", "mixup"])
def test_what_changes_the_content_is_refused(key: str) -> None:
    options = Augment(**{key: 1})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=f"{key} cannot be applied to a teacher's outputs"):
        moved({"map": torch.zeros(40, 1, 4, 4)}, SAMPLES, 0, options, (4, 4))


def test_what_has_no_place_in_the_image_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'tokens' has the shape \(40, 5, 8\)"):
        moved({"tokens": torch.zeros(40, 5, 8)}, SAMPLES, 0, MOVES, (4, 4))


def test_a_map_of_one_cell_stays() -> None:
    given = torch.randn(40, 3, 1, 1)
    assert torch.equal(moved({"map": given}, SAMPLES, 1, MOVES, (12, 16))["map"], given)
