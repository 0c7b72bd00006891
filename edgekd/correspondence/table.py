"""A correspondence as text that people read and edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgekd import plugins
from edgekd.correspondence.pair import Pair
from edgekd.correspondence.projectors import wanted
from edgekd.correspondence.taps import Tap
from edgekd.errors import RecipeError, nearest
from edgekd.types import Json, LossTerm, Part

_COLUMNS = (
    "student", "teacher", "loss", "weight", "role", "student shape", "teacher shape", "stride", "depth", "cka", "score",
    "projector",
)  # fmt: skip
_READ = _COLUMNS[:4]


def write(pairs: Sequence[Pair], notes: Sequence[str]) -> str:
    """A line a pair; loss and weight may be changed, lines taken out, and the text read back by `read`."""
    rows = [_COLUMNS, *(_row(pair) for pair in pairs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"# {note}" for note in notes)]) + "\n"


def read(text: str) -> tuple[LossTerm, ...]:
    """The terms of a table as `write` gives it, edited or not; a line of weight 0 is none.

    Only the columns student, teacher, loss and weight are looked at; lines that begin with # are notes.

    Raises:
        RecipeError: a column is missing, or a line or its weight cannot be read.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    header = [cell.strip() for cell in lines[0].split("|")] if lines else []
    for column in _READ:
        if column not in header:
            raise RecipeError(f"there is no column '{column}'", where="table of pairs", nearest=nearest(column, header))
    rows = []
    for number, line in enumerate(lines[1:], 2):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < len(header):
            raise RecipeError(
                f"line {number} has {len(cells)} columns", expected=str(len(header)), where="table of pairs"
            )
        student, teacher, loss, weight = (cells[header.index(column)] for column in _READ)
        try:
            rows.append((loss, float(weight), (student, teacher)))
        except ValueError:
            raise RecipeError(
                f"line {number} has the weight '{weight}'", expected="a number", where="table of pairs"
            ) from None
    return grouped((Part(loss), weight, pair) for loss, weight, pair in rows if weight)


def grouped(rows: Iterable[tuple[Part, float, tuple[str, str]]]) -> tuple[LossTerm, ...]:
    """Terms of the same loss, options and weight as one, in the order of their first pair."""
    terms: list[tuple[Part, float, list[tuple[str, str]]]] = []
    for part, weight, pair in rows:
        for known, known_weight, pairs in terms:
            if known == part and known_weight == weight:
                pairs.append(pair)
                break
        else:
            terms.append((part, weight, [pair]))
    return tuple(LossTerm(part, weight, tuple(pairs)) for part, weight, pairs in terms)


def told(pair: Pair) -> dict[str, Json]:
    """A pair for the report's JSON."""
    return {
        "student": _tap(pair.student),
        "teacher": _tap(pair.teacher),
        "loss": pair.loss,
        "weight": pair.weight,
        "role": pair.role,
        "cka": pair.cka,
        "score": pair.score,
        "projector": _projector(pair),
        "channel_map": None if pair.channel_map is None else list(pair.channel_map),
        "options": dict(pair.options),
    }


def _tap(tap: Tap) -> dict[str, Json]:
    return {
        "path": tap.path,
        "layout": tap.layout,
        "shape": list(tap.shape),
        "channels": tap.channels,
        "depth": tap.depth,
        "stride": tap.stride,
        "kind": tap.kind,
        "grid": list(tap.grid),
        "prefix": tap.prefix,
    }


def _row(pair: Pair) -> tuple[str, ...]:
    strides = [f"{tap.stride:.3g}" if tap.stride else "-" for tap in (pair.student, pair.teacher)]
    return (
        *pair.paths,
        pair.loss,
        f"{pair.weight:g}",
        pair.role,
        _shape(pair.student),
        _shape(pair.teacher),
        f"{strides[0]}/{strides[1]}",
        f"{pair.student.depth:.2f}/{pair.teacher.depth:.2f}",
        "-" if pair.cka is None else f"{pair.cka:.2f}",
        f"{pair.score:.2f}",
        _projector(pair),
    )


def _projector(pair: Pair) -> str:
    """What is trained between the two for the pair's loss: channels of a linear map, a fusion or an exit."""
    names = wanted(plugins.bind("losses", Part(pair.loss, pair.options)))
    if "projected_feature" in names and pair.projector == "linear":
        return f"{pair.student.channels}>{pair.target_channels}"
    return "fusion" if "fused_features" in names else "exit" if "exit_logits" in names else "none"


def _shape(tap: Tap) -> str:
    grid = "x".join(map(str, tap.grid))
    over = f"+{tap.prefix}" if tap.prefix else ""
    return f"{tap.channels}" + (f"@{grid}{over}" if grid else "")
