#!/usr/bin/env python3
"""Build TensorRT engines from the models of this bundle, on the board that will run them, and check them.

    ./build.sh                          every precision that the bundle has, then run.py --selftest on each engine
    ./build.sh --precision int8         one of them
    ./build.sh --measure                and time each engine with trtexec
    ./build.sh --dry-run                show the commands only

Engines belong to one TensorRT version and one board: build them where they run. What is written goes to engine/: the
engine, a record of what it was built by and for, the timing cache (it makes the next build quick), and the log.

Needs Python 3.8 and TensorRT 8.5 or later (JetPack 5.1 or later). trtexec does the work; where there is none, the
Python bindings do. Not validated: it was tested against fakes of trtexec and of the bindings, never on a board.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any, Mapping  # noqa: UP035 - Python 3.8

sys.dont_write_bytecode = True  # a bundle stays as it was verified
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

from board import record, trtexec  # noqa: E402 - beside this file, wherever it is started from

LEAST_FREE_MIB = 700  # our own guard, not measured: below it even loading CUDA and TensorRT risks a kill
NO_DLA = (
    "DLA is not supported by edgekd. TensorRT 10.7 was the last 10.x release with it, 11.4.1 has it again for AGX Orin "
    "on JetPack 7.2.2 only, Orin Nano and Thor have none; and up to 10.x its int8 needs a calibration cache instead of "
    "the Q/DQ nodes of these models. Build for the GPU, or convert with NVIDIA's qdq-translator by hand"
)
OUT_OF_MEMORY = (
    "the build was killed, most likely for want of memory: CPU and GPU share it on a Jetson. Stop the desktop "
    "(sudo init 3), close other programs, add swap, or give a smaller --workspace-mib"
)


class Problem(Exception):
    """Something the user can fix; shown as one line, exit code 1."""


# ---------------------------------------------------------------- what is here


def find_trtexec(given: str | None) -> str | None:
    for candidate in (given, shutil.which("trtexec"), "/usr/src/tensorrt/bin/trtexec"):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
        if candidate and candidate == given:
            raise Problem(f"{given} is no executable file")
    return None


def versions_here(executable: str | None) -> dict[str, tuple[int, ...]]:
    """TensorRT's version as each of trtexec, dpkg and the Python bindings tells it; whoever is absent is left out."""
    found: dict[str, tuple[int, ...]] = {}
    if executable:
        version = trtexec.read_version(output_of([executable, "--help"]))
        if version:
            found["trtexec"] = version
    for package in ("libnvinfer11", "libnvinfer10", "libnvinfer8"):
        match = re.match(r"(\d+)\.(\d+)\.(\d+)", output_of(["dpkg-query", "-W", "-f=${Version}", package]))
        if match:
            found["dpkg"] = tuple(int(part) for part in match.groups())
            break
    try:
        import tensorrt

        found["python"] = tuple(int(part) for part in tensorrt.__version__.split(".")[:3])
    except ImportError:
        pass  # build and selftest say so where they need it
    return found


