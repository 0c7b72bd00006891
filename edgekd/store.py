"""The artifact store: everything built is a folder named by the hash of what it was built from.

    <root>/<step>-<key>/           a finished artifact: its files and artifact.json; never changed again
    <root>/.partial/<step>-<key>/  a build under way; it survives a kill, and the next run goes on in it
    <root>/.locks/                 one lock a key, so that several runs may share a store

key = hash(step, its version, options, keys of its inputs). Builds are kept here; measurements never are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError, StoreError
from edgekd.processes import here
from edgekd.types import Artifact, Json, Say

MANIFEST = "artifact.json"
Build = Callable[[Path], Mapping[str, Json]]  # fills the folder, returns what is worth knowing about it


def key_of(step: str, version: int, options: Mapping[str, Any], parents: Sequence[str]) -> str:
    """The name of the artifact that `step` makes of these inputs: 20 hexadecimal digits of SHA-256."""
    identity = json.dumps([step, version, options, list(parents)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(identity.encode()).hexdigest()[:20]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: into a neighbour first, then renamed over `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise disk_error(problem, path) from problem


def copy(source: Path, path: Path) -> None:
    """Copy a file whole or not at all, and make its folder.

    Raises:
        StoreError: the disk is full or read-only.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial)
        partial.replace(path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise disk_error(problem, path) from problem


def make_folder(path: Path) -> Path:
    """The folder `path`, made where it does not exist, and known to be writable.

    Raises:
        StoreError: it cannot be made or written.
    """
    probe = path / f".{os.getpid()}.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise disk_error(problem, path) from problem
    return path


def disk_error(problem: OSError, path: Path) -> StoreError:
    """What an OSError on `path` means to a user."""
    reasons = {
        errno.ENOSPC: ("the disk is full", "free some space; the same command goes on where it stopped"),
        errno.EDQUOT: ("the disk quota is used up", "free some space; the same command goes on where it stopped"),
        errno.EROFS: ("the file system is read-only", "choose another folder with --out or --store"),
        errno.EACCES: ("no permission to write", "choose another folder with --out or --store"),
        errno.EPERM: ("no permission to write", "choose another folder with --out or --store"),
        errno.ENOTDIR: ("a file stands where a folder is needed", "choose another folder with --out or --store"),
        errno.EEXIST: ("a file stands where a folder is needed", "choose another folder with --out or --store"),
    }
    what, fix = reasons.get(problem.errno or 0, (f"cannot be written: {problem.strerror or problem}", ""))
    return StoreError(what, where=str(path), fix=fix)


class Store:
    """Finished builds under one folder.

    Args:
        root: the folder; made where it does not exist.
        say: told "cached", "building", "waiting" and "corrupt", each with the step and key.

    Raises:
        StoreError: the folder cannot be written.
    """

    def __init__(self, root: Path, say: Say) -> None:
        self._root, self._say = root, say
        for folder in (root, root / ".partial", root / ".locks"):
            make_folder(folder)

    def step(
        self,
        step: str,
        version: int,
        options: Mapping[str, Any],
        parents: Sequence[Artifact],
        build: Build,
        *,
        together: bool = False,
    ) -> Artifact:
        """The artifact of this step: the one that is there, else built, checked in and published at once.

        `build` gets a folder that may hold what a killed run left there, and returns the artifact's meta. Of several
        processes the first one builds, and the others wait for what it publishes; one that is built `together` is
        built by all of them at once, and the first one's files and meta are published.

        Raises:
            StoreError: the disk is full or read-only.
            EdgekdError: whatever `build` raises; nothing is published then.
        """
        processes = here()
        key = key_of(step, version, options, [parent.key for parent in parents])
        final = self._root / f"{step}-{key}"
        with self._held(step, key) if processes.first else contextlib.nullcontext():
            found = self._found(final, step, key)
            if found is not None:
                return found
            self._say("building", step=step, key=key)

            def made() -> Artifact:
                return self._build(final, step, key, options, parents, build)

            return made() if together else processes.once(made)

    def find(self, step: str, version: int, options: Mapping[str, Any], parents: Sequence[Artifact]) -> Artifact | None:
        """The artifact of this step where it was built already; None where it was not, and nothing is built then.

        One that another process is building is waited for.
        """
        key = key_of(step, version, options, [parent.key for parent in parents])
        with self._held(step, key) if here().first else contextlib.nullcontext():
            return self._found(self._root / f"{step}-{key}", step, key)

    def alias(self, made: Artifact, version: int, options: Mapping[str, Any], parents: Sequence[Artifact]) -> None:
        """Let other options find what was built already: those that say outright what was worked out while building.

        Raises:
            StoreError: the disk is full or read-only.
        """
        place = self._root / f"{made.step}-{key_of(made.step, version, options, [parent.key for parent in parents])}"
        if not here().first or place.exists():
            return
        try:
            place.unlink(missing_ok=True)  # one whose artifact was removed
            place.symlink_to(made.path.name)
        except FileExistsError:
            pass  # another run was faster
        except OSError as problem:
            raise disk_error(problem, self._root) from problem

    def _found(self, final: Path, step: str, key: str) -> Artifact | None:
        """The finished artifact, for all processes; its key is held meanwhile."""
        found = here().once(lambda: self._read(final))
        if found is not None:
            self._say("cached", step=step, key=key)
        return found

    @contextlib.contextmanager
    def _held(self, step: str, key: str) -> Iterator[None]:
        """No other run builds this artifact meanwhile."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._root / ".locks" / f"{step}-{key}")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._say("waiting", step=step, key=key)
                lock.acquire()
        except OSError as problem:
            raise disk_error(problem, self._root) from problem
        try:
            yield
        finally:
            lock.release()

    def _build(
        self, final: Path, step: str, key: str, options: Mapping[str, Any], parents: Sequence[Artifact], build: Build
    ) -> Artifact:
        work = self._root / ".partial" / final.name
        try:
            work.mkdir(exist_ok=True)
            meta = dict(build(work))
            made = Artifact(step=step, key=key, path=final, meta=meta, parents=tuple(p.key for p in parents))
            return here().once(lambda: self._published(made, work, options))
        except OSError as problem:  # the partial folder stays: the same command goes on from it
            raise disk_error(problem, self._root) from problem
        except EdgekdError as problem:
            if here().first and not isinstance(problem, StoreError) and not _resumable(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        except Exception as problem:  # torch.save and safetensors raise errors of their own on a full disk
            if "No space left" in str(problem) or shutil.disk_usage(self._root).free < 1 << 16:
                raise disk_error(OSError(errno.ENOSPC, str(problem)), self._root) from problem
            raise

    def _published(self, made: Artifact, work: Path, options: Mapping[str, Any]) -> Artifact:
        """Check in what was built, and put it where everybody finds it."""
        files = {name: [sha256_of(work / name), (work / name).stat().st_size] for name in _files(work)}
        manifest = {
            "step": made.step, "key": made.key, "options": options, "parents": list(made.parents),
            "meta": made.meta, "files": files,
        }  # fmt: skip
        write_text(work / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n")
        for name in files:
            _sync(work / name)
        work.rename(made.path)
        _sync(self._root)
        return made

    def _read(self, final: Path) -> Artifact | None:
        """The finished artifact; a corrupt one is removed, so that it is built again."""
        if not final.is_dir():
            if final.is_symlink():  # an alias whose artifact was removed
                final.unlink()
            return None
        reason = ""
        try:
            manifest = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
            for name, (sha256, size) in manifest["files"].items():
                path = final / name
                if not path.is_file() or path.stat().st_size != size or sha256_of(path) != sha256:
                    reason = f"{name} is not what was built"
                    break
        except (OSError, ValueError, KeyError, TypeError) as problem:
            reason = f"{MANIFEST} cannot be read: {problem}"
        if not reason:
            return Artifact(manifest["step"], manifest["key"], final, manifest["meta"], tuple(manifest["parents"]))
        self._say("corrupt", path=final.name, reason=reason)
        try:
            shutil.rmtree(final.resolve())
            final.unlink(missing_ok=True)  # an alias
        except OSError as problem:
            raise disk_error(problem, final) from problem
        return None


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _resumable(work: Path) -> bool:
    return (work / "last.pt").exists()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
