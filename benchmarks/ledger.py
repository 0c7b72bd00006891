"""Results as JSON lines: what a benchmark has done already, so that it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgekd import distillation
from edgekd.bench import conditions

HERE = Path(__file__).resolve().parent
RESULTS, STORE = HERE / "results", HERE / ".store"
CACHE_GB = 24.0  # of teachers' answers, which all benchmarks keep in one folder: the smallest limit would hold for all
DATA = HERE.parent.parent / "shared" / "data"


@dataclass(frozen=True)
class Ledger:
    """A file with one JSON object a line; `settings` of a row say what was run, all else what came out."""

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        """Every result that is there, in the order in which they came."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def find(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a run with just these settings."""
        wanted = key(settings)
        return next((row for row in self.rows() if key(row["settings"]) == wanted), None)

    def add(self, settings: Mapping[str, Any], **found: Any) -> dict[str, Any]:
        """Write down what a run gave, with the machine it ran on."""
        cpu = conditions.device_name()
        machine = {"cpu": cpu, "torch": torch.__version__, "python": platform.python_version()}
        row = {"settings": _versioned(settings), **found, "environment": machine}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def key(settings: Mapping[str, Any]) -> str:
    """A short name for settings; other settings have another one."""
    return hashlib.sha256(json.dumps(_versioned(settings), sort_keys=True).encode()).hexdigest()[:16]


def _versioned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the version of edgekd's training, where there is none yet: what another one gave is another result."""
    return {"edgekd": distillation.VERSION, **settings}


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if len(values) < 2:
        return f"{statistics.fmean(values):.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
