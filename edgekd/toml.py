"""TOML tables into frozen dataclasses: an unknown key is an error that names the nearest one, and where it stands."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgekd.errors import EdgekdError, RecipeError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

T = TypeVar("T")


def loads(text: str) -> dict[str, Any]:
    """The tables of TOML text.

    Raises:
        ValueError: it is not TOML.
    """
    tables: dict[str, Any] = tomllib.loads(text)
    return tables


def load(path: Path, error: type[EdgekdError] = RecipeError) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        error: the file is missing, unreadable, or not TOML (with line and column).
    """
    try:
        return loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise error("no such file", where=str(path), nearest=nearest(path.name, siblings)) from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"cannot be read: {problem}", where=str(path)) from None
    except tomllib.TOMLDecodeError as problem:
        raise error(f"not valid TOML: {problem}", where=str(path)) from None


def known(given: Iterable[str], allowed: Iterable[str], where: str, *, error: type[EdgekdError] = RecipeError) -> None:
    """Raise `error` for the first key of `given` that is not in `allowed`."""
    allowed = sorted(allowed)
    for key in given:
        if key not in allowed:
            choices = ", ".join(allowed) or "no keys"
            raise error(f"unknown key '{key}'; it takes {choices}", where=where, nearest=nearest(key, allowed))


def validated(value: object, hint: Any, where: str, *, error: type[EdgekdError] = RecipeError) -> Any:
    """`value`, as TOML or JSON gave it, as the annotated type `hint`; a list may become a tuple, an integer a float.

    Raises:
        error: it is of another type, or out of the bounds that the annotation carries.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as problem:
        # Of a union, the member that the value fits best; its name is none of the user's.
        first = max(problem.errors(include_url=False), key=lambda error: len(error["loc"]))
        steps = [step for step in first["loc"] if isinstance(step, int) or "[" not in step]
        inner = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
        message = first["msg"][0].lower() + first["msg"][1:]
        raise error(f"{json.dumps(value, default=str)} does not fit: {message}", where=where + inner) from None


def as_table(value: object, where: str, *, error: type[EdgekdError] = RecipeError) -> Mapping[str, Any]:
    """`value`, where it is a table.

    Raises:
        error: it is none.
    """
    if not isinstance(value, Mapping):
        raise error(f"{json.dumps(value, default=str)} is no table", where=where, expected=f"[{where}] with keys")
    return value


def read(cls: type[T], value: object, where: str, *, error: type[EdgekdError] = RecipeError) -> T:
    """The dataclass `cls` from a TOML table, with its defaults for keys left out; nested dataclasses are read alike."""
    table = as_table(value, where, error=error)
    assert is_dataclass(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    known(table, hints, where, error=error)
    given: dict[str, Any] = {}
    for item in fields(cls):
        if item.name in table:
            hint, place = hints[item.name], f"{where}.{item.name}"
            nested = is_dataclass(hint) and isinstance(hint, type)
            found = table[item.name]
            if nested:
                given[item.name] = read(hint, found, place, error=error)
            else:
                given[item.name] = validated(found, hint, place, error=error)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise error(f"'{item.name}' is missing", where=where, fix=f"add {item.name} = … to [{where}]")
    return cls(**given)
