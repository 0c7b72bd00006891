"""The processes that run one command together: `torchrun --nproc-per-node 4 -m edgekd compress` starts four.

All run the same code on the same recipe, from a disk that they share. They train together; what is no training is
done by the first one, and what comes of it is everybody's. Without a launcher there is one process, and nothing here
does anything.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from types import FrameType
from typing import Any, TypeVar

from edgekd.errors import EdgekdError
from edgekd.types import Json, Say

_PATIENCE = timedelta(days=1)  # with which the others wait for what the first one does by itself
Result = TypeVar("Result")


class Processes:
    """This process among those that were started with it.

    Args:
        rank: of this process, from 0.
        world: how many there are.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self._world = rank, world
        self._by_itself = False  # inside `once`
        self._talk: Any = None  # the group that objects are sent in

    @property
    def world(self) -> int:
        """How many work together at this point of the program: one alone inside `once`."""
        return 1 if self._by_itself else self._world

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and tells what happens."""
        return self.rank == 0

    def join(self) -> None:
        """Meet the others, and take this process's GPU where there are GPUs; nothing where that was done before.

        Raises:
            EdgekdError: they do not meet, or there are fewer GPUs than processes.
        """
        if self._world == 1 or self._talk is not None:
            return
        import torch
        from accelerate import PartialState

        on_gpus = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self._world))
        if on_gpus and torch.cuda.device_count() < local:
            raise EdgekdError(
                f"{local} processes were started here, and there are {torch.cuda.device_count()} GPUs",
                fix="start one for each GPU; CUDA_VISIBLE_DEVICES= trains on the processor",
            )
        with lost_is_told():
            state = PartialState(cpu=not on_gpus)
            if state.num_processes != self._world:
                raise EdgekdError(
                    f"WORLD_SIZE is {self._world}, and {state.num_processes} process is here",
                    fix="start the command with torchrun, or without WORLD_SIZE in the environment",
                )
            # Objects travel in a group of their own, over the processor: waiting for one keeps no GPU busy.
            self._talk = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def once(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, done by the first process alone; the others wait for it, and all get the same.

        What the work asks of edgekd meanwhile is asked by one process. The result is pickled: tensors on the
        processor. An EdgekdError is raised in all of them.
        """
        if self.world == 1:
            return work()
        self.join()
        box: list[Any] = [None, None]
        if self.first:
            self._by_itself = True
            try:
                box[0] = work()
            except EdgekdError as problem:
                box[1] = problem
            finally:
                self._by_itself = False
        import torch

        with lost_is_told():
            torch.distributed.broadcast_object_list(box, src=0, group=self._talk, device=torch.device("cpu"))
        if box[1] is not None:
            raise box[1]
        result: Result = box[0]
        return result

    def agree(self, value: str, what: str) -> None:
        """Check that all have the same value.

        Raises:
            EdgekdError: this process has another one than the first.
        """
        if self.once(lambda: value) != value:
            raise EdgekdError(
                f"{what} of process {self.rank} is not that of the first process",
                fix="start all of them with the same recipe, data and weights",
            )

    def heard(self, say: Say) -> Say:
        """The same `say` for the first process; the others are silent."""
        return say if self.first else silent

    # ------------------------------------------------------------ the end of a command

    def watch(self) -> None:
        """Have an end from outside told like any other problem: a launcher ends all when one has stopped."""
        if self._world > 1:
            signal.signal(signal.SIGTERM, _ended)

    def leave(self, *, sound: bool) -> None:
        """Nothing is asked of the others any more; `sound` where all has gone well."""
        if self._world == 1:
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is ending already, and says why
        if sound and self._talk is not None:
            import torch

            torch.distributed.destroy_process_group()


@lru_cache(maxsize=1)
def here() -> Processes:
    """This process as its launcher describes it in the environment: RANK and WORLD_SIZE."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def lost_is_told() -> Iterator[None]:
    """Around what all do together: that one of them is gone is a thing to be told, not a traceback.

    Raises:
        EdgekdError: torch.distributed fails.
    """
    try:
        yield
    except (RuntimeError, ValueError) as problem:
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        reason = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", first).partition(". ")[0]  # without where in torch, and its advice
        raise EdgekdError(
            f"another process of this run has stopped or cannot be reached ({reason})",
            fix="look at what it said; the same command goes on where it stopped",
        ) from problem


def _ended(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise EdgekdError(
        "this process was ended from outside, as it is when another one of its run has stopped",
        fix="look at what that one said; the same command goes on where it stopped",
    )


def silent(_event: str, /, **_fields: Json) -> None:
    """A `say` that tells nobody."""
