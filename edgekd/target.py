"""Targets: facts about a platform, one TOML file each. A path, ./targets/<name>.toml, or one that comes with edgekd."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekd import toml
from edgekd.errors import TargetError, nearest
from edgekd.types import Device, Part, PowerMode, PruningRules, QuantizationRules, Target

_HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """Where the targets that come with edgekd are: inside the installed package, or beside it in a checkout."""
    packaged = _HERE / "_targets"
    return packaged if packaged.is_dir() else _HERE.parent / "targets"


def names() -> dict[str, Path]:
    """Every target that can be named: those of edgekd, and over them those in ./targets."""
    return {file.stem: file for place in (folder(), Path("targets")) for file in sorted(place.glob("*.toml"))}


def load(name: str) -> Target:
    """The target of that name, or in that TOML file.

    Raises:
        TargetError: no such target (the nearest is named), or the file breaks a rule.
    """
    if name.endswith(".toml"):
        path = Path(name)
    else:
        known = names()
        if name not in known:
            raise TargetError(
                f"there is no target '{name}'; there is {', '.join(known)}", nearest=nearest(name, known),
                fix="a target of your own is a TOML file: --target path/to/it.toml (see docs/targets.md)",
            )  # fmt: skip
        path = known[name]
    return _parse(toml.load(path, TargetError), where=str(path.name))


def as_json(target: Target) -> dict[str, Any]:
    """All that is known of the target, as JSON."""
    return asdict(target)


def as_text(targets: list[Target]) -> str:
    """The targets as lines to read; one alone is told with its devices and their sources."""
    if len(targets) != 1:
        width = max(len(target.name) for target in targets)
        return "\n".join(f"{target.name:<{width}}  {target.title} ({target.backend.name})" for target in targets)
    target, rules = targets[0], targets[0].quantization
    symmetry = "symmetric" if rules.activation_symmetric else "affine"
    lines = [
        f"{target.name}: {target.title}",
        f"backend     {target.backend.name}, ONNX opset {target.opset}",
        f"precisions  {', '.join(target.precisions)}",
        f"int8        activations {rules.activation} {symmetry}, weights {rules.weight} per channel",
        f"pruning     channels in multiples of {target.pruning.channel_multiple}",
    ]
    for device in target.devices:
        memory = f", {device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else ""
        lines.append(f"device      {device.name}: {device.title}{memory}")
        for mode in device.modes:
            peaks = ", ".join(f"{name} {value / 1e12:.3g} T/s" for name, value in mode.peak_ops_per_s.items())
            lines.append(f"              {mode.name}: {peaks}; {mode.bandwidth_bytes_per_s / 1e9:.4g} GB/s")
    return "\n".join(lines)


def _parse(table: dict[str, Any], where: str) -> Target:
    toml.known(
        table,
        ("name", "title", "backend", "precisions", "onnx", "quantization", "pruning", "device", "sources"),
        where,
        error=TargetError,
    )
    for key in ("name", "title", "backend", "precisions", "onnx", "quantization"):
        if key not in table:
            raise TargetError(
                f"'{key}' is missing", where=where, fix=f"add it; targets/host.toml in {folder().name}/ shows how"
            )
    backend = table["backend"]
    if not isinstance(backend, dict) or not isinstance(backend.get("name"), str):
        raise TargetError("has no name", where=f"{where}: backend", expected='backend = { name = "onnxruntime" }')
    return Target(
        name=toml.validated(table["name"], str, f"{where}: name", error=TargetError),
        title=toml.validated(table["title"], str, f"{where}: title", error=TargetError),
        backend=Part(backend["name"], {key: value for key, value in backend.items() if key != "name"}),
        opset=toml.validated(table["onnx"].get("opset"), int, f"{where}: onnx.opset", error=TargetError),
        legacy_opset=toml.validated(
            table["onnx"].get("legacy_opset"), int | None, f"{where}: onnx.legacy_opset", error=TargetError
        ),
        precisions=_precisions(table["precisions"], f"{where}: precisions"),
        quantization=toml.read(QuantizationRules, table["quantization"], f"{where}: quantization", error=TargetError),
        devices=tuple(_device(item, f"{where}: device[{i}]") for i, item in enumerate(table.get("device", []))),
        sources=toml.validated(table.get("sources", {}), dict[str, str], f"{where}: sources", error=TargetError),
        pruning=toml.read(PruningRules, table.get("pruning", {}), f"{where}: pruning", error=TargetError),
    )


def _precisions(value: Any, where: str) -> tuple[Any, ...]:
    from edgekd.types import Precision

    checked: tuple[Any, ...] = toml.validated(value, tuple[Precision, ...], where, error=TargetError)
    return checked


def _device(table: Any, where: str) -> Device:
    modes = table.pop("mode", [])
    table["modes"] = ()
    device = toml.read(Device, table, where, error=TargetError)
    read = tuple(toml.read(PowerMode, mode, f"{where}.mode[{i}]", error=TargetError) for i, mode in enumerate(modes))
    return Device(device.name, device.title, device.memory_bytes, read, device.sources)
