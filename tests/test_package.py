"""What `pip install edgekd` would give: the wheel carries the targets and the templates, and nothing else of ours."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_wheel_carries_targets_and_templates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("the build back-end cannot be installed here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("edgekd-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = (
        "edgekd/_targets/jetson.toml", "edgekd/_targets/host.toml", "edgekd/_targets/runner/run.py",
        "edgekd/_targets/board/build.sh", "edgekd/report/templates/report.html", "edgekd/report/templates/report.css",
    )  # fmt: skip
    assert not [name for name in wanted if name not in names]
    tops = {name.split("/")[0] for name in names}
    assert tops == {"edgekd", f"edgekd-{wheel.name.split('-')[1]}.dist-info"}
    assert not [name for name in names if "__pycache__" in name]
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from edgekd import target
assert "_targets" in str(target.folder())
print(sorted(target.names()))
"""
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    told = subprocess.run(
        [sys.executable, "-I", "-c", script, str(unpacked)], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert told.stdout.strip() == "['host', 'jetson']"
