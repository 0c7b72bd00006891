"""Peak memory of a model's inference, measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.types import Arrays, Backend, Json, Part

_RUNS = 20
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Bytes, or None with the reason why there are none."""

    bytes: int | None
    reason: str | None


def peak_memory(backend: Part, file: Path, sample: Arrays, *, threads: int, timeout_s: float = 300.0) -> PeakMemory:
    """How much the resident memory of a process grows at most while it loads `file` and runs it on `sample`.

    The process starts afresh and has imported the runtime before it starts to count: what counts is the model, its
    buffers and what the runtime makes for it (peak of VmHWM minus VmRSS before loading). Linux only. Memory of a GPU
    is not resident memory of a process, so a model on one shows its share of the host alone.
    """
    if not _STATUS.exists():
        return PeakMemory(None, "peak memory is measured on Linux only")
    with tempfile.TemporaryDirectory(prefix="edgekd-memory-") as folder:
        samples = Path(folder) / "sample.npz"
        np.savez(samples, *sample.values())  # by position, since an input may be named as an argument of savez
        task: dict[str, Json] = {
            "backend": backend.name,
            "options": dict(backend.options),
            "file": str(file.resolve()),
            "sample": str(samples),
            "inputs": list(sample),
            "threads": threads,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "edgekd.bench.memory"],
                input=json.dumps(task),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return PeakMemory(None, f"the measuring process took more than {timeout_s:g} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return PeakMemory(None, f"the measuring process failed: {last}")
    answer = json.loads(lines[-1])
    return PeakMemory(answer["bytes"], answer["reason"])


def _measure(task: dict[str, Json]) -> PeakMemory:
    """Runs in the fresh process."""
    from edgekd import plugins

    options, inputs = task["options"], task["inputs"]
    assert isinstance(options, dict)
    assert isinstance(inputs, list)
    backend: Backend = plugins.build("backends", Part(str(task["backend"]), options), where="backend")
    refused = backend.available()  # imports the runtime, which is thus not counted
    if refused:
        return PeakMemory(None, refused)
    with np.load(str(task["sample"]), allow_pickle=False) as file:
        sample = {str(name): file[f"arr_{i}"] for i, name in enumerate(inputs)}
    was_reset = _reset_peak()
    peak_before, resident_before = _kilobytes("VmHWM"), _kilobytes("VmRSS")
    session = backend.load(Path(str(task["file"])), int(str(task["threads"])))
    for _ in range(_RUNS):
        session(sample)
    peak = _kilobytes("VmHWM")
    session.close()
    if not was_reset and peak <= peak_before:
        return PeakMemory(None, "the system does not let a process reset its peak (/proc/self/clear_refs)")
    return PeakMemory((peak - resident_before) * 1024, None)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5", encoding="ascii")  # man 5 proc: resets VmHWM to VmRSS
    except OSError:
        return False
    return True


def _kilobytes(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {key}")


if __name__ == "__main__":
    try:
        found = _measure(json.load(sys.stdin))
    except EdgekdError as problem:
        found = PeakMemory(None, str(problem))
    sys.stdout.write("\n" + json.dumps({"bytes": found.bytes, "reason": found.reason}) + "\n")
