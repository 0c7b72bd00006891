"""The engine build recipe of a Jetson bundle, run end to end against fakes (tests/fakes: nothing of NVIDIA's)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorrt_fakes
import tiny_onnx
from bundles import PREPROCESSING, rewrite

from edgekd import target as targets
from edgekd.bundle import Source, verify, write
from edgekd.bundle import manifest as manifests
from edgekd.types import Latency

VERSIONS = ("8.5.2", "8.6.2", "10.3.0", "11.1.0")  # test_trtexec.py holds the flags of the others


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("jetson")
    models = [
        Source(tiny_onnx.classifier(work / "int8.onnx", "int8", opset=19), "int8", "strong"),
        Source(tiny_onnx.classifier(work / "fp16.onnx", "fp16", opset=19), "fp16", "strong"),
        Source(tiny_onnx.classifier(work / "int8w.onnx", "int8", opset=17), "int8", "weak"),
        Source(tiny_onnx.classifier(work / "fp32w.onnx", "fp32", opset=17), "fp32", "weak"),
    ]
    return write(
        work / "bundle", name="colours", target=targets.load("jetson"), models=models,
        samples={"image": tiny_onnx.images()}, labels=tiny_onnx.LABELS, preprocessing=PREPROCESSING, provenance={},
        verdict=None,
    )  # fmt: skip


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "jetson"))


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fakes")


def build(bundle: Path, fakes: Path, version: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = tensorrt_fakes.environment(fakes, version, PYTHON=sys.executable, **more)
    command = [str(bundle / "build.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def without_bindings(fakes: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(fakes)}


def test_what_is_written(written: Path) -> None:
    manifest = manifests.read(written)
    assert manifest.backend == "tensorrt"
    assert [(model.path, model.typing, model.opset) for model in manifest.models] == [
        ("model.int8.onnx", "strong", 19),
        ("model.fp16.onnx", "strong", 19),
        ("model.int8.opset17.onnx", "weak", 17),
        ("model.fp32.opset17.onnx", "weak", 17),
    ]
    names = {file.path for file in manifest.files}
    assert {"build.sh", "build_engine.py", "board/engine.py", "board/build_8.py", "board/trtexec.py"} <= names
    assert os.access(written / "build.sh", os.X_OK)
    assert verify(written).sound
    text = (written / "README.md").read_text(encoding="utf-8")
    assert "TensorRT 8.5 to 11.x" in text
    assert "never run on a board" in text


@pytest.mark.parametrize("version", VERSIONS)
def test_build_and_selftest(bundle: Path, fakes: Path, version: str) -> None:
    done = build(bundle, fakes, version)
    assert done.returncode == 0, done.stderr + done.stdout
    weak = version.startswith("8")
    engines = sorted(path.name for path in (bundle / "engine").glob("*.engine"))
    strong_names = ["model.fp16.engine", "model.int8.engine"]
    assert engines == (["model.fp32.opset17.fp16.engine", "model.int8.opset17.engine"] if weak else strong_names)
    assert done.stdout.count("selftest passed") == 2
    assert f"tensorrt {version}" in done.stdout
    assert "power mode 25W" in done.stderr
    for name in engines:
        record = json.loads((bundle / "engine" / f"{name}.json").read_text())
        assert record["tensorrt"] == version
        assert record["sm"] == "8.7"
        assert record["power_mode"] == "25W"
        assert record["precision"] == ("fp16" if "fp16" in name else "int8")
        flags = {argument.split("=")[0] for argument in record["command"]}
        assert ("--fp16" in flags) == weak
        assert ("--stronglyTyped" in flags) == version.startswith("10")
    assert not list((bundle / "engine").glob("*.partial"))
    found = verify(bundle)
    assert found.sound, found.findings


def test_run_py_takes_the_engine_that_was_built(bundle: Path, fakes: Path) -> None:
    assert build(bundle, fakes, "10.3.0", "--max-batch", "4").returncode == 0
    environment = tensorrt_fakes.environment(fakes, "10.3.0")
    command = [sys.executable, str(bundle / "run.py"), "--bench", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert found["conditions"]["runtime"] == "tensorrt 10.3.0"
    assert found["conditions"]["file"] == "engine/model.int8.engine"
    assert found["latency_ms"]["power_mode"] == "25W"
    # Another TensorRT on the same board: refused before it is loaded.
    environment = tensorrt_fakes.environment(fakes, "10.16.1")
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert refused.returncode == 1
    assert "built by TensorRT 10.3.0, and this is TensorRT 10.16.1" in refused.stderr
    # And without an engine for it, the ONNX file still answers.
    plain = [sys.executable, str(bundle / "run.py"), "--selftest", "--runtime", "onnxruntime"]
    assert subprocess.run(plain, capture_output=True, check=False, env=environment).returncode == 0


def test_measure(bundle: Path, fakes: Path) -> None:
    done = build(bundle, fakes, "11.1.0", "--measure", "--precision", "fp16")
    assert done.returncode == 0, done.stderr
    text = done.stdout[done.stdout.index("{") :]
    found = json.loads(text)
    latency = Latency(**found["latency_ms"])
    assert latency.n == 100
    assert latency.p50 == pytest.approx(1.695)
    assert latency.power_mode == "25W"
    assert "coefficient of variance" in found["conditions"]["warnings"][0]
    assert "--noCudaGraph" in found["conditions"]["command"]


def test_the_python_bindings_build_where_there_is_no_trtexec(bundle: Path, fakes: Path) -> None:
    for version in ("8.6.1", "10.3.0", "11.4.0.106"):
        shutil.rmtree(bundle / "engine", ignore_errors=True)
        done = build(bundle, fakes, version, "--python-api", "--precision", "int8", FAKE_DPKG_VERSION=version)
        assert done.returncode == 0, done.stderr
        (record,) = (bundle / "engine").glob("*.engine.json")
        assert json.loads(record.read_text())["built_with"] == "python"
        assert "selftest passed" in done.stdout


def test_a_second_build_uses_the_timing_cache(bundle: Path, fakes: Path) -> None:
    for _ in range(2):
        assert build(bundle, fakes, "10.3.0", "--precision", "int8").returncode == 0
    cache = bundle / "engine" / "timing.10.3.0.cache"
    assert cache.read_text().count("fake timing cache") == 2


def test_out_of_memory(bundle: Path, fakes: Path) -> None:
    done = build(bundle, fakes, "10.3.0", FAKE_TRTEXEC="oom")
    assert done.returncode == 1
    assert "killed, most likely for want of memory" in done.stderr
    assert "sudo init 3" in done.stderr
    assert not list((bundle / "engine").glob("*.engine"))


def test_trtexec_fails(bundle: Path, fakes: Path) -> None:
    done = build(bundle, fakes, "10.3.0", FAKE_TRTEXEC="fail")
    assert done.returncode == 1
    assert "no importer registered for op: Frobnicate" in done.stderr
    done = build(bundle, fakes, "10.3.0", FAKE_TRTEXEC="silent")
    assert done.returncode == 1
    assert "ended without an engine" in done.stderr


def test_versions_that_disagree(bundle: Path, fakes: Path) -> None:
    done = build(bundle, fakes, "10.3.0", FAKE_DPKG_VERSION="10.16.1")
    assert done.returncode == 1
    assert "several versions of TensorRT" in done.stderr
    assert "dpkg says 10.16.1" in done.stderr


def test_nothing_installed(bundle: Path, fakes: Path) -> None:
    done = build(bundle, fakes, "10.3.0", PATH="/usr/bin:/bin", **without_bindings(fakes))
    assert done.returncode == 1
    assert "no TensorRT was found" in done.stderr


def test_without_bindings_there_is_no_selftest(bundle: Path, fakes: Path) -> None:
    done = build(bundle, fakes, "10.3.0", **without_bindings(fakes))
    assert done.returncode == 1
    assert "--no-selftest" in done.stderr
    done = build(bundle, fakes, "10.3.0", "--no-selftest", **without_bindings(fakes))
    assert done.returncode == 0, done.stderr
    assert (bundle / "engine" / "model.int8.engine").is_file()
    done = build(bundle, fakes, "10.3.0", "--python-api", **without_bindings(fakes))
    assert done.returncode == 1
    assert "neither trtexec nor" in done.stderr


def test_a_selftest_that_fails(bundle: Path, fakes: Path) -> None:
    other = tiny_onnx.classifier(bundle.parent / "other.onnx", "fp16", opset=19, seed=5)
    environment = tensorrt_fakes.environment(fakes, "10.3.0", PYTHON=sys.executable)
    assert build(bundle, fakes, "10.3.0", "--precision", "fp16").returncode == 0
    engine = bundle / "engine" / "model.fp16.engine"
    engine.write_text(json.dumps({**json.loads(engine.read_text()), "onnx": str(other)}))
    command = [sys.executable, str(bundle / "run.py"), "--selftest", "--model", "engine/model.fp16.engine"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "changed or copied over" in done.stderr
    from edgekd.backends._tensorrt import record

    facts = record.read(str(engine))
    record.write(
        str(engine), tensorrt="10.3.0", sm="8.7", precision="fp16", onnx=str(bundle / "model.fp16.onnx"),
        power_mode=facts["power_mode"],
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "selftest FAILED" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (("--dla",), 1, "TensorRT 10.7 was the last 10.x release"),
        (("--precision", "fp32"), 1, "no strongly typed fp32 model"),
        (("--precision", "fp8"), 2, "invalid choice"),
        (("--max-batch", "0"), 2, "at least 1"),
        (("--trtexec", "/no/such/file"), 1, "no executable file"),
        (("--measure", "--python-api"), 1, "--measure needs trtexec"),
    ],
)
def test_what_a_user_can_get_wrong(
    bundle: Path, fakes: Path, arguments: tuple[str, ...], status: int, reason: str
) -> None:
    done = build(bundle, fakes, "10.3.0", *arguments)
    assert done.returncode == status
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (bundle / "engine").exists()


def test_old_versions_are_refused(bundle: Path, fakes: Path) -> None:
    done = build(bundle, fakes, "8.2.1")
    assert done.returncode == 1
    assert "too old" in done.stderr


def test_a_damaged_model_is_not_built(bundle: Path, fakes: Path) -> None:
    (bundle / "model.int8.onnx").write_bytes(b"x")
    done = build(bundle, fakes, "10.3.0")
    assert done.returncode == 1
    assert "copy the bundle again" in done.stderr


def test_dry_run_writes_nothing(bundle: Path, fakes: Path) -> None:
    done = build(bundle, fakes, "8.5.2", "--dry-run", "--workspace-mib", "64")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("--memPoolSize=workspace:64 " in line and line.endswith("--buildOnly") for line in lines)
    assert not (bundle / "engine").exists()


def test_a_dynamic_dimension_beside_the_batch(bundle: Path, fakes: Path) -> None:
    rewrite(bundle, lambda table: table["inputs"][0].update(shape=["batch", "height", 8, 3]))
    done = build(bundle, fakes, "10.3.0")
    assert done.returncode == 1
    assert "dynamic dimension beside the batch" in done.stderr


def recipe(bundle: Path) -> Any:
    """build_engine.py as a module."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    spec = importlib.util.spec_from_file_location("build_engine", bundle / "build_engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = before
    for name in [name for name in sys.modules if name.split(".")[0] == "board"]:
        del sys.modules[name]
    sys.path.remove(str(bundle))
    return module


