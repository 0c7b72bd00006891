"""Where events go: a person's terminal (stderr) and the run's log.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn

from edgekd.types import Json

# What a person reads for an event; one that is not listed is only logged (shown with -v).
_LINES = {
    "data": "data      {name}: {train} to train, {calibration} to calibrate, {test} to test, {classes} classes",
    "cached": "{step:<9} already built ({key})",
    "waiting": "{step:<9} another run builds it; waiting",
    "corrupt": "store     {path} is corrupt ({reason}); building it again",
    "resumed": "{step:<9} goes on at epoch {epoch}",
    "precision": "{step:<9} computes in {precision}: {reason}",
    "compile": "{step:<9} is compiled: {reason}",
    "quantizing": "quantize  {id}",
    "quantized": "quantized {id}: cosine with the float file {cosine:.6f}",
    "candidate": "candidate {name}: {done} of {of} are done",
    "measured": "{metric:<9} {id}: {accuracy:.2%}",
    "latency": "latency   {id}: {p50:.3f} ms",
    "note": "note      {text}",
    "done": "done      {summary}",
}


class Progress:
    """A `Say` that shows what happens on stderr and appends every event to a log file.

    Args:
        log: the file that gets one JSON object a line; None for no file.
        verbose: show every event, not only those a person waits for.
    """

    def __init__(self, log: Path | None = None, *, verbose: bool = False) -> None:
        self._verbose = verbose
        self._file: IO[str] | None = log.open("a", encoding="utf-8") if log else None
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            "{task.description:<9} epoch {task.fields[epoch]}/{task.total:.0f}",
            BarColumn(30),
            "{task.fields[note]}",
        )
        self._bars = rich.progress.Progress(*columns, console=self._console, transient=True)
        self._task: rich.progress.TaskID | None = None
        self._begun_s = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._file:
            self._file.close()

    def __call__(self, event: str, /, **fields: Json) -> None:
        """Log the event, and show it where a person would want to read it."""
        if self._file and event != "batch":
            entry = {"t_s": round(time.monotonic() - self._begun_s, 3), "event": event} | fields
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        values: dict[str, Any] = dict(fields)
        if event in ("epoch", "batch"):
            self._train(event, values)
        elif event in _LINES:
            self._console.print(_LINES[event].format_map(values), markup=False)
        elif self._verbose:
            self._console.print(f"{event:<9}", *(f"{key}={value}" for key, value in values.items()), markup=False)

    def _train(self, event: str, values: dict[str, Any]) -> None:
        step, epoch, of = values.get("step", "train"), values["epoch"], values["of"]
        note = f"loss {values['loss']:.3f}" if values.get("loss") is not None else ""
        if values.get("eta_s"):
            note += f", {_duration(values['eta_s'])} left"
        if event == "epoch" and (epoch == of or self._verbose):
            self._console.print(f"{step:<9} epoch {epoch}/{of} {note}", markup=False)
        if event == "epoch" and epoch == of:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = None
        elif self._task is None:
            self._task = self._bars.add_task(step, total=of, completed=epoch, epoch=epoch, note=note)
        else:
            self._bars.update(self._task, description=step, total=of, completed=epoch, epoch=epoch, note=note)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
