"""The manifest of a bundle, edgekd.json: what is in the folder, what the model takes and gives, where it comes from.

Reading one executes nothing and writes nothing; a path in it can only name a plain file inside the folder.
The manifest is not signed: its hashes tell damage from health, not a friend from a forger.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from edgekd import toml
from edgekd.errors import ModelError
from edgekd.types import LabelForm, Precision, Preprocessing, TensorSpec, Verdict

SCHEMA = 1
NAME = "edgekd.json"
LARGEST_BYTES = 16 << 20  # a manifest is some kilobytes; more is an attempt to exhaust memory
ENGINES = "engine"  # where the board writes what it builds; the one folder that the manifest does not list

Typing = Literal["any", "strong", "weak"]


@dataclass(frozen=True, slots=True)
class File:
    """One file of the bundle, its path relative to the folder with forward slashes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """One ONNX file of the bundle.

    typing: which TensorRT it is for: "strong" graphs say every precision themselves (10 and later), "weak" ones stay in
    fp32 and leave it to builder flags (8.x); "any" where that makes no difference.
    """

    path: str
    precision: Precision
    typing: Typing
    opset: int


@dataclass(frozen=True, slots=True)
class Golden:
    """Real inputs with the outputs that each model gave for them when the bundle was written."""

    path: str
    samples: int


@dataclass(frozen=True, slots=True)
class Task:
    """What the output is.

    labels: "classes": a logit for each class; "flags": a logit for each label, any number of which hold; "maps": a
    logit for each class at each point of a grid; "values": numbers.
    """

    name: str = "classification"
    labels: LabelForm = "classes"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What edgekd.json holds."""

    schema: int
    name: str
    edgekd: str  # the version that wrote it
    target: str
    backend: str
    model: str  # path of the model to use unless told otherwise
    models: tuple[Model, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing | None  # of the one image input; None where inputs are no images
    preprocessing_in_graph: bool  # the model takes uint8 images, height × width × channels
    labels: tuple[str, ...]  # names of classes, labels or values, in the order of the output
    golden: Golden
    verdict: Verdict | None
    provenance: dict[str, Any]  # artifact keys, versions, hashes: where each file came from
    files: tuple[File, ...]  # every file of the bundle but edgekd.json itself
    task: Task = Task()  # bundles that do not say it are classifiers


def read(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`.

    Raises:
        ModelError: there is none, or it breaks a rule of the schema.
    """
    path = folder / NAME
    where = str(path)
    if path.is_symlink() or not path.is_file():
        raise ModelError(
            "no bundle: there is no such file", where=where, fix="edgekd compress writes bundles/<target>/"
        )
    if path.stat().st_size > LARGEST_BYTES:
        raise ModelError(f"larger than a manifest can be ({path.stat().st_size} bytes)", where=where)
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise ModelError(f"not valid JSON: {problem}", where=where) from problem
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        given = table.get("schema") if isinstance(table, dict) else None
        raise ModelError(f"schema {given!r} is not known", where=where, expected=f"schema {SCHEMA}")
    manifest = toml.read(Manifest, table, NAME, error=ModelError)
    _check(manifest)
    return manifest


def text(manifest: Manifest) -> str:
    """The manifest as it is written: indented JSON, the same bytes for the same content."""
    return json.dumps(asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def place(folder: Path, relative: str) -> Path:
    """Where a file of the bundle is.

    Raises:
        ModelError: the path is absolute, leaves the folder, or goes through a symbolic link.
    """
    posix = PurePosixPath(relative)
    unsafe = posix.is_absolute() or ".." in posix.parts or "\\" in relative or "\0" in relative or not posix.parts
    if unsafe or PureWindowsPath(relative).drive or str(posix) != relative:
        raise ModelError(f"'{relative}' does not name a file inside the bundle", where=NAME)
    path = folder
    for part in posix.parts:
        path = path / part
        if path.is_symlink():
            raise ModelError(f"'{relative}' goes through a symbolic link", where=NAME)
    return path


def _check(manifest: Manifest) -> None:
    """What the types cannot say: names that must exist, numbers that must make sense."""
    paths = [file.path for file in manifest.files]
    named = [model.path for model in manifest.models]
    problem = ""
    if len(set(paths)) != len(paths):
        problem = "files names a path twice"
    elif manifest.model not in named:
        problem = f"model '{manifest.model}' is not among models"
    elif missing := [path for path in (*named, manifest.golden.path) if path not in paths]:
        problem = f"'{missing[0]}' is not among files"
    elif not manifest.inputs or not manifest.outputs:
        problem = "inputs or outputs are empty"
    elif manifest.preprocessing and len(manifest.preprocessing.mean) != len(manifest.preprocessing.std):
        problem = "preprocessing has not as many mean values as std values"
    elif any(file.size_bytes < 0 for file in manifest.files) or manifest.golden.samples < 1:
        problem = "a size is negative, or there is no golden sample"
    if problem:
        raise ModelError(problem, where=NAME)
