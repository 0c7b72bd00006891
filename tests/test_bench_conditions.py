"""What is told of the machine, memory in a fresh process, and `edgekd bench` itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.bench import command, conditions, memory
from edgekd.doctor import Examination
from edgekd.errors import BackendError, ModelError
from edgekd.types import Json, Part

X86 = "processor : 0\nmodel name : Some(R) CPU(TM)  X\ncpu MHz : 2000.0\nflags : avx2 avx512f avx512_vnni\n"
ARM = "processor : 0\nFeatures : fp asimd asimddp asimdhp i8mm\nCPU part : 0xd0b\n"


def silent(event: str, /, **fields: Json) -> None:
    """A `Say` that keeps quiet."""


def test_environment_is_json_and_names_the_versions() -> None:
    found = conditions.environment()
    assert json.loads(json.dumps(found)) == found
    packages = found["packages"]
    assert isinstance(packages, dict)
    assert packages["numpy"] == np.__version__
    cpu = found["cpu"]
    assert isinstance(cpu, dict)
    assert isinstance(cpu["allowed_cpus"], int)


@pytest.mark.parametrize(
    ("cpuinfo", "there", "absent"),
    [(X86, {"avx2", "avx512", "vnni"}, "dotprod"), (ARM, {"neon", "dotprod", "fp16", "i8mm"}, "vnni")],
)
def test_cpu_features(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str, there: set[str], absent: str
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(conditions, "_CPUINFO", tmp_path / "cpuinfo")
    cpu: Any = conditions.environment()["cpu"]
    assert {name for name, has in cpu["features"].items() if has} == there
    assert cpu["features"][absent] is False
    if cpuinfo is X86:
        assert cpu["model"] == "Some CPU X"


def test_x86_without_vnni_is_warned_of_and_nothing_else() -> None:
    def facts(architecture: str, features: Any) -> dict[str, Any]:
        return {"architecture": architecture, "cpu": {"features": features}}

    assert "no VNNI" in str(conditions.without_vnni(facts("x86_64", {"avx2": True, "vnni": False})))
    assert conditions.without_vnni(facts("x86_64", {"avx2": True, "vnni": True})) is None
    assert conditions.without_vnni(facts("aarch64", {"neon": True, "vnni": False})) is None
    assert conditions.without_vnni(facts("x86_64", None)) is None
    told = Examination(facts("x86_64", {"vnni": False}), {}, ("beware",))
    assert told.as_text().endswith("warning: beware")
    assert told.as_json()["warnings"] == ["beware"]


def test_what_the_machine_does_not_tell_has_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_CPUINFO", "_CPUS", "_THERMAL"):
        monkeypatch.setattr(conditions, name, tmp_path / "absent")
    found: Any = conditions.environment()
    assert found["cpu"]["features"] is None
    assert "cpu.features" in found["missing"]
    nothing = {key for key, value in found["clocks"].items() if value is None}
    assert (
        nothing == set(found["clocks"]["missing"]) == {"governor", "frequency_mhz", "temperature_c", "throttle_count"}
    )


def test_clocks_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu, khz in ((0, 1_000_000), (1, 3_000_000)):
        folder = tmp_path / f"cpu{cpu}"
        (folder / "cpufreq").mkdir(parents=True)
        (folder / "thermal_throttle").mkdir()
        (folder / "cpufreq/scaling_governor").write_text("performance\n")
        (folder / "cpufreq/scaling_cur_freq").write_text(f"{khz}\n")
        (folder / "thermal_throttle/core_throttle_count").write_text("2\n")
    for zone, text in (("thermal_zone0", "45500"), ("thermal_zone1", "-256000")):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "temp").write_text(text)
    monkeypatch.setattr(conditions, "_CPUS", tmp_path)
    monkeypatch.setattr(conditions, "_THERMAL", tmp_path)
    found = conditions.clocks([0, 1])
    assert (found["governor"], found["frequency_mhz"]) == ("performance", 2000.0)
    assert (found["temperature_c"], found["throttle_count"], found["missing"]) == (45.5, 4, {})


def test_changes_while_measuring_are_noted() -> None:
    before: dict[str, Json] = {"throttle_count": 1, "frequency_mhz": 2000.0, "governor": "performance"}
    assert conditions.changes(before, before) == ()
    after: dict[str, Json] = {
        "throttle_count": 4, "frequency_mhz": 1500.0, "governor": "powersave", "raspberry_pi_throttled": "50005",
    }  # fmt: skip
    notes = conditions.changes(before, after)
    assert len(notes) == 4
    assert notes[0] == "the CPU was throttled 3 times while it was measured"
    assert conditions.changes(before, before | {"raspberry_pi_throttled": "50000"}) == (), "long ago is not now"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A linear layer of 1 M weights, 4 MB."""
    weights = numpy_helper.from_array(np.full((1000, 1000), 1e-3, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1000])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])], [weights],
    )  # fmt: skip
    path = tmp_path / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_holds_the_weights(model: Path) -> None:
    found = memory.peak_memory(Part("onnxruntime"), model, {"x": np.zeros((1, 1000), np.float32)}, threads=1)
    assert found.reason is None
    assert found.bytes is not None
    assert 4_000_000 < found.bytes < 60_000_000


