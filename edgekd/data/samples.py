"""Whatever a user's function returns as data → Dataset: any map-style torch Dataset, or a train and test pair."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from edgekd.data import images
from edgekd.data.arrays import ArraySplit
from edgekd.data.imagefolder import IN_MEMORY_BYTES, settled
from edgekd.data.images import Plan, UnreadableError
from edgekd.data.labels import labels_of
from edgekd.data.splits import Pool, assemble
from edgekd.data.streams import StreamedSplit, cores
from edgekd.errors import DataError
from edgekd.types import Arrays, Dataset, LabelForm, TensorSpec

_FORMS = "a torch Dataset with __len__ and __getitem__, a (train, test) pair, or {'train': …, 'test': …}"
_SAMPLE = "(input, label), or a dictionary of arrays with a 'label'"
_PICKLED_BYTES = 64 << 20  # a data set that pickles to more is read in this process: workers would copy it


@dataclass(frozen=True, slots=True)
class Reading:
    """How samples are kept and divided; the same options as imagefolder's, and what their labels are."""

    seed: int
    test_fraction: float = 0.2
    calibration: int | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None
    memory_bytes: int = IN_MEMORY_BYTES
    workers: int | None = None
    labels: LabelForm = "classes"


@dataclass(slots=True)
class _Survey:
    """Every sample of one torch Dataset, read once; `kept` is None when they are too many for memory."""

    source: Any
    labels: list[Any]
    digests: list[bytes]
    shapes: list[dict[str, tuple[str, tuple[int, ...]]]]  # name → dtype and shape
    image: bool
    kept: list[Arrays] | None


def wrapped(value: object, name: str, reading: Reading) -> Dataset:
    """The Dataset that `value` stands for.

    A sample is (input, label) or a dictionary with a "label" (or "labels") beside its named inputs. A label is an
    integer or a name; for other tasks an array of zeros and ones, of class indices on a grid (an array, a tensor or a
    PIL image), or a number or an array of them. An input that is
    a PIL image, a uint8 array (height × width or height × width × channels) or a uint8 tensor (channels × height ×
    width, as torchvision has it) is an image; any other array or tensor is passed to the network as it is. Samples
    are read once and kept in memory where they fit; a data set that changes them at random is so frozen.

    Raises:
        DataError: it is none of these, samples differ in form or shape, or labels are not what the task takes.
    """
    parts = _parts(value, name)
    surveys = []
    left = reading.memory_bytes
    for split, source in parts.items():
        survey = _surveyed(source, f"{name} ({split})", left)
        left -= sum(a.nbytes for sample in survey.kept or () for a in sample.values())
        surveys.append(survey)
    if any(survey.kept is None for survey in surveys):
        for survey in surveys:
            survey.kept = None
    shapes = [shape for survey in surveys for shape in survey.shapes]
    plan, notes = None, tuple(_unsteady(surveys[0]))
    if surveys[0].image:
        looks = [Plan((h, w), c) for shape in shapes for (_, (h, w, c)) in shape.values()]
        plan, said = settled(looks, reading.size, reading.channels)
        notes += said
    else:
        _equal_shapes(shapes, name)
    own = getattr(surveys[0].source, "classes", None)
    given = [_label_array(survey.labels, reading.labels, name) for survey in surveys]
    labels, classes = labels_of(given, _class_names(own), reading.labels, name)
    specs = _specs(shapes[0], plan)
    workers = cores() if reading.workers is None else reading.workers
    pools = [_pool(s, y, specs, plan, workers, name) for s, y in zip(surveys, labels, strict=True)]
    return assemble(
        name,
        specs,
        classes,
        pools[0],
        pools[1] if len(pools) > 1 else None,
        form=reading.labels,
        images=plan is not None,
        seed=reading.seed,
        test_fraction=reading.test_fraction,
        calibration=reading.calibration,
        where=name,
        notes=notes,
    )


