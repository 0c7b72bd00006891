"""What the quantized network is examined for once it is made: which layers cost, and which had better stay in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from edgekd.graph.program import reason
from edgekd.quantize import mixed as mixing
from edgekd.quantize import sensitivity
from edgekd.quantize.ladder import Ladder
from edgekd.quantize.measured import Loss
from edgekd.types import Interval, Json, LayerSensitivity, Say, Sensitivity

VERSION = 2  # of what is kept of an examination


def examine(ladder: Ladder, *, mixed: bool, say: Say) -> dict[str, Json]:
    """What the artifact keeps: `sensitivity`, a row for each layer, with the number of samples that all were measured
    on, and `mixed`, sets of layers to leave in float.

    Args:
        mixed: look for such sets where the best that the ladder came to is not within its limit.
    """
    simulation, samples = ladder.simulation, ladder.samples
    whole = ladder.attempts[ladder.best].loss
    assert whole is not None
    try:
        rows, count = sensitivity.analyse(simulation, samples.held_out, ladder.task, say=say)
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
    mixes = None if found is None else found.to_json()
    return {"sensitivity": listed, "sensitivity_samples": count, "mixed": mixes}


def rows_of(meta: Mapping[str, Any]) -> tuple[LayerSensitivity, ...]:
    """The rows that an artifact kept."""
    return tuple(
        LayerSensitivity(**row | {"drop": None if row["drop"] is None else Interval(**row["drop"])})
        for row in meta.get("sensitivity") or ()
    )


def sets(meta: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The sets of layers that would do in float, fewest layers first; none where there was no need, or no set."""
    return [tuple(mix["layers"]) for mix in (meta.get("mixed") or {}).get("mixes", ())]


def in_float(meta: Mapping[str, Any], layers: Sequence[str]) -> float:
    """The part of the multiply-accumulates that one of those sets does in float."""
    return next(float(mix["macs"]) for mix in meta["mixed"]["mixes"] if mix["layers"] == list(layers))


def kept(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """The attempt at int8 that was kept: its figures on the samples held out."""
    return next(attempt for attempt in meta["methods"] if attempt["kept"])


def lost(meta: Mapping[str, Any]) -> float:
    """What the kept attempt loses, see `sensitivity.estimate`."""
    figures = {name: kept(meta)[name] for name in (field.name for field in fields(Loss))}
    loss = Loss(**figures)
    return sensitivity.estimate(loss.expected_drop, sensitivity.interval(loss))


def sensitivity_of(
    target: str, variant: str, meta: Mapping[str, Any], mixed: tuple[str, Sequence[str], Mapping[str, Any]] | None
) -> Sensitivity | None:
    """What the report shows of an int8 artifact; None where its layers were not looked into.

    Args:
        variant: its id in the report.
        meta: what the artifact kept.
        mixed: id, float layers and kept figures of the variant with some layers in float, where there is one.
    """
    rows = rows_of(meta)
    if not rows:
        return None
    return Sensitivity(
        target=target,
        variant=variant,
        samples=int(meta["sensitivity_samples"]),
        layers=rows,
        float_layers=() if mixed is None else tuple(mixed[1]),
        mixed=None if mixed is None else mixed[0],
        whole=lost(meta),
        remaining=None if mixed is None else lost(mixed[2]),
        notes=tuple((meta.get("mixed") or {}).get("why", ())),
        left=dict(meta.get("float") or {}),
    )
