"""Write report.json, report.md and report.html."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from edgekd.report import schema, story
from edgekd.report.front import fronts
from edgekd.report.judge import choose, judge
from edgekd.report.nearest import nearest
from edgekd.report.view import page
from edgekd.store import write_text
from edgekd.types import Budget, Report

_TEMPLATES = Path(__file__).parent / "templates"


def render(report: Report, folder: Path) -> None:
    """Write the three forms of the report into `folder`, each whole or not at all.

    report.html is one file that needs nothing else: no script, no font, no picture from elsewhere.

    Raises:
        ValueError: a number in the report is not finite.
        StoreError: the disk is full or read-only.
    """
    written = {"report.json": schema.text(report), "report.html": html(report), "report.md": markdown(report)}
    for name, text in written.items():
        write_text(folder / name, text)


def html(report: Report) -> str:
    """The report as one self-contained page; every text from the run is escaped."""
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return _environment(escape=True).get_template("report.html").render(page=page(report), style=style)


def markdown(report: Report) -> str:
    """The same facts as Markdown, short."""
    text = _environment(escape=False).get_template("report.md").render(page=page(report))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def rejudged(report: Report, budget: Budget) -> Report:
    """The report as it would be with another budget: new verdicts, a new choice; nothing is measured anew."""
    teacher = story.teacher_of(report)
    variants = tuple(
        dataclasses.replace(v, verdict=judge(v, teacher, budget, report.metric)) if v.verdict is not None else v
        for v in report.variants
    )
    chosen = choose(variants, budget, report.comparisons)
    kept = {target: chosen.get(target) for target in (report.chosen or chosen)}
    return concluded(dataclasses.replace(report, variants=variants, budget=budget, chosen=kept))


def concluded(report: Report) -> Report:
    """The report with what follows from its variants and its choice: what is nearest, and the front of each target."""
    teacher = story.teacher_of(report)
    near = nearest(report.variants, teacher, report.budget, report.chosen, report.metric, report.comparisons)
    return dataclasses.replace(report, nearest=near, pareto=fronts(report.variants, report.chosen))


def summary(report: Report, folder: Path) -> str:
    """The outcome as a few plain lines for a terminal."""
    return story.summary(report, str(folder))


def _environment(*, escape: bool) -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["md"] = _markdown_text
    made.filters["sentence"] = _sentence
    return made


def _sentence(text: str) -> str:
    """The text with a capital at its start and a full stop at its end."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def _markdown_text(text: object) -> str:
    """Text that Markdown shows as it is, in a table cell too; a name cannot become a link, an image or HTML."""
    flat = re.sub(r"\s+", " ", str(text)).strip()
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", flat)
