"""A quantized graph computes nearly the same, on integers, in the format of its target."""

from __future__ import annotations

import gc
import weakref
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import pytest
import torch
from rules import HOST
from torch import Tensor, nn

from edgekd.backends.onnxruntime import fused, onnxruntime
from edgekd.errors import DataError, ModelError
from edgekd.export import check_parity, export, parity, to_fp16
from edgekd.graph.edit import tensors
from edgekd.models.network import Network
from edgekd.quantize import lint, quantize
from edgekd.quantize.quantizer import LOWEST_SCALE, narrow
from edgekd.types import Arrays, Json, Preprocessing, QuantizationRules, TensorSpec

TENSORRT = QuantizationRules("int8", True, "int8", True, False, False, 16, "tensorrt")


def silent(event: str, /, **fields: Json) -> None:
    """Nobody listens."""


def made(
    network: Network,
    rules: QuantizationRules,
    path: Path,
    *,
    count: int = 64,
    opset: int = 19,
    preprocessing: bool = True,
) -> dict[str, Json]:
    batches = [networks.samples(network.inputs, 32, seed) for seed in range(count // 32)]
    return quantize(network, batches, rules, opset=opset, preprocessing=preprocessing, path=path, say=silent)


@pytest.fixture(scope="module")
def network() -> Network:
    return networks.small()


@pytest.fixture(scope="module")
def host(network: Network, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Json]]:
    path = tmp_path_factory.mktemp("host") / "int8.onnx"
    return path, made(network, HOST, path)


@pytest.fixture(scope="module")
def board(network: Network, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Json]]:
    path = tmp_path_factory.mktemp("board") / "int8.onnx"
    return path, made(network, replace(TENSORRT, min_channels=0), path)


def outputs(path: Path, given: Arrays, *, optimizations: bool = True) -> Arrays:
    return onnxruntime(optimizations=optimizations).load(path, 1)(given)


# ---------------------------------------------------------------- the host's format


def test_host_runs_every_layer_on_integers(host: tuple[Path, dict[str, Json]]) -> None:
    found = fused(host[0])
    assert found["float"] == {}
    integer = found["integer"]
    assert integer["QLinearConv"] == 5
    assert integer["QGemm"] == 1
    assert integer["QLinearGlobalAveragePool"] == 2
    assert integer["QLinearMul"] == 2  # hard swish, and the gate of squeeze and excitation
    assert integer["QLinearAdd"] == 3  # hard swish, hard sigmoid, residual
    assert found["nodes"].get("QuantizeLinear") == 1  # the image
    assert "DequantizeLinear" not in found["nodes"]


def test_host_computes_nearly_the_same(network: Network, host: tuple[Path, dict[str, Json]]) -> None:
    given = networks.samples(networks.IMAGE, 16, seed=9)
    reference = networks.logits(network, given)
    check_parity(reference, outputs(host[0], given), "int8", where="host")
    assert parity(reference, outputs(host[0], given)).cosine > 0.99
    unfused = parity(outputs(host[0], given, optimizations=False), outputs(host[0], given))
    assert unfused.cosine > 0.999  # the integers that run are the integers that were written


def test_what_was_done_is_told(host: tuple[Path, dict[str, Json]], board: tuple[Path, dict[str, Json]]) -> None:
    for _, meta in (host, board):
        assert (meta["quantizer"], meta["fallback"], meta["samples"], meta["static_batch"]) == ("pt2e", None, 64, None)
        assert meta["quantized"] == ["stem.0", "depthwise.0", "squeeze.1", "squeeze.3", "project.0", "head"]
        assert meta["float"] == {}
    nodes: Any = host[1]["nodes"]
    assert nodes == dict(sorted(Counter(n.op_type for n in onnx.load(host[0]).graph.node).items()))


def test_the_image_is_normalised_in_float_before_the_first_pair(host: tuple[Path, dict[str, Json]]) -> None:
    kinds = [n.op_type for n in onnx.load(host[0]).graph.node if n.op_type != "DequantizeLinear"]
    assert kinds[:4] == ["Cast", "Transpose", "BatchNormalization", "QuantizeLinear"]


