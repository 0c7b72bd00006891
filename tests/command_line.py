"""The command line in this process, for tests: the same `main` that the installed script calls."""

from __future__ import annotations

import sys

import pytest

from edgekd import cli


def call(*words: str) -> int:
    """Run `edgekd WORDS` and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["edgekd", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
    return int(left.value.code or 0)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of `edgekd WORDS`."""
    code = call(*words)
    found = capsys.readouterr()
    return code, found.out, found.err
