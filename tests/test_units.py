"""Quantities as people write them."""

from __future__ import annotations

import pytest

from edgekd import units
from edgekd.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"), [("5ms", 5.0), ("0.8 ms", 0.8), ("200us", 0.2), ("1s", 1000.0), (".5ms", 0.5)]
)
def test_times(text: str, value: float) -> None:
    assert units.milliseconds(text, "--max-latency") == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("90s", 90.0), ("20m", 1200.0), ("20 min", 1200.0), ("1.5h", 5400.0)])
def test_durations(text: str, value: float) -> None:
    assert units.seconds(text, "--time-budget") == pytest.approx(value)


@pytest.mark.parametrize("text", ["20", "0m", "20ms", "soon"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--time-budget: .*e\.g\. 20m"):
        units.seconds(text, "--time-budget")


@pytest.mark.parametrize(("text", "value"), [("4MB", 4_000_000), ("900 kB", 900_000), ("2MiB", 2 * 2**20), ("1b", 1)])
def test_sizes(text: str, value: int) -> None:
    assert units.size_bytes(text, "--max-size") == value


@pytest.mark.parametrize(("text", "value"), [("0.01", 0.01), ("1%", 0.01), ("0", 0.0), ("100 %", 1.0)])
def test_fractions(text: str, value: float) -> None:
    assert units.fraction(text, "--max-drop") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "ms", "-5ms", "0ms", "5 parsecs", "5e9ms"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--max-latency: .*e\.g\. 5ms"):
        units.milliseconds(text, "--max-latency")


@pytest.mark.parametrize("text", ["", "2", "-1%", "101%", "one"])
def test_what_is_no_fraction_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="0 to 1"):
        units.fraction(text, "--max-drop")
