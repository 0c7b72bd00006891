"""Tell and choose: verdicts, the choice for each target, and report.json, report.md and report.html."""

from edgekd.report.front import figure, front, fronts
from edgekd.report.judge import choose, deployable, judge, rejections
from edgekd.report.nearest import nearest
from edgekd.report.render import concluded, rejudged, render, summary
from edgekd.report.schema import SCHEMA, dump, load, schema

__all__ = [
    "SCHEMA", "choose", "concluded", "deployable", "dump", "figure", "front", "fronts", "judge", "load", "nearest",
    "rejections", "rejudged", "render", "schema", "summary",
]  # fmt: skip
