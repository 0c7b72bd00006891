"""The ONNX file computes what the network computes, and tells nothing of where it was made."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.errors import DataError, ModelError, ParityError
from edgekd.export import check_parity, export, parity, strip, to_fp16, to_opset
from edgekd.graph.edit import cast_first
from edgekd.models.network import Network
from edgekd.types import Preprocessing, TensorSpec

TESTS = Path(__file__).parent


def run(model: onnx.ModelProto | Path, given: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    path = model if isinstance(model, Path) else folder / "run.onnx"
    if isinstance(model, onnx.ModelProto):
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
    return onnxruntime(optimizations=False).load(path, 1)(given)


@pytest.fixture(scope="module")
def network() -> Network:
    return networks.small()


@pytest.fixture(scope="module")
def exported(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    meta = export(network, networks.samples(networks.IMAGE, 1), opset=18, preprocessing=True, path=path)
    assert meta == {"static_batch": None}
    return path


def test_the_file_computes_what_the_network_computes(network: Network, exported: Path, tmp_path: Path) -> None:
    given = networks.samples(networks.IMAGE, 7, seed=3)
    found = check_parity(networks.logits(network, given), run(exported, given, tmp_path), "fp32", where="model.onnx")
    assert found.samples == 7
    assert found.max_abs < 1e-4


def test_inputs_outputs_and_batch_are_named(exported: Path) -> None:
    session = onnxruntime().load(exported, 1)
    assert session.inputs == networks.IMAGE
    assert session.outputs == (TensorSpec("logits", "float32", ("batch", 5)),)


def test_batch_norm_is_folded_and_weights_are_inside(exported: Path) -> None:
    model = onnx.load(exported, load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["BatchNormalization"] == 0
    assert kinds["Conv"] == 5
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in model.graph.initializer)
    assert [o.version for o in model.opset_import] == [18]
    assert model.graph.node[0].op_type == "Cast"  # TensorRT takes uint8 only where a Cast reads it


def test_without_preprocessing_the_graph_takes_normalised_floats(network: Network, tmp_path: Path) -> None:
    given = networks.samples(networks.IMAGE, 4)
    path = tmp_path / "bare.onnx"
    export(network, given, opset=18, preprocessing=False, path=path)
    session = onnxruntime().load(path, 1)
    assert session.inputs == (TensorSpec("image", "float32", ("batch", 3, 8, 8)),)
    prepared = network.prepare(torch.from_numpy(given["image"]))[0].contiguous().numpy()
    check_parity(networks.logits(network, given), session({"image": prepared}), "fp32", where="bare")


def test_two_inputs_of_other_types(tmp_path: Path) -> None:
    network = networks.sensors()
    given = networks.samples(network.inputs, 5)
    export(network, given, opset=17, preprocessing=True, path=tmp_path / "m.onnx")
    session = onnxruntime().load(tmp_path / "m.onnx", 1)
    assert session.inputs == network.inputs
    check_parity(networks.logits(network, given), session(given), "fp32", where="m")
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 17


def test_export_leaves_the_warning_and_log_settings_alone(network: Network, tmp_path: Path, capfd: Any) -> None:
    import logging

    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(network, networks.samples(networks.IMAGE, 2), opset=18, preprocessing=True, path=tmp_path / "m.onnx")
        with pytest.raises(UserWarning, match="ours"):
            warnings.warn("ours", stacklevel=1)
    assert logging.root.manager.disable == before
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- models that cannot


def test_a_model_of_a_fixed_batch_is_told_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(networks.BatchOfOne(), (TensorSpec("x", "float32", ("batch", 8)),), None)
    said: list[tuple[str, dict[str, Any]]] = []
    given = networks.samples(network.inputs, 3)
    meta = export(
        network,
        given,
        opset=18,
        preprocessing=True,
        path=tmp_path / "m.onnx",
        say=lambda e, /, **f: said.append((e, f)),
    )
    assert isinstance(meta["static_batch"], str)
    assert [event for event, _ in said] == ["static batch"]
    session = onnxruntime().load(tmp_path / "m.onnx", 1)
    assert session.inputs[0].shape == (1, 8)
    one = {"x": given["x"][:1]}
    check_parity(networks.logits(network, one), session(one), "fp32", where="m")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if float(x.sum()) > 0 else x


class Twin(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1


@pytest.mark.parametrize(("module", "words"), [(Branching(), "traced"), (Twin(), "2 values")])
def test_a_model_that_cannot_be_exported_is_one_paragraph(module: nn.Module, words: str, tmp_path: Path) -> None:
    network = Network(module, (TensorSpec("x", "float32", ("batch", 4)),), None)
    with pytest.raises(ModelError, match=words) as problem:
        export(network, networks.samples(network.inputs, 2), opset=18, preprocessing=True, path=tmp_path / "m.onnx")
    assert len(str(problem.value)) < 700
    assert "Traceback" not in str(problem.value)
    assert not (tmp_path / "m.onnx").exists()


def test_a_missing_input_is_named(network: Network, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image"):
        export(
            network, {"picture": np.zeros((1, 8, 8, 3), np.uint8)}, opset=18, preprocessing=True, path=tmp_path / "m"
        )


# ---------------------------------------------------------------- traces and determinism


def test_nothing_of_this_machine_is_in_the_file(exported: Path) -> None:
    content = exported.read_bytes()
    for mark in (
        str(TESTS),
        str(Path.cwd()),
        str(Path.home()) + "/",
        f"/{getpass.getuser()}/",
        ".py",
        "networks",
        "torch",
        "fx_node",
    ):
        assert mark.encode() not in content, mark
    model = onnx.load(exported)
    assert (model.producer_name, model.producer_version, model.domain, model.model_version) == ("edgekd", "", "", 0)


def test_strip_empties_every_field_that_can_tell() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18, "own" : 1],
            producer_name: "pytorch", producer_version: "2", doc_string: "/home/me">
        g (float[N,2] x) => (float[N,2] y) <float[2] "module.secret.weight" = {1,2}>
        { "secret_node" = own.f(x)
          y = Add("secret_node", "module.secret.weight") }
        <domain: "own", opset_import: ["" : 18]>
        f (a) => (b) { "secret_inner" = Relu(a)
          b = Neg("secret_inner") }"""
    )
    for item in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.initializer, *model.functions):
        item.doc_string = "secret"
        entry = item.metadata_props.add()
        entry.key, entry.value = "secret", "/home/me/secret.py"
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("secret_node", 1, ["N", 2]))
    cleaned = strip(model)
    onnx.checker.check_model(cleaned, full_check=True)
    content = cleaned.SerializeToString()
    assert b"secret" not in content
    assert b"/home" not in content
    assert b"pytorch" not in content
    assert [node.op_type for node in cleaned.graph.node] == ["Relu", "Neg", "Add"]
    assert [node.name for node in cleaned.graph.node] == ["relu_0", "neg_0", "add_0"]
    assert b"secret" in model.SerializeToString()  # the original is left alone


