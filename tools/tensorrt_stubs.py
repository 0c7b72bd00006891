"""Type stubs of NVIDIA's real TensorRT bindings, made in a folder of your choice without TensorRT or a GPU.

    python tools/tensorrt_stubs.py 10.3.0 stubs        # then: MYPYPATH=stubs mypy --strict module.py

The bindings' wheel on the package index holds one extension module with its signatures in docstrings. It needs three or
four NVIDIA libraries, of which it takes a dozen C functions; empty libraries with those names let it be imported, and
pybind11-stubgen then writes its stubs, which are repaired here until mypy reads them.

The wheels are under NVIDIA's licence, which forbids redistribution: nothing that this makes may be committed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

# The pins that edgekd's code is checked against: the last 8.x, JetPack 6.1 and 6.2, JetPack 7.2, and 11.
VERSIONS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.16.1.11": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu12-bindings==11.4.0.106",
}
_LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin", "nvparsers")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    # of libnvparsers, which 8.x still needs
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)
# Return types that pybind11 did not know yet when it wrote the docstring.
_LATE = {
    "get_error": "ParserError",
    "get_tensor_mode": "TensorIOMode",
    "create_engine_inspector": "EngineInspector",
    "profiling_verbosity": "ProfilingVerbosity",
}
_ADDED = """
from collections.abc import Sequence as _Sequence
import builtins
__version__: str
def volume(iterable: typing.Iterable[int]) -> int: ...
def nptype(trt_type: DataType) -> typing.Any: ...
"""


class StubError(Exception):
    """A step could not be done here: no network, no compiler, or a wheel for another Python."""


def bindings(version: str, folder: Path) -> Path:
    """Download and unpack the bindings' wheel of that version for the running Python; returns the folder to import.

    Raises:
        StubError: pip cannot get it; the text is pip's last line.
    """
    unpacked = folder / f"bindings-{version}"
    if unpacked.is_dir():
        return unpacked
    wheels = folder / f"wheel-{version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--only-binary=:all:", "--dest", str(wheels), VERSIONS[version]])
    wheel = next(wheels.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def libraries(version: str, folder: Path) -> Path:
    """Compile empty libraries that satisfy the loader; every function in them returns a null pointer.

    Raises:
        StubError: there is no C compiler.
    """
    major = version.split(".")[0]
    built = folder / f"libraries-{major}"
    built.mkdir(parents=True, exist_ok=True)
    source = built / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    for library in _LIBRARIES:
        soname = f"lib{library}.so.{major}"
        _run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(built / soname), str(source)])
    return built


def stubs(version: str, folder: Path) -> Path:
    """Write `tensorrt/__init__.pyi` for that version; returns the folder for MYPYPATH.

    Raises:
        StubError: the wheel, the compiler or pybind11-stubgen is missing.
    """
    raw, typed = folder / f"raw-{version}", folder / f"stubs-{version}"
    environment = _environment(version, folder)
    stubgen = [sys.executable, "-m", "pybind11_stubgen", "--numpy-array-remove-parameters", "--ignore-all-errors"]
    _run([*stubgen, "-o", str(raw), "tensorrt_bindings.tensorrt"], environment)
    (typed / "tensorrt").mkdir(parents=True, exist_ok=True)
    text = (raw / "tensorrt_bindings" / "tensorrt.pyi").read_text(encoding="utf-8")
    (typed / "tensorrt" / "__init__.pyi").write_text(repaired(text), encoding="utf-8")
    return typed


def names(version: str, folder: Path) -> frozenset[str]:
    """Every public name of the real module, and "Class.member" for its classes: what a fake may offer at most."""
    program = (
        "import inspect, tensorrt_bindings as t\n"
        "for n in dir(t):\n"
        "    print(n)\n"
        "    if inspect.isclass(getattr(t, n)):\n"
        "        for m in dir(getattr(t, n)): print(n + '.' + m)\n"
    )
    return frozenset(_run([sys.executable, "-c", program], _environment(version, folder)).split())


def repaired(text: str) -> str:
    """What pybind11-stubgen wrote, as stubs that mypy reads and that allow what pybind11 converts by itself."""
    text = re.sub(r"\btensorrt_bindings\.tensorrt\.", "", text)
    # void * of C++: pybind11 takes any object of its own for it, so also a Logger.
    text = re.sub(r"\b(typing_extensions\.CapsuleType|capsule)\b", "typing.Any", text)
    text = re.sub(r"([(,] *)in:", r"\1in_:", text)  # a parameter named as a keyword
    # The module has a variable `bool` (a DataType), so the type needs its full name.
    text = re.sub(r"(?<=[:>\[|] )bool(?=[,):\s\]|=])", "builtins.bool", text)
    text = text.replace("[bool]", "[builtins.bool]")
    text = re.sub(r": ([\w.]+) = None", r": typing.Optional[\1] = None", text)
    for name, kind in _LATE.items():
        text = re.sub(rf"(def {name}\([^)]*\)) -> \.\.\.:", rf"\1 -> {kind}:", text)
    text = re.sub(r"-> \.\.\.:", "-> typing.Any:", text)
    text = re.sub(r": \.\.\.(?=[,)\s])", ": typing.Any", text)
    # pybind11 converts any sequence of integers to Dims, and IHostMemory has the buffer interface.
    text = re.sub(r"(?<=[\w]): Dims(?=[,)=])", ": Dims | _Sequence[int]", text)
    text = re.sub(r"^(class Dims:.*)$", r"\1\n    def __iter__(self) -> typing.Iterator[int]: ...", text, flags=re.M)
    text = re.sub(
        r"^(class IHostMemory:.*)$", r"\1\n    def __buffer__(self, flags: int) -> memoryview: ...", text, flags=re.M
    )
    text = re.sub(r"^( *def \w+\()(.*)(\) -> .*)$", _defaulted, text, flags=re.M)
    text = text.replace("from __future__ import annotations\n", "from __future__ import annotations\n" + _ADDED, 1)
    return "# mypy: ignore-errors\n" + text


def _defaulted(line: re.Match[str]) -> str:
    """Give every parameter behind one with a default a default too: C++ had none there, Python asks for one."""
    parts, depth, begun = [], 0, 0
    text = line.group(2)
    for place, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and depth == 0:
            parts.append(text[begun:place].strip())
            begun = place + 1
    parts.append(text[begun:].strip())
    seen = False
    for index, part in enumerate(parts):
        if "=" in part:
            seen = True
        elif seen and part and not part.startswith("*"):
            parts[index] = f"{part} = ..."
    return line.group(1) + ", ".join(parts) + line.group(3)


def _environment(version: str, folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    found = {"LD_LIBRARY_PATH": str(libraries(version, folder)), "PYTHONPATH": str(bindings(version, folder))}
    return {**os.environ, **found}


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    except FileNotFoundError:
        raise StubError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise StubError(f"{' '.join(command[:3])} did not end within 300 s") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise StubError(f"{' '.join(command[:4])} failed: {lines[-1]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", choices=VERSIONS)
    parser.add_argument("folder", type=Path, help="where the wheel, the empty libraries and the stubs go")
    given = parser.parse_args()
    sys.stdout.write(f"{stubs(given.version, given.folder)}\n")


if __name__ == "__main__":
    main()