def test_the_workspace_is_a_quarter_of_the_ram_at_most(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe(bundle)
    assert module.workspace_mib(None, 7620, 5000) == 1024
    assert module.workspace_mib(None, 3900, 3000) == 975
    assert module.workspace_mib(None, 7620, 1000) == 500
    assert module.workspace_mib(100, 7620, 5000) == 100
    assert module.workspace_mib(4096, 7620, 5000) == 1905
    assert "cut to 1905 MiB" in capsys.readouterr().err
    with pytest.raises(module.Problem, match="only 600 MiB of 3900 MiB are free"):
        module.workspace_mib(None, 3900, 600)


def test_memory_is_read(bundle: Path, tmp_path: Path) -> None:
    module = recipe(bundle)
    (tmp_path / "meminfo").write_text(
        "MemTotal:        7802780 kB\nMemFree: 100 kB\nMemAvailable:    5120000 kB\nHugePages_Total: 0\n"
    )
    assert module.memory_mib(str(tmp_path / "meminfo")) == (7619, 5000)


def test_only_the_precisions_of_that_version(bundle: Path) -> None:
    module = recipe(bundle)
    table = json.loads((bundle / "edgekd.json").read_text())
    assert module.choose_models(table, 10, None) == {"int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}
    assert module.choose_models(table, 8, None) == {
        "int8": "model.int8.opset17.onnx",
        "fp16": "model.fp32.opset17.onnx",
    }
    assert module.choose_models(table, 8, "fp32") == {"fp32": "model.fp32.opset17.onnx"}
    table["models"] = [model for model in table["models"] if model["typing"] == "strong"]
    with pytest.raises(module.Problem, match=r"is for TensorRT 8; it has fp16 \(strong\), int8 \(strong\)"):
        module.choose_models(table, 8, None)
