"""One process of a search, for tests: `python search_worker.py STORAGE COUNT SECONDS [hang]`, trials out of air."""

from __future__ import annotations

import sys
import time

from edgekd.processes import silent
from edgekd.search import trials as storing
from edgekd.search.space import Space

WIDTHS = Space("width", tuple(map(float, range(2, 18))), 6)


def opened(storage: str, count: int, seed: int = 3, objectives: int = 2) -> storing.Trials:
    """The search that the tests share."""
    return storing.open_trials(
        "a-search", storing.storage_at(storage), WIDTHS, count=count, objectives=objectives, seed=seed, say=silent
    )


def work(trials: storing.Trials, seconds: float, *, hang: bool = False) -> list[int]:
    """Make trials until there are enough; a candidate's figures follow from its width."""
    made = []
    while (proposal := trials.next(lambda left: left > 0, lambda: True)) is not None:
        with trials.held(proposal):
            print(f"begun {proposal.at}", flush=True)
            time.sleep(600 if hang else seconds)
            width = WIDTHS.values[proposal.at]
            trials.tell(proposal, {"at": proposal.at}, [1 / width, width], {"width": max(0.0, width - 12)})
        made.append(proposal.at)
    return made


if __name__ == "__main__":
    storing.WAIT_S = 0.1
    print("made", work(opened(sys.argv[1], int(sys.argv[2])), float(sys.argv[3]), hang="hang" in sys.argv))
