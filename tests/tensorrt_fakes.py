"""Fixtures' material: the fake CUDA runtime compiled, and an environment with all the fakes (see fakes/README.md)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FAKES = Path(__file__).parent / "fakes"


def cudart(folder: Path) -> Path:
    """The folder with the fake libcudart.so; the test is skipped where there is no C compiler."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc): the fake CUDA runtime cannot be built")
    library = folder / "libcudart.so"
    if not library.exists():
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(FAKES / "cudart.c")], check=True)
    return folder


def bindings(folder: Path) -> Path:
    """The folder to import the fake `tensorrt` from."""
    python = folder / "python"
    python.mkdir(exist_ok=True)
    shutil.copyfile(FAKES / "fake_tensorrt.py", python / "tensorrt.py")
    return python


def environment(folder: Path, version: str, **more: str) -> dict[str, str]:
    """The environment of a subprocess that sees a Jetson with that TensorRT."""
    return {
        **os.environ,
        "PATH": f"{FAKES / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(bindings(folder)),
        "LD_LIBRARY_PATH": str(cudart(folder)),
        "FAKE_TENSORRT_VERSION": version,
        "OMP_NUM_THREADS": "1",
        **more,
    }