@pytest.mark.parametrize("which", ["host", "board"])
def test_weights_are_int8_per_output_channel(which: str, request: pytest.FixtureRequest) -> None:
    path, _ = request.getfixturevalue(which)
    model = onnx.load(path)
    constants = tensors(model.graph)
    weights = [
        n
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and getattr(constants.get(n.input[0]), "ndim", 0) >= 2
    ]
    assert len(weights) == 6
    for node in weights:
        weight, scale = constants[node.input[0]], constants[node.input[1]]
        axis = next(a.i for a in node.attribute if a.name == "axis")
        assert weight.dtype == np.int8
        assert weight.min() >= -127
        assert scale.shape == (weight.shape[axis],)
        assert axis == 0
        assert (np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)) == 127).all()
        assert (scale >= LOWEST_SCALE).all()
    floats = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 16]
    assert floats == []


def test_biases_are_integers_for_the_host_and_float_for_the_board(
    host: tuple[Path, dict[str, Json]], board: tuple[Path, dict[str, Json]]
) -> None:
    kinds = []
    for path, _ in (host, board):
        model = onnx.load(path)
        makers = {n.output[0]: n.op_type for n in model.graph.node}
        layers = [n for n in model.graph.node if n.op_type in {"Conv", "Gemm"}]
        kinds.append({makers.get(n.input[2], "constant") for n in layers})
    assert kinds == [{"DequantizeLinear"}, {"constant"}]


# ---------------------------------------------------------------- TensorRT's format


def test_board_breaks_no_rule_and_the_host_graph_breaks_many(
    host: tuple[Path, dict[str, Json]], board: tuple[Path, dict[str, Json]]
) -> None:
    assert lint.check(board[0], TENSORRT, 19) == ()
    assert {f.rule for f in lint.check(host[0], TENSORRT, 19)} >= {"quantized_type", "zero_point"}
    assert lint.check(host[0], HOST, 19) == ()


def test_board_computes_nearly_the_same_also_in_fp16(
    network: Network, board: tuple[Path, dict[str, Json]], tmp_path: Path
) -> None:
    given = networks.samples(networks.IMAGE, 16, seed=9)
    reference = networks.logits(network, given)
    assert parity(reference, outputs(board[0], given, optimizations=False)).cosine > 0.99
    half = tmp_path / "half.onnx"
    to_fp16(board[0], half)
    assert lint.check(half, TENSORRT, 19) == ()
    assert parity(reference, outputs(half, given, optimizations=False)).cosine > 0.99


def test_board_quantizes_the_residual_branch_and_no_output(board: tuple[Path, dict[str, Json]]) -> None:
    model = onnx.load(board[0])
    makers = {value: n.op_type for n in model.graph.node for value in n.output}
    residual = [n for n in model.graph.node if n.op_type == "Add" and "Conv" in {makers.get(v) for v in n.input}]
    assert [sorted(makers[v] for v in n.input) for n in residual] == [["Conv", "DequantizeLinear"]]
    readers = Counter(value for n in model.graph.node for value in n.input)
    quantized = [n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantized) == len(set(quantized))
    assert all(readers[value] >= 1 for value in quantized)


