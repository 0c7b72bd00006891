"""The store: same inputs, same key; published whole or not at all; safe against kills, corruption and neighbours."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from edgekd.errors import DataError, StoreError
from edgekd.store import Store, key_of, make_folder, write_text
from edgekd.types import Json

Events = list[tuple[str, Mapping[str, Json]]]


@pytest.fixture
def events() -> Events:
    return []


@pytest.fixture
def store(tmp_path: Path, events: Events) -> Store:
    return Store(tmp_path / "store", lambda event, /, **fields: events.append((event, fields)))


def _write(text: str) -> object:
    def build(work: Path) -> Mapping[str, Json]:
        (work / "out.txt").write_text(text)
        return {"length": len(text)}

    return build


def test_a_step_is_built_once(store: Store, events: Events) -> None:
    first = store.step("demo", 1, {"a": 1}, [], _write("x"))  # type: ignore[arg-type]
    again = store.step("demo", 1, {"a": 1}, [], _write("never built"))  # type: ignore[arg-type]
    assert (first.path / "out.txt").read_text() == "x"
    assert again == first
    assert first.meta == {"length": 1}
    assert [event for event, _ in events] == ["building", "cached"]


def test_what_was_built_is_found_and_nothing_is_built_for_it(store: Store, events: Events) -> None:
    assert store.find("demo", 1, {"a": 1}, []) is None
    made = store.step("demo", 1, {"a": 1}, [], _write("x"))  # type: ignore[arg-type]
    assert store.find("demo", 1, {"a": 1}, []) == made
    assert store.find("demo", 1, {"a": 2}, []) is None
    assert [event for event, _ in events] == ["building", "cached"]
    (made.path / "out.txt").write_text("y")
    assert store.find("demo", 1, {"a": 1}, []) is None, "it is not what was built"
    assert [event for event, _ in events] == ["building", "cached", "corrupt"]


def test_the_key_follows_step_version_options_and_parents() -> None:
    base = key_of("demo", 1, {"a": 1, "b": 2}, ["p"])
    assert base == key_of("demo", 1, {"b": 2, "a": 1}, ["p"])
    others = [
        key_of("other", 1, {"a": 1, "b": 2}, ["p"]),
        key_of("demo", 2, {"a": 1, "b": 2}, ["p"]),
        key_of("demo", 1, {"a": 1, "b": 3}, ["p"]),
        key_of("demo", 1, {"a": 1, "b": 2}, ["q"]),
    ]
    assert base not in others
    assert len(set(others)) == 4


def test_an_alias_finds_what_was_built_and_builds_anew_what_is_gone(store: Store, events: Events) -> None:
    made = store.step("demo", 1, {"a": "found"}, [], _write("x"))  # type: ignore[arg-type]
    for _ in range(2):
        store.alias(made, 1, {"a": 7}, [])
    again = store.step("demo", 1, {"a": 7}, [], _write("never built"))  # type: ignore[arg-type]
    assert (again.key, (again.path / "out.txt").read_text()) == (made.key, "x")
    shutil.rmtree(made.path)
    anew = store.step("demo", 1, {"a": 7}, [], _write("y"))  # type: ignore[arg-type]
    assert (anew.path / "out.txt").read_text() == "y"
    assert [event for event, _ in events] == ["building", "cached", "building"]


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "half"])
def test_a_corrupt_entry_is_told_and_built_again(store: Store, events: Events, damage: str) -> None:
    made = store.step("demo", 1, {}, [], _write("good"))  # type: ignore[arg-type]
    if damage == "truncate":
        (made.path / "out.txt").write_text("bad!")
    elif damage == "delete":
        (made.path / "out.txt").unlink()
    elif damage == "manifest":
        (made.path / "artifact.json").write_text("{}")
    else:
        (made.path / "artifact.json").write_text((made.path / "artifact.json").read_text()[:20])
    again = store.step("demo", 1, {}, [], _write("good"))  # type: ignore[arg-type]
    assert (again.path / "out.txt").read_text() == "good"
    assert "corrupt" in [event for event, _ in events]


def test_a_failed_build_publishes_nothing_and_an_interrupted_one_goes_on(store: Store) -> None:
    def refuse(work: Path) -> Mapping[str, Json]:
        (work / "junk").write_text("x")
        raise DataError("no")

    def interrupt(work: Path) -> Mapping[str, Json]:
        (work / "half").write_text("x")
        raise KeyboardInterrupt

    def finish(work: Path) -> Mapping[str, Json]:
        assert (work / "half").exists()
        return {}

    with pytest.raises(DataError):
        store.step("demo", 1, {}, [], refuse)
    with pytest.raises(KeyboardInterrupt):
        store.step("demo", 1, {}, [], interrupt)
    made = store.step("demo", 1, {}, [], finish)
    assert sorted(path.name for path in made.path.iterdir()) == ["artifact.json", "half"]


@pytest.mark.parametrize("hidden", [True, False])
def test_a_full_disk_is_one_clear_error(store: Store, hidden: bool) -> None:
    def build(work: Path) -> Mapping[str, Json]:
        if hidden:  # as torch.save and safetensors report it
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError, match="the disk is full"):
        store.step("demo", 1, {}, [], build)


def test_two_threads_build_one_artifact_once(store: Store) -> None:
    built: list[int] = []
    started = threading.Barrier(2)

    def build(work: Path) -> Mapping[str, Json]:
        built.append(1)
        (work / "out").write_text("x")
        return {}

    def run() -> None:
        started.wait()
        store.step("demo", 1, {}, [], build)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_a_killed_process_leaves_the_lock_free_and_its_work_in_place(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from edgekd.store import Store
        def build(work):
            if (work / "step1").exists():
                return {"resumed": True}
            (work / "step1").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        store = Store(Path(sys.argv[1]), lambda event, /, **fields: None)
        print(store.step("demo", 1, {}, [], build).meta)
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    assert subprocess.run(command, check=False).returncode == -9
    assert not list((tmp_path / "store").glob("demo-*"))
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stdout == "{'resumed': True}\n"


def test_the_manifest_holds_the_files_and_their_hashes_and_no_time(store: Store) -> None:
    made = store.step("demo", 1, {"a": 1}, [], _write("x"))  # type: ignore[arg-type]
    manifest = json.loads((made.path / "artifact.json").read_text())
    assert set(manifest) == {"step", "key", "options", "parents", "meta", "files"}
    assert manifest["files"]["out.txt"][1] == 1


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        make_folder(tmp_path / "file" / "runs")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        write_text(tmp_path / "file" / "report.json", "{}")


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="disk is full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
