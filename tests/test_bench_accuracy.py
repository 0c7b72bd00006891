"""Intervals by hand, and predictions of any session over a split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from edgekd.bench.accuracy import agreement, difference, drop, labels, mean, paired_difference, predict, wilson
from edgekd.errors import ModelError
from edgekd.types import Arrays, Batch, Interval, TensorSpec


class Numbers:
    """A split whose sample i is [i, 0] with the label i % 3."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        for indices in order:
            x = np.stack([indices, np.zeros_like(indices)], axis=1).astype(np.float32)
            yield Batch(indices, {"x": x, "unused": x}, indices % 3)


class Modulo:
    """A session whose class is sample % 3, with a fixed batch size or any."""

    runtime = "modulo 1"
    outputs: tuple[TensorSpec, ...] = (TensorSpec("logits", "float32", ("batch", 3)),)

    def __init__(
        self, batch: int | str = "batch", names: tuple[str, ...] = ("logits",), dtype: str = "float32"
    ) -> None:
        self.inputs: tuple[TensorSpec, ...] = (TensorSpec("x", dtype, (batch, 2)),)
        self.names, self.sizes = names, set[int]()

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        assert set(inputs) == {"x"}
        self.sizes.add(len(inputs["x"]))
        return {name: np.eye(3, dtype=np.float32)[inputs["x"][:, 0].astype(int) % 3] for name in self.names}

    def close(self) -> None:
        """Nothing to close."""


def test_wilson_by_hand() -> None:
    # z² = 3.8415; 81 of 263, from Newcombe 1998 (two-sided 95 %, method 3): 0.2553 to 0.3662
    found = wilson(81, 263)
    assert (found.value, found.n) == (81 / 263, 263)
    assert found.low == pytest.approx(0.2553, abs=5e-5)
    assert found.high == pytest.approx(0.3662, abs=5e-5)
    # all right: low = n / (n + z²)
    assert wilson(10, 10).low == pytest.approx(10 / (10 + 3.841459), abs=1e-6)
    assert wilson(10, 10).high == 1.0
    assert wilson(0, 10).low == 0.0
    with pytest.raises(ValueError, match="0 of 0"):
        wilson(0, 0)


@pytest.mark.parametrize(
    ("table", "value", "low", "high"),
    [
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),  # Newcombe 1998, Statistics in Medicine 17, table IV, method 10
        ((1, 1, 7, 12), -0.286, -0.507, -0.026),  # Fagerland, Lydersen, Laake 2014: airway hyper-responsiveness
    ],
)
def test_paired_difference_as_published(
    table: tuple[int, int, int, int], value: float, low: float, high: float
) -> None:
    found = paired_difference(*table)
    assert found.value == pytest.approx(value, abs=5e-4)
    assert found.low == pytest.approx(low, abs=5e-4)
    assert found.high == pytest.approx(high, abs=5e-4)


def test_paired_difference_is_antisymmetric_and_never_without_width() -> None:
    one, two = paired_difference(400, 12, 5, 33), paired_difference(400, 5, 12, 33)
    assert one.value == -two.value
    assert one.low == pytest.approx(-two.high)
    same = paired_difference(440, 0, 0, 10)
    assert same.value == 0
    assert same.low < 0 < same.high


def test_pairing_narrows_the_interval() -> None:
    agreeing, independent = paired_difference(880, 20, 10, 90), paired_difference(801, 99, 89, 11)
    assert agreeing.value == independent.value
    assert agreeing.high - agreeing.low < (independent.high - independent.low) / 2


def test_the_difference_of_two_drops_by_hand_and_its_turning_round() -> None:
    one, two = Interval(0.01, 0.006, 0.02, 500), Interval(0.06, 0.057, 0.064, 500)
    found = difference(one, two)
    assert found.value == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05 - (0.003**2 + 0.01**2) ** 0.5)
    assert found.high == pytest.approx(0.05 + (0.004**2 + 0.004**2) ** 0.5)
    turned = difference(two, one)
    assert (turned.value, turned.low, turned.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_the_difference_of_drops_holds_that_of_the_two_networks_themselves() -> None:
    random = np.random.default_rng(0)
    teacher, first = random.random(2000) < 0.95, random.random(2000) < 0.9
    second = first & (random.random(2000) < 0.95)  # errs where the first does, and elsewhere
    drops = [drop(teacher.astype(float), each.astype(float)) for each in (first, second)]
    direct, found = drop(first.astype(float), second.astype(float)), difference(*drops)
    assert found.value == pytest.approx(direct.value)
    assert found.low < direct.low
    assert found.high > direct.high


def test_right_or_wrong_is_a_proportion() -> None:
    teacher, student = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 1, 0])
    assert mean(teacher) == wilson(3, 4)
    assert drop(teacher, student) == paired_difference(2, 1, 0, 1)
    assert drop(student, teacher).value == -0.25
    assert drop(teacher, teacher).value == 0
    assert drop(teacher, teacher).low < 0 < drop(teacher, teacher).high
    assert agreement(np.array([0, 1, 2, 1]), np.array([0, 2, 2, 2])) == 0.5
    with pytest.raises(ValueError, match="4 scores against 3"):
        drop(teacher, student[:3])
    with pytest.raises(ValueError, match="0 of 0"):
        mean(teacher[:0])
    with pytest.raises(ValueError, match="0 of 0"):
        drop(teacher[:0], student[:0])