def choose_version(found: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The one version that all agree on."""
    if not found:
        raise Problem(
            "no TensorRT was found: neither trtexec, nor the package libnvinfer, nor Python bindings. On a Jetson, "
            "sudo apt install nvidia-jetpack brings all three"
        )
    if len({version[:2] for version in found.values()}) > 1:
        told = ", ".join(f"{who} says {'.'.join(map(str, version))}" for who, version in found.items())
        raise Problem(
            f"several versions of TensorRT are installed: {told}. An engine built by one does not load in another; "
            "use the system python3, or name the right trtexec with --trtexec"
        )
    version = next(iter(found.values()))
    reason = trtexec.unsupported(version)
    if reason:
        raise Problem(reason)
    return version


def output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def memory_mib(path: str = "/proc/meminfo") -> tuple[int, int]:
    """(all memory, what can be had of it now), in MiB."""
    with open(path, encoding="ascii") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in file if line.rstrip().endswith("kB")}
    return sizes["MemTotal"], sizes["MemAvailable"]


def workspace_mib(wanted: int | None, total_mib: int, free_mib: int) -> int:
    """Memory that a kernel may take: at most a quarter of the RAM and half of what is free now."""
    if free_mib < LEAST_FREE_MIB:
        raise Problem(
            f"only {free_mib} MiB of {total_mib} MiB are free, and a build needs {LEAST_FREE_MIB} MiB at least: stop "
            "the desktop (sudo init 3), close other programs, or add swap"
        )
    limit = min(total_mib // 4, free_mib // 2)
    if wanted is not None and wanted > limit:
        sys.stderr.write(f"build_engine.py: --workspace-mib {wanted} is cut to {limit} MiB (a quarter of the RAM)\n")
    return min(wanted or 1024, limit)


def power_mode() -> str | None:
    found = re.search(r"NV Power Mode: *(.+)", output_of(["nvpmodel", "-q"]))
    return found.group(1).strip() if found else None


# ---------------------------------------------------------------- the bundle


def read_manifest() -> dict[str, Any]:
    with open(os.path.join(HERE, "edgekd.json"), encoding="utf-8") as file:
        manifest: dict[str, Any] = json.load(file)
    if manifest.get("schema") != 1:
        raise Problem(f"edgekd.json is of schema {manifest.get('schema')}; this recipe reads schema 1")
    return manifest


def choose_models(manifest: Mapping[str, Any], major: int, precision: str | None) -> dict[str, str]:
    """The model file to build from, by precision: strongly typed graphs for TensorRT 10 and 11, the others for 8."""
    wanted = "weak" if major == 8 else "strong"
    fit = {item["precision"]: item["path"] for item in manifest["models"] if item["typing"] in (wanted, "any")}
    if major == 8 and "fp32" in fit:
        fit.setdefault("fp16", fit["fp32"])  # weakly typed: the builder turns the fp32 graph into fp16
        if precision is None:
            fit.pop("fp32")
    here = ", ".join(sorted({f"{item['precision']} ({item['typing']})" for item in manifest["models"]}))
    if precision is not None:
        if precision not in fit:
            raise Problem(
                f"no {wanted}ly typed {precision} model is in this bundle for TensorRT {major}; it has {here}"
            )
        return {precision: fit[precision]}
    if not fit:
        raise Problem(f"no model of this bundle is for TensorRT {major}; it has {here}")
    return fit


def check_hash(manifest: Mapping[str, Any], name: str) -> str:
    listed = {file["path"]: file["sha256"] for file in manifest["files"]}
    path = os.path.join(HERE, name)
    digest = hashlib.sha256()
    if os.path.isfile(path):
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    if listed.get(name) != digest.hexdigest():
        raise Problem(f"{name} is missing or not the file that the manifest was written for; copy the bundle again")
    return path


def shapes_of(manifest: Mapping[str, Any], max_batch: int) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """(min, opt, max) of every input with a dynamic batch; tuned for a batch of 1."""
    shapes = {}
    for item in manifest["inputs"]:
        batch, rest = item["shape"][0], item["shape"][1:]
        if any(isinstance(size, str) for size in rest):
            raise Problem(f"input '{item['name']}' has a dynamic dimension beside the batch: {item['shape']}")
        if isinstance(batch, str):
            shapes[item["name"]] = ([1, *rest], [1, *rest], [max_batch, *rest])
    return shapes


# ---------------------------------------------------------------- build, check, measure


def run_logged(command: list[str], log_path: str) -> str:
    """Run a command with its output in a log file; returns the log."""
    with open(log_path, "wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    with open(log_path, encoding="utf-8", errors="replace") as text:
        log = text.read()
    if code in (-9, 137) or "OutOfMemory" in log or "out of memory" in log.lower():
        raise Problem(f"{OUT_OF_MEMORY} (log: {log_path})")
    if code != 0:
        errors = [line for line in log.splitlines() if "[E]" in line] or log.splitlines()[-5:]
        raise Problem(
            f"{os.path.basename(command[0])} failed with code {code}: "
            + " | ".join(errors[-5:])
            + f" (log: {log_path})"
        )
    return log


def build(
    source: str, engine: str, precision: str, version: tuple[int, ...], shapes: Mapping[str, Any], mib: int,
    executable: str | None,
) -> None:  # fmt: skip
    """Build one engine, whole or not at all, with its record."""
    name = ".".join(map(str, version))
    folder = os.path.dirname(engine)
    cache = cache_of(folder, version)
    partial = engine + ".partial"
    facts: dict[str, Any] = {"power_mode": power_mode(), "workspace_mib": mib, "shapes": shapes}
    if executable:
        command = trtexec.build(
            version, onnx=source, precision=precision, engine=partial, shapes=shapes, workspace_mib=mib,
            timing_cache=cache, executable=executable,
        )  # fmt: skip
        log = run_logged(command, engine + ".log")
        built_by = trtexec.read_version(log)
        if built_by and built_by[:2] != version[:2]:
            raise Problem(f"trtexec is of TensorRT {'.'.join(map(str, built_by))}, not {name}")
        facts.update(built_with="trtexec", command=command, sm=trtexec.read_device(log).get("sm"))
    else:
        facts.update(built_with="python", sm=build_with_python(source, partial, precision, version, shapes, mib, cache))
    if not os.path.isfile(partial):
        raise Problem(f"the build ended without an engine; see {engine}.log")
    os.replace(partial, engine)
    sm = facts.pop("sm")
    record.write(engine, tensorrt=name, sm=sm, precision=precision, onnx=source, **facts)


def build_with_python(
    source: str, partial: str, precision: str, version: tuple[int, ...], shapes: Mapping[str, Any], mib: int, cache: str
) -> str:
    """Build through the bindings; returns the GPU's compute capability."""
    import importlib

    from board import engine as runtime

    branch = importlib.import_module(f"board.build_{version[0]}")
    earlier = b""
    if os.path.isfile(cache):
        with open(cache, "rb") as file:
            earlier = file.read()
    plan, timings = branch.build(source, precision, shapes, mib << 20, earlier)
    for path, content in ((partial, plan), (cache, timings)):
        with open(path, "wb") as file:
            file.write(content)
    sm: str = runtime.Cuda().compute_capability()
    return sm


def selftest(engine: str) -> None:
    command = [sys.executable, os.path.join(HERE, "run.py"), "--selftest", "--runtime", "tensorrt"]
    code = subprocess.run([*command, "--model", os.path.relpath(engine, HERE)], check=False).returncode
    if code != 0:
        raise Problem(f"{os.path.relpath(engine, HERE)} was built, but does not pass its selftest; do not use it")


def measure(engine: str, version: tuple[int, ...], shapes: Mapping[str, Any], executable: str) -> dict[str, Any]:
    """Time one engine at batch 1, copies to and from the GPU included, without CUDA graphs."""
    times = engine + ".times.json"
    ones = {name: three[0] for name, three in shapes.items()}
    command = trtexec.measure(version, engine=engine, times=times, shapes=ones, executable=executable)
    log = run_logged(command, engine + ".measure.log")
    with open(times, encoding="utf-8") as file:
        found = trtexec.percentiles(trtexec.read_times(file.read()))
    conditions = {"command": command, "warnings": trtexec.warnings(log), "tensorrt": ".".join(map(str, version))}
    latency = {**found, "origin": "device", "device": record.device_name(), "threads": 1, "power_mode": power_mode()}
    return {"metric": "latency", "unit": "ms", "latency_ms": latency, "conditions": conditions}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=trtexec.PRECISIONS, help="build this one only")
    parser.add_argument("--max-batch", type=int, default=1, help="largest batch the engine takes (default 1)")
    parser.add_argument(
        "--workspace-mib", type=int, help="memory for a kernel (default 1024, a quarter of RAM at most)"
    )
    parser.add_argument("--trtexec", help="where trtexec is, if not on PATH or in /usr/src/tensorrt/bin")
    parser.add_argument("--python-api", action="store_true", help="build through the Python bindings, not trtexec")
    parser.add_argument("--measure", action="store_true", help="time each engine with trtexec, JSON on stdout")
    parser.add_argument("--no-selftest", action="store_true", help="build only (no Python bindings needed)")
    parser.add_argument("--dry-run", action="store_true", help="show the commands, build nothing")
    parser.add_argument("--dla", action="store_true", help="refused: says why there is no DLA")
    given = parser.parse_args()
    if given.max_batch < 1 or (given.workspace_mib is not None and given.workspace_mib < 1):
        parser.error("--max-batch and --workspace-mib take a number of at least 1")
    return given


