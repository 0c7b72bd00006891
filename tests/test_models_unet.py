"""The U-Net: an output for each pixel, whatever the sides are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from edgekd import target
from edgekd.backends.onnxruntime import onnxruntime
from edgekd.errors import ModelError
from edgekd.export import check_parity, export, parity
from edgekd.models import build
from edgekd.models.network import Network
from edgekd.quantize import quantize
from edgekd.types import ModelSpec, TensorSpec


def image(height: int, width: int, channels: int = 3) -> tuple[TensorSpec, ...]:
    return (TensorSpec("image", "uint8", ("batch", height, width, channels)),)


def made(inputs: tuple[TensorSpec, ...], **options: Any) -> Network:
    torch.manual_seed(0)
    spec = ModelSpec("unet", {"width": 4, "depth": 2} | options)
    return build(spec, classes=5, inputs=inputs, images=True, dense=True).eval()


def photos(inputs: tuple[TensorSpec, ...], count: int = 3) -> np.ndarray:
    sides = [int(side) for side in inputs[0].shape[1:]]
    return np.random.default_rng(0).integers(0, 256, (count, *sides), np.uint8)


def outputs(network: Network, images: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        logits = network(torch.from_numpy(images))
    assert isinstance(logits, Tensor)
    return {"logits": logits.numpy()}


@pytest.mark.parametrize(("height", "width", "channels"), [(16, 16, 3), (24, 8, 1), (13, 22, 3), (4, 4, 4)])
def test_outputs_have_the_images_size(height: int, width: int, channels: int) -> None:
    inputs = image(height, width, channels)
    network = made(inputs)
    logits = network.train()(torch.from_numpy(photos(inputs)))
    assert isinstance(logits, Tensor)
    assert logits.shape == (3, 5, height, width)
    torch.autograd.backward(logits.square().sum())
    assert all(p.grad is not None for p in network.parameters())


def test_a_pixel_sees_its_surroundings_and_no_more() -> None:
    inputs = image(64, 64)
    network, images = made(inputs, width=8), photos(inputs, 1)
    before = outputs(network, images)["logits"]
    images[0, 32, 32] ^= 0xFF
    moved = np.abs(outputs(network, images)["logits"] - before).max((0, 1)) > 0
    assert moved[32, 32]
    assert 10 < int(moved.any(0).sum()) < 56
    assert not moved[:4].any()


def test_exported_and_quantized_graphs_compute_the_same(tmp_path: Path) -> None:
    inputs = image(13, 22)
    network, images = made(inputs), photos(inputs)
    given = {"image": images}
    export(network, given, opset=17, preprocessing=True, path=tmp_path / "m.onnx")
    check_parity(outputs(network, images), onnxruntime().load(tmp_path / "m.onnx", 1)(given), "fp32", where="unet")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert (kinds["Conv"], kinds["MaxPool"], kinds["Resize"], kinds["ConvTranspose"]) == (11, 2, 2, 0)
    host = target.load("host")
    meta = quantize(
        network,
        [given],
        host.quantization,
        opset=18,
        preprocessing=True,
        path=tmp_path / "q.onnx",
        say=lambda *_, **__: None,
    )
    assert meta["fallback"] is None
    assert len(meta["quantized"]) == 11  # type: ignore[arg-type]  # a list of layers
    found = parity(outputs(network, images), onnxruntime().load(tmp_path / "q.onnx", 1)(given))
    assert found.cosine > 0.99


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ModelError, match="sides of 8×64 pixels cannot be halved 4 times"):
        made(image(8, 64), depth=4)
    with pytest.raises(ModelError, match="width is 0, depth 2"):
        made(image(8, 8), width=0)