class Shortcut(nn.Module):
    """A block whose shortcut is a convolution too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.shortcut, self.head = nn.Conv2d(3, 16, 1, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def test_of_two_convolutions_the_shorter_path_is_quantized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = networks.settled(Shortcut(), networks.IMAGE, networks.NORMAL)
    meta = made(network, TENSORRT, tmp_path / "m.onnx", opset=17)
    assert meta["float"] == {"head": "16 → 4 features, fewer than 16"}
    model = onnx.load(tmp_path / "m.onnx")
    assert model.opset_import[0].version == 17
    assert lint.check(tmp_path / "m.onnx", TENSORRT, 17) == ()
    makers = {value: n for n in model.graph.node for value in n.output}
    add = next(
        n
        for n in model.graph.node
        if n.op_type == "Add" and all(v in makers for v in n.input) and "Conv" in {makers[v].op_type for v in n.input}
    )
    dq = next(makers[v] for v in add.input if makers[v].op_type == "DequantizeLinear")
    branch = makers[makers[dq.input[0]].input[0]]
    assert branch.op_type == "Conv"
    assert next(a.ints for a in branch.attribute if a.name == "kernel_shape") == [1, 1]


@pytest.mark.parametrize(
    ("shape", "groups", "fits"),
    [
        ((32, 32, 3, 3), 1, True), ((16, 3, 3, 3), 1, True), ((8, 8, 3, 3), 1, False), ((16, 3, 1, 3), 1, False),
        ((32, 1, 3, 3), 32, True), ((32, 1, 1, 3), 32, False), ((12, 1, 3, 3), 12, False), ((10, 64), 1, False),
        ((64, 16), 1, True),
    ],
)  # fmt: skip
def test_narrow_layers(shape: tuple[int, ...], groups: int, fits: bool) -> None:
    assert (narrow(shape, 16, groups=groups) == "") is fits
    assert narrow(shape, 0, groups=groups) == ""


# ---------------------------------------------------------------- other kinds of models


@pytest.mark.parametrize("rules", [HOST, TENSORRT], ids=["host", "board"])
def test_two_inputs_and_linear_layers(rules: QuantizationRules, tmp_path: Path) -> None:
    network = networks.sensors()
    meta = made(network, rules, tmp_path / "m.onnx")
    given = networks.samples(network.inputs, 16, seed=9)
    assert parity(networks.logits(network, given), outputs(tmp_path / "m.onnx", given)).cosine > 0.99
    assert meta["quantizer"] == "pt2e"
    assert lint.check(tmp_path / "m.onnx", rules, 19) == ()
    if rules is HOST:
        assert fused(tmp_path / "m.onnx")["float"] == {}


def test_without_preprocessing_the_graph_takes_floats(network: Network, tmp_path: Path) -> None:
    made(network, HOST, tmp_path / "m.onnx", preprocessing=False)
    session = onnxruntime().load(tmp_path / "m.onnx", 1)
    assert session.inputs == (TensorSpec("image", "float32", ("batch", 3, 8, 8)),)
    assert fused(tmp_path / "m.onnx")["float"] == {}


def test_a_dead_channel_has_a_scale_that_float16_can_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Shortcut()
    with torch.no_grad():
        module.first.weight[3] = 0
        module.first.bias[3] = 40.0  # type: ignore[index]
    network = networks.settled(module, networks.IMAGE, networks.NORMAL)
    given = networks.samples(networks.IMAGE, 16)
    for rules in (HOST, TENSORRT):
        path = tmp_path / f"{rules.lint}.onnx"
        made(network, rules, path)
        assert parity(networks.logits(network, given), outputs(path, given)).cosine > 0.98
    to_fp16(tmp_path / "tensorrt.onnx", tmp_path / "half.onnx")
    assert lint.check(tmp_path / "half.onnx", TENSORRT, 19) == ()


def test_a_fixed_batch_is_calibrated_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(networks.BatchOfOne(), (TensorSpec("x", "float32", ("batch", 8)),), None)
    said: list[str] = []
    batches = [networks.samples(network.inputs, 5)]
    meta = quantize(
        network,
        batches,
        HOST,
        opset=19,
        preprocessing=True,
        path=tmp_path / "m.onnx",
        say=lambda event, /, **_: said.append(event),
    )
    assert meta["samples"] == 5
    assert meta["static_batch"]
    assert said == ["static batch"]
    assert onnxruntime().load(tmp_path / "m.onnx", 1).inputs[0].shape == (1, 8)


# ---------------------------------------------------------------- calibration


def test_calibration_is_streamed(tmp_path: Path) -> None:
    network = networks.sensors()
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    class Stream:
        def __iter__(self) -> Iterator[Arrays]:
            nonlocal most
            for seed in range(12):
                gc.collect()
                most = max(most, sum(ref() is not None for ref in alive))
                given = networks.samples(network.inputs, 8, seed)
                alive.append(weakref.ref(given["window"]))
                yield given

    meta = quantize(network, Stream(), HOST, opset=19, preprocessing=True, path=tmp_path / "m.onnx", say=silent)
    assert meta["samples"] == 96
    assert most <= 2  # the first, which the graph was traced with, and the one before


def test_without_samples_nothing_is_quantized(network: Network, tmp_path: Path) -> None:
    for batches in ([], [{"image": np.zeros((0, 8, 8, 3), np.uint8)}]):
        with pytest.raises(DataError, match="no calibration samples"):
            quantize(network, batches, HOST, opset=19, preprocessing=True, path=tmp_path / "m.onnx", say=silent)


# ---------------------------------------------------------------- the fallback


@pytest.mark.parametrize("rules", [HOST, replace(TENSORRT, min_channels=0)], ids=["host", "board"])
def test_what_pt2e_cannot_take_is_quantized_as_onnx_and_told(
    rules: QuantizationRules, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("no such operator\nand much more")

    monkeypatch.setattr("torchao.quantization.pt2e.quantize_pt2e.convert_pt2e", refuse)
    said: list[tuple[str, Any]] = []
    path = tmp_path / "m.onnx"
    batches = [networks.samples(networks.IMAGE, 32, seed) for seed in range(2)]
    meta = quantize(
        network,
        batches,
        rules,
        opset=19,
        preprocessing=True,
        path=path,
        method=["mse"],
        say=lambda event, /, **f: said.append((event, f["reason"])),
    )
    assert (meta["quantizer"], meta["samples"]) == ("onnxruntime", 64)
    assert meta["fallback"] == "no such operator; method cannot be heeded there"
    assert [event for event, _ in said] == ["fallback"]
    assert "no such operator" in said[0][1]
    given = networks.samples(networks.IMAGE, 16, seed=9)
    assert parity(networks.logits(network, given), outputs(path, given)).cosine > 0.98
    assert not [f for f in lint.check(path, rules, 19) if f.severity == "error"]
    if rules is HOST:
        assert fused(path)["float"] == {}
    one_shot = iter(batches)
    with pytest.raises((ModelError, DataError)):
        quantize(network, one_shot, rules, opset=19, preprocessing=True, path=path, say=silent)


# ---------------------------------------------------------------- a real network on real images


def _cifar(shared_data: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    with zipfile.ZipFile(shared_data / "cifar10" / "cifar10-images.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{split}/") and n.endswith(".jpg"))
        classes = sorted({n.split("/")[1] for n in names})
        chosen = [names[i] for i in np.random.default_rng(0).permutation(len(names))[:count]]
        images = np.stack([np.asarray(Image.open(BytesIO(archive.read(n))).convert("RGB")) for n in chosen])
    return images, np.array([classes.index(n.split("/")[1]) for n in chosen])


@pytest.mark.parametrize("shortcut", ["pad", pytest.param("conv", marks=pytest.mark.slow)])
def test_resnet20_keeps_its_accuracy_and_runs_whole_on_integers(
    shortcut: str, shared_data: Path, tmp_path: Path
) -> None:
    from edgekd.models.resnet import convolution_shortcuts, resnet20

    specs = (TensorSpec("image", "uint8", ("batch", 32, 32, 3)),)
    module = resnet20(10, specs)
    state = torch.load(shared_data / "teachers" / "resnet20-published.th", map_location="cpu", weights_only=True)[
        "state_dict"
    ]
    module.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    if shortcut == "conv":
        module = convolution_shortcuts(module)
    network = Network(module.eval(), specs, Preprocessing((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images, labels = _cifar(shared_data, "test", 1000)
    calibration, _ = _cifar(shared_data, "train", 256)
    whole, integer = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export(network, {"image": images[:2]}, opset=18, preprocessing=True, path=whole)
    batches = [{"image": calibration[i : i + 64]} for i in range(0, 256, 64)]
    quantize(network, batches, HOST, opset=18, preprocessing=True, path=integer, say=silent)
    correct = {path: outputs(path, {"image": images})["logits"].argmax(1) == labels for path in (whole, integer)}
    assert correct[whole].mean() == pytest.approx(0.82, abs=0.03)
    assert correct[whole].mean() - correct[integer].mean() <= 0.01
    found = fused(integer)
    assert found["float"] == {}
    assert found["integer"]["QLinearConv"] == (19 if shortcut == "pad" else 21)
    assert found["integer"]["QLinearAdd"] == 9
    assert integer.stat().st_size < 0.3 * whole.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "resnet18", "vit_tiny_patch16_224", "regnetx_002", "efficientnet_b0"]
)
def test_models_of_timm(name: str, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    specs = (TensorSpec("image", "uint8", ("batch", 32, 32, 3)),)
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
    module = timm.create_model(name, num_classes=10, **options)
    network = networks.settled(module, specs, Preprocessing((32, 32), (0.5,) * 3, (0.25,) * 3))
    given = networks.samples(specs, 16, seed=9)
    for rules in (HOST, TENSORRT):
        path = tmp_path / f"{rules.lint}.onnx"
        meta = made(network, rules, path)
        assert meta["quantizer"] == "pt2e"
        assert lint.check(path, rules, 19) == ()
        reference = networks.logits(network, given)
        assert parity(reference, outputs(path, given, optimizations=rules is HOST)).cosine > 0.9
    left = fused(tmp_path / "onnxruntime.onnx")["float"]
    assert sum(left.values()) == (24 if "vit" in name else 0)  # products of two activations, two in each block
