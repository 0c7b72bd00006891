"""quantize.json: how each form of a model was made, beside its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from edgekd.types import Json, Report


def account_of(made: Report, accounts: Mapping[str, Mapping[str, Json]], source: str) -> dict[str, Json]:
    """What quantize.json holds: each form with how it was made and its figures, from a report and the steps' accounts.

    Args:
        accounts: variant id → what its step said.
        source: "onnx" for a file without PyTorch source, "pytorch" for a recipe's model.
    """
    forms: list[Json] = []
    for row in made.variants:
        if row.id not in accounts:
            continue
        told: Any = dict(accounts[row.id])
        forms.append(
            {
                "id": row.id, "precision": row.precision, "path": row.path, "size_bytes": row.size_bytes,
                "accuracy": asdict(row.accuracy) if row.accuracy else None,
                "drop": asdict(row.drop) if row.drop else None,
                "parity": asdict(row.parity) if row.parity else None,
                "latency_ms": asdict(row.latency_ms) if row.latency_ms else None,
                "verdict": asdict(row.verdict) | {"reasons": list(row.verdict.reasons)} if row.verdict else None,
                "account": told,
            }
        )  # fmt: skip
    return {
        "schema": 1, "name": made.name, "source": source, "metric": made.metric, "chosen": dict(made.chosen),
        "forms": forms, "notes": list(made.notes),
    }  # fmt: skip
