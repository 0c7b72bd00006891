"""`edgekd.quantize_model`: modules and ONNX files in hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

import edgekd
from edgekd.backends.onnxruntime import fused, onnxruntime
from edgekd.errors import DataError, ModelError, RecipeError
from edgekd.quantize.saturation import exposed


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["int8", "w8", "dynamic"])
def test_a_module_in_hand(tmp_path: Path, precision: Any) -> None:
    torch.manual_seed(0)
    module = Small()
    batches = [torch.rand(16, 3, 8, 8) for _ in range(2)]
    made = edgekd.quantize_model(module, batches, tmp_path / "q.onnx", precision=precision)
    assert made.path == tmp_path / "q.onnx"
    assert made.parity.cosine > 0.99
    assert made.account["quantized"]
    session = onnxruntime().load(made.path, 1)
    with torch.no_grad():
        expected = module(batches[0]).numpy()
    found = session({"x": batches[0].numpy()})["logits"]
    session.close()
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    if precision == "int8":
        assert made.account["quantizer"] == "pt2e"
        assert fused(made.path)["float"] == {}
        assert isinstance(made.account["relieved"], dict)


def test_a_module_of_images_with_its_normalisation_inside(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    made = edgekd.quantize_model(Small(), [{"image": images}], tmp_path / "q.onnx", mean=mean, std=std)
    assert onnx.load(made.path).graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    with pytest.raises(ModelError, match="one uint8 input"):
        edgekd.quantize_model(Small(), [torch.rand(4, 3, 8, 8)], tmp_path / "q.onnx", mean=mean, std=std)
    with pytest.raises(ModelError, match="Divide them by 255"):
        edgekd.quantize_model(Small(), [{"image": images}], tmp_path / "q.onnx", mean=(123, 117, 104), std=(58, 57, 57))


def test_an_onnx_file_in_hand(tmp_path: Path) -> None:
    path = tiny_onnx.classifier(tmp_path / "m.onnx")
    made = edgekd.quantize_model(path, [tiny_onnx.images(16)], tmp_path / "q.onnx")
    assert made.account["quantizer"] == "onnxruntime"
    assert not exposed(onnx.load(made.path)) or made.account["relieved"] is not None
    with pytest.raises(DataError, match="no calibration samples"):
        edgekd.quantize_model(path, [], tmp_path / "q.onnx")
    with pytest.raises(ModelError, match="host takes no fp16"):
        edgekd.quantize_model(path, [tiny_onnx.images(2)], tmp_path / "q.onnx", precision="fp16")
    with pytest.raises(ModelError, match="it takes image, a batch has a, b"):
        edgekd.quantize_model(path, [{"a": tiny_onnx.images(2), "b": tiny_onnx.images(2)}], tmp_path / "q.onnx")
    fixed = onnx.load(path)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(fixed, tmp_path / "four.onnx")
    with pytest.raises(ModelError, match="its batch is fixed to 4"):
        edgekd.quantize_model(tmp_path / "four.onnx", [tiny_onnx.images(4)], tmp_path / "q.onnx")
    with pytest.raises(ModelError, match=r"float_layers: for modules"):
        edgekd.quantize_model(path, [tiny_onnx.images(2)], tmp_path / "q.onnx", float_layers=["a"])


class Numbers(nn.Module):
    """One number a sample, of channels that differ in size by a thousand."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.flat = nn.Linear(20, 64), nn.Linear(64, 1), flat
        factor = torch.exp(3 * torch.randn(64))
        with torch.no_grad():
            self.a.weight.mul_(factor[:, None])
            self.b.weight.div_(factor)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(self.a(x).relu())
        return found[:, 0] if self.flat else found


@pytest.mark.parametrize("flat", [False, True])
def test_a_module_of_numbers_is_judged_by_its_numbers(flat: bool, tmp_path: Path) -> None:
    """Of one column a softmax is always 1: judged as classes, any range would hold."""
    module, x = Numbers(flat=flat), torch.randn(256, 20)
    made = edgekd.quantize_model(module, [x], tmp_path / "q.onnx")
    tried: Any = made.account["methods"]
    assert not tried[0]["within"]
    assert "equalize" in next(one["methods"] for one in tried if one["kept"])
    session = onnxruntime().load(made.path, 1)
    with torch.no_grad():
        wanted = module(x).numpy()
    found = session({"x": x.numpy()})["logits"]
    session.close()
    assert found.shape == wanted.shape
    assert 1 - ((found - wanted) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum() > 0.95
    chosen = edgekd.quantize_model(module, [x], tmp_path / "q.onnx", method=["minmax"], task="regression")
    assert [one["methods"] for one in chosen.account["methods"]] == [["minmax"]]  # type: ignore[union-attr, index, call-overload]
    with pytest.raises(RecipeError, match=r"quantize_model\(\).method"):
        edgekd.quantize_model(module, [x], tmp_path / "q.onnx", method=["minmx"])  # type: ignore[list-item]


class Stream:
    """Batches that can be read again, and how many of them are alive."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def __iter__(self) -> Iterator[Tensor]:
        def gone() -> None:
            self.alive -= 1

        for _ in range(12):
            batch = torch.rand(4, 3, 8, 8)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(batch, gone)
            yield batch


def test_a_module_in_hand_stays_as_it_is_and_its_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, stream, path = Small().train(), Stream(), tmp_path / "a" / "b" / "q.onnx"
    before = {name: value.clone() for name, value in module.state_dict().items()}
    edgekd.quantize_model(module, stream, path)
    assert path.exists()
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert stream.most <= 3, "batches are held"
    written = path.read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise ModelError("no")

    monkeypatch.setattr("edgekd.quantize.saturation.relieve", refuse)
    with pytest.raises(ModelError, match="no"):
        edgekd.quantize_model(module, stream, path)
    assert path.read_bytes() == written
    assert [file.name for file in path.parent.iterdir()] == ["q.onnx"]


def test_what_a_module_in_hand_may_be(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.small, self.wrap = Small(), wrap

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.small(x))

    x = torch.rand(8, 3, 8, 8)
    for wrap in (lambda y: (y,), lambda y: {"out": y}):
        assert edgekd.quantize_model(Wrapped(wrap), [x], tmp_path / "q.onnx").account["quantizer"] == "pt2e"
    with pytest.raises(ModelError, match="returns 2 values"):
        edgekd.quantize_model(Wrapped(lambda y: (y, y * 2)), [x], tmp_path / "q.onnx")
    with pytest.raises(ModelError, match=r"its weights are float16.*Give module.float\(\)"):
        edgekd.quantize_model(Small().half(), [x.half()], tmp_path / "q.onnx")
    with pytest.raises(DataError, match="'x' is bfloat16"):
        edgekd.quantize_model(Small(), [x.bfloat16()], tmp_path / "q.onnx")
