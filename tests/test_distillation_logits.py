"""What a network says of a split: in order, in eval mode, and refused where it is no logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import handwritten, network, small, taught

from edgekd.data.arrays import ArraySplit
from edgekd.distillation import evaluate
from edgekd.errors import DataError, ModelError
from edgekd.models.network import Network
from edgekd.types import Dataset, Preprocessing


@pytest.fixture(scope="module")
def data() -> Dataset:
    return handwritten()


def test_evaluate_gives_the_splits_logits_in_order(data: Dataset) -> None:
    tested = network(data)
    tested.train()
    small(tested).norm.eval()
    found = evaluate(tested, data.test, batch_size=100)
    assert found.dtype == np.float32
    assert found.shape == (len(data.test), 10)
    assert tested.training
    assert small(tested).conv.training
    assert not small(tested).norm.training
    batch = next(iter(data.test.batches([np.arange(7)])))
    tested.eval()
    with torch.no_grad():
        expected = tested(torch.from_numpy(batch.inputs["image"]))
    np.testing.assert_allclose(found[:7], expected.numpy(), atol=1e-5)
    empty = ArraySplit({"image": np.zeros((0, 8, 8, 1), np.uint8)}, np.zeros(0, np.int64), np.arange(0))
    with pytest.raises(DataError, match="no samples"):
        evaluate(tested, empty)


def test_a_model_that_gives_no_logits_is_refused(data: Dataset, tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    preprocessing = Preprocessing((8, 8), (0.5,), (0.5,))
    with pytest.raises(ModelError, match="returns tuple"):
        evaluate(Network(Two(), data.inputs, preprocessing), data.test)
    flat = Network(nn.Flatten(0), data.inputs, preprocessing)
    with pytest.raises(ModelError, match=r"a tensor of shape \(16384,\)"):
        evaluate(flat, data.test)
    grid = Network(nn.Conv2d(1, 10, 1), data.inputs, preprocessing)
    with pytest.raises(ModelError, match=r"the student gives outputs of shape \(2, 10, 8, 8\).*for classification"):
        taught(tmp_path, student=grid)
    with pytest.raises(ModelError, match=r"no head 'digit'.*returns tuple"):
        evaluate(Network(Two(), data.inputs, preprocessing), data.test, head="digit")
