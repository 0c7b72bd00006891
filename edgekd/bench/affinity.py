"""Which CPUs a measurement runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class Pin:
    """The CPUs that threads were pinned to, or the reason why they were not."""

    cpus: tuple[int, ...] | None
    reason: str | None


@contextmanager
def pinned(threads: int) -> Iterator[Pin]:
    """Keep every thread of this process on `threads` CPUs meanwhile; afterwards each may run where it could before.

    Of the CPUs allowed to the process, the fastest cores come first (big before little), then one hardware thread of
    each core before the second, then high numbers, since CPU 0 serves most interrupts.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield Pin(None, "this system offers no CPU affinity")
        return
    allowed = os.sched_getaffinity(0)
    if threads > len(allowed):
        yield Pin(None, f"{threads} threads on {len(allowed)} CPUs")
        return
    cpus = tuple(sorted(sorted(allowed, key=_preference)[:threads]))
    before: dict[int, set[int]] = {}
    try:
        try:
            for task in _tasks():  # not only this thread: a runtime's pool was started when its model was loaded
                with suppress(ProcessLookupError):  # it ended since it was listed
                    before[task] = os.sched_getaffinity(task)
                    os.sched_setaffinity(task, cpus)
            pin = Pin(cpus, None)
        except OSError as problem:
            pin = Pin(None, f"the system refused: {problem.strerror}")
        yield pin
    finally:
        for task, mask in before.items():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(task, mask)


def _tasks() -> list[int]:
    try:
        return [int(entry.name) for entry in _TASKS.iterdir()]
    except OSError:
        return [0]


def _preference(cpu: int) -> tuple[int, bool, int]:
    folder = _CPUS / f"cpu{cpu}"
    capacity = _text(folder / "cpu_capacity")
    siblings = _text(folder / "topology" / "thread_siblings_list")
    first = siblings.replace("-", ",").split(",")[0]
    is_second = first.isdigit() and int(first) != cpu
    return (-int(capacity) if capacity.isdigit() else 0, is_second, -cpu)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
