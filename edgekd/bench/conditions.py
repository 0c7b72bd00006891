"""The conditions of a measurement: versions, the CPU and what it can do, clocks, temperature, throttling.

Nothing here names the machine or its user. What the machine does not tell is None, with the reason under its name in
`missing`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekd.types import Json

PACKAGES = ("edgekd", "numpy", "onnx", "onnxruntime", "tensorrt", "torch", "torchao", "timm", "torch-pruning")

# What each feature is called in /proc/cpuinfo: x86 flags and Arm features (Linux: cpufeatures.h, hwcap.h).
_FEATURES: Mapping[str, tuple[str, ...]] = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),  # int8 dot products into 32 bits
    "amx_int8": ("amx_int8",),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "neon": ("asimd", "neon"),
    "dotprod": ("asimddp",),  # the same on Arm
    "i8mm": ("i8mm",),
    "fp16": ("asimdhp", "fphp", "avx512_fp16"),
    "sve": ("sve",),
}
_CPUINFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")
_THERMAL = Path("/sys/class/thermal")
_PI_THROTTLED = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")


def environment() -> dict[str, Json]:
    """Versions of the packages that matter, the system and the CPU, as nested plain data.

    Versions are read from package metadata: nothing is imported.
    """
    missing: dict[str, Json] = {}
    cpu = _cpu(missing)
    memory = _memory_bytes()
    if memory is None:
        missing["memory_bytes"] = "the system does not tell"
    return {
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": cpu,
        "memory_bytes": memory,
        "container": _container(),
        "clocks": clocks(),
        "missing": missing,
    }


def without_vnni(facts: Mapping[str, Json] | None = None) -> str | None:
    """What to know of int8 on an x86 CPU that has no VNNI; None on any other, and where it is not known.

    Args:
        facts: an `environment()`; left out: of this machine.
    """
    facts = environment() if facts is None else facts
    cpu = facts.get("cpu")
    features = cpu.get("features") if isinstance(cpu, dict) else None
    if facts.get("architecture") not in ("x86_64", "AMD64") or not isinstance(features, dict) or features.get("vnni"):
        return None
    return (
        "this CPU has no VNNI: int8 gains less on it, and ONNX Runtime clips its sums at 16 bits; int8 files that "
        "edgekd makes for the target host are made for that, files of other tools may lose accuracy here"
    )


def clocks(cpus: Sequence[int] | None = None) -> dict[str, Json]:
    """What changes while one measures: frequency, governor, temperature, throttling; taken before and after."""
    missing: dict[str, Json] = {}
    chosen = sorted(cpus if cpus is not None else _allowed())
    state: dict[str, Json] = {
        "governor": _governor(chosen),
        "frequency_mhz": _frequency_mhz(chosen),
        "temperature_c": _temperature_c(),
        "throttle_count": _throttle_count(chosen),
    }
    reasons = {
        "governor": "no cpufreq (a virtual machine, or not Linux)",
        "frequency_mhz": "neither cpufreq nor /proc/cpuinfo tells it",
        "temperature_c": "no thermal zone is visible",
        "throttle_count": "the kernel counts none for this CPU",
    }
    missing.update({name: reason for name, reason in reasons.items() if state[name] is None})
    if _PI_THROTTLED.exists():
        state["raspberry_pi_throttled"] = _text(_PI_THROTTLED)
    return state | {"missing": missing}


def changes(before: Mapping[str, Json], after: Mapping[str, Json]) -> tuple[str, ...]:
    """What happened to the machine between two `clocks()`, as notes: throttling, a lower clock, another governor."""
    notes: list[str] = []
    one, two = before.get("throttle_count"), after.get("throttle_count")
    if isinstance(one, int) and isinstance(two, int) and two > one:
        notes.append(f"the CPU was throttled {two - one} times while it was measured")
    pi = after.get("raspberry_pi_throttled")
    # vcgencmd get_throttled: bits 0 to 3 mean under-voltage, frequency cap, throttling and soft limit, now
    if isinstance(pi, str) and re.fullmatch(r"(0x)?[0-9a-f]+", pi) and int(pi, 16) & 0xF:
        notes.append(f"the board was throttled or short of voltage while it was measured (get_throttled = {pi})")
    slow, fast = after.get("frequency_mhz"), before.get("frequency_mhz")
    if isinstance(slow, float) and isinstance(fast, float) and slow < 0.95 * fast:
        notes.append(f"the clock fell from {fast:.0f} to {slow:.0f} MHz while it was measured")
    if before.get("governor") != after.get("governor"):
        notes.append(f"the CPU governor changed from {before.get('governor')} to {after.get('governor')}")
    return tuple(notes)


def device_name() -> str:
    """The board or CPU that `latency_ms.device` names, without anything that identifies this one machine."""
    board = _text(Path("/proc/device-tree/model"))
    if board:
        return board.rstrip("\0")
    name = _fields(_cpuinfo()).get("model name") or platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)", "", name)).strip()


def _cpu(missing: dict[str, Json]) -> dict[str, Json]:
    fields = _fields(_cpuinfo())
    words = set((fields.get("flags") or fields.get("features") or "").split())
    features: Json = {name: any(flag in words for flag in flags) for name, flags in _FEATURES.items()}
    if not words:
        features = None
        missing["cpu.features"] = "only /proc/cpuinfo is asked, and it is not there or lists none"
    return {
        "model": device_name(),
        "features": features,
        "logical_cpus": os.cpu_count(),
        "allowed_cpus": len(_allowed()),
    }


def _cpuinfo() -> str:
    return _text(_CPUINFO) or ""


def _fields(cpuinfo: str) -> dict[str, str]:
    """The first value of each key, keys in lower case."""
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip().lower(), value.strip())
    return found


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _governor(cpus: Sequence[int]) -> str | None:
    found = {text for cpu in cpus if (text := _text(_CPUS / f"cpu{cpu}/cpufreq/scaling_governor"))}
    return ", ".join(sorted(found)) or None


def _frequency_mhz(cpus: Sequence[int]) -> float | None:
    """Mean over the CPUs; from cpufreq, else what /proc/cpuinfo says (a virtual machine repeats its nominal clock)."""
    khz = [text for cpu in cpus if (text := _text(_CPUS / f"cpu{cpu}/cpufreq/scaling_cur_freq"))]
    if khz:
        return sum(map(float, khz)) / len(khz) / 1e3
    mhz = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _cpuinfo(), re.MULTILINE)]
    return sum(mhz) / len(mhz) if mhz else None


def _temperature_c() -> float | None:
    """The hottest zone, in degrees Celsius."""
    zones = [text for path in sorted(_THERMAL.glob("thermal_zone*/temp")) if (text := _text(path))]
    found = [int(text) / 1e3 for text in zones if re.fullmatch(r"-?\d+", text)]
    return max((value for value in found if -50 < value < 150), default=None)  # a dead sensor says -256 or so


def _throttle_count(cpus: Sequence[int]) -> int | None:
    counts = [text for cpu in cpus if (text := _text(_CPUS / f"cpu{cpu}/thermal_throttle/core_throttle_count"))]
    return sum(map(int, counts)) if counts else None


def _memory_bytes() -> int | None:
    if not hasattr(os, "sysconf") or not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> str | None:
    """A hint at what limits this process, or None where there is no sign of a container."""
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    groups = _text(Path("/proc/1/cgroup")) or ""
    return next((name for name in ("docker", "kubepods", "lxc", "containerd") if name in groups), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None
