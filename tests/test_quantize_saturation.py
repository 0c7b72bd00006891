"""Sums in 16 bits: where they may be clipped, what that costs, and that a graph can be made safe from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd import target
from edgekd.backends.onnxruntime import fused
from edgekd.deploy import reference
from edgekd.graph.edit import tensors
from edgekd.quantize import quantize
from edgekd.quantize.saturation import ROUNDING, clipped_sums, exposed, fits, losses, relieve, relieved
from edgekd.types import Arrays, Json

HOST = target.load("host").quantization


def silent(event: str, /, **fields: Json) -> None:
    """Nobody listens."""


@pytest.mark.parametrize(
    ("weights", "safe"),
    [
        ([64, 64, 0, 0], True),  # 255 · 128 = 32640
        ([64, 65, 0, 0], False),  # 255 · 129 = 32895
        ([127, 1, -127, -1], True),
        ([127, 2, 0, 0], False),
        ([-64, -64, 127, 1], True),
        ([-64, -65, 0, 0], False),
        ([127, -127, 0, 0], True),  # of different signs: neither sum is larger than one product
        ([1, 0, 0, 127, 0, 0, 2], False),  # not neighbours, but what a kernel reads together is its own affair
        ([127, 127], False),
        ([127], True),
    ],
)
def test_the_bound_from_weights_alone(weights: list[int], safe: bool) -> None:
    row = np.array([weights], np.int8)
    assert fits(row) == safe
    assert fits(np.concatenate([np.zeros_like(row), row])) == safe
    # It is sound: where it holds, nothing is clipped in any order for any activations, and it is not idle either.
    random = np.random.default_rng(0)
    clipped = 0.0
    for _ in range(50):
        order = random.permutation(len(weights))
        x = random.choice(np.array([0, 255], np.uint8), (20, len(weights)))
        clipped += clipped_sums(x, row[:, order])[1]
    assert (clipped == 0) == safe


def test_sums_are_clipped_pair_by_pair() -> None:
    x = np.array([[255, 255, 255, 1], [1, 2, 3, 4]], np.uint8)
    weight = np.array([[127, 127, -127, 5], [-127, -127, 0, 0]], np.int8)
    sums, part = clipped_sums(x, weight)
    assert sums.tolist() == [[32767 - 255 * 127 + 5, -32768], [127 * 3 - 381 + 20, -381]]
    assert part == 2 / 8
    odd, none = clipped_sums(x[:, :3], weight[:, :3])
    assert odd[1, 0] == 127 * 3 - 381
    assert none == 2 / 8  # the third of three stands in a pair of its own


def layer(weight: np.ndarray, *, group: int = 1, step: float = 1.0) -> onnx.ModelProto:
    """Conv of uint8 images (scale 1/64) with int8 weights (scale 1/64) and an int32 bias, quantized again."""
    outs = len(weight)
    held: dict[str, np.ndarray] = {
        "xs": np.array(1 / 64, np.float32), "xz": np.array(10, np.uint8), "w": weight,
        "ws": np.full(outs, 1 / 64, np.float32), "wz": np.zeros(outs, np.int8), "b": np.full(outs, 1000, np.int32),
        "bs": np.full(outs, 1 / 4096, np.float32), "bz": np.zeros(outs, np.int32), "ys": np.array(step, np.float32),
        "yz": np.array(128, np.uint8),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], name="conv_0", pads=[1, 1, 1, 1], group=group),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "ys", "yz"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("x", TensorProto.UINT8, ["b", weight.shape[1] * group, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", outs, 6, 6])],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def images(channels: int, value: int | None = None) -> Arrays:
    shape = (4, channels, 6, 6)
    if value is not None:
        return {"x": np.full(shape, value, np.uint8)}
    return {"x": np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)}


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def test_a_loss_is_told_in_steps_of_the_output(tmp_path: Path) -> None:
    weight = np.zeros((4, 4, 3, 3), np.int8)
    weight[0, :2, 1, 1] = 127  # 255 · 254 − 32767 = 32003 too much, of scale 1/4096: 7.81
    path = saved(layer(weight, step=0.5), tmp_path / "m.onnx")
    (found,) = losses(path, images(4, 255)).values()
    assert found.clipped == pytest.approx(1 / (4 * 18))
    assert found.steps == pytest.approx(32003 / 4096 / 0.5 / 2)  # in one of four channels: the root of a quarter
    assert found.matters
    (fine,) = losses(path, images(4, 100)).values()
    assert (fine.clipped, fine.steps, fine.matters) == (0, 0, False)


def test_padding_that_the_runtime_works_out(tmp_path: Path) -> None:
    model = layer(np.full((4, 4, 3, 3), 127, np.int8))
    del model.graph.node[3].attribute[:]
    model.graph.node[3].attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim[2:]:
            dim.dim_value = 2
    path = saved(model, tmp_path / "m.onnx")
    given = {"x": np.full((2, 4, 2, 2), 255, np.uint8)}  # smaller than the kernel
    (found,) = losses(path, given).values()
    assert found.matters


def test_depthwise_and_small_weights_are_not_exposed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    assert exposed(layer(random.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8))) == ("conv_0",)
    assert exposed(layer(random.integers(-64, 65, (8, 4, 3, 3)).astype(np.int8))) == ()
    assert exposed(layer(random.integers(-127, 128, (8, 1, 3, 3)).astype(np.int8), group=8)) == ()
    assert exposed(layer(random.integers(-127, 128, (8, 2, 3, 3)).astype(np.int8), group=4)) == ("conv_0",)
    path = saved(layer(random.integers(-64, 65, (8, 4, 3, 3)).astype(np.int8)), tmp_path / "m.onnx")
    before = path.read_bytes()
    assert losses(path, images(4)) == {}
    assert relieve(path, images(4)) == {"relieved": {}, "clipped": {}}
    assert path.read_bytes() == before


@pytest.mark.parametrize("group", [1, 2])
def test_a_relieved_layer_cannot_be_clipped_and_computes_the_same(tmp_path: Path, group: int) -> None:
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8)
    weight[0] = np.clip(weight[0], -60, 60)  # this channel has no need of it
    path = saved(layer(weight, group=group, step=1.0), tmp_path / "m.onnx")
    given = images(4 * group)
    expected = reference(path, 1)(given)["y"]
    told = relieve(path, given)
    (steps,) = dict(told["relieved"]).values()  # type: ignore[arg-type]
    assert float(str(steps)) > ROUNDING
    model = onnx.load(path)
    assert exposed(model) == ()
    assert losses(path, given) == {}
    (levels,) = (a for a in tensors(model.graph).values() if a.dtype == np.int8 and a.ndim == 4)
    np.testing.assert_array_equal(levels[0], weight[0])
    found = reference(path, 1)(given)["y"]
    assert np.abs(found - expected).max() <= 2.0
    assert np.abs(found - expected).mean() < 0.2
    assert fused(path)["float"] == {}


def test_what_two_layers_share_is_changed_for_one_alone() -> None:
    model = layer(np.full((4, 4, 1, 1), 127, np.int8))
    other = helper.make_node("Conv", ["xd", "wd", "bd"], ["z"], name="conv_1")
    model.graph.node.insert(4, other)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", 4, 6, 6]))
    assert exposed(model) == ("conv_0", "conv_1")
    assert exposed(relieved(model, ["conv_0"])) == ("conv_1",)


def test_a_gemm_of_either_layout_is_relieved(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for transposed in (0, 1):
        weight = random.integers(-127, 128, (5, 16) if transposed else (16, 5)).astype(np.int8)
        held: dict[str, np.ndarray] = {
            "xs": np.array(0.01, np.float32), "xz": np.array(0, np.uint8), "w": weight,
            "ws": np.full(5, 0.01, np.float32), "wz": np.zeros(5, np.int8),
        }  # fmt: skip
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0 if transposed else 1),
            helper.make_node("Gemm", ["xd", "wd"], ["y"], name="gemm_0", transB=transposed),
        ]
        graph = helper.make_graph(
            nodes, "one", [helper.make_tensor_value_info("x", TensorProto.UINT8, ["b", 16])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 5])],
            [numpy_helper.from_array(value, name) for name, value in held.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        path = saved(model, tmp_path / "m.onnx")
        given = {"x": random.integers(100, 256, (32, 16)).astype(np.uint8)}
        expected = reference(path, 1)(given)["y"]
        assert list(dict(relieve(path, given)["relieved"])) == ["gemm_0"]  # type: ignore[arg-type]
        assert exposed(onnx.load(path)) == ()
        assert np.abs(reference(path, 1)(given)["y"] - expected).max() < 0.02 * np.abs(expected).max()


def test_seven_bit_weights_of_the_whole_network_are_never_exposed(tmp_path: Path) -> None:
    network = networks.small()
    batches = [networks.samples(network.inputs, 32, 0)]
    for bits in (7, 8):
        rules = replace(HOST, weight_bits=bits)
        path = tmp_path / f"{bits}.onnx"
        quantize(network, batches, rules, opset=18, preprocessing=True, path=path, say=silent)
        assert bool(exposed(onnx.load(path))) == (bits == 8)
        largest = max(
            np.abs(a.astype(int)).max() for a in tensors(onnx.load(path).graph).values() if a.dtype == np.int8
        )
        assert largest == (64 if bits == 7 else 127)
    relieve(path, batches[0])
    assert not any(loss.matters for loss in losses(path, batches[0]).values())


def test_the_host_says_that_it_may_have_such_kernels() -> None:
    assert HOST.sums_16_bit
    assert HOST.weight_bits == 8
    assert not target.load("jetson").quantization.sums_16_bit
