"""edgekd.load: open a bundle, a run's folder, an ONNX file or an engine, and call it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from edgekd.backends._tensorrt import record
from edgekd.backends.onnxruntime import onnxruntime
from edgekd.backends.tensorrt import tensorrt
from edgekd.bundle import manifest as manifests
from edgekd.bundle.answers import Answer, answer
from edgekd.bundle.manifest import Manifest
from edgekd.errors import DataError, ModelError, nearest
from edgekd.store import sha256_of
from edgekd.types import Arrays, Precision, Preprocessing, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Model:
    """An exported model that can be called.

    A model of images takes an image (Pillow's, a file's path, or uint8 height × width × channels; it is resized) and
    gives what its task says of it: a Prediction of a class, the Flags of several labels, a ClassMap or Values. Several
    images (a list, or one array with a batch dimension) give a list. Any model takes {name: array}, batch first and as
    the graph takes it, and gives {name: array}.
    """

    def __init__(self, session: Session, manifest: Manifest | None) -> None:
        self._session = session
        self.inputs, self.outputs, self.runtime = session.inputs, session.outputs, session.runtime
        self.labels = manifest.labels if manifest else ()
        self.preprocessing = manifest.preprocessing if manifest else None
        self._in_graph = manifest.preprocessing_in_graph if manifest else False
        self._form = manifest.task.labels if manifest else "classes"

    @overload
    def __call__(self, given: Arrays) -> dict[str, np.ndarray]: ...

    @overload
    def __call__(self, given: Any) -> Any: ...

    def __call__(self, given: Any) -> Any:
        """Outputs for `given`.

        Raises:
            DataError: it is no image, or the model takes named arrays.
            BackendError: the arrays are not of the names, types and shapes that the model takes.
        """
        if isinstance(given, Mapping):
            return self._session(given)
        if self.preprocessing is None:
            names = ", ".join(f"'{item.name}': {item.dtype} {item.shape}" for item in self.inputs)
            raise DataError(
                f"this model was not told how to take a {type(given).__name__}", where="edgekd.load",
                expected=f"named arrays, {{{names}}}",
            )  # fmt: skip
        many = isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.ndim == 4)
        images = [_image(item, self.preprocessing) for item in (given if many else [given])]
        found = [self._answer(image) for image in images]
        return found if many else found[0]

    def close(self) -> None:
        """Give the memory back."""
        self._session.close()

    def _answer(self, image: NDArray[np.uint8]) -> Answer:
        assert self.preprocessing is not None
        batch: NDArray[Any] = image[None]
        if not self._in_graph:
            mean, std = (np.array(value, np.float32) for value in (self.preprocessing.mean, self.preprocessing.std))
            batch = np.ascontiguousarray(((batch.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))
        output = self._session({self.inputs[0].name: batch})[self.outputs[0].name][0]
        return answer(self._form, output, self.labels)


def load(
    path: str | Path,
    *,
    model: str | None = None,
    runtime: Literal["onnxruntime", "tensorrt"] | None = None,
    threads: int = 1,
) -> Model:
    """Open an exported model.

    Args:
        path: a bundle, a run's folder (its bundle for this host, or its only one), an .onnx file, or an .engine.
        model: a model file of the bundle; left out, the bundle's own choice.
        runtime: left out, TensorRT where the bundle has an engine that was built here, else ONNX Runtime.
        threads: of ONNX Runtime.

    Raises:
        ModelError: there is no such file, it is none of these, or it is not what the manifest says.
        BackendError: the runtime is missing or refuses the model.
    """
    place = Path(path)
    if place.name == manifests.NAME:
        place = place.parent
    if place.is_dir():
        folder = _bundle_of(place)
        manifest = manifests.read(folder)
        return Model(_open(_choose(folder, manifest, model, runtime), runtime, threads), manifest)
    if not place.is_file():
        siblings = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
        raise ModelError("no such file or folder", where=str(path), nearest=nearest(place.name, siblings))
    if model is not None:
        raise ModelError(f"'{model}' was asked for, and this is one file", where=str(path))
    if (place.parent / manifests.NAME).is_file() and place.suffix == ".onnx":
        return load(place.parent, model=place.name, runtime=runtime, threads=threads)
    return Model(_open(place, runtime, threads), None)


def _bundle_of(folder: Path) -> Path:
    """The bundle in a run's folder, or the folder itself where it is one."""
    if (folder / manifests.NAME).is_file() or not (folder / "bundles").is_dir():
        return folder
    found = {item.parent.name: item.parent for item in sorted((folder / "bundles").glob(f"*/{manifests.NAME}"))}
    if len(found) == 1:
        return next(iter(found.values()))
    if "host" in found:
        return found["host"]
    raise ModelError(
        f"{len(found)} bundles: {', '.join(found) or 'none'}", where=str(folder / "bundles"),
        fix=f"name one: edgekd.load('{folder.name}/bundles/<target>')",
    )  # fmt: skip


