"""The record beside an engine (`<engine>.json`): what it was built from, by and for.

An engine belongs to one TensorRT version and one GPU; loaded elsewhere it fails or, worse, crashes. So the record is
compared before TensorRT sees the file. This file is copied into every Jetson bundle: standard library, Python 3.8.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping

SCHEMA = 1


def path_of(engine: str) -> str:
    """Where the record of that engine is."""
    return engine + ".json"


def device_name(device_tree: str = "/proc/device-tree/model") -> str:
    """The board's name from its device tree ("NVIDIA Jetson Orin Nano …"), or the kind of machine where it has none."""
    try:
        with open(device_tree, "rb") as file:
            return file.read().rstrip(b"\0").decode()
    except OSError:
        return f"{platform.system()} {platform.machine()}"


def write(engine: str, *, tensorrt: str, sm: str | None, precision: str, onnx: str, **more: object) -> None:
    """Write the record of an engine that was just built on this device.

    Args:
        engine: the engine's file.
        tensorrt: version of TensorRT, e.g. "10.3.0".
        sm: compute capability of the GPU, e.g. "8.7"; None where the builder did not tell it.
        precision: "fp32", "fp16" or "int8".
        onnx: the file it was built from.
        more: whatever else is worth knowing: the command line, the power mode, the workspace.
    """
    record = {
        "schema": SCHEMA,
        "tensorrt": tensorrt,
        "device": device_name(),
        "sm": sm,
        "precision": precision,
        "onnx_sha256": sha256_of(onnx),
        "engine_sha256": sha256_of(engine),
        **more,
    }
    partial = path_of(engine) + ".partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
    os.replace(partial, path_of(engine))


def read(engine: str) -> dict[str, object]:
    """The record of an engine.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        with open(path_of(engine), encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError:
        name = os.path.basename(path_of(engine))
        raise ValueError(f"there is no {name} beside {engine} that says what it was built for") from None
    except (OSError, ValueError) as problem:
        raise ValueError(f"the record of the engine cannot be read: {problem}") from problem
    wanted = ("schema", "tensorrt", "device", "sm", "precision", "onnx_sha256", "engine_sha256")
    missing = [key for key in wanted if not isinstance(record, dict) or key not in record]
    if missing or record["schema"] != SCHEMA:
        raise ValueError(
            f"the record of the engine is not one of schema {SCHEMA}: {', '.join(missing) or 'other schema'}"
        )
    return dict(record)


def mismatch(engine: str, *, tensorrt: str, sm: str) -> str | None:
    """Why this engine cannot be loaded here, or None where its record fits the file, the version and the GPU."""
    try:
        record: Mapping[str, object] = read(engine)
    except ValueError as problem:
        return str(problem)
    if record["engine_sha256"] != sha256_of(engine):
        return "the engine is not the file that its record was written for: it was changed or copied over"
    if _release(str(record["tensorrt"])) != _release(tensorrt):
        return f"the engine was built by TensorRT {record['tensorrt']}, and this is TensorRT {tensorrt}"
    if record["sm"] not in (None, sm):
        return f"the engine was built for compute capability {record['sm']}, and this GPU has {sm}"
    if record["device"] != device_name():
        return f"the engine was built on {record['device']}, and this is {device_name()}"
    return None


def sha256_of(path: str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _release(version: str) -> list[str]:
    return version.split(".")[:3]  # the bindings say 10.16.1.11, trtexec says 10.16.1