def _parts(value: object, name: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        if set(value) == {"train", "test"}:
            return {"train": value["train"], "test": value["test"]}
        keys = ", ".join(map(str, value))
        raise DataError(f"it returned a dictionary with the keys {keys}", where=name, expected=_FORMS)
    if isinstance(value, tuple) and len(value) == 2:
        return {"train": value[0], "test": value[1]}
    return {"all": value}


def _surveyed(source: Any, where: str, memory_bytes: int) -> _Survey:
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        hint = "an iterable data set has no random access; collect it in a list" if hasattr(source, "__iter__") else ""
        raise DataError(f"a {type(source).__name__} is no data set", where=where, expected=_FORMS, fix=hint)
    if len(source) == 0:
        raise DataError("the data set is empty", where=where)
    survey = _Survey(source, [], [], [], False, [])
    used = 0
    for index in range(len(source)):
        inputs, label, image = _sample(source[index], f"{where}[{index}]")
        if index and image != survey.image:
            raise DataError(f"sample {index} is {'' if image else 'not '}an image, unlike sample 0", where=where)
        survey.image = image
        survey.labels.append(label)
        survey.digests.append(_digest(inputs))
        survey.shapes.append({key: (str(a.dtype), a.shape) for key, a in inputs.items()})
        used += sum(a.nbytes for a in inputs.values())
        if survey.kept is not None:
            survey.kept.append(inputs)
            if used > memory_bytes:
                survey.kept = None
    return survey


def _sample(value: Any, where: str) -> tuple[dict[str, np.ndarray], Any, bool]:
    """One sample as named arrays, its label, and whether it is an image."""
    if isinstance(value, Mapping):
        key = next((key for key in ("label", "labels") if key in value), None)
        if key is None:
            raise DataError(f"a sample has the keys {sorted(map(str, value))}", where=where, expected=_SAMPLE)
        label = value[key]
        given: Any = {name: item for name, item in value.items() if name != key}
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        given, label = value
    else:
        raise DataError(f"a sample is a {type(value).__name__}", where=where, expected=_SAMPLE)
    if not isinstance(given, Mapping):
        picture = _picture(given, where)
        if picture is not None:
            return {"image": picture}, label, True
        given = {"x": given}
    elif len(given) == 1:
        ((name, only),) = given.items()
        picture = _picture(only, where)
        if picture is not None:
            return {str(name): picture}, label, True
    return {str(name): _array(item, f"{where} '{name}'") for name, item in given.items()}, label, False


def _picture(value: Any, where: str) -> np.ndarray | None:
    """An image as uint8 height × width × channels, or None where it is no image."""
    if isinstance(value, Image.Image):
        try:
            return images.fit(value, images.seen(value))
        except UnreadableError as problem:
            raise DataError(f"the image cannot be decoded: {problem}", where=where) from problem
    tensor = hasattr(value, "detach")
    array = _array(value, where) if tensor or isinstance(value, np.ndarray) else None
    if array is None or array.dtype != np.uint8 or array.ndim not in (2, 3):
        return None
    if array.ndim == 2:
        return array[:, :, None]
    if tensor:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3):
        order = "channels × height × width" if tensor else "height × width × channels"
        raise DataError(f"an image has shape {array.shape}", where=where, expected=f"{order}, of 1 or 3 channels")
    return array


def _array(value: Any, where: str) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise DataError(f"a {type(value).__name__} is no array of numbers", where=where, expected=_SAMPLE)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError("it holds NaN or infinite values", where=where)
    return array


def _digest(inputs: Arrays) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        digest.update(np.ascontiguousarray(inputs[name]).tobytes())
    return digest.digest()


def _unsteady(survey: _Survey) -> Iterator[str]:
    again, _, _ = _sample(survey.source[0], "sample 0")
    if _digest(again) != survey.digests[0]:
        where = "kept as they were read first" if survey.kept is not None else "different in every epoch"
        yield f"the data set gives other values each time a sample is read; samples are {where}"