def test_other_scores_have_a_normal_interval() -> None:
    # 0.5, 0.7, 0.9: mean 0.7, s = 0.2, z · s / √3 = 0.2263
    found = mean(np.array([0.5, 0.7, 0.9]))
    assert found.n == 3
    assert [found.value, found.low, found.high] == pytest.approx([0.7, 0.4737, 0.9263], abs=1e-4)
    assert mean(np.array([0.1, 0.9])).low == 0
    assert mean(np.array([-3.0, 1.0])).low < -1
    assert mean(np.array([0.9, 1.0, 1.0])).high == 1
    # paired: the differences are 0.1, 0.2, 0.3, whatever the samples' own spread
    lost = drop(np.array([0.2, 0.6, 1.0]), np.array([0.1, 0.4, 0.7]))
    assert [lost.value, lost.low, lost.high] == pytest.approx([0.2, 0.0868, 0.3132], abs=1e-4)


def test_the_normal_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = [(found := mean(random.beta(6, 2, 60))).low <= 0.75 <= found.high for _ in range(2000)]
    assert 0.93 <= np.mean(covered) <= 0.96


def test_one_sample_tells_little() -> None:
    found = mean(np.array([0.8]))
    assert found.value == pytest.approx(0.8)
    assert found.high - found.low > 0.7
    lost = drop(np.array([0.8]), np.array([0.7]))
    assert [lost.value, lost.low, lost.high] == pytest.approx([0.1, -1, 1])


@pytest.mark.parametrize(("batch", "sizes"), [("batch", {4, 2}), (4, {4}), (1, {1})])
def test_predict_streams_in_order_and_fills_a_fixed_batch(batch: int | str, sizes: set[int]) -> None:
    session, split = Modulo(batch), Numbers(10)
    logits = predict(session, split, batch_size=4)
    assert logits.shape == (10, 3)
    assert (logits.argmax(1) == np.arange(10) % 3).all()
    assert (labels(split, 3) == np.arange(10) % 3).all()
    assert session.sizes == sizes


def test_predict_takes_the_only_output_or_the_one_named_logits() -> None:
    assert len(predict(Modulo(names=("output",)), Numbers(3))) == 3
    assert len(predict(Modulo(names=("features", "logits")), Numbers(3))) == 3
    with pytest.raises(ModelError, match="expected one named 'logits'"):
        predict(Modulo(names=("a", "b")), Numbers(3))


def test_predict_refuses_what_cannot_be_right() -> None:
    with pytest.raises(ModelError, match="is uint8 there, float32 in the data"):
        predict(Modulo(dtype="uint8"), Numbers(3))
    with pytest.raises(ModelError, match="no samples"):
        predict(Modulo(), Numbers(0))

    other = Modulo()
    other.inputs = (TensorSpec("y", "float32", ("batch", 2)),)
    with pytest.raises(ModelError, match="it takes the inputs y, the data has x, unused"):
        predict(other, Numbers(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predict_refuses_values_that_are_not_finite(bad: float) -> None:
    class Overflows(Modulo):
        def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
            return {"logits": np.full((len(inputs["x"]), 3), bad, np.float32)}

    with pytest.raises(ModelError, match="NaN or infinity"):
        predict(Overflows(), Numbers(3))


def test_predict_refuses_a_wrong_shape() -> None:
    class Flat(Modulo):
        def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
            return {"logits": np.zeros(len(inputs["x"]), np.float32)}

    with pytest.raises(ModelError, match=r"expected \(3, classes\)"):
        predict(Flat(), Numbers(3))
    with pytest.raises(ModelError, match=r"shape \(3, 3\); expected \(3, classes, grid\)"):
        predict(Modulo(), Numbers(3), dense=True)


def test_predict_keeps_what_it_is_told_to() -> None:
    class Maps(Modulo):
        def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
            return {"logits": np.stack([super().__call__(inputs)["logits"]] * 4, axis=2)}

    with pytest.raises(ModelError, match=r"shape \(3, 3, 4\)"):
        predict(Maps(), Numbers(3))
    found = predict(Maps(), Numbers(7), 3, dense=True, keep=lambda logits: logits.argmax(1).astype(np.uint8))
    assert (found.shape, found.dtype) == ((7, 4), np.dtype(np.uint8))
    assert (found[:, 0] == np.arange(7) % 3).all()


def test_labels_in_memory_are_not_read_from_batches() -> None:
    class Known(Numbers):
        labels = np.ones((10, 2), np.float32)

        def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
            raise AssertionError(order)

    assert labels(Known(10)) is Known.labels
