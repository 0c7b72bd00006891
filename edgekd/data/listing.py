"""Which images a folder or zip file holds, and which class and split each belongs to."""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from edgekd.data.images import EXTENSIONS, UnreadableError
from edgekd.data.splits import listed
from edgekd.errors import DataError, nearest

_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")  # the first that is there is the test split
_SYSTEM = ("Thumbs.db", "desktop.ini")  # files that Windows leaves in picture folders
_LARGEST_ENTRY_BYTES = 1 << 30  # a zip entry that claims more is refused before it is inflated


class Files(Protocol):
    """Named files of one place. `names` are relative, with forward slashes; `folders` include empty ones."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def folders(self) -> Sequence[str]: ...

    def read(self, name: str) -> bytes:
        """The content of one file.

        Raises:
            UnreadableError: it cannot be read.
        """
        ...


class FolderFiles:
    """The files below a folder, links followed."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        names: list[str] = []
        folders: list[str] = []
        visited: set[str] = set()
        for here, below, files in os.walk(root, followlinks=True):
            real = os.path.realpath(here)
            if real in visited:  # a link to a folder above would never end
                below.clear()
                continue
            visited.add(real)
            prefix = "" if here == self._root else os.path.relpath(here, root).replace(os.sep, "/") + "/"
            names.extend(prefix + name for name in files)
            folders.extend(prefix + name for name in below)
        self.names, self.folders = tuple(names), tuple(folders)

    def read(self, name: str) -> bytes:
        """The content of one file."""
        try:
            with open(os.path.join(self._root, name), "rb") as file:
                return file.read()
        except OSError as problem:
            raise UnreadableError(str(problem.strerror)) from problem