def _choose(folder: Path, manifest: Manifest, model: str | None, runtime: str | None) -> Path:
    """The file to load, once its hash is found to be the manifest's; engines are compared with their own record."""
    name = model or manifest.model
    if name.endswith(".engine"):
        return manifests.place(folder, name)
    known = {file.path: file for file in manifest.files}
    listed = {item.path: item for item in manifest.models}
    if name not in listed:
        raise ModelError(
            f"the bundle has no model '{name}'; it has {', '.join(listed)}", where=str(folder),
            nearest=nearest(name, listed),
        )  # fmt: skip
    engine = _built(folder, listed[name].precision) if runtime != "onnxruntime" else None
    if engine is not None and (runtime == "tensorrt" or tensorrt().available() is None):
        return engine
    if runtime == "tensorrt":
        raise ModelError(f"no engine of {name} was built here", where=str(folder), fix="run ./build.sh in the bundle")
    path = manifests.place(folder, name)
    if not path.is_file() or sha256_of(path) != known[name].sha256:
        raise ModelError("missing, or not the file that the manifest was written for", where=str(path))
    return path


def _built(folder: Path, precision: Precision) -> Path | None:
    """The engine of that precision which was built on this device, by its record."""
    for path in sorted((folder / manifests.ENGINES).glob("*.engine")):
        engine = manifests.place(folder, f"{manifests.ENGINES}/{path.name}")
        try:
            if record.read(str(engine))["precision"] == precision:
                return engine
        except ValueError as problem:
            raise ModelError(str(problem), where=str(engine), fix="run ./build.sh in the bundle again") from problem
    return None


def _open(path: Path, runtime: str | None, threads: int) -> Session:
    kinds = {".onnx": "onnxruntime", ".engine": "tensorrt"}
    if path.suffix not in kinds:
        raise ModelError("no kind of file that edgekd opens", where=str(path), expected="a folder, .onnx or .engine")
    if runtime is not None and kinds[path.suffix] != runtime:
        raise ModelError(f"{path.name} runs on {kinds[path.suffix]}, not on {runtime}", where=str(path))
    backend = onnxruntime() if path.suffix == ".onnx" else tensorrt()
    return backend.load(path, threads)


def _image(given: Any, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """One image as uint8 height × width × channels of the model's size."""
    from PIL import Image, UnidentifiedImageError

    height, width = preprocessing.size
    mode = "L" if len(preprocessing.mean) == 1 else "RGB"
    if isinstance(given, np.ndarray):
        flat = given[:, :, 0] if given.ndim == 3 and given.shape[2] == 1 else given
        if flat.dtype != np.uint8 or not (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[2] in (3, 4))):
            raise DataError(
                f"{given.dtype} array of shape {given.shape}", where="edgekd.load",
                expected="uint8, height × width or height × width × 1, 3 or 4 channels, values 0 to 255",
            )  # fmt: skip
        image = Image.fromarray(flat)
    elif isinstance(given, str | Path):
        try:
            image = Image.open(given)
        except (OSError, UnidentifiedImageError) as problem:
            raise DataError(f"no image: {problem}", where=str(given)) from problem
    elif isinstance(given, Image.Image):
        image = given
    else:
        raise DataError(
            f"a {type(given).__name__} is no image", where="edgekd.load", expected="an image or named arrays"
        )
    image = image.convert(mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    array = np.asarray(image, np.uint8)
    return array[:, :, None] if array.ndim == 2 else array
