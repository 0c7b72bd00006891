"""The reference pages of docs/, made from the code: CLI, recipe keys, parts, targets, report schema.

tools/docs            writes them
tools/docs --check    fails, naming the page, where one is not what the code says
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import click

from edgekd import goals, outcome, plugins, recipe, report, target, types
from edgekd.cli import cli

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Made from the code by tools/docs; edits here are lost. -->\n\n"


def main() -> int:
    """Write or check every page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not current")
    check = parser.parse_args().check
    stale = [name for name, text in pages().items() if _current(name) != text]
    if not check:
        for name in stale:
            (ROOT / "docs" / name).write_text(pages()[name], encoding="utf-8")
            print(f"docs/{name}: written")
        return 0
    for name in stale:
        print(f"docs/{name} is not current: run tools/docs", file=sys.stderr)
    return 1 if stale else 0


def pages() -> dict[str, str]:
    """File name in docs/ → its text."""
    made = {"cli.md": _cli, "recipe.md": _recipe, "parts.md": _parts, "targets.md": _targets, "report.md": _report}
    return {name: HEAD + "\n".join(make()).rstrip() + "\n" for name, make in made.items()}


def _current(name: str) -> str | None:
    path = ROOT / "docs" / name
    return path.read_text(encoding="utf-8") if path.exists() else None


# ---------------------------------------------------------------- command line


def _cli() -> Iterator[str]:
    yield "# Command line\n"
    yield _help(cli, "edgekd")


def _help(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=100, max_content_width=100)
    own = f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"
    if not isinstance(command, click.Group):
        return own
    return own + "".join("\n" + _help(command.commands[sub], f"{name} {sub}") for sub in command.list_commands(context))


# ---------------------------------------------------------------- recipe


def _recipe() -> Iterator[str]:
    yield "# Recipe\n"
    yield textwrap.dedent("""\
        `edgekd compress` and `edgekd distill` read `edgekd.toml`, or the recipe they are given. One file, read top to
        bottom: no inheritance, no expressions; an unknown key is an error that names the nearest one. Relative paths
        are relative to the recipe's folder. `edgekd init` writes one to start from; the recipe with every default
        filled in, and every pair of layers that was found, is left in the run folder and reruns the same run.

        | key | type | default | meaning |
        |---|---|---|---|
        | `name` | str | | names the run and its folder, `runs/<name>` |
        | `seed` | int | `0` | of splits, initial weights and order; the augmentation has its own |

        ## `[data]`

        `name` is a [data part](parts.md#data); the other keys are its options.

        ## `[task]`

        `name` is a [task](parts.md#tasks), what the outputs are; the other keys are its options. Left out, it is
        `classification`.

        ## `[teacher]` and `[student]`
        """)
    yield from _table(_model_rows())
    yield "\nOther keys are options of the [model part](parts.md#models). A teacher without `weights` is trained first,"
    yield "by `[teacher.train]`; the student is trained by `[distill]`.\n"
    yield "Several teachers are `[[teacher]]` tables. The student learns the mean of their probabilities, by `weight`"
    yield "(float > 0, default `1.0`) in each of the tables, and the first one's features.\n"
    yield 'A student with `model = "pruned"` is its (first) teacher with channels cut out, as `[prune]` says; see'
    yield "[pruning](pruning.md).\n"
    yield "## `[teacher.train]` and `[distill]`\n"
    yield from _table(_keys(types.TrainOptions))
    yield "\nIn `[distill]` label smoothing is an option of the loss `ce`; in `[teacher.train]`, where nobody is asked,"
    yield "`views` is refused.\n"
    yield "## `[[distill.assistants]]`\n"
    yield f"{_first_line(recipe.Assistant)}\n"
    rows = _keys(recipe.Assistant)
    yield from _table(_model_rows() | {"epochs": ("int ≥ 1", *rows["epochs"][1:])})
    yield from _losses()
    yield from _heads()
    for title, cls in (
        ("augment", types.Augment),
        ("export", recipe.Export),
        ("quantize", recipe.Quantize),
        ("prune", goals.Prune),
        ("budget", types.Budget),
    ):
        yield f"## `[{title}]`\n"
        yield f"{_first_line(cls).replace('None is', 'left out is')}\n"
        yield from _table(_keys(cls))
        yield ""


