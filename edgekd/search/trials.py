"""The trials of a search in a storage that several processes may share; Optuna proposes them.

Akiba, Sano, Yanase, Ohta and Koyama, "Optuna", KDD, 2019; its sampler for several objectives with constraints: Ozaki,
Tanigaki, Watanabe and Onishi, "Multiobjective Tree-Structured Parzen Estimator", GECCO, 2020.

A trial is a place in the search space. One that is under way is renewed by its process now and then; one that nobody
renews any more is given to another process. A process that has ended on the same machine is known to be gone at once.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, RecipeError
from edgekd.search.space import Space
from edgekd.store import disk_error
from edgekd.types import Json, Say

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

RENEW_S = 15.0  # a trial under way is renewed so often
LOST_S = 90.0  # one that was not renewed for so long is somebody else's
WAIT_S = 2.0  # between looks at what the others have finished
_AT = "place"  # the parameter of a trial


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate that this process is to make."""

    number: int  # of the trial
    at: int  # place in the space


@dataclass(frozen=True, slots=True)
class Finished:
    """A trial that is done: what was found, or why there is no such candidate."""

    number: int
    at: int
    found: Mapping[str, Any]
    refused: str | None
    worker: str


@dataclass
class Trials:
    """One search among those that a storage may hold."""

    study: Study
    space: Space
    count: int
    seed: int
    say: Say
    worker: str = field(default_factory=lambda: f"{_machine()}:{os.getpid()}:{time.time_ns()}")
    _mine: dict[int, Trial] = field(default_factory=dict)
    _seen: dict[int, tuple[str, float]] = field(default_factory=dict)  # trial → what it was renewed to, and when seen

    def next(self, may_begin: Callable[[int], bool], may_wait: Callable[[], bool]) -> Proposal | None:
        """The candidate to make now; None once as many as asked for, or all that there are, are done.

        Where all that are left are under way in other processes it waits for them, since one of them may be lost.

        Args:
            may_begin: asked, with how many are left, whether there is time for one more.
            may_wait: whether there is time to wait for others.
        """
        told = False
        while True:
            self._bury()
            under_way = self._under_way()
            taken = {self._place(t) for t in [*self._done(), *under_way]}
            if len(self._done()) >= self.count or len({self._place(t) for t in self._done()}) == len(self.space.values):
                return None
            left = min(self.count, len(self.space.values)) - len(self._done()) - len(under_way)
            if left > 0 and len(taken) < len(self.space.values):
                if not may_begin(left):
                    return None
                found = self._claimed()
                if found is not None:
                    return found
                continue
            if not may_wait():
                return None
            if not told:
                self.say("note", text="the search waits for what other processes have under way")
                told = True
            time.sleep(WAIT_S)

    def finished(self) -> list[Finished]:
        """What is done, in the order in which it was begun."""
        found = []
        for trial in self._done():
            attrs = trial.user_attrs
            found.append(
                Finished(
                    trial.number, self._place(trial), attrs.get("found", {}), attrs.get("refused"),
                    attrs.get("worker", ""),
                )
            )  # fmt: skip
        return sorted(found, key=lambda each: each.number)

    @contextlib.contextmanager
    def held(self, proposal: Proposal) -> Iterator[None]:
        """Renew the trial while it is made; one that is broken off is there for the next process that looks."""
        stop = threading.Event()
        number = proposal.number

        def renew() -> None:
            while not stop.wait(RENEW_S):
                with contextlib.suppress(Exception):  # the next one may succeed; without any the trial is another's
                    self._mine[number].set_user_attr("alive", time.time())

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            stop.set()
            thread.join()
            with contextlib.suppress(Exception):  # what broke it off is what must be told
                self._give_back(number, proposal.at)
            raise
        finally:
            stop.set()
            thread.join()

    def tell(
        self, proposal: Proposal, found: Mapping[str, Json], goals: Sequence[float], beyond: Mapping[str, float]
    ) -> None:
        """The candidate is made.

        Args:
            proposal: which one.
            found: what it is to be remembered by.
            goals: its objectives, of which less is better.
            beyond: by how much it passes each limit; above 0 is not feasible.
        """
        self._say_of(proposal.number, lambda trial: trial.set_user_attr("found", dict(found)), beyond)
        self._finish(proposal.number, "COMPLETE", list(goals))

    def refuse(self, proposal: Proposal, why: str) -> None:
        """There is no such candidate, or nothing is known of it that could be compared."""
        self._say_of(proposal.number, lambda trial: trial.set_user_attr("refused", why), {"refused": 1.0})
        self._finish(proposal.number, "PRUNED", None)

    # ------------------------------------------------------------ claims

    def _claimed(self) -> Proposal | None:
        """A trial of its own; None where another process was quicker with the same one."""
        optuna = library()
        self._use_sampler(len(self._done()) + len(self._under_way()))
        trial = self.study.ask()
        self._mine[trial.number] = trial
        at = trial.suggest_int(_AT, 0, len(self.space.values) - 1)
        trial.set_user_attr("worker", self.worker)
        trial.set_user_attr("alive", time.time())
        others = [t for t in self.study.get_trials(deepcopy=False) if t.number != trial.number]
        waiting = [t for t in others if t.state == optuna.trial.TrialState.WAITING]
        ahead = [t for t in [*self._done(), *self._under_way()] if t.number != trial.number]
        before = [t for t in ahead if t.state.is_finished() or t.number < trial.number]
        if len(before) >= self.count:
            self._finish(trial.number, "FAIL", None)
            return None
        if at in {self._place(t) for t in [*before, *waiting]}:
            free = self.space.free(at, [self._place(t) for t in [*ahead, *waiting]])
            self._finish(trial.number, "FAIL", None)
            if free is not None:
                self.study.enqueue_trial({_AT: free})
            return None
        return Proposal(trial.number, at)

    def _bury(self) -> None:
        """Trials under way that nobody renews any more are to be had again."""
        for trial in self._under_way():
            worker, alive = trial.user_attrs.get("worker", ""), str(trial.user_attrs.get("alive", ""))
            if worker == self.worker:
                continue
            known, since = self._seen.get(trial.number, ("", 0.0))
            if known != alive or trial.number not in self._seen:
                self._seen[trial.number] = (alive, time.monotonic())
                since = time.monotonic()
            if _gone(worker) or time.monotonic() - since > LOST_S:
                self.say(
                    "note", text=f"{self.space.name(self._place(trial))} was broken off elsewhere: it goes on here"
                )
                self._give_back(trial.number, self._place(trial))

    def _give_back(self, number: int, at: int) -> None:
        if self._finish(number, "FAIL", None):
            self.study.enqueue_trial({_AT: at})

    def _finish(self, number: int, state: str, values: list[float] | None) -> bool:
        """Whether it was this process that ended the trial."""
        optuna = library()
        try:
            self.study.tell(number, values, state=optuna.trial.TrialState[state])
        except optuna.exceptions.UpdateFinishedTrialError:
            return False  # it was taken for lost, and another process has ended it
        except ValueError:  # the same, found out earlier; or values that are none
            if any(t.number == number and t.state.is_finished() for t in self.study.get_trials(deepcopy=False)):
                return False
            raise
        return True

    def _say_of(self, number: int, say: Callable[[Trial], None], beyond: Mapping[str, float]) -> None:
        """Say something of a trial of this process; nothing is said of one that another process has ended."""
        with contextlib.suppress(library().exceptions.UpdateFinishedTrialError):
            say(self._mine[number])
            for name, value in beyond.items():
                self._mine[number].set_constraint(name, value)

    def _use_sampler(self, number: int) -> None:
        """Seeded anew for each trial, so that a search that was broken off goes on as if it had not been."""
        self.study.sampler = library().samplers.TPESampler(
            seed=(self.seed * 100_003 + number) % 2**32, n_startup_trials=startup(self.count)
        )

    # ------------------------------------------------------------ what there is

    def _done(self) -> list[FrozenTrial]:
        optuna = library()
        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        return list(self.study.get_trials(deepcopy=False, states=states))

    def _under_way(self) -> list[FrozenTrial]:
        optuna = library()
        return list(self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)))

    def _place(self, trial: FrozenTrial) -> int:
        """Where in the space it is; -1 where its process has not said so yet."""
        fixed = trial.system_attrs.get("fixed_params", {})
        return int(trial.params.get(_AT, fixed.get(_AT, -1)))


