"""Augmentation: pure functions of (sample, view, seed), against a slow and plain implementation."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekd.distillation.augment import (
    GREY,
    VERSION,
    augmented,
    below,
    blended,
    check,
    geometry,
    mixing,
    random_bits,
)
from edgekd.errors import RecipeError
from edgekd.types import Augment

ALL = Augment(crop_pixels=3, flip=True, cutout_pixels=5, seed=3)


def _images(count: int, height: int = 12, width: int = 10, channels: int = 3) -> Tensor:
    return torch.randint(
        0, 256, (count, height, width, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _splitmix64(state: int, count: int) -> list[int]:
    found, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_random_bits_are_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # from 1234567, Rosetta Code
    assert _splitmix64(1234567, 3) == published
    start = int.from_bytes(hashlib.sha256(b"crop row 5 3").digest()[:8], "little")
    assert random_bits(np.arange(4), seed=5, purpose="crop row", view=3).tolist() == _splitmix64(start, 4)


def test_random_numbers_are_uniform_and_independent() -> None:
    samples = np.arange(20_000)
    draws = below(random_bits(samples, seed=1, purpose="a"), 9)
    assert draws.min() == 0
    assert draws.max() == 8
    assert np.abs(np.bincount(draws) / 20_000 - 1 / 9).max() < 0.01
    for other in ({"seed": 2}, {"purpose": "b"}, {"view": 1}):
        again = below(random_bits(samples, **({"seed": 1, "purpose": "a"} | other)), 9)  # type: ignore[arg-type]
        assert abs(np.mean(again == draws) - 1 / 9) < 0.01, other


def test_crop_is_a_window_of_the_reflected_image() -> None:
    images, samples = _images(40), np.arange(40)
    found = augmented(images, samples, 2, Augment(crop_pixels=3)).numpy()
    shifts = set()
    for image, got in zip(images.numpy(), found, strict=True):
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="reflect")
        windows = [(y, x) for y in range(7) for x in range(7) if (padded[y : y + 12, x : x + 10] == got).all()]
        assert len(windows) == 1
        shifts.add(windows[0])
    assert len(shifts) > 20
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(7))


def test_flip_alternates_and_half_of_the_images_begin_mirrored() -> None:
    images, samples = _images(200), np.arange(200)
    views = [augmented(images, samples, view, Augment(flip=True, seed=5)) for view in range(4)]
    mirrored = [(view == images.flip(2)).flatten(1).all(1) for view in views]
    straight = [(view == images).flatten(1).all(1) for view in views]
    for view in range(4):
        assert bool((mirrored[view] ^ straight[view]).all())
        assert bool((mirrored[view] == mirrored[view % 2]).all())
    assert bool((mirrored[0] != mirrored[1]).all())
    assert 70 < int(mirrored[0].sum()) < 130


def test_cutout_is_a_grey_square_that_may_stick_out() -> None:
    images = torch.zeros(300, 12, 10, 1, dtype=torch.uint8)
    found = augmented(images, np.arange(300), 0, Augment(cutout_pixels=5))
    assert int(images.sum()) == 0, "the images given are left as they are"
    assert set(found.flatten().tolist()) == {0, GREY}
    areas = set()
    for image in found[..., 0].numpy():
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert (image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == GREY).all()
        assert 3 <= len(rows) <= 5
        assert 3 <= len(columns) <= 5
        areas.add(len(rows) * len(columns))
    assert {25, 9} <= areas


def test_nothing_asked_nothing_done() -> None:
    images = _images(4)
    assert torch.equal(augmented(images, np.arange(4), 1, Augment()), images)


def test_a_sample_does_not_depend_on_its_batch_or_the_order() -> None:
    images, samples = _images(32), np.arange(100, 132)
    whole = augmented(images, samples, 7, ALL)
    order = np.random.default_rng(0).permutation(32)
    shuffled = augmented(images[torch.from_numpy(order)], samples[order], 7, ALL)
    assert torch.equal(shuffled, whole[torch.from_numpy(order)])
    for size in (1, 5):
        parts = [augmented(images[at : at + size], samples[at : at + size], 7, ALL) for at in range(0, 32, size)]
        assert torch.equal(torch.cat(parts), whole)
    for view, options in ((8, ALL), (7, replace(ALL, seed=4))):
        assert not torch.equal(augmented(images, samples, view, options), whole)


def test_a_view_of_a_larger_tensor_is_read_right() -> None:
    strided = _images(8, 12, 20)[:, :, ::2]
    copied = strided.contiguous()
    assert torch.equal(augmented(strided, np.arange(8), 0, ALL), augmented(copied, np.arange(8), 0, ALL))


@pytest.mark.parametrize("key", ["crop_pixels", "cutout_pixels"])
def test_an_augmentation_larger_than_the_image_is_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key} is 8, and the images are 8 × 16"):
        check(Augment(**{key: 8}), ("batch", 8, 16, 1), "augment")  # type: ignore[arg-type]
    check(Augment(**{key: 7}), ("batch", 8, 16, 1), "augment")  # type: ignore[arg-type]


def test_equal_options_make_the_pixels_they_always_made() -> None:
    """Kept outputs of teachers rely on it: whoever changes these digests raises VERSION with them."""
    options = replace(ALL, mixup=0.4)
    samples = np.arange(16)
    plain = (np.arange(16 * 12 * 10 * 3) * 37 % 256).astype(np.uint8).reshape(16, 12, 10, 3)
    images = augmented(torch.from_numpy(plain), samples, 3, options)
    partners, parts = mixing(samples, 3, options, 1000)
    mixed = blended(images, images.flip(0), parts)
    digests = [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (images.numpy(), partners, mixed.numpy())]
    assert (VERSION, digests) == (1, ["06ae80397cbab751", "0d9c7a65ebca41d1", "9f2712603a2f19cf"])


def test_the_geometry_is_what_augmented_does() -> None:
    images, samples, options = _images(50), np.arange(50), Augment(crop_pixels=2, flip=True, seed=9)
    for view in (0, 1):
        place = geometry(samples, view, options)
        assert set(place.rows) == set(place.columns) == set(range(-2, 3))
        for at, got in enumerate(augmented(images, samples, view, options).numpy()):
            padded = np.pad(images[at].numpy(), ((2, 2), (2, 2), (0, 0)), mode="reflect")
            window = padded[2 + place.rows[at] :, 2 + place.columns[at] :][:12, :10]
            assert (got == (window[:, ::-1] if place.mirrored[at] else window)).all()
    assert not geometry(samples, 0, Augment(crop_pixels=2)).mirrored.any()


# ---------------------------------------------------------------- mixup


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_parts_of_a_mixture_are_beta_distributed(alpha: float) -> None:
    samples = np.arange(40_000)
    partners, parts = mixing(samples, 0, Augment(mixup=alpha), len(samples))
    assert parts.min() >= 0
    assert parts.max() <= 256
    shares = parts / 256
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)  # of Beta(α, α)
    assert abs(np.corrcoef(shares, partners)[0, 1]) < 0.02


def test_partners_are_others_and_every_other_alike() -> None:
    samples = np.arange(5)
    seen = np.stack([mixing(samples, view, Augment(mixup=1.0), 5)[0] for view in range(4000)])
    assert not (seen == samples).any()
    for sample in samples:
        counts = np.bincount(seen[:, sample], minlength=5)
        assert counts[sample] == 0
        assert np.abs(np.delete(counts, sample) - 1000).max() < 120
    assert set(mixing(np.arange(2), 3, Augment(mixup=1.0), 2)[0]) == {0, 1}


def test_a_mixture_does_not_depend_on_the_batch_but_on_view_and_seed() -> None:
    options, samples = Augment(mixup=1.0, seed=2), np.arange(64)
    whole = mixing(samples, 5, options, 200)
    order = np.random.default_rng(0).permutation(64)
    for found, expected in zip(mixing(order, 5, options, 200), whole, strict=True):
        assert (found == expected[order]).all()
    for view, other in ((6, options), (5, replace(options, seed=3))):
        assert (mixing(samples, view, other, 200)[0] != whole[0]).mean() > 0.9
        assert (mixing(samples, view, other, 200)[1] != whole[1]).mean() > 0.9


def test_blending_is_exact_and_rounds_half_to_even() -> None:
    values = np.arange(256)
    own, other = (grid.reshape(-1) for grid in np.meshgrid(values, values))
    for part in (0, 1, 77, 128, 255, 256):
        images = torch.from_numpy(own.astype(np.uint8)).view(1, 256, 256, 1)
        others = torch.from_numpy(other.astype(np.uint8)).view(1, 256, 256, 1)
        found = blended(images, others, np.array([part])).flatten().numpy()
        for at in range(0, 65536, 997):
            exact = Fraction(part * int(own[at]) + (256 - part) * int(other[at]), 256)
            assert found[at] == round(exact), (part, own[at], other[at])
    assert torch.equal(blended(images, others, np.array([256])), images)
    assert torch.equal(blended(images, others, np.array([0])), others)
