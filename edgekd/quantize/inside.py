"""Values inside an ONNX graph, for real samples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.types import Arrays


def inside(model: onnx.ModelProto, names: Iterable[str], given: Arrays, kind: int) -> Iterator[dict[str, np.ndarray]]:
    """What these values are for each sample, one sample after the other: few are held, and a fixed batch takes it.

    Args:
        names: of values of the graph.
        given: a batch as the graph takes it.
        kind: the values' type, as `onnx.TensorProto` has them.
    """
    opened, wanted = onnx.ModelProto(), sorted(set(names))
    opened.CopyFrom(model)
    there = {output.name for output in opened.graph.output} | set(given)
    for name in wanted:
        if name not in there:
            opened.graph.output.add().name = name
            opened.graph.output[-1].type.tensor_type.elem_type = kind
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "opened.onnx"
        onnx.save(opened, path)
        session = onnxruntime(optimizations=False).load(path, 1)
    try:
        for at in range(len(next(iter(given.values())))):
            sample = {name: array[at : at + 1] for name, array in given.items()}
            found = {**sample, **session(sample)}
            yield {name: found[name] for name in wanted}
    finally:
        session.close()