def _losses() -> Iterator[str]:
    yield "\n## `[[loss]]`\n"
    yield "The student minimises the weighted sum of these. Other keys are options of the [loss](parts.md#losses).\n"
    yield textwrap.dedent(f"""\
        | key | type | default | meaning |
        |---|---|---|---|
        | `name` | str | | of the loss; `{recipe.AUTO}`: those of layers that `match` finds; alone: the default |
        | `weight` | float > 0 | `1.0` | of the loss in the sum |
        | `pairs` | [[str, str], …] | found | of a loss of features: layers by their paths, the student's first |""")
    yield "\nLeft out, they are those of the task, or those with layers where student and teacher are convolutional"
    yield "networks whose layers correspond; the run says which:\n"
    yield "| task | losses | with layers |\n|---|---|---|"
    for name in sorted(plugins.names("tasks")):
        task: types.Task = plugins.build("tasks", types.Part(name))
        beside = " + ".join([*map(_term, task.beside_layers), "layers"]) if task.beside_layers else "no"
        yield f"| `{name}` | {' + '.join(map(_term, task.losses))} | {beside} |"


def _heads() -> Iterator[str]:
    yield "\n## `[[task]]`\n"
    yield textwrap.dedent("""\
        A student of several tasks has one of these for each of its heads, in place of `[data]`, `[task]` and
        `[teacher]`. `edgekd distill` trains it.

        | key | type | default | meaning |
        |---|---|---|---|
        | `head` | str | | names the student's output for it |
        | `name` | str | `"classification"` | the [task](parts.md#tasks); other keys are its options |
        | `data` | table | | as `[data]` |
        | `teacher` | table, or several | | as `[teacher]`, with its `train` |
        | `loss` | several tables | those of the recipe, else of the task | as `[[loss]]` |
        """)


def _model_rows() -> dict[str, tuple[str, str, str]]:
    rows = _keys(types.ModelSpec)
    rows.pop("options")
    return {"model": rows.pop("name")} | rows


def _term(term: types.LossTerm) -> str:
    options = ", ".join(f"{name} = {_toml(value)}" for name, value in term.part.options.items())
    return f"{term.weight:g} × `{term.part.name}`" + (f" ({options})" if options else "")


def _keys(cls: type) -> dict[str, tuple[str, str, str]]:
    """The fields of a dataclass as keys of TOML, which has no None."""
    return {
        name: (kind.replace(" \\| None", ""), default, meaning.replace("None: ", "left out: "))
        for name, (kind, default, meaning) in _field_rows(cls)
    }


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]


