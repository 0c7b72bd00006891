"""Columns of a CSV file: UTF-8, a header line, commas, texts that hold commas or line breaks in double quotes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from edgekd.data.splits import listed
from edgekd.errors import DataError, nearest


def columns(path: Path, names: Sequence[str]) -> list[list[str]]:
    """The cells below the header of each of the named columns; blank lines are skipped.

    Raises:
        DataError: no such file or column, not UTF-8, not CSV, a row of another length, an empty cell in a named
            column, or no rows.
    """
    where = str(path)
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    found: list[list[str]] = [[] for _ in names]
    try:
        header = next(reader, [])
        places = [_place(header, name, where) for name in names]
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"line {reader.line_num} has {len(cells)} cells",
                    where=where,
                    expected=f"{len(header)}, as the header",
                    fix="put a text that holds a comma in double quotes",
                )
            for name, column, place in zip(names, found, places, strict=True):
                if not cells[place].strip():
                    raise DataError(f"'{name}' is empty in line {reader.line_num}", where=where, fix="remove that row")
                column.append(cells[place])
    except csv.Error as problem:
        raise DataError(
            f"not CSV, in or before line {reader.line_num}: {problem}",
            where=where,
            fix='look for a double quote without its partner; inside a quoted text it is written ""',
        ) from problem
    if not found[0]:
        raise DataError("there are no rows", where=where, expected=f"a header with {listed(names)}, then rows")
    return found


def _decoded(path: Path) -> str:
    if not path.is_file():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError("no such file", where=str(path), nearest=nearest(path.name, siblings))
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content[: problem.start].count(b"\n") + 1
        raise DataError(f"line {line} is not UTF-8", where=str(path), fix="save the file as UTF-8") from problem


def _place(header: Sequence[str], name: str, where: str) -> int:
    titles = [title.strip() for title in header]
    if titles.count(name) != 1:
        raise DataError(
            f"there is {'no' if name not in titles else 'more than one'} column '{name}' in the header",
            where=where,
            expected=f"one of {', '.join(titles)}" if any(titles) else "a header line, e.g. text,label",
            nearest=nearest(name, titles) if name not in titles else "",
        )
    return titles.index(name)