def toolchain(given: argparse.Namespace) -> tuple[tuple[int, ...], str | None]:
    """(TensorRT's version, trtexec or None for the Python bindings), or a Problem where something needed is missing."""
    executable = find_trtexec(given.trtexec)
    found = versions_here(executable)
    version = choose_version(found)
    if given.python_api or not executable:
        executable = None
        if "python" not in found:
            raise Problem("neither trtexec nor TensorRT's Python bindings are here: sudo apt install nvidia-jetpack")
    if given.measure and not executable:
        raise Problem("--measure needs trtexec; run.py --bench measures without it")
    if not given.no_selftest and not given.dry_run and "python" not in found:
        raise Problem("the selftest needs TensorRT's Python bindings; use the system python3, or give --no-selftest")
    return version, executable


def main() -> int:
    given = arguments()
    if given.dla:
        raise Problem(NO_DLA)
    manifest = read_manifest()
    version, executable = toolchain(given)
    total, free = memory_mib()
    mib = workspace_mib(given.workspace_mib, total, free)
    shapes = shapes_of(manifest, given.max_batch)
    sys.stderr.write(
        f"TensorRT {'.'.join(map(str, version))} on {record.device_name()}, power mode {power_mode() or 'unknown'}, "
        f"{free} of {total} MiB free, workspace {mib} MiB\n"
    )
    folder = os.path.join(HERE, "engine")
    for precision, name in choose_models(manifest, version[0], given.precision).items():
        source = check_hash(manifest, name)
        engine = os.path.join(folder, engine_name(name, precision))
        if given.dry_run:
            command = trtexec.build(
                version, onnx=source, precision=precision, engine=engine, shapes=shapes, workspace_mib=mib,
                timing_cache=cache_of(folder, version), executable=executable or "trtexec",
            )  # fmt: skip
            sys.stdout.write(" ".join(command) + "\n")
            continue
        os.makedirs(folder, exist_ok=True)
        build(source, engine, precision, version, shapes, mib, executable)
        sys.stderr.write(f"built {os.path.relpath(engine, HERE)}\n")
        if not given.no_selftest:
            selftest(engine)
        if given.measure and executable:
            sys.stdout.write(json.dumps(measure(engine, version, shapes, executable), indent=2) + "\n")
    return 0


def cache_of(folder: str, version: tuple[int, ...]) -> str:
    """The timing cache: one a version, since another one's is refused; the folder is of one board."""
    return os.path.join(folder, f"timing.{'.'.join(map(str, version))}.cache")


def engine_name(model: str, precision: str) -> str:
    """model.fp16.onnx → model.fp16.engine; what TensorRT 8 makes of an fp32 file is named by what it became."""
    stem = model[: -len(".onnx")]
    return f"{stem}.engine" if precision in stem.split(".") else f"{stem}.{precision}.engine"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Problem, RuntimeError, ValueError, OSError) as problem:
        sys.stderr.write(f"build_engine.py: {problem}\n")
        sys.exit(1)
