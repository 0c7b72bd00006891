"""File systems for tests, where the machine lets them be mounted."""

from __future__ import annotations

import subprocess


def mount(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `mount WORDS`."""
    return subprocess.run(["mount", *words], check=False, capture_output=True, text=True)
