"""report.json: its schema, reading it and writing it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from edgekd.errors import DataError
from edgekd.store import write_text
from edgekd.types import Report

SCHEMA = 1  # raised when a reader of the older form would misread the newer one; a key more does not raise it


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json, made from `edgekd.types.Report`."""
    made = _adapter().json_schema(mode="serialization")
    made["properties"]["schema"] = {"const": SCHEMA, "title": "Schema", "type": "integer"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "edgekd report", **made}


def dump(report: Report, path: Path) -> None:
    """Write report.json whole or not at all.

    Raises:
        ValueError: a number in it is not finite; the message names where.
        StoreError: the disk is full or read-only.
    """
    write_text(path, text(report))


def text(report: Report) -> str:
    """The report as JSON, the same bytes for the same report."""
    document = dataclasses.asdict(report)
    for where in _not_finite(document, "report"):
        raise ValueError(f"{where} is not finite: a figure that was not measured is None")
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load(path: Path) -> Report:
    """The report in a report.json, or in a run folder that holds one.

    Raises:
        DataError: no such file, not JSON, of another schema version, or a value that does not fit.
    """
    path = path / "report.json" if path.is_dir() else path
    where = str(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        raise DataError("no such report", where=where, fix="edgekd compress writes one into its run folder") from None
    except OSError as problem:
        raise DataError(f"cannot be read: {problem.strerror or problem}", where=where) from problem
    except (ValueError, RecursionError) as problem:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"not JSON: {problem}", where=where, expected="a report.json of edgekd") from None
    if not isinstance(document, dict) or "schema" not in document or "variants" not in document:
        raise DataError("this is no report", where=where, expected="a report.json of edgekd")
    version = document["schema"]
    if version != SCHEMA or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA
        raise DataError(
            f"report schema {version!r} cannot be read",
            where=where,
            expected=f"schema {SCHEMA}",
            fix="it was written by a newer edgekd: upgrade" if newer else "run edgekd compress again to write it anew",
        )
    try:
        report = _adapter().validate_json(json.dumps(document), strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise DataError(f"'{place}': {first['msg'][0].lower()}{first['msg'][1:]}", where=where) from None
    for place in _not_finite(document, "report"):
        raise DataError(f"'{place}' is not finite", where=where)
    _consistent(report, where)
    return report


def _consistent(report: Report, where: str) -> None:
    """What the types cannot say: ids are unique, and what is named exists."""
    ids = [variant.id for variant in report.variants]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise DataError(f"several variants are called '{twice[0]}'", where=where)
    for name in (report.teacher, *(chosen for chosen in report.chosen.values() if chosen is not None)):
        if name not in ids:
            raise DataError(f"there is no variant '{name}'", where=where)


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _not_finite(value: object, where: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_finite(inner, f"{where}[{index}]")
