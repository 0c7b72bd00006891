"""Bundles: what is written, what a check finds in a damaged one, and run.py as it runs on a device."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_onnx
from bundles import PREPROCESSING, host_bundle, relist, rewrite, run, task_bundle

from edgekd.bundle import Source, golden, verify
from edgekd.bundle import manifest as manifests
from edgekd.errors import ModelError, StoreError
from edgekd.types import Verdict


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_bundle(tmp_path_factory.mktemp("bundle") / "host")


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "host"))


# ---------------------------------------------------------------- writing


def test_what_is_written(written: Path) -> None:
    names = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "edgekd.json", "golden.npz", "labels.txt", "model.fp32.onnx", "model.int8.onnx", "run.py",
        "app/app.py", "app/cpp/CMakeLists.txt", "app/cpp/main.cpp",
    }  # fmt: skip
    manifest = manifests.read(written)
    assert manifest.model == "model.int8.onnx"
    assert manifest.labels == tiny_onnx.LABELS
    assert manifest.preprocessing == PREPROCESSING
    assert manifest.preprocessing_in_graph
    assert [(item.name, item.dtype, item.shape) for item in manifest.inputs] == [("image", "uint8", ("batch", 8, 8, 3))]
    assert manifest.verdict == Verdict("met", ("accuracy drop 0.2 % of 1 % allowed",))
    assert {file.path for file in manifest.files} == names - {"edgekd.json"}
    assert manifest.provenance["artifacts"] == {"onnx": "0123456789abcdef0123"}


def test_a_sound_bundle_has_no_finding(written: Path) -> None:
    found = verify(written)
    assert found.sound, found.findings
    assert found.skipped == ()
    assert found.files == 9


def test_the_same_input_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = host_bundle(tmp_path / "host")
    for path in sorted(written.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(written)).read_bytes(), path


def test_no_path_of_this_machine_is_in_it(written: Path) -> None:
    for path in written.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(written.parent).encode() not in content, path
            assert str(Path.home()).encode() + b"/" not in content, path


def test_readme_names_what_is_there(written: Path) -> None:
    text = (written / "README.md").read_text(encoding="utf-8")
    for word in (
        "colours",
        "model.int8.onnx` (default)",
        "--selftest",
        "4 classes",
        "uint8, 8 × 8",
        "Budget: met",
        "bytes",
    ):
        assert word in text, word
    assert "TensorRT" not in text


def test_a_bundle_is_replaced_and_nothing_else(written: Path, tmp_path: Path) -> None:
    folder = host_bundle(tmp_path / "host")
    (folder / "engine").mkdir()
    host_bundle(folder, name="second")
    assert manifests.read(folder).name == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["host", "models"]
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("years of work")
    with pytest.raises(StoreError, match="no bundle"):
        host_bundle(foreign)
    assert (foreign / "chapter1.txt").read_text() == "years of work"


def test_a_failed_write_leaves_the_old_bundle(written: Path, tmp_path: Path) -> None:
    folder = host_bundle(tmp_path / "host")
    other = tiny_onnx.classifier(tmp_path / "models" / "other.onnx", raw=False)
    with pytest.raises(ModelError, match="not those of"):
        host_bundle(folder, models=[Source(tmp_path / "models" / "fp32.onnx", "fp32"), Source(other, "fp16")])
    assert verify(folder).sound
    assert sorted(path.name for path in tmp_path.iterdir()) == ["host", "models"]


def test_models_that_cannot_be_bundled(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_text("this is no model")
    with pytest.raises(ModelError, match="no ONNX file"):
        host_bundle(tmp_path / "host", models=[Source(tmp_path / "no.onnx", "fp32")])
    with pytest.raises(ModelError, match="at least one"):
        host_bundle(tmp_path / "host", models=[])
    twice = Source(tiny_onnx.classifier(tmp_path / "m.onnx"), "fp32")
    with pytest.raises(ModelError, match="would be called"):
        host_bundle(tmp_path / "host", models=[twice, twice])
    model = onnx.load(twice.path)
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(ModelError, match="another file"):
        host_bundle(tmp_path / "host", models=[Source(tmp_path / "big.onnx", "fp32")])
    assert not (tmp_path / "host").exists()


@pytest.mark.parametrize(
    ("name", "labels", "says"),
    [
        ("multilabel", "flags", ("one logit for each of 4 labels", "its sigmoid is", "Confidence is a sigmoid")),
        ("regression", "values", ("The output is 4 values",)),
        ("segmentation", "maps", ("one logit for each of 4 classes (`labels.txt`, in order) at each point",)),
    ],
)
def test_a_bundle_of_another_task(name: str, labels: str, says: tuple[str, ...], tmp_path: Path) -> None:
    folder = task_bundle(tmp_path / "host", name)
    assert verify(folder).sound
    assert manifests.read(folder).task == manifests.Task(name, labels)  # type: ignore[arg-type]
    text = (folder / "README.md").read_text(encoding="utf-8")
    for words in says:
        assert words in text
    assert "softmax" not in text
    assert "app/" not in text
    assert not (folder / "app").exists(), "the sample apps classify"


def test_a_manifest_that_names_no_task_is_of_a_classifier(bundle: Path) -> None:
    rewrite(bundle, lambda table: table.pop("task"))
    assert manifests.read(bundle).task == manifests.Task("classification", "classes")


def test_a_model_that_is_no_image_classifier(tmp_path: Path) -> None:
    model = tiny_onnx.classifier(tmp_path / "m.onnx", raw=False)
    samples = {"image": np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)}
    folder = host_bundle(
        tmp_path / "host", models=[Source(model, "fp32")], samples=samples, preprocessing=None, labels=()
    )
    assert verify(folder).sound
    assert not (folder / "app").exists()
    assert not (folder / "labels.txt").exists()
    assert run(folder, "--selftest").returncode == 0
    np.savez(tmp_path / "in.npz", **samples)  # type: ignore[arg-type]
    done = run(folder, str(tmp_path / "in.npz"))
    assert done.returncode == 0
    assert done.stdout.startswith("logits float32 (3, 4)")


# ---------------------------------------------------------------- verifying


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    """Move it out of the bundle and leave a link to it."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


