"""run.py and the app samples of a bundle, as they run on a device."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from bundles import host_bundle, relist, rewrite, run, task_bundle

from edgekd import target as targets
from edgekd.bundle import golden, verify
from edgekd.types import Latency


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_bundle(tmp_path_factory.mktemp("bundle") / "host")


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "host"))


def test_run_py_is_python_3_8() -> None:
    for file in sorted((targets.folder()).rglob("*.py")):
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_selftest(bundle: Path) -> None:
    for arguments in ((), ("--model", "model.fp32.onnx")):
        done = run(bundle, "--selftest", *arguments)
        assert done.returncode == 0, done.stderr
        assert "selftest passed" in done.stdout
        assert "6 samples" in done.stdout
    assert verify(bundle).sound  # it left nothing behind


def test_selftest_fails_on_another_model(bundle: Path) -> None:
    tiny_onnx.classifier(bundle / "model.int8.onnx", "int8", seed=7)
    done = run(bundle, "--selftest")
    assert done.returncode == 1
    assert "not the file that the manifest was written for" in done.stderr
    relist(bundle, "model.int8.onnx")
    done = run(bundle, "--selftest")
    assert done.returncode == 1
    assert "selftest FAILED" in done.stdout
    assert "does not compute here what it computed" in done.stdout


def test_predictions(bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    image = tiny_onnx.images(1)[0]
    logits = golden.compute(bundle / "model.int8.onnx", {"image": image[None]})["logits"][0]
    best = tiny_onnx.LABELS[int(logits.argmax())]
    Image.fromarray(image).save(tmp_path / "i.png")
    Image.fromarray(image).save(tmp_path / "i.ppm")
    np.save(tmp_path / "i.npy", image)
    np.savez(tmp_path / "i.npz", image=image[None])
    outputs = {
        name: run(bundle, str(tmp_path / name), "--top", "3").stdout for name in ("i.png", "i.ppm", "i.npy", "i.npz")
    }
    assert len(set(outputs.values())) == 1, outputs
    lines = outputs["i.png"].splitlines()
    assert len(lines) == 3
    assert lines[0].split()[1] == best
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert float(lines[0].split()[0]) == pytest.approx(float(probabilities.max()), abs=1e-4)
    app = subprocess.run(
        [sys.executable, str(bundle / "app" / "app.py"), str(tmp_path / "i.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{best} (" in app.stdout


def test_predictions_of_other_tasks(tmp_path: Path) -> None:
    image = tiny_onnx.images(1)[0]
    np.save(tmp_path / "i.npy", image)
    given, saved = str(tmp_path / "i.npy"), str(tmp_path / "o.npy")
    output = golden.compute(tiny_onnx.classifier(tmp_path / "m.onnx"), {"image": image[None]})["logits"][0]
    likely = 1 / (1 + np.exp(-output.astype(np.float64)))

    flags = task_bundle(tmp_path / "flags", "multilabel")
    wanted = [f"{likely[i]:7.4f}  {tiny_onnx.LABELS[i]}" for i in np.argsort(-likely) if likely[i] >= 0.5]
    assert run(flags, given, "--top", "1").stdout.splitlines() == wanted
    assert len(run(flags, given, "--threshold", "0").stdout.splitlines()) == 4
    assert run(flags, given, "--threshold", "1.1").stdout == "no label reaches 1.1\n"

    values = task_bundle(tmp_path / "values", "regression")
    lines = [line.split() for line in run(values, given, "--save", saved).stdout.splitlines()]
    assert [name for _, name in lines] == list(tiny_onnx.LABELS)
    np.testing.assert_allclose([float(value) for value, _ in lines], output, rtol=1e-4)
    np.testing.assert_allclose(np.load(saved), output[None], rtol=1e-6)

    maps = task_bundle(tmp_path / "maps", "segmentation")
    decided = np.where(image.max(2) >= 200, image.argmax(2), 3)
    done = run(maps, given, "--save", saved)
    assert (np.load(saved)[0] == decided).all()
    shares = {line.split()[1]: float(line.split()[0]) for line in done.stdout.splitlines()}
    for index, label in enumerate(tiny_onnx.LABELS):
        assert shares[label] == pytest.approx((decided == index).mean(), abs=1e-4)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_outputs_of_another_shape_than_the_task_says_are_shown_as_they_are(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", tiny_onnx.images(1)[0])
    rewrite(bundle, lambda table: table.update(task={"name": "segmentation", "labels": "maps"}))
    assert run(bundle, str(tmp_path / "i.npy")).stdout.startswith("logits float32 (1, 4)\n")


def test_bench(bundle: Path) -> None:
    done = run(bundle, "--bench", "--quick")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    latency = Latency(**found["latency_ms"])
    assert latency.n >= 50
    assert 0 < latency.p50 <= latency.p90 <= latency.p99
    assert latency.low <= latency.p50 <= latency.high
    assert latency.origin == "device"
    assert found["conditions"]["runtime"].startswith("onnxruntime ")
    assert found["conditions"]["warm_up_runs"] >= 40


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ((), 2, "give an input"),
        (("none.png",), 1, "no file none.png"),
        (("--selftest", "--model", "model.fp16.onnx"), 1, "the models here are model.int8.onnx, model.fp32.onnx"),
        (("--selftest", "--model", "../host/model.int8.onnx"), 1, "not in the manifest"),
        (("--selftest", "--runtime", "tensorrt"), 1, "./build.sh"),
        (("--selftest", "--model", "engine/x.engine"), 1, "there is no engine"),
        (("--selftest", "--model", "model.int8.onnx", "--runtime", "tensorrt"), 1, "runs on onnxruntime"),
        (("--bench", "--threads", "0"), 2, "at least 1"),
    ],
)
def test_what_a_user_can_get_wrong(bundle: Path, arguments: tuple[str, ...], status: int, reason: str) -> None:
    done = run(bundle, *arguments)
    assert done.returncode == status
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.ppm", b"P6 8 8 255\nshort"), ("x.ppm", b"GIF89a"), ("x.npy", b"garbage"), ("x.png", b"garbage")],
)
def test_broken_images(bundle: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    done = run(bundle, str(tmp_path / name))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def template() -> Any:
    """run.py as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("run_template", targets.folder() / "runner" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


@pytest.mark.parametrize(
    ("size", "wanted"), [((13, 17), (8, 8)), ((5, 4), (9, 11)), ((8, 8), (8, 8)), ((64, 32), (7, 9))]
)
def test_resizing_without_pillow_agrees_with_pillow(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = template().resize(image, *wanted).astype(int)
    theirs = np.asarray(Image.fromarray(image).resize((wanted[1], wanted[0]), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - theirs).max() <= 1


def test_channels_are_converted_as_pillow_does(tmp_path: Path) -> None:
    from PIL import Image

    module = template()
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "c.npy", colour)
    grey = module.read_image(str(tmp_path / "c.npy"), 8, 8, 1)
    assert np.abs(grey[:, :, 0].astype(int) - np.asarray(Image.fromarray(colour).convert("L")).astype(int)).max() <= 1
    Image.fromarray(grey[:, :, 0]).save(tmp_path / "g.pgm")
    assert (module.read_image(str(tmp_path / "g.pgm"), 8, 8, 3) == np.repeat(grey, 3, 2)).all()


def test_the_cpp_sample_compiles_and_classifies(bundle: Path, tmp_path: Path) -> None:
    import onnxruntime
    from PIL import Image

    places = [
        os.environ.get("EDGEKD_ONNXRUNTIME_INCLUDE", ""),
        "/usr/include/onnxruntime",
        "/usr/local/include/onnxruntime",
    ]
    headers = [place for place in places if place and (Path(place) / "onnxruntime_cxx_api.h").is_file()]
    if not headers or shutil.which("c++") is None:
        pytest.skip("no C++ compiler, or no ONNX Runtime headers (EDGEKD_ONNXRUNTIME_INCLUDE=folder names them)")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)  # the wheel has it under its full version only
    program = tmp_path / "classify"
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", headers[0]]
    command += [
        str(bundle / "app" / "cpp" / "main.cpp"),
        "-o",
        str(program),
        str(library),
        f"-Wl,-rpath,{tmp_path}",
    ]
    subprocess.run(command, check=True)
    image = tiny_onnx.images(1)[0]
    logits = golden.compute(bundle / "model.fp32.onnx", {"image": image[None]})["logits"][0]
    Image.fromarray(image).save(tmp_path / "i.ppm")
    given = [str(program), str(bundle / "model.fp32.onnx"), str(tmp_path / "i.ppm"), str(bundle / "labels.txt")]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(tiny_onnx.LABELS[int(logits.argmax())] + " (logit ")
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "i.ppm")
    refused = subprocess.run(given, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "no 8-bit PPM of 8 x 8" in refused.stderr


PYTHON_3_8 = os.environ.get("EDGEKD_PYTHON38", "")


@pytest.mark.skipif(not PYTHON_3_8, reason="EDGEKD_PYTHON38 names no Python 3.8 with numpy and onnxruntime")
def test_on_python_3_8(bundle: Path) -> None:
    assert run(bundle, "--selftest", python=PYTHON_3_8).returncode == 0
    assert json.loads(run(bundle, "--bench", "--quick", python=PYTHON_3_8).stdout)["conditions"]["python"].startswith(
        "3.8"
    )
