"""The one extension rule: `edgekd/<kind>/<name>.py` defines a callable `<name>`.

A third party offers the same through the entry-point group `edgekd.<kind>`; a user's own code is named
`package.module:callable`, importable from the current folder. A family in one file drops trailing digits
(`models/resnet.py` defines `resnet20`), and a library that is a family of its own takes the rest of a dotted name
(`timm.resnet50` is `models/timm.py` with name="resnet50").

Positional arguments come from edgekd, keyword-only ones from the recipe: the signature is the schema.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from edgekd import toml
from edgekd.errors import EdgekdError, PartError, nearest
from edgekd.types import Part


@cache
def names(kind: str) -> Mapping[str, str]:
    """Every part of `kind` that is installed: name → module, found without importing any of them."""
    found: dict[str, str] = {}
    for file in sorted((Path(__file__).parent / kind).glob("[a-z]*.py")):
        stem = re.escape(file.stem)
        for name in re.findall(rf"^(?:def|class) ({stem}\d*)\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = f"edgekd.{kind}.{file.stem}"
    for point in importlib.metadata.entry_points(group=f"edgekd.{kind}"):
        found.setdefault(point.name, point.module)
    return found


def find(kind: str, name: str, *, where: str = "") -> Callable[..., Any]:
    """The callable that `name` stands for among the parts of `kind`.

    Raises:
        PartError: no part has that name, or the user's module or callable does not exist or fails on import.
    """
    where = where or kind
    if ":" in name:
        return _own(name, where)
    installed = names(kind)
    if name not in installed:
        likely = nearest(name, installed)
        fix = "" if likely else "your own code is named package.module:callable"
        raise PartError(
            f"there is no '{name}' in {kind}; there is {', '.join(sorted(installed))}",
            where=where,
            nearest=likely,
            fix=fix,
        )
    for point in importlib.metadata.entry_points(group=f"edgekd.{kind}", name=name):
        if not installed[name].startswith("edgekd."):
            return typing.cast("Callable[..., Any]", point.load())
    return typing.cast("Callable[..., Any]", getattr(importlib.import_module(installed[name]), name))


def _own(name: str, where: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except EdgekdError:
        raise
    except Exception as problem:
        missing = isinstance(problem, ModuleNotFoundError) and problem.name in (module_name, module_name.split(".")[0])
        fix = "import it in Python to see the whole error"
        if missing:
            fix = "run edgekd in the folder that holds it, or install its package"
        raise PartError(f"'{module_name}' cannot be imported: {problem}", where=where, fix=fix) from problem
    found = getattr(module, attribute, None)
    if not callable(found):
        offers = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise PartError(
            f"'{module_name}' has no callable '{attribute}'", where=where, nearest=nearest(attribute, offers)
        )
    return typing.cast("Callable[..., Any]", found)


def bind(kind: str, part: Part, *, where: str = "") -> Callable[..., Any]:
    """The part with its options filled in and checked against its signature, waiting for its positional arguments.

    Raises:
        PartError: the part is unknown, an option is unknown, missing or of another type.
    """
    where = where or kind
    name, options = part.name, dict(part.options)
    if ":" not in name and "." in name and name not in names(kind):
        name, _, options["name"] = name.partition(".")
    function = find(kind, name, where=where)
    keyword_only = {p.name: p for p in _parameters(function) if p.kind is p.KEYWORD_ONLY}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in _parameters(function))
    for key in options:
        if key not in keyword_only and not takes_any:
            takes = ", ".join(keyword_only) or "no options"
            raise PartError(
                f"unknown option '{key}'; {part.name} takes {takes}", where=where, nearest=nearest(key, keyword_only)
            )
    for key, parameter in keyword_only.items():
        if key not in options and parameter.default is parameter.empty:
            raise PartError(f"{part.name} needs the option '{key}'", where=where, fix=f"add {key} = … to it")
    hints = _hints(function, [key for key in options if key in keyword_only])
    checked = {
        key: toml.validated(value, hints[key], f"{where}.{key}", error=PartError) if key in hints else value
        for key, value in options.items()
    }
    return partial(function, **checked)


def build(kind: str, part: Part, *given: object, where: str = "") -> Any:
    """What the part returns for `given`; a user's callable may take fewer positional arguments than edgekd offers."""
    bound = bind(kind, part, where=where)
    function = bound.func if isinstance(bound, partial) else bound
    positional = [p for p in _parameters(function) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not any(p.kind is p.VAR_POSITIONAL for p in _parameters(function)):
        needed = [p.name for p in positional if p.default is p.empty]
        if len(needed) > len(given):
            raise PartError(
                f"{part.name} needs {len(needed)} positional arguments: {', '.join(needed)}; edgekd gives {len(given)}",
                where=where or kind,
                fix="make the others keyword-only (after a *), so that the recipe can set them",
            )
        given = given[: len(positional)]
    return bound(*given)


def defaults(kind: str, part: Part) -> dict[str, Any]:
    """The options of the part with every default filled in, for the resolved recipe."""
    bound = bind(kind, part)
    function = bound.func if isinstance(bound, partial) else bound
    filled = {p.name: p.default for p in _parameters(function) if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return {key: value for key, value in (filled | dict(part.options)).items() if value is not None}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _hints(function: Callable[..., Any], wanted: list[str]) -> dict[str, Any]:
    """Types of the wanted parameters only: a positional one may name what is imported for type checking alone."""
    annotated = {
        p.name: p.annotation for p in _parameters(function) if p.name in wanted and p.annotation is not p.empty
    }
    scope = getattr(inspect.unwrap(function), "__globals__", None) or vars(sys.modules[function.__module__])
    return typing.get_type_hints(
        type("Options", (), {"__annotations__": annotated}), globalns=scope, include_extras=True
    )