def test_peak_memory_says_why_there_is_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = memory.peak_memory(Part("no_such_backend"), model, {}, threads=1)
    assert found.bytes is None
    assert "no_such_backend" in str(found.reason)
    monkeypatch.setattr(memory, "_STATUS", model / "absent")
    assert (
        memory.peak_memory(Part("onnxruntime"), model, {}, threads=1).reason == "peak memory is measured on Linux only"
    )


def test_bench_measures_a_file_and_a_bundle_in_turns(model: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "run" / "bundles" / "host"
    bundle.mkdir(parents=True)
    (bundle / "m.onnx").write_bytes(model.read_bytes())
    (bundle / "edgekd.json").write_text(json.dumps({"model": "m.onnx", "backend": "onnxruntime"}))
    found = command.bench([model, tmp_path / "run", model], threads=1, quick=True, say=silent)
    assert [m.id for m in found.models] == ["linear.onnx", "host/m.onnx"]
    assert [m.macs for m in found.models] == [1_000_000, 1_000_000]
    assert [(c.candidate, c.baseline) for c in found.comparisons] == [("host/m.onnx", "linear.onnx")]
    assert found.comparisons[0].ratio.value == pytest.approx(1.0, rel=0.5)
    assert json.loads(json.dumps(found.as_json()))["models"][0]["latency_ms"]["n"] >= 50
    assert found.as_text().splitlines()[1].startswith("linear.onnx")


def test_bench_refuses_what_it_cannot_measure(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        command.bench([tmp_path / "absent"], threads=1, quick=True, say=silent)
    with pytest.raises(ModelError, match="is no model"):
        command.bench([tmp_path], threads=1, quick=True, say=silent)
    bundle = tmp_path / "evil"
    bundle.mkdir()
    for path in ("../linear.onnx", str(model), "absent.onnx", "..\\linear.onnx"):
        (bundle / "edgekd.json").write_text(json.dumps({"model": path, "backend": "onnxruntime"}))
        with pytest.raises(ModelError, match="there is no model"):
            command.bench([bundle], threads=1, quick=True, say=silent)
    (bundle / "edgekd.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        command.bench([bundle], threads=1, quick=True, say=silent)


def test_bench_says_where_a_runtime_is_missing(model: Path, tmp_path: Path) -> None:
    if conditions._version("tensorrt"):
        pytest.skip("TensorRT is installed here")
    (tmp_path / "edgekd.json").write_text(json.dumps({"model": model.name, "backend": "tensorrt"}))
    with pytest.raises(BackendError, match="Measure it on the board"):
        command.bench([tmp_path], threads=1, quick=True, say=silent)