def _equal_shapes(shapes: Sequence[dict[str, tuple[str, tuple[int, ...]]]], name: str) -> None:
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise DataError(
                f"sample {index} is {shape}, sample 0 is {shapes[0]}", where=name, fix="pad or crop them to one shape"
            )


def _label_array(labels: Sequence[Any], form: LabelForm, name: str) -> np.ndarray:
    if form != "classes":
        arrays = [_array(label, f"{name}: the label of sample {index}") for index, label in enumerate(labels)]
        odd = next((index for index, array in enumerate(arrays) if array.shape != arrays[0].shape), None)
        if odd is not None:
            raise DataError(
                f"the label of sample {odd} has shape {arrays[odd].shape}, that of sample 0 {arrays[0].shape}",
                where=name,
                fix="bring them to one shape; images and their label maps together",
            )
        return np.stack(arrays)
    plain = [label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label for label in labels]
    for index, label in enumerate(plain):
        if isinstance(label, bool) or not isinstance(label, (int, float, str)):
            shape = f" of shape {tuple(label.shape)}" if hasattr(label, "shape") else ""
            raise DataError(
                f"the label of sample {index} is a {type(label).__name__}{shape}",
                where=name,
                expected="an integer class index, or a name",
                fix='[task] name = … says what else labels are: "multilabel", "segmentation" or "regression"',
            )
    return np.array(plain)


def _class_names(own: Any) -> list[str] | None:
    """A data set's own class names; torchvision's ImageNet has tuples of synonyms."""
    if not isinstance(own, (list, tuple)):
        return None
    return [str(name[0]) if isinstance(name, (list, tuple)) else str(name) for name in own]


def _specs(shape: dict[str, tuple[str, tuple[int, ...]]], plan: Plan | None) -> tuple[TensorSpec, ...]:
    if plan is not None:
        return (TensorSpec(next(iter(shape)), "uint8", ("batch", *plan.shape)),)
    return tuple(TensorSpec(name, dtype, ("batch", *sides)) for name, (dtype, sides) in shape.items())


def _planned(inputs: Arrays, plan: Plan | None) -> Arrays:
    """A sample as it is stored: images of one size and number of channels."""
    if plan is None:
        return inputs
    ((name, array),) = inputs.items()
    if array.shape == plan.shape:
        return inputs
    return {name: images.fit(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), plan)}


def _pool(
    survey: _Survey, labels: np.ndarray, specs: tuple[TensorSpec, ...], plan: Plan | None, workers: int, where: str
) -> Pool:
    if survey.kept is None:
        source = _Read(survey.source, specs, plan, where)
        return Pool(
            labels, survey.digests, lambda rows: StreamedSplit(source, labels, rows, workers if _small(source) else 0)
        )
    planned = [_planned(inputs, plan) for inputs in survey.kept]
    arrays = {spec.name: np.stack([inputs[spec.name] for inputs in planned]) for spec in specs}
    return Pool(labels, survey.digests, lambda rows: ArraySplit(arrays, labels, rows))


class _Read:
    """A torch Dataset read sample by sample."""

    def __init__(self, source: Any, specs: tuple[TensorSpec, ...], plan: Plan | None, where: str) -> None:
        self._source, self._plan, self._where = source, plan, where
        self.inputs = specs

    def read(self, row: int) -> Arrays:
        """One sample's inputs."""
        inputs, _, _ = _sample(self._source[row], f"{self._where}[{row}]")
        return _planned(inputs, self._plan)


class _Sink(io.RawIOBase):
    """Counts what is written, and refuses more than a limit."""

    def __init__(self) -> None:
        super().__init__()
        self._written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        self._written += size
        if self._written > _PICKLED_BYTES:
            raise pickle.PicklingError("too large")
        return size


def _small(source: object) -> bool:
    """Whether worker processes can get a copy of the source: it pickles, and to little."""
    try:
        pickle.Pickler(_Sink()).dump(source)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True