def startup(count: int) -> int:
    """How many of so many trials are spread over the space before the optimiser has its say."""
    return max(2, count // 3)


def open_trials(name: str, storage: Any, space: Space, *, count: int, objectives: int, seed: int, say: Say) -> Trials:
    """The search of that name in a storage, begun there where it is not.

    Args:
        name: of the search; searches of other recipes in the same storage have others.
        storage: what `storage_at` gave.
        space: what is searched.
        count: trials in all, whoever makes them.
        objectives: how many figures are to be made small.
        seed: of the proposals.
        say: told "note" where a process waits or takes over.

    Raises:
        RecipeError: the storage fails.
    """
    with _told_of("the storage of the search"):
        study = library().create_study(
            storage=storage, study_name=name, directions=["minimize"] * objectives, load_if_exists=True
        )
    found = Trials(study, space, count, seed, say)
    if not study.get_trials(deepcopy=False):
        for at in space.spread(min(startup(count), count)):
            study.enqueue_trial({_AT: at}, skip_if_exists=True)
    return found


def storage_at(place: str) -> Any:
    """A storage for trials: a journal file, SQLite where it ends in .db, .sqlite or .sqlite3; or the database of a URL.

    Raises:
        RecipeError: Optuna is not installed, or the database cannot be opened.
        StoreError: the file cannot be written.
    """
    optuna = library()
    path = Path(place)
    with _told_of(f"--search-storage {place}"):
        if "://" in place:
            return optuna.storages.RDBStorage(place)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".db", ".sqlite", ".sqlite3"):
                return optuna.storages.RDBStorage(f"sqlite:///{path}")
            from optuna.storages.journal import JournalFileBackend

            return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        except OSError as problem:
            raise disk_error(problem, path) from problem


@contextlib.contextmanager
def _told_of(where: str) -> Iterator[None]:
    """What a database or its driver raises is its own: here it becomes one line."""
    try:
        yield
    except EdgekdError:
        raise
    except Exception as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise RecipeError(
            f"it cannot be opened: {first}", where=where,
            expected="a file, or the URL of a database, e.g. sqlite:///search.db",
        ) from problem  # fmt: skip


def library() -> Any:
    """Optuna, quiet.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise RecipeError(
            "the search needs Optuna, which is not installed",
            where="--search",
            fix="install it: pip install 'edgekd[search]'",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def version() -> str:
    """What proposes the candidates."""
    return f"Optuna {library().__version__} (TPE)"


def _machine() -> str:
    """This machine, and the numbering of processes on it: two containers of one name have processes of their own."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _gone(worker: str) -> bool:
    """Whether a worker was a process of this machine that is there no more."""
    place, number, _ = worker.rsplit(":", 2) if worker.count(":") >= 2 else ("", "", "")
    if place != _machine() or place.count("/") < 2:  # elsewhere, or nobody knows whose numbers these are
        return False
    if int(number) == os.getpid():  # which began later: it is not this one
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
