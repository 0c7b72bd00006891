"""Several processes for a test, as a launcher starts them: forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from edgekd.errors import EdgekdError

PATIENCE_S = 120.0
# what takes seconds to import; torch needs its compiler to be told to be deterministic
IMPORTED = [
    "accelerate",
    "edgekd.distillation",
    "edgekd.data.digits",
    "filelock",
    "sklearn.datasets",
    "torch._inductor",
]


def together(work: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """What `work(*args)` gives in each of `world` processes, by rank; an EdgekdError is given, not raised.

    Args:
        work: a function at the top of a module.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started, ends = [], []
    for rank in range(world):
        end, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_one, args=(theirs, rank, world, port, work, args), daemon=True)
        process.start()
        theirs.close()
        started.append(process)
        ends.append(end)
    found = [_received(end) for end in ends]
    for process in started:
        process.join(PATIENCE_S)
    wrong = [text for text in found if isinstance(text, Broken)]
    assert not wrong, "\n".join(wrong)
    return found


class Broken(str):
    """The traceback of what a process raised that is no EdgekdError."""


def _received(end: Connection) -> Any:
    if not end.poll(PATIENCE_S):
        return Broken("no answer")
    try:
        return end.recv()
    except EOFError:
        return None  # it was killed


def _one(end: Connection, rank: int, world: int, port: int, work: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        found = work(*args)
    except EdgekdError as problem:
        found = problem
    except BaseException:
        found = Broken(traceback.format_exc())
    end.send(found)
    end.close()
    os._exit(0)  # as a launcher's end is: nobody waits for the others' sockets
