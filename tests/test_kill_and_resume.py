"""kill -9 at random moments, then the same command again: the end is an undisturbed run's, to the byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekd.store import sha256_of

RECIPE = """
name = "small"
[data]
name = "digits"
[teacher]
model = "resnet8"
width = 8
[teacher.train]
epochs = 12
precision = "fp32"
[student]
model = "resnet8"
width = 4
[distill]
epochs = 12
precision = "fp32"
[augment]
crop_pixels = 1
"""
COMMAND = [sys.executable, "-c", "from edgekd.cli import main; main()", "compress", "--target", "jetson"]


def _start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _built(folder: Path) -> dict[str, str]:
    """Key of every artifact and hash of every file that it or the run folder ships."""
    store = {
        str(p.relative_to(folder)): sha256_of(p)
        for p in folder.glob(".edgekd/*/*")
        if p.suffix in {".onnx", ".safetensors"}
    }
    run = folder / "runs" / "small"
    shipped = [*run.glob("models/*/*.onnx"), *run.glob("bundles/*/*.onnx"), *run.glob("bundles/*/golden.npz")]
    return store | {str(path.relative_to(folder)): sha256_of(path) for path in shipped}


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    for folder in (calm, disturbed):
        folder.mkdir()
        (folder / "edgekd.toml").write_text(RECIPE)
    begun = time.monotonic()
    assert _start(calm).wait() in {0, 3}
    whole_s = time.monotonic() - begun
    moments = random.Random(20261122)
    kills, ends = 0, 0
    while kills < 8:
        process = _start(disturbed)
        try:
            process.wait(timeout=moments.uniform(0.15, 0.7) * whole_s)
            ends += 1
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            assert not [p for p in (disturbed / "runs").rglob("*.json") if p.stat().st_size == 0]
    if not ends:
        assert _start(disturbed).wait() in {0, 3}
    assert kills >= 2
    expected = _built(calm)
    assert len([name for name in expected if name.endswith(".onnx")]) >= 8
    assert _built(disturbed) == expected
    assert not list((disturbed / ".edgekd" / ".partial").glob("*/*.onnx"))
