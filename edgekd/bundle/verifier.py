"""Check a bundle: is it whole, is it what was written, does it still compute the same? Executes and writes nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from edgekd.bundle import golden
from edgekd.bundle.manifest import ENGINES, NAME, Manifest, place, read
from edgekd.bundle.writer import external_data, read_signature
from edgekd.errors import EdgekdError, ModelError
from edgekd.store import sha256_of


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with one file of a bundle."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of a check: sound where there is no finding; `skipped` says what could not be checked here, and why."""

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]
    files: int  # that were checked

    @property
    def sound(self) -> bool:
        return not self.findings


def verify(folder: Path) -> Verification:
    """Check the bundle in `folder`: manifest, every file's hash and size, no stray file or link, and golden samples.

    The golden outputs are computed anew on ONNX Runtime, where it is installed and the files are sound.
    A bundle that passes is undamaged; the manifest is not signed, so this says nothing about who wrote it.
    """
    try:
        manifest = read(folder)
    except ModelError as problem:
        return Verification((Finding(NAME, str(problem)),), (), 0)
    findings = [*_files(folder, manifest), *_strays(folder, manifest)]
    skipped: list[str] = []
    if findings:
        skipped.append("the models were not run, because files are not what the manifest says")
    elif importlib.util.find_spec("onnxruntime") is None:
        skipped.append("the models were not run, because onnxruntime is not installed")
    else:
        findings += _models(folder, manifest)
    if (folder / ENGINES).is_dir():
        skipped.append(f"{ENGINES}/ was not checked: it was built on this device and is compared when it is loaded")
    return Verification(tuple(findings), tuple(skipped), len(manifest.files))


def _files(folder: Path, manifest: Manifest) -> list[Finding]:
    findings = []
    for file in manifest.files:
        try:
            path = place(folder, file.path)
        except ModelError as problem:
            findings.append(Finding(file.path, problem.what))
            continue
        if not path.is_file():
            findings.append(Finding(file.path, "is missing"))
        elif path.stat().st_size != file.size_bytes:
            findings.append(Finding(file.path, f"has {path.stat().st_size} bytes, expected {file.size_bytes}"))
        elif sha256_of(path) != file.sha256:
            findings.append(Finding(file.path, "was changed: its SHA-256 is not the one in the manifest"))
    return findings


def _strays(folder: Path, manifest: Manifest) -> list[Finding]:
    """Links, and files that nobody listed: a stray module beside run.py would be imported by it."""
    known = {NAME, *(file.path for file in manifest.files)}
    findings = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_symlink():
            findings.append(Finding(relative.as_posix(), "is a symbolic link"))
        elif path.is_file() and relative.as_posix() not in known and relative.parts[0] != ENGINES:
            findings.append(Finding(relative.as_posix(), "is not in the manifest"))
    return findings


def _models(folder: Path, manifest: Manifest) -> list[Finding]:
    import onnx

    try:
        wanted = golden.read(place(folder, manifest.golden.path))
    except ModelError as problem:
        return [Finding(manifest.golden.path, problem.what)]
    findings = []
    if len(next(iter(wanted.inputs.values()))) != manifest.golden.samples:
        findings.append(Finding(manifest.golden.path, f"does not hold {manifest.golden.samples} samples"))
    for model in manifest.models:
        path = place(folder, model.path)
        if model.path not in wanted.expected:
            findings.append(Finding(model.path, f"has no expected outputs in {manifest.golden.path}"))
            continue
        try:
            if external_data(onnx.load(str(path), load_external_data=False)):
                findings.append(Finding(model.path, "keeps weights in another file"))
                continue
            if read_signature(path) != (manifest.inputs, manifest.outputs):
                findings.append(Finding(model.path, "its inputs or outputs are not those of the manifest"))
                continue
            actual = golden.compute(path, wanted.inputs)
        except EdgekdError as problem:
            findings.append(Finding(model.path, problem.what))
            continue
        differs = golden.difference(wanted.expected[model.path], actual, wanted.tolerance[model.path])
        if differs:
            findings.append(Finding(model.path, f"golden samples: {differs}"))
    return findings
