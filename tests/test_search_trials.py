"""The trials of a search: proposed, kept, shared by processes, and taken up where they were broken off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from search_worker import WIDTHS, opened, work

from edgekd.errors import EdgekdError, RecipeError
from edgekd.search import trials as storing
from edgekd.search.space import Space
from edgekd.search.trials import Trials

WORKER = Path(__file__).parent / "search_worker.py"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is short."""
    monkeypatch.setattr(storing, "WAIT_S", 0.01)


def started(storage: Path, count: int, seconds: float, *more: str) -> subprocess.Popen[str]:
    """Another process of the same search."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), str(root / "tests")])
    command = [sys.executable, str(WORKER), str(storage), str(count), str(seconds), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})


def places(trials: Trials) -> list[int]:
    """Of what is done."""
    return [each.at for each in trials.finished()]


@pytest.mark.parametrize("name", ["search.log", "search.db", "url"])
def test_every_kind_of_storage_gives_the_same_search(tmp_path: Path, name: str) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}" if name == "url" else str(tmp_path / name)
    trials = opened(storage, 7)
    made = work(trials, 0.0)
    assert made == work(opened(str(tmp_path / "other.log"), 7), 0.0), "one process, one seed"
    assert len(set(made)) == 7
    assert made[:2] == WIDTHS.spread(2), "the recipe's own is the first"
    assert [each.found for each in trials.finished()] == [{"at": at} for at in made]


def test_a_search_that_is_done_makes_nothing_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    storage = str(tmp_path / "search.log")
    first = work(opened(storage, 4), 0.0)
    assert work(opened(storage, 4), 0.0) == []
    more = work(opened(storage, 9), 0.0)
    assert len(more) == 5
    assert not set(first) & set(more)
    assert places(opened(storage, 9)) == first + more


def test_what_was_broken_off_is_the_next_one_again(tmp_path: Path, quick: None) -> None:
    storage = str(tmp_path / "search.log")
    trials = opened(storage, 3)
    whole = work(opened(str(tmp_path / "whole.log"), 3), 0.0)
    first = trials.next(lambda left: True, lambda: True)
    assert first is not None
    with pytest.raises(KeyboardInterrupt), trials.held(first):
        raise KeyboardInterrupt
    assert places(trials) == []
    assert sorted(work(opened(storage, 3), 0.0)) == sorted(whole)


def test_all_that_there_are_is_enough(tmp_path: Path, quick: None) -> None:
    few = Space("width", (1.0, 2.0, 3.0), 1)
    storage = storing.storage_at(str(tmp_path / "x.log"))
    trials = storing.open_trials("few", storage, few, count=50, objectives=2, seed=0, say=lambda *a, **k: None)
    made = []
    while (proposal := trials.next(lambda left: True, lambda: True)) is not None:
        trials.tell(proposal, {}, [1.0, 2.0], {})
        made.append(proposal.at)
    assert sorted(made) == [0, 1, 2]


def test_a_refused_candidate_counts_and_is_told(tmp_path: Path) -> None:
    trials = opened(str(tmp_path / "x.log"), 2)
    proposal = trials.next(lambda left: True, lambda: True)
    assert proposal is not None
    trials.refuse(proposal, "it cannot be built")
    assert len(work(trials, 0.0)) == 1
    assert [each.refused for each in trials.finished()] == ["it cannot be built", None]


def test_time_that_is_up_ends_it(tmp_path: Path) -> None:
    trials = opened(str(tmp_path / "x.log"), 3)
    asked: list[int] = []
    assert trials.next(lambda left: asked.append(left) or False, lambda: True) is None  # type: ignore[func-returns-value]
    assert asked == [3]
    other = opened(str(tmp_path / "x.log"), 1)
    other.worker = "elsewhere/boot/ns:1:1"
    assert other.next(lambda left: True, lambda: True) is not None
    assert opened(str(tmp_path / "x.log"), 1).next(lambda left: True, lambda: False) is None, "it does not wait"


def test_one_that_nobody_renews_is_taken_over_and_its_late_end_is_nobodys(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "LOST_S", 0.05)
    slow, other = opened(str(tmp_path / "x.log"), 1), opened(str(tmp_path / "x.log"), 1)
    slow.worker = "elsewhere/boot/ns:1:1"
    held = slow.next(lambda left: True, lambda: True)
    assert held is not None
    assert work(other, 0.0) == [held.at]
    slow.tell(held, {"late": True}, [0.0, 0.0], {})
    assert [each.found for each in other.finished()] == [{"at": held.at}]


def test_one_that_is_renewed_is_left_alone(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "LOST_S", 0.5)
    monkeypatch.setattr(storing, "RENEW_S", 0.05)
    slow, other = opened(str(tmp_path / "x.log"), 1), opened(str(tmp_path / "x.log"), 1)
    slow.worker = "elsewhere/boot/ns:1:1"
    held = slow.next(lambda left: True, lambda: True)
    assert held is not None
    waits = iter([True] * 100)  # a second
    with slow.held(held):
        assert other.next(lambda left: True, lambda: next(waits, False)) is None
        slow.tell(held, {"in time": True}, [0.0, 0.0], {})
    assert [each.found for each in other.finished()] == [{"in time": True}]


@pytest.mark.parametrize("name", ["search.log", "search.db"])
def test_two_processes_share_a_search(tmp_path: Path, name: str) -> None:
    storage = tmp_path / name
    opened(str(storage), 8)
    both = [started(storage, 8, 0.4) for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    done = places(opened(str(storage), 8))
    assert len(done) == len(set(done)) == 8
    assert all("begun" in text for text in told), "each has made some"
    assert len({each.worker for each in opened(str(storage), 8).finished()}) == 2


def test_the_trial_of_a_killed_process_is_made_by_another(tmp_path: Path, quick: None) -> None:
    storage = tmp_path / "search.log"
    opened(str(storage), 3)
    process = started(storage, 3, 0.0, "hang")
    assert process.stdout is not None
    begun = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert begun == f"begun {WIDTHS.own}\n"
    trials = opened(str(storage), 3)
    work(trials, 0.0)
    assert WIDTHS.own in places(trials)
    assert len(places(trials)) == 3


def test_a_storage_that_cannot_be_opened_is_one_clear_error(tmp_path: Path) -> None:
    for place in ("nosuch://place", "postgresql://127.0.0.1:9/none", f"{tmp_path}"):
        with pytest.raises(EdgekdError) as problem:
            storing.storage_at(place)
        assert place.split("/")[-1] in str(problem.value)
        assert len(str(problem.value).splitlines()) == 1


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"needs Optuna.*pip install 'edgekd\[search\]'"):
        storing.library()
