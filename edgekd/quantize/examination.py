"""What the quantized network is examined for once it is made: which layers cost, and which had better stay in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from edgekd.graph.program import reason
from edgekd.quantize import mixed as mixing
from edgekd.quantize import sensitivity
from edgekd.quantize.ladder import Ladder
from edgekd.types import Interval, Json, LayerSensitivity, Say


def examine(ladder: Ladder, *, mixed: bool, say: Say) -> dict[str, Json]:
    """What the artifact keeps: `sensitivity`, a row for each layer, and `mixed`, sets of layers to leave in float.

    Args:
        mixed: look for such sets where the best that the ladder came to is not within its limit.
    """
    simulation, samples = ladder.simulation, ladder.samples
    whole = ladder.attempts[ladder.best].loss
    assert whole is not None
    try:
        rows = sensitivity.analyse(simulation, samples.held_out, ladder.task, say=say)
        found = None
        if mixed and not whole.within(ladder.max_drop):
            found = mixing.search(
                simulation, rows, samples.ranging, samples.held_out, ladder.task,
                whole=whole, max_drop=ladder.max_drop, say=say,
            )  # fmt: skip
            rows = tuple(replace(row, rest=found.rest.get(row.layer)) for row in rows)
    except MemoryError:
        raise
    except Exception as error:  # what was quantized is good, whatever cannot be said of its layers
        why = reason(error)
        say("note", step="quantize", text=f"sensitivity could not be measured: {why}")
        return {"sensitivity": [], "mixed": None, "not_examined": why}
    listed: list[Json] = [asdict(row) for row in rows]
    return {"sensitivity": listed, "mixed": None if found is None else found.to_json()}


def rows_of(meta: Mapping[str, Any]) -> tuple[LayerSensitivity, ...]:
    """The rows that an artifact kept."""
    return tuple(
        LayerSensitivity(**row | {"drop": None if row["drop"] is None else Interval(**row["drop"])})
        for row in meta.get("sensitivity") or ()
    )
