"""The documentation says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "reference.py"), "--check"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            path = link.partition("#")[0]
            assert (page.parent / path).exists(), f"{page.name}: {link}"


def test_every_verb_and_part_that_a_page_names_exists() -> None:
    from edgekd import plugins
    from edgekd.cli import cli

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for verb in re.findall(r"^(?:tools/)?edgekd (\w+)", text, re.MULTILINE):
            assert verb in cli.commands, f"{page.name}: edgekd {verb}"
    parts = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    for kind in ("data", "models", "losses", "backends"):
        for name in plugins.names(kind):
            assert f"### `{name}`" in parts


def test_the_tools_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for tool in re.findall(r"(?<![\w/.-])tools/(\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / "tools" / tool).exists() or (ROOT / "tools" / f"{tool}.py").exists(), f"{page.name}: {tool}"