class ZipFiles:
    """The entries of a zip file, read in place: nothing is extracted. Each process opens the file for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        names = self._zip().namelist()
        self.names = tuple(name for name in names if not name.endswith("/"))
        self.folders = tuple(name.rstrip("/") for name in names if name.endswith("/"))

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "names": self.names, "folders": self.folders}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _opened=None, _lock=threading.Lock())

    def _zip(self) -> zipfile.ZipFile:
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                try:
                    self._opened = (os.getpid(), zipfile.ZipFile(self._path))
                except (zipfile.BadZipFile, OSError) as problem:
                    raise DataError(f"not a zip file that can be read: {problem}", where=str(self._path)) from problem
            return self._opened[1]

    def read(self, name: str) -> bytes:
        """The content of one entry."""
        archive = self._zip()
        try:
            entry = archive.getinfo(name)
            if entry.file_size > _LARGEST_ENTRY_BYTES:
                raise UnreadableError(f"it unpacks to {entry.file_size / 1e9:.1f} GB")
            return archive.read(entry)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as problem:
            raise UnreadableError(str(problem)) from problem  # RuntimeError: a password or method zipfile does not know


@dataclass(frozen=True, slots=True)
class Layout:
    """Images by split, each a file name and the position of its class; `test` is None where there is no test folder."""

    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...] | None
    notes: tuple[str, ...]


def files(path: Path) -> Files:
    """The files of a folder or zip file.

    Raises:
        DataError: it does not exist or is neither.
    """
    if path.is_dir():
        return FolderFiles(path)
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise DataError("neither a folder nor a zip file", where=str(path), fix="unpack it, or pack it as .zip")
        return ZipFiles(path)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(
        "no such folder or zip file",
        where=str(path),
        nearest=nearest(path.name, siblings),
        fix="" if siblings else f"{path.parent} does not exist either",
    )


def layout(found: Files, where: str) -> Layout:
    """Sorts images into classes and splits by the folders they lie in.

    `<class>/…/*.jpg`, or `train/<class>/…` with `test/<class>/…` (or `val/`); one folder around all of it is allowed.
    Classes are in the order of their names, as torchvision's ImageFolder has them.

    Raises:
        DataError: no images, no class folders, a class without images, or in one split only.
    """
    names = [name for name in found.names if not _hidden(name)]
    images = sorted(name for name in names if PurePosixPath(name).suffix.lower() in EXTENSIONS)
    if not images:
        fix = f"it holds {len(names):,} other files, e.g. {listed(sorted(names))}" if names else "it is empty"
        raise DataError("there are no images", where=where, expected="<class>/*.jpg or train/<class>/*.jpg", fix=fix)
    notes = []
    if len(images) < len(names):
        others = sorted(set(names) - set(images))
        notes.append(f"{len(others):,} files that are not images were ignored: {listed(others)}")
    folders = {folder for folder in found.folders if not _hidden(folder)}
    folders |= {str(parent) for name in images for parent in PurePosixPath(name).parents if str(parent) != "."}
    root = _unwrapped(images, folders)
    tops = {_first(folder, root): folder for folder in sorted(folders) if _depth(folder) == _depth(root) + 1}
    train_root = next((tops[top] for top in tops if top.lower() in _TRAIN), None)
    test_roots = [tops[top] for word in _TEST for top in tops if top.lower() == word]
    if train_root is None:
        if len(test_roots) == len(tops) and tops:
            only = listed([f"{top}/" for top in sorted(tops)])
            raise DataError(f"there is {only} but no train/", where=where, expected="train/<class>/*.jpg")
        classes, train = _by_class(images, folders, root, where, notes)
        return Layout(classes, train, None, tuple(notes))
    for top in sorted(set(tops.values()) - {train_root, *test_roots[:1]}):
        notes.append(f"{top}/ ({sum(name.startswith(top + '/') for name in images):,} images) was not used")
    classes, train = _by_class(images, folders, train_root, where, notes)
    if not test_roots:
        return Layout(classes, train, None, tuple(notes))
    test_classes, test = _by_class(images, folders, test_roots[0], where, notes)
    _same_classes(classes, test_classes, (train_root, test_roots[0]), where)
    return Layout(classes, train, test, tuple(notes))


def _by_class(
    images: Sequence[str], folders: set[str], root: str, where: str, notes: list[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, int], ...]]:
    level = _depth(root) + 1
    classes = sorted(_first(folder, root) for folder in folders if _inside(folder, root) and _depth(folder) == level)
    mine = [name for name in images if _inside(name, root)]
    stray = [name for name in mine if _depth(name) == level]
    if stray and not classes:
        raise DataError(
            f"{len(stray):,} images lie in no class folder, e.g. {stray[0]}",
            where=where,
            expected="one folder for each class",
        )
    if stray:
        notes.append(f"{len(stray):,} images that lie in no class folder were ignored: {listed(stray)}")
    position = {name: index for index, name in enumerate(classes)}
    samples = tuple((name, position[_first(name, root)]) for name in mine if _depth(name) > level)
    filled = {label for _, label in samples}
    empty = [(root + "/" if root else "") + name for index, name in enumerate(classes) if index not in filled]
    if empty:
        count = "a class folder has" if len(empty) == 1 else f"{len(empty)} class folders have"
        raise DataError(
            f"{count} no images: {listed(empty)}",
            where=where,
            fix="put images in, or remove the folder",
        )
    return tuple(classes), samples


def _same_classes(train: Sequence[str], test: Sequence[str], roots: tuple[str, str], where: str) -> None:
    for here, there, root, other in ((test, train, *reversed(roots)), (train, test, *roots)):
        alone = sorted(set(here) - set(there))
        if alone:
            count = "a class is" if len(alone) == 1 else f"{len(alone)} classes are"
            raise DataError(
                f"{count} in {root}/ and not in {other}/: {listed([repr(name) for name in alone])}",
                where=where,
                nearest=nearest(alone[0], there),
                fix=f"give {other}/ images of the same classes, or take them out of {root}/",
            )


def _unwrapped(images: Sequence[str], folders: set[str]) -> str:
    """The folder that holds the class or split folders: zip files often have one folder around everything."""
    root = ""
    while True:
        tops = [folder for folder in folders if _inside(folder, root) and _depth(folder) == _depth(root) + 1]
        if len(tops) != 1 or _first(tops[0], root).lower() in (*_TRAIN, *_TEST):
            return root
        if any(_inside(name, root) and _depth(name) <= _depth(tops[0]) + 1 for name in images):
            return root
        root = tops[0]


def _hidden(name: str) -> bool:
    parts = name.split("/")
    return parts[-1] in _SYSTEM or any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _depth(name: str) -> int:
    return name.count("/") + 1 if name else 0


def _inside(name: str, root: str) -> bool:
    return not root or name.startswith(root + "/")


def _first(name: str, root: str) -> str:
    """The first component of `name` below `root`."""
    return name[len(root) + 1 if root else 0 :].split("/", 1)[0]
