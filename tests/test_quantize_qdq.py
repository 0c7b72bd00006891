"""What is rewritten in an exported Q/DQ graph computes the same, and only where its pattern is whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from rules import BOARD, HOST

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.graph.edit import strip, tensors
from edgekd.quantize.qdq import finish
from edgekd.types import QuantizationRules

HEAD = '<ir_version: 9, opset_import: ["" : 19]>\n'


def finished(text: str, rules: QuantizationRules, tmp_path: Path, *, tolerance: float = 1e-6) -> onnx.ModelProto:
    """The rewritten graph, once it was seen to compute what the text computes."""
    before = onnx.parser.parse_model(HEAD + text)
    before.CopyFrom(onnx.shape_inference.infer_shapes(before, strict_mode=True))
    after = strip(finish(before, rules))
    onnx.checker.check_model(after, full_check=True)
    shape = [d.dim_value or 3 for d in before.graph.input[0].type.tensor_type.shape.dim]
    kind = np.uint8 if before.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8 else np.float32
    given = {before.graph.input[0].name: (np.random.default_rng(0).normal(size=shape) * 4).astype(kind)}
    results = []
    for model in (before, after):
        onnx.save(model, tmp_path / "m.onnx")
        results.append(onnxruntime(optimizations=False).load(tmp_path / "m.onnx", 1)(given)["y"])
    np.testing.assert_allclose(results[1], results[0], atol=tolerance)
    return after


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


MOVED = """g (float[N,2,4,4] x) => (float[N,3,2,4] y)
<float s = {0.1}, uint8 z = {7}, float s2 = {S2}, int64[1] b = {0}, int64[1] e = {9}, int64[1] a = {2},
 int64[1] t = {2}, int64[8] p = {0,0,0,0,0,1,0,0}>
{ q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  m = Slice(d, b, e, a, t)
  mq = QuantizeLinear(m, s2, z)
  md = DequantizeLinear(mq, s2, z)
  w = Pad(md, p)
  wq = QuantizeLinear(w, s2, z)
  y = DequantizeLinear(wq, s2, z) }"""


def test_slices_and_pads_move_integers(tmp_path: Path) -> None:
    model = finished(MOVED.replace("S2", "0.1"), HOST, tmp_path)
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear", "Slice", "Pad", "DequantizeLinear"]
    zero = next(node for node in model.graph.node if node.op_type == "Pad").input[2]
    assert tensors(model.graph)[zero] == 7


def test_a_slice_between_other_scales_stays(tmp_path: Path) -> None:
    model = finished(MOVED.replace("S2", "0.2"), HOST, tmp_path)
    assert [node.op_type for node in model.graph.node][1:3] == ["DequantizeLinear", "Slice"]


def test_where_only_inputs_are_quantized_nothing_moves(tmp_path: Path) -> None:
    assert kinds(finished(MOVED.replace("S2", "0.1"), BOARD, tmp_path))["QuantizeLinear"] == 3


@pytest.mark.parametrize(("keep", "shape"), [(1, "[N,2,1,1]"), (0, "[N,2]")])
@pytest.mark.parametrize("behind", ["s", "r"])
def test_a_spatial_mean_becomes_a_pool(keep: int, shape: str, behind: str, tmp_path: Path) -> None:
    text = f"""g (float[N,2,4,4] x) => (float{shape} y)
    <float s = {{0.1}}, float r = {{0.05}}, uint8 z = {{7}}, int64[2] a = {{-1,-2}}>
    {{ q = QuantizeLinear(x, s, z)
       d = DequantizeLinear(q, s, z)
       m = ReduceMean<keepdims = {keep}>(d, a)
       mq = QuantizeLinear(m, {behind}, z)
       y = DequantizeLinear(mq, {behind}, z) }}"""
    found = kinds(finished(text, HOST, tmp_path, tolerance=0.101))
    assert found["ReduceMean"] == 0
    assert found["GlobalAveragePool"] == 1
    assert found["Flatten"] == 1 - keep


@pytest.mark.parametrize(("axes", "made"), [("{1,2}", "d"), ("{2,3}", "x")])
def test_another_mean_stays(axes: str, made: str, tmp_path: Path) -> None:
    text = f"""g (float[2,2,4,4] x) => (float[A,B,C,D] y) <float s = {{0.1}}, uint8 z = {{7}}, int64[2] a = {axes}>
    {{ q = QuantizeLinear(x, s, z)
       d = DequantizeLinear(q, s, z)
       m = ReduceMean({made}, a)
       t = Add(m, d)
       y = ReduceMax(t) }}"""
    assert kinds(finished(text, HOST, tmp_path))["ReduceMean"] == 1


def test_a_stored_weight_is_stored_transposed(tmp_path: Path) -> None:
    text = """g (float[N,2] x) => (float[N,3] y)
    <float s = {0.1}, int8 z = {0}, int8[3,2] w = {1,2,3,4,5,6}, float[3] ws = {0.1,0.2,0.3}, int8[3] wz = {0,0,0}>
    { q = QuantizeLinear(x, s, z)
      d = DequantizeLinear(q, s, z)
      wd = DequantizeLinear<axis = 0>(w, ws, wz)
      wt = Transpose<perm = [1,0]>(wd)
      y = MatMul(d, wt) }"""
    model = finished(text, BOARD, tmp_path)
    assert kinds(model)["Transpose"] == 0
    weight = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors(model.graph))
    assert tensors(model.graph)[weight.input[0]].tolist() == [[1, 3, 5], [2, 4, 6]]
    assert [a.i for a in weight.attribute if a.name == "axis"] == [1]


CONV = """g (float[N,2,4,4] x) => (float[N,2,4,4] y)
<float s = {0.1}, uint8 z = {7}, int8[2,2,1,1] w = {1,-2,3,4}, float[2] ws = {0.1,WS}, int8[2] wz = {0,0},
 float[2] b = {1.234,30}>
{ q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  wd = DequantizeLinear<axis = 0>(w, ws, wz)
  y = Conv(d, wd, b) }"""


def test_a_bias_becomes_int32_of_the_product_of_scales(tmp_path: Path) -> None:
    model = finished(CONV.replace("WS", "0.2"), HOST, tmp_path, tolerance=0.011)
    constants = tensors(model.graph)
    bias = next(
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and constants[n.input[2]].dtype == np.int32
    )
    assert constants[bias.input[0]].tolist() == [123, 1500]
    np.testing.assert_allclose(constants[bias.input[1]], [0.01, 0.02], rtol=1e-6)
    assert kinds(finished(CONV.replace("WS", "0.2"), BOARD, tmp_path))["DequantizeLinear"] == 2


def test_a_dead_channel_gets_a_scale_its_bias_fits(tmp_path: Path) -> None:
    model = finished(CONV.replace("WS", "1e-9"), HOST, tmp_path, tolerance=0.011)
    constants = tensors(model.graph)
    bias = next(
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and constants[n.input[2]].dtype == np.int32
    )
    assert 2**29 < constants[bias.input[0]][1] <= 2**30
    assert constants[bias.input[0]][1] * constants[bias.input[1]][1] == pytest.approx(30)


CLIP = """g (float[N,4] x) => (float[N,4] y) <float s = {0.05}, uint8 z = {128}, float o = {OUT}, uint8 oz = {ZERO}>
{ q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  h = OPERATOR(d)
  hq = QuantizeLinear(h, o, oz)
  y = DequantizeLinear(hq, o, oz) }"""


@pytest.mark.parametrize(
    ("operator", "out", "zero"),
    [
        ("HardSwish", "0.03", "13"),
        ("HardSigmoid<alpha = 0.1666667>", "0.00392156862", "0"),
        ("HardSigmoid", "0.0035", "0"),
    ],
)
def test_hard_functions_become_integer_sums_and_products(operator: str, out: str, zero: str, tmp_path: Path) -> None:
    text = CLIP.replace("OPERATOR", operator).replace("OUT", out).replace("ZERO", zero)
    model = finished(text, HOST, tmp_path, tolerance=float(out) * 1.01)  # one level
    assert not {"HardSwish", "HardSigmoid"} & set(kinds(model))
    assert kinds(model)["Mul"] == int(operator == "HardSwish")
    assert kinds(finished(text, BOARD, tmp_path))[operator.partition("<")[0]] == 1


@pytest.mark.parametrize(("out", "zero"), [("0.0041", "0"), ("0.0039", "3")])
def test_a_hard_sigmoid_whose_integers_do_not_end_at_0_and_1_stays(out: str, zero: str, tmp_path: Path) -> None:
    text = CLIP.replace("OPERATOR", "HardSigmoid").replace("OUT", out).replace("ZERO", zero)
    assert kinds(finished(text, HOST, tmp_path))["HardSigmoid"] == 1


NORMAL = """g (uint8[N,4,4,3] image) => (float[N,3,4,4] y)
<float[1,3,1,1] scale = {0.1,0.2,0.3}, float[1,3,1,1] offset = {-1,-2,-3}, float s = {0.1}, uint8 z = {7}>
{ [c] c = Cast<to = 1>(image)
  [t] t = Transpose<perm = [0,3,1,2]>(c)
  [m] m = Mul(t, scale)
  [a] a = Add(m, offset)
  q = QuantizeLinear(a, s, z)
  y = DequantizeLinear(q, s, z) }"""


def test_an_image_is_normalised_at_once_for_the_host(tmp_path: Path) -> None:
    model = finished(NORMAL, HOST, tmp_path, tolerance=0.101)
    assert [n.op_type for n in model.graph.node][:3] == ["Cast", "Transpose", "BatchNormalization"]
    assert kinds(finished(NORMAL, BOARD, tmp_path))["BatchNormalization"] == 0
    inner = NORMAL.replace("uint8[N,4,4,3]", "float[N,4,4,3]")
    assert kinds(finished(inner, HOST, tmp_path))["BatchNormalization"] == 0