def _table(rows: dict[str, tuple[str, str, str]]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, (kind, default, meaning) in rows.items():
        yield f"| `{name}` | {kind} | {default} | {meaning} |"


def _field_rows(cls: type) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Field → (type, default, the comment behind it in the source)."""
    assert is_dataclass(cls)
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    body = typing.cast("ast.ClassDef", ast.parse(source).body[0]).body
    nodes = {n.target.id: n for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for item in fields(cls):
        node = nodes[item.name]
        comment = " ".join(
            match[1] for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if (match := re.search(r"(?:^|\s)# (.*)$", lines[number - 1]))
        )  # fmt: skip
        default = (
            "" if item.default is MISSING else f"`{_toml(item.default)}`" if item.default is not None else "left out"
        )
        yield item.name, (_kind(ast.unparse(node.annotation)), default, comment.replace("fmt: skip", "").strip())


def _kind(annotation: str) -> str:
    text = re.sub(r"Annotated\[([^,]+), (.+?)\](?= |$)", lambda m: f"{m[1]} {_bounds(m[2])}", annotation)
    return text.replace("|", "\\|")


def _bounds(text: str) -> str:
    for name, sign in (("Ge", "≥"), ("Gt", ">"), ("Le", "≤"), ("Lt", "<")):
        text = re.sub(rf"{name}\(([^)]*)\)", rf"{sign} \1", text)
    return text


def _toml(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else json.dumps(value)


# ---------------------------------------------------------------- parts


def _parts() -> Iterator[str]:
    yield "# Parts\n"
    yield (inspect.getdoc(plugins) or "") + "\n"
    for kind in ("data", "tasks", "models", "losses", "backends"):
        yield f"## {kind}\n"
        yield f"```text\n{inspect.getdoc(importlib.import_module(f'edgekd.{kind}')) or ''}\n```\n"
        for name, module in sorted(plugins.names(kind).items()):
            if not module.startswith("edgekd."):
                continue
            function = getattr(importlib.import_module(module), name)
            yield f"### `{name}`\n"
            yield f"```python\n{_signature(name, function)}\n```\n"
            yield f"```text\n{inspect.getdoc(function) or ''}\n```\n"


def _signature(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    shown: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        prefix = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        shown.append(f"{prefix}{parameter.name}: {parameter.annotation}{default}")
    one_line = f"{name}({', '.join(shown)}) -> {signature.return_annotation}"
    if len(one_line) <= 110:
        return one_line
    return "\n".join([f"{name}(", *(f"    {item}," for item in shown), f") -> {signature.return_annotation}"])


# ---------------------------------------------------------------- targets


def _targets() -> Iterator[str]:
    yield "# Targets\n"
    yield textwrap.dedent("""\
        A target is facts, one TOML file: `targets/<name>.toml`. `--target name` takes one of these, one of yours in
        `./targets/`, or a path to a file. Every number in it has a source; "derived" ones say the formula.
        """)
    for name in sorted(file.stem for file in target.folder().glob("*.toml")):
        found = target.load(name)
        yield f"## {name}\n\n```text\n{target.as_text([found])}\n```\n"
        yield "| fact | source |\n|---|---|"
        for fact, source in found.sources.items():
            yield f"| {fact} | {_cell(source)} |"
        for device in found.devices:
            for fact, source in device.sources.items():
                yield f"| {device.name}: {fact} | {_cell(source)} |"
        yield ""
    yield "## Keys of a target file\n"
    for title, cls in (
        ("quantization", types.QuantizationRules),
        ("pruning", types.PruningRules),
        ("[device]", types.Device),
        ("[device.mode]", types.PowerMode),
    ):
        yield f"### `[{title}]`\n"
        yield from _table(dict(_field_rows(cls)))
        yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------- report


def _report() -> Iterator[str]:
    yield "# report.json\n"
    yield f"Schema version {report.SCHEMA}. What was not measured is null, with the reason in `missing`; never zero.\n"
    shown = (
        types.Report,
        types.Variant,
        types.Interval,
        types.Latency,
        types.Parity,
        types.Comparison,
        types.Estimate,
        types.Budget,
        types.Verdict,
        outcome.Limit,
        outcome.Nearest,
        outcome.Front,
        outcome.Search,
        outcome.Candidate,
        types.Sensitivity,
        types.LayerSensitivity,
        types.Training,
        types.LossTerm,
        types.Part,
        outcome.Matched,
        outcome.LayerPair,
        outcome.Layer,
        outcome.Pruning,
        outcome.LeftAlone,
    )
    for cls in shown:
        yield f"## {cls.__name__}\n"
        yield f"{inspect.getdoc(cls)}\n"
        yield from _table(dict(_field_rows(cls)))
        yield ""
    yield "## JSON Schema\n"
    yield f"```json\n{json.dumps(report.schema(), indent=1)}\n```"


if __name__ == "__main__":
    sys.exit(main())
