"""Each rule fires on the graph it is about, and on nothing that is right."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from rules import HOST

from edgekd.quantize import lint
from edgekd.types import QuantizationRules

TENSORRT = QuantizationRules("int8", True, "int8", True, False, False, 16, "tensorrt")

HEAD = '<ir_version: 9, opset_import: ["" : 19]>\n'
# A residual block as TensorRT wants it: one shared pair for the convolution and the branch, nothing behind the Conv.
RIGHT = """
g (uint8[N,8,8,2] image) => (float[N,2,8,8] y)
<float s = {0.1}, int8 z = {0}, int8[2,2,1,1] w = {1,-2,3,4},
 float[2] ws = {0.1,0.2}, int8[2] wz = {0,0}, float[2] b = {0,1}>
{
  f = Cast<to = 1>(image)
  x = Transpose<perm = [0,3,1,2]>(f)
  q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  wd = DequantizeLinear<axis = 0>(w, ws, wz)
  c = Conv(d, wd, b)
  a = Add(c, d)
  y = Relu(a)
}
"""


def found(text: str, rules: QuantizationRules = TENSORRT, opset: int = 19, head: str = HEAD) -> list[str]:
    """Names of the rules that fire, each once, in order."""
    findings = lint.check_model(onnx.parser.parse_model(head + text), rules, opset)
    return list(dict.fromkeys(finding.rule for finding in findings))


def edited(*pairs: tuple[str, str]) -> str:
    text = RIGHT
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def test_the_right_graph_breaks_no_rule() -> None:
    assert found(RIGHT) == []


def test_a_float_graph_breaks_no_rule() -> None:
    assert found("g (float[N,4] x) => (float[N,4] y) { t = Relu(x)\n y = Add(t, x) }") == []


BROKEN = {
    "uint8 pair": (
        edited(("int8 z = {0}", "uint8 z = {0}")),
        "quantized_type",
    ),
    "zero point": (edited(("int8 z = {0}", "int8 z = {3}")), "zero_point"),
    "zero point of another size": (edited(("int8[2] wz = {0,0}", "int8[1] wz = {0}")), "zero_point"),
    "computed zero point": (
        edited(("q = Quant", "k = Identity(z)\n q = Quant"), ("(x, s, z)", "(x, s, k)")), "zero_point",
    ),
    "missing zero point": (edited(("DequantizeLinear(q, s, z)", "DequantizeLinear(q, s)")), "explicit_zero_point"),
    "scale of zero": (edited(("float[2] ws = {0.1,0.2}", "float[2] ws = {0.1,0.0}")), "positive_scale"),
    "negative scale": (edited(("float s = {0.1}", "float s = {-0.1}")), "positive_scale"),
    "computed scale": (
        edited(("q = Quant", "k = Identity(s)\n q = Quant"), ("(x, s, z)", "(x, k, z)")), "positive_scale",
    ),
    "axis left out": (edited(("DequantizeLinear<axis = 0>(w", "DequantizeLinear(w")), "channel_axis"),
    "axis of the inputs": (edited(("<axis = 0>", "<axis = 1>")), "channel_axis"),
    "axis of another length": (edited(("<axis = 0>", "<axis = 2>")), "channel_axis"),
    "activation per channel": (
        edited(("QuantizeLinear(x, s, z)", "QuantizeLinear<axis = 1>(x, ws, wz)"),
               ("DequantizeLinear(q, s, z)", "DequantizeLinear<axis = 1>(q, ws, wz)")),
        "weights_only_per_channel",
    ),
    "integer bias": (
        edited(("float[2] b = {0,1}", "int32[2] bq = {0,1}, int32[2] bz = {0,0}"),
               ("c = Conv", "b = DequantizeLinear<axis = 0>(bq, ws, bz)\n c = Conv")),
        "quantized_type",
    ),
    "byte rearranged": (
        edited(("f = Cast<to = 1>(image)", "f = Transpose<perm = [0,3,1,2]>(image)"),
               ("x = Transpose<perm = [0,3,1,2]>(f)", "x = Cast<to = 1>(f)")),
        "byte_only_cast",
    ),
    "two pairs": (
        edited(("c = Conv", "q2 = QuantizeLinear(x, s2, z)\n d2 = DequantizeLinear(q2, s2, z)\n c = Conv"),
               ("Add(c, d)", "Add(c, d2)"), ("float s =", "float s2 = {0.2}, float s =")),
        "shared_pair",
    ),
    "two dequantizers": (
        edited(("c = Conv", "d2 = DequantizeLinear(q, s, z)\n c = Conv"), ("Add(c, d)", "Add(c, d2)")),
        "shared_pair",
    ),
    "branch in float": (edited(("Add(c, d)", "Add(c, x)")), "residual_branch"),
    "both sides quantized": (
        edited(("a = Add(c, d)", "cq = QuantizeLinear(c, s, z)\n cd = DequantizeLinear(cq, s, z)\n a = Add(cd, d)")),
        "residual_branch",
    ),
    "weight of -128": (edited(("{1,-2,3,4}", "{1,-128,3,4}")), "weight_range"),
    "half bias": (
        edited(("float[2] b = {0,1}", "float16[2] h = {0,1}"), ("c = Conv(d, wd, b)", "c = Conv(d, wd, h)")),
        "float_types_agree",
    ),
    "half scale": (edited(("float s = {0.1}", "float16 s = {1}")), "float_types_agree"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_named(name: str) -> None:
    text, rule = BROKEN[name]
    assert rule in found(text)


def test_newer_opset_than_the_parser_reads() -> None:
    assert found(RIGHT, opset=17) == ["newer_opset"]
    assert found(RIGHT, opset=19) == []


INTEGER = {
    "QLinearAdd": "y = com.microsoft.QLinearAdd(x, s, z, x, s, z, s, z)",
    "MatMulInteger": "i = MatMulInteger(x, x)\n y = Identity(x)",
    "QLinearMatMul": "y = QLinearMatMul(x, s, z, x, s, z, s, z)",
    "DynamicQuantizeLinear": "f = Cast<to = 1>(x)\n d, ds, dz = DynamicQuantizeLinear(f)\n y = Identity(x)",
}


@pytest.mark.parametrize("operator", INTEGER)
def test_integer_operators_are_refused(operator: str) -> None:
    head = '<ir_version: 9, opset_import: ["" : 19, "com.microsoft" : 1]>\n'
    body = f"g (int8[4,4] x) => (int8[4,4] y) <float s = {{0.1}}, int8 z = {{0}}> {{ {INTEGER[operator]} }}"
    assert "unsupported_operator" in found(body, head=head)


def test_an_invalid_graph_is_a_finding_and_no_crash() -> None:
    assert found("g (int8[4,4] x) => (int8[4,4] y) { y = QLinearMatMul(x) }") == ["invalid_graph"]


@pytest.mark.parametrize(
    ("operator", "axis", "fires"),
    [
        ("MatMul", 1, False), ("MatMul", 0, True), ("Gemm", 1, False), ("Gemm<transB = 1>", 0, False),
        ("Gemm<transB = 1>", 1, True),
    ],
)  # fmt: skip
def test_the_axis_belongs_to_the_operator(operator: str, axis: int, fires: bool) -> None:
    text = f"""g (float[N,2] x) => (float[N,2] y)
    <float s = {{0.1}}, int8 z = {{0}}, int8[2,2] w = {{1,2,3,4}}, float[2] ws = {{0.1,0.2}}, int8[2] wz = {{0,0}}>
    {{
      q = QuantizeLinear(x, s, z)
      d = DequantizeLinear(q, s, z)
      wd = DequantizeLinear<axis = {axis}>(w, ws, wz)
      y = {operator}(d, wd)
    }}"""
    assert ("channel_axis" in found(text)) is fires


def test_a_convolution_in_float_may_be_added_to_anything() -> None:
    text = """g (float[N,2,4,4] x) => (float[N,2,4,4] y) <float[2,2,1,1] w = {1,2,3,4}>
    { c = Conv(x, w)
      y = Add(c, x) }"""
    assert found(text) == []


def test_a_finding_says_where_and_what() -> None:
    text = edited(("int8 z = {0}", "int8 z = {3}"))
    finding = next(
        f for f in lint.check_model(onnx.parser.parse_model(HEAD + text), TENSORRT, 19) if f.rule == "zero_point"
    )
    assert (finding.severity, finding.node) == ("error", "q")
    assert "3, not 0" in str(finding)


def test_every_rule_of_tensorrt_has_a_graph_that_breaks_it() -> None:
    covered = {rule for _, rule in BROKEN.values()} | {"newer_opset", "unsupported_operator"}
    assert covered == {rule.__name__ for rule in lint.TENSORRT}


def test_host_rules_accept_bytes_and_point_at_float_layers(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(HEAD + edited(("int8 z = {0}", "uint8 z = {3}"))), path)
    rules = {finding.rule for finding in lint.check(path, HOST, 19)}
    assert rules == {"float_layer"}  # the output of this Conv goes to an Add in float


@pytest.mark.parametrize(
    ("version", "newest"), [("8.0", 13), ("8.2.1", 13), ("8.5.2", 17), ("8.6.2", 17), ("10.3.0", 20), ("10.16.1", 24)]
)
def test_newest_opset_of_a_release(version: str, newest: int) -> None:
    assert lint.newest_opset(version) == newest
