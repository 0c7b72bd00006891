"""The bound on a run's time: what fits, what is left out, and what is said of it."""

from __future__ import annotations

import math

from edgekd.clock import Deadline


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_without_a_bound_everything_fits_and_nothing_is_said() -> None:
    deadline = Deadline()
    assert deadline.remaining_s() == math.inf
    assert deadline.fits("a step", 1e9)
    assert deadline.notes() == []


def test_a_step_that_does_not_fit_is_left_out_and_told_once() -> None:
    clock = Clock()
    deadline = Deadline(60.0, clock)
    assert deadline.fits("a step", 30.0)
    clock.now_s += 40
    assert deadline.remaining_s() == 20
    assert not deadline.fits("a dear step", 30.0)
    assert not deadline.fits("a dear step", 30.0)
    assert deadline.fits("a cheap step", 10.0)
    assert deadline.notes() == [
        "left out: a dear step (it needs about 30 s); 20 s were left of the time budget of 60 s"
    ]


def test_a_step_of_unknown_length_fits_until_the_time_is_up() -> None:
    clock = Clock()
    deadline = Deadline(60.0, clock)
    clock.now_s += 59
    assert deadline.fits("a step", 0.0)
    clock.now_s += 1
    assert not deadline.fits("a step", 0.0)
    assert deadline.notes() == ["left out: a step; nothing was left of the time budget of 60 s"]


def test_a_bound_that_was_passed_is_told() -> None:
    clock = Clock()
    deadline = Deadline(1200.0, clock)
    clock.now_s += 1200 + 300
    assert deadline.notes()[-1].startswith("the time budget of 20 min was passed by 5 min: training")
