"""How a user's samples become the inputs of a user's ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from edgekd.errors import ModelError
from edgekd.models import check_levels
from edgekd.types import Arrays, Dataset, Split, TensorSpec

BATCH = 32


@dataclass(frozen=True, slots=True)
class Feed:
    """How stored samples become a graph's inputs."""

    inputs: tuple[TensorSpec, ...]
    renamed: dict[str, str]  # the samples' names → the graph's
    image: str | None  # how the one input is laid out as an image: "NHWC" or "NCHW"; None: it is no image
    mean: tuple[float, ...] | None  # None: the graph takes bytes
    std: tuple[float, ...] | None

    def __call__(self, stored: Arrays) -> dict[str, np.ndarray]:
        """A batch as the graph takes it."""
        made = {}
        for spec in self.inputs:
            array = next(value for name, value in stored.items() if self.renamed[name] == spec.name)
            if self.mean is not None and self.std is not None:
                mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
                array = (array.astype(np.float32) / 255 - mean) / std
            if self.image == "NCHW":
                array = array.transpose(0, 3, 1, 2)
            made[spec.name] = np.ascontiguousarray(array)
        return made

    @property
    def one_by_one(self) -> bool:
        """Whether the graph has a fixed batch of one."""
        return any(isinstance(spec.shape[0], int) for spec in self.inputs)

    def batches(self, split: Split, count: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """A split's samples, as many as the graph takes at once."""
        order = np.arange(len(split) if count is None else min(count, len(split)))
        size = 1 if self.one_by_one else BATCH
        for batch in split.batches([order[i : i + size] for i in range(0, len(order), size)]):
            yield self(batch.inputs)


def signature(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph."""
    constants = {tensor.name for tensor in model.graph.initializer}

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        sizes = [
            d.dim_value if d.HasField("dim_value") else d.dim_param or f"dim{i}" for i, d in enumerate(kind.shape.dim)
        ]
        return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), tuple(sizes))

    inputs = tuple(spec(value) for value in model.graph.input if value.name not in constants)
    return inputs, tuple(spec(value) for value in model.graph.output)


def split(batch: Arrays, inputs: Sequence[TensorSpec]) -> Iterator[Arrays]:
    """The batch as the graph takes it: whole, or sample by sample where its batch is fixed to one."""
    if not any(isinstance(spec.shape[0], int) for spec in inputs):
        yield batch
        return
    for at in range(len(next(iter(batch.values())))):
        yield {name: array[at : at + 1] for name, array in batch.items()}


def check_batch(inputs: Sequence[TensorSpec], where: str) -> None:
    """Raise ModelError where a graph takes another number of samples than one, or any."""
    for spec in inputs:
        if isinstance(spec.shape[0], int) and spec.shape[0] != 1:
            raise ModelError(f"its batch is fixed to {spec.shape[0]}", where=where, expected="a batch of 1, or any")


def layout(spec: TensorSpec) -> str:
    """Where an image's channels are: last, "NHWC", unless the first dimension may be their number too."""
    return "NHWC" if spec.shape[3] in (1, 3) and spec.shape[1] not in (1, 3) else "NCHW"


def feeding(
    inputs: Sequence[TensorSpec], data: Dataset, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, *,
    where: str,
) -> Feed:  # fmt: skip
    """How the samples become what the graph takes.

    Images (uint8) are normalised by mean and std, of values in [0, 1], where the graph takes float; it takes bytes as
    they are. Other inputs must have the graph's names, types and shapes; a single one may be called otherwise.

    Raises:
        ModelError: they do not fit, or it is not said how images are normalised.
    """
    names = [spec.name for spec in inputs]
    held = [spec.name for spec in data.inputs]
    if len(names) == len(held) == 1:
        renamed = {held[0]: names[0]}
    elif sorted(names) == sorted(held):
        renamed = {name: name for name in held}
    else:
        raise ModelError(
            f"it takes {', '.join(names)}, the samples have {', '.join(held)}", where=where,
            fix="arrays are called as the inputs are, and labels y",
        )  # fmt: skip
    image = None
    if data.images:
        image = _image(inputs[0], data.inputs[0], mean, std, where)
        if inputs[0].dtype == "uint8":
            mean = std = None
    elif mean is not None or std is not None:
        raise ModelError("--mean and --std are for images, and the samples are none", where=where, fix="leave them out")
    feed = Feed(tuple(inputs), renamed, image, mean, std)
    made = feed(next(iter(data.calibration.batches([np.arange(1)]))).inputs)
    for spec in inputs:
        shape = made[spec.name].shape
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(want, int) or want == size for want, size in zip(spec.shape[1:], shape[1:], strict=True)
        )
        if not fits or made[spec.name].dtype != spec.dtype:
            raise ModelError(
                f"its input '{spec.name}' is {spec.dtype} {shown(spec.shape)}, "
                f"a sample is {made[spec.name].dtype} {shown(shape)}", where=where, expected="samples of that form",
            )  # fmt: skip
    check_batch(inputs, where)
    return feed


def _image(
    spec: TensorSpec, stored: TensorSpec, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, where: str
) -> str:
    if len(spec.shape) != 4:
        raise ModelError(f"its input '{spec.name}' is {shown(spec.shape)}, the samples are images", where=where)
    order = layout(spec)
    channels = spec.shape[3 if order == "NHWC" else 1]
    if isinstance(channels, int) and channels != stored.shape[3]:
        raise ModelError(
            f"its input '{spec.name}' takes {channels} channels ({order}), the images have {stored.shape[3]}",
            where=where, expected=f"images of {channels} channels",
        )  # fmt: skip
    if spec.dtype == "uint8":
        if mean is not None or std is not None:
            raise ModelError("it takes bytes and normalises them itself", where=where, fix="leave out --mean and --std")
        return order
    if mean is None or std is None:
        raise ModelError(
            f"its input '{spec.name}' is {spec.dtype}, and it is not said how images are normalised for it",
            where=where, expected="--mean and --std, of values in [0, 1]",
            fix="--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 are ImageNet's; --mean 0 --std 1 leaves [0, 1]",
        )  # fmt: skip
    for option, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, stored.shape[3]):
            raise ModelError(f"{option} has {len(values)} values", where=where, expected=f"1 or {stored.shape[3]}")
    check_levels(mean, std, where=where)
    return order


def shown(shape: Sequence[int | str]) -> str:
    """A shape as people write it: batch×3×32×32."""
    return "×".join(map(str, shape))