def test_strip_does_not_depend_on_names() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x) => (float[N,2] y) <float[2] {w} = {{1,2}}>
    {{ {t} = Add(x, {w})
       y = Mul({t}, {w}) }}"""
    models = [onnx.parser.parse_model(text.format(w=w, t=t)) for w, t in (("a", "b"), ("add_0", "mul_0"), ("zz", "w"))]
    assert len({strip(model).SerializeToString(deterministic=True) for model in models}) == 1


SCRIPT = """
import hashlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import networks
from edgekd.export import export
from edgekd.quantize import quantize
from edgekd.types import QuantizationRules
network, given = networks.small(), networks.samples(networks.IMAGE, 16)
export(network, given, opset=18, preprocessing=True, path=Path("a.onnx"))
rules = QuantizationRules("uint8", False, "int8", True, True, True)
silent = lambda event, /, **fields: None
quantize(network, [given], rules, opset=19, preprocessing=True, path=Path("b.onnx"), say=silent)
print([hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in ("a.onnx", "b.onnx")])
"""


def test_the_same_network_gives_the_same_bytes_in_another_process_and_place(tmp_path: Path) -> None:
    running = []
    for number, seed in enumerate(("1", "271")):
        folder = tmp_path / f"place{number}" / ("deeper" * number)
        folder.mkdir(parents=True)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, str(TESTS)]
        running.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    printed = []
    for process in running:
        out, problem = process.communicate(timeout=300)
        assert process.returncode == 0, problem
        printed.append(out)
    assert printed[0] == printed[1]
    assert printed[0].count("'") == 4


# ---------------------------------------------------------------- parity


def test_parity_by_hand() -> None:
    found = parity({"a": np.array([[3.0, 4.0], [1.0, 0.0]])}, {"a": np.array([[3.0, 4.0], [0.0, 1.0]])})
    assert (found.max_abs, found.samples) == (1.0, 2)
    assert found.cosine == pytest.approx(0.5)
    same = parity({"a": np.zeros((2, 3))}, {"a": np.zeros((2, 3))})
    assert (same.max_abs, same.cosine) == (0.0, 1.0)
    assert parity({"a": np.zeros((1, 2))}, {"a": np.ones((1, 2))}).cosine == 0.0


def test_parity_of_different_things_is_refused() -> None:
    a = np.zeros((2, 3))
    for other in ({"b": a}, {"a": a[:1]}, {"a": np.zeros((2, 4))}):
        with pytest.raises(ParityError):
            parity({"a": a}, other)
    with pytest.raises(ParityError, match="at least one"):
        parity({"a": a[:0]}, {"a": a[:0]})


def test_check_parity_has_a_measure_for_each_precision() -> None:
    reference = {"logits": np.array([[10.0, -5.0, 2.0]])}
    near, far = {"logits": reference["logits"] + 0.005}, {"logits": reference["logits"] + 0.05}
    assert check_parity(reference, near, "fp32", where="m").max_abs == pytest.approx(0.005)
    with pytest.raises(ParityError, match=r"max_abs 0.05, cosine 0.9999.* over 1 samples") as problem:
        check_parity(reference, far, "fp32", where="m.onnx")
    assert "m.onnx" in str(problem.value)
    assert "0.01" in str(problem.value)  # 1e-3 of the largest logit
    assert check_parity(reference, far, "fp16", where="m").cosine > 0.999
    turned = {"logits": np.array([[5.0, -8.0, 5.0]])}
    for precision in ("fp16", "int8"):
        with pytest.raises(ParityError):
            check_parity(reference, turned, precision, where="m")
    with pytest.raises(ParityError, match="not finite"):
        check_parity(reference, {"logits": np.array([[np.nan, 1.0, 1.0]])}, "int8", where="m")


# ---------------------------------------------------------------- float16


def test_fp16_is_half_as_large_and_keeps_inputs_outputs_and_preprocessing(exported: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    account = to_fp16(exported, half)
    model = onnx.load(half)
    kinds = Counter(t.data_type for t in model.graph.initializer if len(t.dims) == 4 and t.dims[1] != 3)
    assert account["clamped"] == 0
    assert account["float32_nodes"] == []
    assert onnx.TensorProto.FLOAT not in {t.data_type for t in model.graph.initializer if np.prod(t.dims) > 3}
    assert kinds[onnx.TensorProto.FLOAT16] > 0
    given = networks.samples(networks.IMAGE, 8)
    check_parity(run(exported, given, tmp_path), run(half, given, tmp_path), "fp16", where="half")
    session = onnxruntime().load(half, 1)
    assert (session.inputs[0].dtype, session.outputs[0].dtype) == ("uint8", "float32")
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    normalised = next(node for node in model.graph.node if node.op_type == "Add")
    assert types[normalised.output[0]] == onnx.TensorProto.FLOAT


def halve(text: str, tmp_path: Path, opset: int = 19) -> tuple[onnx.ModelProto, dict[str, Any]]:
    source = tmp_path / "in.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{text}'), source)
    account = to_fp16(source, tmp_path / "out.onnx")
    return onnx.load(tmp_path / "out.onnx"), account


def test_fp16_refuses_weights_and_clamps_masks(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="1 weights of n exceed 65504"):
        halve("g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1,2,3,70000}> { [n] y = MatMul(x, w) }", tmp_path)
    model, account = halve("g (float[N,2] x) => (float[N,2] y) <float[2] w = {0,-3.4e38}> { y = Add(x, w) }", tmp_path)
    assert account["clamped"] == 1
    assert onnx.numpy_helper.to_array(model.graph.initializer[0]).tolist() == [0.0, -65504.0]


def test_fp16_keeps_what_onnx_fixes_to_float32(tmp_path: Path) -> None:
    model, _ = halve(
        """g (float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] s = {1,1,2,2}>
        { y = Resize<mode = "nearest">(x, , s) }""",
        tmp_path,
    )
    assert [node.op_type for node in model.graph.node] == ["Cast", "Resize", "Cast"]
    assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT


def test_fp16_leaves_integers_alone_and_casts_each_value_once(tmp_path: Path) -> None:
    model, _ = halve(
        """g (int64[N,3] ids, float[N,2] x) => (float[N,2] y)
        <float[5,2] table = {0,1,2,3,4,5,6,7,8,9}, int64[1] axes = {1}>
        { rows = Gather(table, ids)
          sum = ReduceSum<keepdims = 0>(rows, axes)
          twice = Mul(x, x)
          t = Add(sum, twice)
          y = Add(t, x) }""",
        tmp_path,
    )
    assert Counter(node.op_type for node in model.graph.node)["Cast"] == 2  # x on its way in, y on its way out
    out = run(model, {"ids": np.array([[0, 1, 2]]), "x": np.ones((1, 2), np.float32)}, tmp_path)
    assert out["y"].tolist() == [[8.0, 11.0]]


PAIR = """g (float[N,2] x) => (float[N,2] y) <float s = {SCALE}, TYPE z = {0}>
{ q = QuantizeLinear(x, s, z)
  y = DequantizeLinear(q, s, z) }"""


def test_fp16_reaches_the_scales_of_int8_pairs(tmp_path: Path) -> None:
    model, _ = halve(PAIR.replace("SCALE", "0.5").replace("TYPE", "int8"), tmp_path)
    kinds = {t.data_type for t in model.graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8}
    assert run(model, {"x": np.array([[1.2, -9.0]], np.float32)}, tmp_path)["y"].tolist() == [[1.0, -9.0]]


@pytest.mark.parametrize(
    ("scale", "kind", "opset", "words"),
    [("1e-9", "int8", 19, "zero in float16"), ("0.5", "int8", 17, "opset 17"), ("0.5", "uint8", 19, "uint8")],
)
def test_fp16_refuses_pairs_it_cannot_keep(scale: str, kind: str, opset: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        halve(PAIR.replace("SCALE", scale).replace("TYPE", kind), tmp_path, opset)


# ---------------------------------------------------------------- older opsets

NEWER = {
    "mean": """g (float[N,3,4,4] x) => (float[N,3] y) <int64[2] a = {2,3}>
    { y = ReduceMean<keepdims = 0, noop_with_empty_axes = 0>(x, a) }""",
    "pad": "g (float[N,3,4,4] x) => (float[N,5,4,4] y) <int64[2] p = {1,1}, int64[1] a = {1}> { y = Pad(x, p, , a) }",
    "split": """g (float[N,3,4,4] x) => (float[N,2,4,4] y, float[N,1,4,4] z)
    { y, z = Split<axis = 1, num_outputs = 2>(x) }""",
    "gelu": "g (float[N,3,4,4] x) => (float[N,3,4,4] y) { y = Gelu(x) }",
    "cast": "g (float[N,3,4,4] x) => (int32[N,3,4,4] y) { y = Cast<to = 6, saturate = 1>(x) }",
}  # fmt: skip


@pytest.mark.parametrize("name", NEWER)
def test_to_opset_17_computes_the_same(name: str, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]>\n{NEWER[name]}')
    lowered = to_opset(model, 17)
    assert lowered.opset_import[0].version == 17
    given = {"x": np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)}
    before, after = run(model, given, tmp_path), run(lowered, given, tmp_path)
    for key, array in before.items():
        np.testing.assert_allclose(after[key], array, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("g (float[N,4] x) => (float[N,4] y) { y = Mish(x) }", "no Mish"),
        (
            'g (float[N,3,4,4] x, float[N,2,2,2] p) => (float[N,3,2,2] y) { y = GridSample<mode = "linear">(x, p) }',
            "GridSample",
        ),
        ('g (float[N,4] x) => (float[N,4] y) { y = Gelu<approximate = "tanh">(x) }', "tanh"),
        ("g (float[N,4] x, int64[1] a) => (float y) { y = ReduceMean<keepdims = 0>(x, a) }", "computed"),
    ],
)  # fmt: skip
def test_to_opset_17_refuses_what_it_cannot_say(body: str, words: str) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]>\n{body}')
    with pytest.raises(ModelError, match=words) as problem:
        to_opset(model, 17)
    assert "opset 17" in str(problem.value)


def test_to_opset_of_an_old_enough_graph_is_the_graph() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
    )
    assert to_opset(model, 17) is model
    assert to_opset(model, 18) is model


def test_cast_first_moves_the_cast_in_front_of_rearrangements(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (uint8[N,2,3,1] image) => (float[N,1,2,3] y, int64[4] s)
    {{ {body} }}"""
    behind = "t = Transpose<perm = [0,3,1,2]>(image)\n c = Cast<to = 1>(t)\n y = Neg(c)\n s = Shape(image)"
    before = "t = Cast<to = 1>(image)\n c = Transpose<perm = [0,3,1,2]>(t)\n y = Neg(c)\n s = Shape(t)"
    model = onnx.parser.parse_model(text.format(body=behind))
    moved = strip(cast_first(model))
    assert moved.graph.node[0].op_type == "Cast"
    assert [node for node in moved.graph.node if "image" in node.input] == [moved.graph.node[0]]
    given = {"image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3, 1)}
    for name, array in run(model, given, tmp_path).items():
        assert np.array_equal(run(moved, given, tmp_path)[name], array)
    right = onnx.parser.parse_model(text.format(body=before))
    assert strip(cast_first(right)).SerializeToString() == strip(right).SerializeToString()


def test_strip_of_a_stripped_graph_changes_nothing(exported: Path) -> None:
    assert strip(onnx.load(exported)).SerializeToString(deterministic=True) == exported.read_bytes()


def test_a_pool_to_one_pixel_is_one_node_whatever_the_shape_of_its_input(tmp_path: Path) -> None:
    """Small maps that are not square were written with tables of indices (timm's MobileNetV2 at 32 × 48)."""
    for shape in ((1, 2), (2, 3), (5, 5)):
        module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        inputs = (TensorSpec("image", "uint8", ("batch", *shape, 3)),)
        network = Network(module, inputs, Preprocessing(shape, (0.5,) * 3, (0.5,) * 3))
        samples = {"image": np.random.default_rng(0).integers(0, 255, (4, *shape, 3), dtype=np.uint8)}
        path = tmp_path / "pool.onnx"
        export(network, samples, opset=18, preprocessing=True, path=path)
        operators = [node.op_type for node in onnx.load(path).graph.node]
        assert operators.count("ReduceMean") + operators.count("GlobalAveragePool") == 1
        assert not {"Gather", "Range", "Where"} & set(operators)


def test_gelu_is_written_as_the_runtime_fuses_it(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    network = Network(module, (TensorSpec("x", "float32", ("batch", 8)),), None)
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    export(network, {"x": x}, opset=18, preprocessing=False, path=tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert kinds & {"Gelu", "BiasGelu"}
    assert "Erf" not in kinds
    (found,) = session.run(None, {"x": x})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(torch.from_numpy(x)).numpy(), atol=1e-6)


def test_what_only_looks_like_gelu_stays_as_it_is(tmp_path: Path) -> None:
    class Third(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gate = 0.5 * (1 + torch.erf(x))
            return x * gate + gate  # the half is read twice

    network = Network(Third().eval(), (TensorSpec("x", "float32", ("batch", 8)),), None)
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    export(network, {"x": x}, opset=18, preprocessing=False, path=tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, Third()(torch.from_numpy(x)).numpy(), atol=1e-6)
