"""Each branch of the TensorRT backend, type-checked against the real bindings of its version (nothing is committed)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorrt_fakes import bindings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import tensorrt_stubs  # noqa: E402 - a tool, not a package

SOURCES = ROOT / "edgekd" / "backends" / "_tensorrt"
BRANCH = {"8.6.1": "build_8", "10.3.0": "build_10", "10.16.1.11": "build_10", "11.4.0.106": "build_11"}

# What was removed between versions: each line must be flagged by the versions named, and only by them.
PROBE = {
    "trt.BuilderFlag.FP16": ("11.4.0.106",),
    "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH": ("11.4.0.106",),
    "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED": ("8.6.1",),
    "config.max_workspace_size": ("10.3.0", "10.16.1.11", "11.4.0.106"),
    "context.execute_async_v2": ("10.3.0", "10.16.1.11", "11.4.0.106"),
    "engine.num_bindings": ("10.3.0", "10.16.1.11", "11.4.0.106"),
    "engine.num_io_tensors": (),
    "config.no_such_thing": tuple(BRANCH),
    "config.set_flag('FP16')": tuple(BRANCH),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorrt-stubs")


def stubs(version: str, folder: Path) -> Path:
    try:
        return tensorrt_stubs.stubs(version, folder)
    except tensorrt_stubs.StubError as problem:
        pytest.skip(f"the stubs of TensorRT {version} cannot be made here: {problem}")


def check(source: Path, version: str, folder: Path) -> list[str]:
    """Lines that `mypy --strict` objects to, as "line: message"."""
    settings = folder / "mypy.ini"
    settings.write_text("[mypy]\nstrict = true\npython_version = 3.10\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--no-error-summary"]
    command += ["--cache-dir", str(folder / f"cache-{version}"), str(source)]
    environment = {**os.environ, "MYPYPATH": str(stubs(version, folder))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode in (0, 1), done.stderr
    return [line for line in done.stdout.splitlines() if ": error:" in line]


@pytest.mark.slow
@pytest.mark.parametrize("version", tensorrt_stubs.VERSIONS)
def test_branches_fit_the_real_bindings(version: str, folder: Path) -> None:
    for module in (BRANCH[version], "engine"):
        assert check(SOURCES / f"{module}.py", version, folder) == [], module


@pytest.mark.slow
@pytest.mark.parametrize("version", tensorrt_stubs.VERSIONS)
def test_the_check_can_fail(version: str, folder: Path) -> None:
    probe = folder / "probe.py"
    head = "import tensorrt as trt\n\ndef probe(config: trt.IBuilderConfig, context: trt.IExecutionContext,\n"
    head += "          engine: trt.ICudaEngine) -> None:\n"
    first = head.count("\n") + 1
    probe.write_text(head + "".join(f"    {line}\n" for line in PROBE))
    flagged = {int(line.split(":")[1]) for line in check(probe, version, folder)}
    wanted = {first + index for index, versions in enumerate(PROBE.values()) if version in versions}
    assert flagged == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "version"), [("build_8", "11.4.0.106"), ("build_10", "8.6.1")])
def test_a_branch_does_not_fit_another_version(branch: str, version: str, folder: Path) -> None:
    assert check(SOURCES / f"{branch}.py", version, folder)


@pytest.mark.slow
@pytest.mark.parametrize("version", tensorrt_stubs.VERSIONS)
def test_the_fake_offers_nothing_that_the_real_bindings_lack(version: str, folder: Path) -> None:
    stubs(version, folder)
    real = tensorrt_stubs.names(version, folder)
    offered = fake_names(version, folder)
    assert len(offered) > 50
    assert sorted(offered - real) == []


def fake_names(version: str, folder: Path) -> set[str]:
    """Public names of the fake, "Class.member" included, as it is for that version."""
    program = "import tensorrt as t, inspect\nfor c in vars(t).values():\n"
    program += "    if inspect.isclass(c) and c.__module__ == 'tensorrt':\n        print(c.__name__)\n"
    program += "        for m in vars(c):\n            if not m.startswith('_'): print(c.__name__ + '.' + m)\n"
    environment = {**os.environ, "PYTHONPATH": str(bindings(folder)), "FAKE_TENSORRT_VERSION": version}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    instance = {"IOptimizationProfile.shapes", "INetworkDefinition.flags"}  # the fake's own notes, set in __init__
    return set(done.stdout.split()) - instance


def test_repairs() -> None:
    raw = (
        "from __future__ import annotations\nimport typing\nimport typing_extensions\n"
        "class Dims:\n    ...\nclass IHostMemory:\n    ...\n"
        "class P:\n    def get_error(self, index: int) -> ...:\n        ...\n"
        "    def f(self, in: int, a: int = 0, b: str) -> bool:\n        ...\n"
        "    def g(self, shape: Dims, x: Q = None) -> list[bool]:\n        ...\n"
        "def h(logger: capsule) -> ...:\n    ...\n"
    )
    text = tensorrt_stubs.repaired(raw)
    ast.parse(text)
    assert "def get_error(self, index: int) -> ParserError:" in text
    assert "def f(self, in_: int, a: int = 0, b: str = ...) -> builtins.bool:" in text
    assert "def g(self, shape: Dims | _Sequence[int], x: typing.Optional[Q] = None) -> list[builtins.bool]:" in text
    assert "def h(logger: typing.Any) -> typing.Any:" in text


def test_a_failing_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(tensorrt_stubs.StubError, match="cc is not installed"):
        tensorrt_stubs.libraries("10.3.0", tmp_path)
