"""Tell and choose: verdicts, the choice for each target, and report.json, report.md and report.html."""

from edgekd.report.judge import choose, judge, rejections
from edgekd.report.render import rejudged, render, summary
from edgekd.report.schema import SCHEMA, dump, load, schema

__all__ = ["SCHEMA", "choose", "dump", "judge", "load", "rejections", "rejudged", "render", "schema", "summary"]
