"""A bound on the wall-clock time of a run: what does not fit into it is left out, and the report says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a run should have ended. Training is never cut short: optional steps ask, and are left out.

    `bound_s` is the whole time from the moment the deadline is made, None for no bound. `left_out` is filled as the
    run goes on: a sentence for each step that did not fit, for the notes of the report.
    """

    bound_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    begun_s: float = field(init=False)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "begun_s", self.clock())

    def remaining_s(self) -> float:
        """Seconds that are left, below zero once the bound is passed; infinite without a bound."""
        return math.inf if self.bound_s is None else self.bound_s - (self.clock() - self.begun_s)

    def fits(self, what: str, seconds: float) -> bool:
        """Whether an optional step that takes about `seconds` may begin; one that may not is noted as left out.

        Args:
            what: the step, as the note names it: "rounding learned for student-int8".
            seconds: about how long it takes; 0 where nobody knows.
        """
        left = self.remaining_s()
        if left > max(seconds, 0.0):
            return True
        about = f" (it needs about {_told(seconds)})" if seconds > 0 else ""
        when = f"{_told(left)} were left of" if left > 0 else "nothing was left of"
        text = f"left out: {what}{about}; {when} the time budget of {_told(self.bound_s or 0.0)}"
        if text not in self.left_out:
            self.left_out.append(text)
        return False

    def notes(self) -> list[str]:
        """What the report must say of it: what was left out, and by how much the bound was passed."""
        over = -self.remaining_s()
        if over < 1:
            return list(self.left_out)
        passed = f"the time budget of {_told(self.bound_s or 0.0)} was passed by {_told(over)}: training that has "
        return [*self.left_out, passed + "begun, and what a complete report needs, is not cut short"]


def _told(seconds: float) -> str:
    whole = round(seconds)
    if whole < 90:
        return f"{max(seconds, 0.0):.0f} s"
    return f"{whole / 60:.0f} min" if whole < 5400 else f"{whole / 3600:.1f} h"
