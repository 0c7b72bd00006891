"""A split that is read sample by sample while it is used, by worker processes that read ahead."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.types import Arrays, Batch, TensorSpec

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext


class Source(Protocol):
    """Samples that can be read one by one, from any process: it is pickled into the workers."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    def read(self, row: int) -> Arrays:
        """One sample's arrays by input name, without the batch dimension."""
        ...


class StreamedSplit:
    """The samples `rows` of a source, read ahead by torch's DataLoader.

    Args:
        source: where samples come from.
        labels: of all samples of the source, as the task takes them.
        rows: int64 positions of this split's samples in the source.
        workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(self, source: Source, labels: np.ndarray, rows: np.ndarray, workers: int) -> None:
        self._source, self._labels, self._rows, self._workers = source, labels, rows, workers

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray:
        """Of every sample, in order; nothing is read for them."""
        labels: np.ndarray = self._labels[self._rows]
        return labels

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One Batch for each index array, in that order."""
        import torch
        from torch.utils.data import DataLoader

        if not len(order):
            return
        workers = min(self._workers, len(order))
        chosen = [self._rows[indices].tolist() for indices in order]
        loader: DataLoader[Any] = DataLoader(
            _Reader(self._source, len(self._labels)),  # type: ignore[arg-type]  # any map-style object will do
            batch_sampler=chosen,
            num_workers=workers,
            collate_fn=_as_it_is,
            multiprocessing_context=_fork_safe() if workers else None,
            generator=torch.Generator().manual_seed(0),  # else it draws from, and so changes, the global one
        )
        for indices, rows, read in zip(order, chosen, loader, strict=True):
            if isinstance(read, EdgekdError):
                raise read
            yield Batch(indices, read, self._labels[rows])


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Reader:
    """What DataLoader asks of a data set. An error comes back as a value: DataLoader would bury it in a traceback."""

    def __init__(self, source: Source, length: int) -> None:
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __getitems__(self, rows: Sequence[int]) -> dict[str, np.ndarray] | EdgekdError:
        batch = {
            spec.name: np.empty((len(rows), *(int(size) for size in spec.shape[1:])), spec.dtype)
            for spec in self._source.inputs
        }
        try:
            for position, row in enumerate(rows):
                for name, array in self._source.read(row).items():
                    batch[name][position] = array
        except EdgekdError as problem:
            return problem
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _fork_safe() -> BaseContext:
    """Workers that do not inherit this process's threads and locks; after the first they start in milliseconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch.utils.data", __name__])
    return context
