"""edgekd.load: one call for bundles, runs, ONNX files and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from bundles import host_bundle, task_bundle

from edgekd.bundle.load import load
from edgekd.errors import BackendError, DataError, ModelError


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "colours"
    (folder / "bundles").mkdir(parents=True)
    host_bundle(folder / "bundles" / "host")
    return folder


@pytest.fixture(scope="module")
def host(run_folder: Path) -> Path:
    return run_folder / "bundles" / "host"


def test_a_bundle_takes_images_of_any_kind_and_size(host: Path, tmp_path: Path) -> None:
    from PIL import Image

    model = load(host)
    array = tiny_onnx.images(1)[0]
    picture = Image.fromarray(array)
    picture.save(tmp_path / "i.png")
    found = [model(given) for given in (array, picture, tmp_path / "i.png", str(tmp_path / "i.png"))]
    assert len({item.label for item in found}) == 1
    assert found[0].probabilities.sum() == pytest.approx(1)
    assert found[0].label in tiny_onnx.LABELS
    assert found[0].top(2)[0] == (found[0].label, found[0].probability)
    large = model(np.kron(array, np.ones((5, 4, 1), np.uint8)))
    assert large.probabilities.shape == (4,)
    grey = model(array[:, :, 0])
    assert (grey.probabilities == model(array[:, :, :1].repeat(3, 2)).probabilities).all()
    model.close()


def test_many_images_give_many_predictions(host: Path) -> None:
    model = load(host)
    images = tiny_onnx.images(3)
    together, apart = model(images), [model(image) for image in images]
    assert [item.label for item in together] == [item.label for item in apart]
    assert [item.label for item in model(list(images))] == [item.label for item in apart]


def test_a_model_answers_as_its_task_says(tmp_path: Path) -> None:
    image = tiny_onnx.images(1)[0]
    output = load(tiny_onnx.classifier(tmp_path / "m.onnx"))({"image": image[None]})["logits"][0].astype(np.float64)
    flags = load(task_bundle(tmp_path / "flags", "multilabel"))(image)
    np.testing.assert_allclose(flags.probabilities, 1 / (1 + np.exp(-output)))
    assert [label for label, _ in flags.set(0.0)] == [tiny_onnx.LABELS[i] for i in np.argsort(-output)]
    assert {label for label, _ in flags.set()} == {tiny_onnx.LABELS[i] for i in np.flatnonzero(output >= 0)}
    values = load(task_bundle(tmp_path / "values", "regression"))([image, image])[1]
    assert values.by_name() == dict(zip(tiny_onnx.LABELS, output, strict=True))
    found = load(task_bundle(tmp_path / "maps", "segmentation"))(image)
    assert (found.classes == np.where(image.max(2) >= 200, image.argmax(2), 3)).all()
    assert found.classes.dtype == np.uint8
    assert found.shares()[0] == ("grey", pytest.approx(float((found.classes == 3).mean())))
    assert sum(share for _, share in found.shares()) == pytest.approx(1)


def test_named_arrays_give_named_arrays(host: Path) -> None:
    images = tiny_onnx.images(3)
    outputs = load(host)({"image": images})
    assert outputs["logits"].shape == (3, 4)
    bare = load(tiny_onnx.classifier(host.parent.parent / "bare.onnx", "int8"))({"image": images})
    np.testing.assert_allclose(outputs["logits"], bare["logits"])


def test_every_way_to_name_it(run_folder: Path, host: Path) -> None:
    image = tiny_onnx.images(1)[0]
    wanted = load(host)(image).probabilities
    for path in (run_folder, str(run_folder), host / "edgekd.json", host / "model.int8.onnx"):
        assert (load(path)(image).probabilities == wanted).all()
    assert not (load(host, model="model.fp32.onnx")(image).probabilities == wanted).all()


def test_a_run_with_several_bundles(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    for name in ("jetson", "phone"):
        host_bundle(tmp_path / "bundles" / name)
    with pytest.raises(ModelError, match="2 bundles: jetson, phone"):
        load(tmp_path)
    host_bundle(tmp_path / "bundles" / "host")
    assert load(tmp_path).labels == tiny_onnx.LABELS


@pytest.mark.parametrize(
    "given", [3, "none.png", np.zeros((8, 8, 3)), np.zeros(5, np.uint8), np.zeros((8, 8, 2), np.uint8)]
)
def test_what_is_no_image(host: Path, given: Any) -> None:
    with pytest.raises(DataError):
        load(host)(given)


def test_a_bare_model_needs_named_arrays(tmp_path: Path) -> None:
    model = load(tiny_onnx.classifier(tmp_path / "m.onnx"))
    with pytest.raises(DataError, match=r"'image': uint8 \('batch', 8, 8, 3\)"):
        model(tiny_onnx.images(1)[0])


def test_what_cannot_be_opened(host: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean 'model\.int8\.onnx'"):
        load(host / "model.int9.onnx")
    with pytest.raises(ModelError, match="no bundle"):
        load(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match="no kind of file"):
        load(tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"did you mean 'model\.fp32\.onnx'"):
        load(host, model="model.fp3.onnx")
    with pytest.raises(ModelError, match="no engine"):
        load(host, runtime="tensorrt")
    with pytest.raises(ModelError, match="runs on onnxruntime"):
        load(tiny_onnx.classifier(tmp_path / "m.onnx"), runtime="tensorrt")
    (tmp_path / "m.engine").write_bytes(b"x")
    with pytest.raises(BackendError, match="TensorRT"):
        load(tmp_path / "m.engine")
    with pytest.raises(ModelError, match="one file"):
        load(tmp_path / "m.engine", model="x")


def test_a_changed_model_is_not_loaded(tmp_path: Path) -> None:
    folder = host_bundle(tmp_path / "host")
    tiny_onnx.classifier(folder / "model.int8.onnx", "int8", seed=9)
    with pytest.raises(ModelError, match="not the file that the manifest was written for"):
        load(folder)


def test_a_graph_that_takes_normalised_floats(tmp_path: Path) -> None:
    from bundles import PREPROCESSING

    from edgekd.bundle import Source

    raw = tiny_onnx.classifier(tmp_path / "raw.onnx")
    model = tiny_onnx.classifier(tmp_path / "float.onnx", raw=False)
    images = tiny_onnx.images(2)
    samples = {"image": (images.astype(np.float32) / 255).transpose(0, 3, 1, 2)}
    folder = host_bundle(
        tmp_path / "host", models=[Source(model, "fp32")], samples=samples, preprocessing=PREPROCESSING
    )
    logits = load(raw)({"image": images})["logits"].astype(np.float64)
    exponents = np.exp(logits)
    wanted = exponents / exponents.sum(axis=1, keepdims=True)
    found = [item.probabilities for item in load(folder)(images)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