DAMAGE: Mapping[str, tuple[Callable[[Path], object], str, str]] = {
    "a bit of the model": (lambda b: flip(b / "model.int8.onnx"), "model.int8.onnx", "was changed"),
    "a bit of the program": (lambda b: flip(b / "run.py"), "run.py", "was changed"),
    "a model cut short": (lambda b: os.truncate(b / "model.fp32.onnx", 100), "model.fp32.onnx", "has 100 bytes"),
    "a missing file": (lambda b: (b / "golden.npz").unlink(), "golden.npz", "is missing"),
    "a stray file": (lambda b: (b / "numpy.py").write_text("x"), "numpy.py", "not in the manifest"),
    "a stray file deep down": (lambda b: (b / "app" / "x.so").write_bytes(b"x"), "app/x.so", "not in the manifest"),
    "a link for a file": (
        lambda b: link(b / "run.py"),
        "run.py", "symbolic link",
    ),
    "a stray link": (lambda b: (b / "passwd").symlink_to("/etc/passwd"), "passwd", "symbolic link"),
    "a linked folder": (
        lambda b: link(b / "app"),
        "app/app.py", "symbolic link",
    ),
    "no manifest": (lambda b: (b / "edgekd.json").unlink(), "edgekd.json", "no such file"),
    "a manifest that is a link": (
        lambda b: link(b / "edgekd.json"),
        "edgekd.json", "no such file",
    ),
    "a manifest cut short": (lambda b: os.truncate(b / "edgekd.json", 200), "edgekd.json", "not valid JSON"),
    "a manifest that is no text": (lambda b: (b / "edgekd.json").write_bytes(b"\xff\0"), "edgekd.json", "not valid"),
    "a manifest nested too deep": (
        lambda b: (b / "edgekd.json").write_text("[" * 100_000), "edgekd.json", "not valid JSON",
    ),
    "a manifest that is a list": (lambda b: (b / "edgekd.json").write_text("[]"), "edgekd.json", "schema None"),
    "another schema": (lambda b: rewrite(b, lambda t: t.update(schema=2)), "edgekd.json", "schema 2"),
    "an unknown key": (lambda b: rewrite(b, lambda t: t.update(labls=[])), "edgekd.json", "unknown key 'labls'"),
    "a missing key": (lambda b: rewrite(b, lambda t: t.pop("labels")), "edgekd.json", "'labels' is missing"),
    "a key of another type": (lambda b: rewrite(b, lambda t: t.update(name=7)), "edgekd.json", "name"),
    "a model that is not listed": (
        lambda b: rewrite(b, lambda t: t.update(model="model.onnx")), "edgekd.json", "not among models",
    ),
    "a file listed twice": (lambda b: rewrite(b, lambda t: t["files"].append(t["files"][0])), "edgekd.json", "twice"),
    "negative size": (lambda b: rewrite(b, lambda t: t["files"][0].update(size_bytes=-1)), "edgekd.json", "negative"),
    "a huge manifest": (
        lambda b: os.truncate(b / "edgekd.json", manifests.LARGEST_BYTES + 1), "edgekd.json", "larger than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_found(bundle: Path, name: str) -> None:
    damage, path, problem = DAMAGE[name]
    damage(bundle)
    found = verify(bundle)
    assert not found.sound
    assert any(item.path == path and problem in item.problem for item in found.findings), found.findings


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret", "app/../../secret", "C:\\x", "..\\x", "a//b", "./run.py", "", ".", "a\0b", "app/.."],
)
def test_paths_that_leave_the_folder_are_refused(bundle: Path, path: str) -> None:
    (bundle.parent / "secret").write_text("secret")
    with pytest.raises(ModelError, match="does not name a file inside"):
        manifests.place(bundle, path)
    rewrite(bundle, lambda table: table["files"].append({"path": path, "sha256": "0" * 64, "size_bytes": 6}))
    found = verify(bundle)
    assert any(item.path == path and "inside the bundle" in item.problem for item in found.findings), found.findings


def test_another_model_with_a_new_hash_fails_the_golden_samples(bundle: Path, tmp_path: Path) -> None:
    tiny_onnx.classifier(bundle / "model.fp32.onnx", seed=7)
    relist(bundle, "model.fp32.onnx")
    found = verify(bundle)
    assert [item.path for item in found.findings] == ["model.fp32.onnx"]
    assert "golden samples: output 'logits' differs" in found.findings[0].problem
    tiny_onnx.classifier(bundle / "model.fp32.onnx", raw=False)
    relist(bundle, "model.fp32.onnx")
    assert "inputs or outputs" in verify(bundle).findings[0].problem


def test_golden_samples_that_are_no_arrays(bundle: Path) -> None:
    np.savez(bundle / "golden.npz", np.array([{}], dtype=object))  # would run code when read
    relist(bundle, "golden.npz")
    assert "cannot be read" in verify(bundle).findings[0].problem
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("input/image.npy", bytes(golden.LARGEST_BYTES + 1))
    (bundle / "golden.npz").write_bytes(buffer.getvalue())
    relist(bundle, "golden.npz")
    assert "unpack to" in verify(bundle).findings[0].problem
    (bundle / "golden.npz").write_bytes(b"PK")
    relist(bundle, "golden.npz")
    assert verify(bundle).findings[0].path == "golden.npz"


def test_engines_built_on_the_board_are_not_strays(bundle: Path) -> None:
    (bundle / "engine").mkdir()
    (bundle / "engine" / "model.int8.engine").write_bytes(b"built here")
    found = verify(bundle)
    assert found.sound
    assert "engine/" in found.skipped[0]
    (bundle / "engine" / "link").symlink_to("/etc")
    assert not verify(bundle).sound


def test_verifying_writes_and_runs_nothing(bundle: Path) -> None:
    marker = bundle.parent / "ran"
    (bundle / "run.py").write_text(f"open({str(marker)!r}, 'w')")
    relist(bundle, "run.py")
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    assert verify(bundle).sound  # the manifest is not signed: whoever rewrites it too is not found
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    assert not marker.exists()


def test_golden_tolerance() -> None:
    expected = {"logits": np.array([[1.0, -4.0]])}
    allowed = golden.tolerance(expected, "fp32")
    assert allowed.max_abs == pytest.approx(0.04)
    assert golden.difference(expected, {"logits": np.array([[1.03, -4.0]])}, allowed) is None
    assert "differs by 0.05" in str(golden.difference(expected, {"logits": np.array([[1.05, -4.0]])}, allowed))
    assert "no numbers" in str(golden.difference(expected, {"logits": np.array([[np.nan, -4.0]])}, allowed))
    assert "shape" in str(golden.difference(expected, {"logits": np.zeros((2, 2))}, allowed))
    assert "missing" in str(golden.difference(expected, {}, allowed))
