"""trtexec's command lines against the flags of each version, and what is read from its files and logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.backends._tensorrt import trtexec

FLAGS = Path(__file__).parent / "data" / "trtexec-flags"
VERSIONS = {
    "8.5": (8, 5),
    "8.6": (8, 6),
    "10.3": (10, 3),
    "10.13.3": (10, 13),
    "10.16": (10, 16),
    "11.0": (11, 0),
    "11.1": (11, 1),
}
SHAPES = {"x": ((1, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 8))}
ONE = {"x": (1, 3, 8, 8)}
# Parsed by 11.x and ignored with a warning, so a table of flags alone would let them pass.
IGNORED_IN_11 = {
    "--useCudaGraph",
    "--useSpinWait",
    "--noDataTransfers",
    "--separateProfileRun",
    "--stronglyTyped",
    "--int8",
}


def build(version: tuple[int, int], precision: str = "fp16", dynamic: bool = True) -> list[str]:
    return trtexec.build(
        version, onnx="m.onnx", precision=precision, engine="m.engine", shapes=SHAPES if dynamic else {},
        workspace_mib=1024, timing_cache="t.cache",
    )  # fmt: skip


def known(version: str) -> set[str]:
    flags = set((FLAGS / f"{version}.txt").read_text(encoding="utf-8").split())
    return flags - IGNORED_IN_11 if version.startswith("11") else flags


@pytest.mark.parametrize("name", VERSIONS)
def test_every_flag_is_known_to_that_version(name: str) -> None:
    version = VERSIONS[name]
    commands = [build(version, precision) for precision in trtexec.PRECISIONS]
    for transfers in (True, False):
        for graph in (True, False):
            for spin in (True, False):
                commands.append(
                    trtexec.measure(
                        version, engine="e", times="t", shapes=ONE, inputs={"x": "x.bin"}, data_transfers=transfers,
                        cuda_graph=graph, spin_wait=spin,
                    )
                )  # fmt: skip
    commands.append(trtexec.profile(version, engine="e", shapes=ONE, profile_path="p", layers_path="l"))
    used = {argument.split("=")[0] for command in commands for argument in command[1:]}
    assert used <= known(name), used - known(name)
    assert len(used) > 15


def test_the_flag_tables_catch_a_flag_of_another_version() -> None:
    assert "--fp16" in {argument.split("=")[0] for argument in build((8, 6))}
    assert "--fp16" not in known("11.0")
    assert "--skipInference" not in known("8.5")
    assert "--buildOnly" not in known("10.3")


GOLDEN = {
    "8.5": "trtexec --onnx=m.onnx --saveEngine=m.engine --memPoolSize=workspace:1024 --timingCacheFile=t.cache "
    "--profilingVerbosity=detailed --int8 --fp16 --minShapes=x:1x3x8x8 --optShapes=x:1x3x8x8 --maxShapes=x:4x3x8x8 "
    "--buildOnly",
    "8.6": "trtexec --onnx=m.onnx --saveEngine=m.engine --memPoolSize=workspace:1024 --timingCacheFile=t.cache "
    "--profilingVerbosity=detailed --int8 --fp16 --minShapes=x:1x3x8x8 --optShapes=x:1x3x8x8 --maxShapes=x:4x3x8x8 "
    "--skipInference",
    "10": "trtexec --onnx=m.onnx --saveEngine=m.engine --memPoolSize=workspace:1024 --timingCacheFile=t.cache "
    "--profilingVerbosity=detailed --stronglyTyped --minShapes=x:1x3x8x8 --optShapes=x:1x3x8x8 --maxShapes=x:4x3x8x8 "
    "--skipInference",
    "11": "trtexec --onnx=m.onnx --saveEngine=m.engine --memPoolSize=workspace:1024 --timingCacheFile=t.cache "
    "--profilingVerbosity=detailed --minShapes=x:1x3x8x8 --optShapes=x:1x3x8x8 --maxShapes=x:4x3x8x8 --skipInference",
}


@pytest.mark.parametrize("name", VERSIONS)
def test_build_command(name: str) -> None:
    golden = GOLDEN.get(name) or GOLDEN[name.split(".")[0]]
    assert " ".join(build(VERSIONS[name], "int8")) == golden


@pytest.mark.parametrize(("precision", "flags"), [("fp32", []), ("fp16", ["--fp16"]), ("int8", ["--int8", "--fp16"])])
def test_only_version_8_takes_precisions_from_flags(precision: str, flags: list[str]) -> None:
    weak, strong = {"--fp16", "--int8"}, "--stronglyTyped"
    assert [flag for flag in build((8, 6), precision) if flag in weak] == flags
    assert strong not in build((8, 6), precision)
    for version in ((10, 3), (11, 1)):
        assert not weak & set(build(version, precision))
    assert strong in build((10, 3), precision)
    assert strong not in build((11, 1), precision)


def test_a_model_of_fixed_shapes_gets_no_shapes() -> None:  # trtexec refuses explicit shapes for one
    assert not [argument for argument in build((10, 3), dynamic=False) if "Shapes" in argument]


@pytest.mark.parametrize(
    ("version", "transfers", "graph", "spin", "flags"),
    [
        ((8, 6), True, False, True, ["--useSpinWait"]),
        ((10, 3), False, True, False, ["--noDataTransfers", "--useCudaGraph"]),
        ((10, 16), True, False, False, []),
        ((11, 1), True, False, True, ["--includeDataTransfers", "--noCudaGraph"]),
        ((11, 1), False, True, False, ["--noSpinWait"]),
        ((11, 0), False, True, True, []),
    ],
)
def test_measuring_says_the_same_in_10_and_11(
    version: tuple[int, int], transfers: bool, graph: bool, spin: bool, flags: list[str]
) -> None:
    command = trtexec.measure(
        version, engine="e", times="t.json", shapes={}, data_transfers=transfers, cuda_graph=graph, spin_wait=spin
    )
    start = ["trtexec", "--loadEngine=e", "--warmUp=500", "--duration=10", "--iterations=200", "--exportTimes=t.json"]
    assert command == start + flags


def test_names_with_a_colon_are_quoted() -> None:
    command = trtexec.measure((10, 3), engine="e", times="t", shapes={"in:0": (1, 2)})
    assert "--shapes='in:0':1x2" in command


@pytest.mark.parametrize("version", [(8, 2), (8, 4), (7, 0), (12, 0)])
def test_unsupported_versions_say_why(version: tuple[int, int]) -> None:
    assert f"{version[0]}.{version[1]}" in str(trtexec.unsupported(version))
    with pytest.raises(ValueError, match="TensorRT"):
        build(version)


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="bf16"):
        build((10, 3), "bf16")


# Two rows of the shape that exportJSONTrace writes (sampleReporting.cpp, release/8.5 to 11.1); the figures are made up.
TIMES = (
    '[\n  { "startEnqMs" : 1.5  , "endEnqMs" : 1.6  , "startH2dMs" : 1.6  , "endH2dMs" : 1.7  , "startComputeMs" : 1.7'
    '  , "endComputeMs" : 2.7  , "startD2hMs" : 2.7  , "endD2hMs" : 2.75  , "h2dMs" : 0.1  , "computeMs" : 1.0'
    '  , "d2hMs" : 0.05  , "latencyMs" : 1.15 }\n'
    '  , { "h2dMs" : 0.1  , "computeMs" : 2  , "d2hMs" : 0.1  , "latencyMs" : 2.2 }\n]\n'
)


def test_read_times() -> None:
    assert trtexec.read_times(TIMES) == [1.15, 2.2]
    assert trtexec.read_times(TIMES, "computeMs") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[", "not JSON"),
        ("[]", "no inference"),
        ("{}", "no inference"),
        ('[{"computeMs": 1}]', "row 0"),
        ('[{"latencyMs": 1}, {"latencyMs": NaN}]', "row 1"),
        ('[{"latencyMs": -1}]', "row 0"),
        ('[{"latencyMs": true}]', "row 0"),
        ("[3]", "row 0"),
    ],
)
def test_damaged_times_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        trtexec.read_times(text)


def test_percentiles() -> None:
    found = trtexec.percentiles([float(value) for value in range(1, 102)])
    assert found["p50"] == 51
    assert found["p90"] == 91
    assert found["p99"] == 100
    assert found["mean"] == 51
    assert found["n"] == 101
    assert found["low"] < 51 < found["high"]
    assert trtexec.percentiles([2.0]) == {"p50": 2, "p90": 2, "p99": 2, "mean": 2, "n": 1, "low": 2, "high": 2}
    with pytest.raises(ValueError, match="no times"):
        trtexec.percentiles([])


def test_percentiles_agree_with_numpy() -> None:
    import numpy as np

    times = np.random.default_rng(0).lognormal(size=333)
    found = trtexec.percentiles(list(times))
    assert [found["p50"], found["p90"], found["p99"]] == pytest.approx(list(np.percentile(times, (50, 90, 99))))


def test_the_interval_of_the_median_covers_it() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        found = trtexec.percentiles(list(random.exponential(size=101)))
        hits += found["low"] <= np.log(2) <= found["high"]
    assert 0.92 < hits / 400 <= 1


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # ./trtexec --help", (8, 5, 2)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8602] # ./trtexec", (8, 6, 2)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # ./trtexec", (10, 3, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101601] [b11] # ./trtexec", (10, 16, 1)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110401] [b2] # ./trtexec", (11, 4, 1)),
        ("bash: trtexec: command not found", None),
    ],
)
def test_read_version(line: str, version: tuple[int, int, int] | None) -> None:
    assert trtexec.read_version(line) == version


def test_read_device_and_warnings() -> None:
    log = (
        "[05/01/2026-10:00:00] [I] Selected Device: Orin\n[05/01/2026-10:00:00] [I] Compute Capability: 8.7\n"
        "[W] * GPU compute time is unstable, with coefficient of variance = 7.2%.\n[I] fine\n"
    )
    assert trtexec.read_device(log) == {"gpu": "Orin", "sm": "8.7"}
    assert len(trtexec.warnings(log)) == 1
    assert trtexec.read_device("nothing") == {}


def test_the_file_needs_only_the_standard_library_of_python_3_8() -> None:
    import ast
    import sys

    for file in Path(trtexec.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))
        for node in ast.walk(tree):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "numpy", "tensorrt"}, (file.name, name)
