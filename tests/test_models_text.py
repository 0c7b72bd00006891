"""Recurrent networks and transformers: padding never matters, and what they compute is what torch's own layers do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edgekd import target
from edgekd.backends.onnxruntime import onnxruntime
from edgekd.errors import ModelError
from edgekd.export import check_parity, export, parity
from edgekd.models import build
from edgekd.models.network import Network
from edgekd.models.recurrent import Recurrence, Recurrent
from edgekd.models.transformer import Block, Transformer, transformer
from edgekd.quantize import quantize
from edgekd.types import ModelSpec, TensorSpec

STEPS, IDS, CHANNELS = 10, 40, 6
MASK = TensorSpec("mask", "int64", ("batch", STEPS))
TEXTS = (TensorSpec("ids", "int64", ("batch", STEPS), IDS), MASK)
WINDOWS = (TensorSpec("x", "float32", ("batch", STEPS, CHANNELS)),)
PADDED = (*WINDOWS, MASK)
FORMS = {"texts": TEXTS, "windows": WINDOWS, "padded windows": PADDED}
SMALL: dict[str, dict[str, Any]] = {
    "lstm": {"width": 8, "embedding": 6},
    "gru": {"width": 8, "embedding": 6},
    "transformer": {"width": 16, "depth": 2, "heads": 2},
}


def made(name: str, inputs: tuple[TensorSpec, ...], classes: Any = 3, **options: Any) -> Network:
    torch.manual_seed(0)
    spec = ModelSpec(name, SMALL[name] | options)
    return build(spec, classes=classes, inputs=inputs, images=False).eval()


def samples(inputs: tuple[TensorSpec, ...], count: int = 5) -> dict[str, np.ndarray]:
    """Random samples; the first is full, the last has one step, and what stands in the padding is not zero."""
    random = np.random.default_rng(0)
    lengths = np.linspace(STEPS, 1, count).astype(np.int64)
    arrays: dict[str, np.ndarray] = {
        "ids": random.integers(0, IDS, (count, STEPS)),
        "x": random.normal(size=(count, STEPS, CHANNELS)).astype(np.float32),
        "mask": (np.arange(STEPS) < lengths[:, None]).astype(np.int64),
    }
    return {spec.name: arrays[spec.name] for spec in inputs}


def tensors(given: dict[str, np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in given.values()]


def outputs(network: Network, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        logits = network(*tensors(given))
    assert isinstance(logits, Tensor)
    return {"logits": logits.numpy()}


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_each_takes_texts_and_windows(name: str, form: str) -> None:
    network = made(name, FORMS[form])
    logits = network.train()(*tensors(samples(FORMS[form])))
    assert isinstance(logits, Tensor)
    assert logits.shape == (5, 3)
    torch.autograd.backward(logits.square().sum())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("inputs", [TEXTS, PADDED], ids=["texts", "windows"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lstm", {}),
        ("lstm", {"bidirectional": True, "layers": 2}),
        ("gru", {"bidirectional": True}),
        ("transformer", {}),
    ],
)
def test_logits_do_not_depend_on_what_the_padding_holds(
    name: str, options: dict[str, Any], inputs: tuple[TensorSpec, ...]
) -> None:
    network, given = made(name, inputs, **options), samples(inputs)
    before = outputs(network, given)["logits"]
    other, hidden = inputs[0].name, given["mask"] == 0
    changed = given | {other: given[other].copy()}
    changed[other][hidden] = 7
    np.testing.assert_allclose(outputs(network, changed)["logits"], before, atol=1e-6)
    changed[other][:, 0] = 3
    assert (np.abs(outputs(network, changed)["logits"] - before) > 1e-5).any(1).all()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_logits_do_not_depend_on_how_much_padding_there_is(name: str, bidirectional: bool) -> None:
    network, given = made(name, TEXTS, bidirectional=bidirectional), samples(TEXTS)
    longer = {key: np.pad(array, ((0, 0), (0, 9))) for key, array in given.items()}
    np.testing.assert_allclose(outputs(network, longer)["logits"], outputs(network, given)["logits"], atol=1e-6)
    row = {key: array[2:3, : int(given["mask"][2].sum())] for key, array in given.items()}
    np.testing.assert_allclose(outputs(network, row)["logits"], outputs(network, given)["logits"][2:3], atol=1e-6)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_a_bidirectional_layer_is_torchs_on_packed_sequences(cell: type[nn.LSTM | nn.GRU]) -> None:
    torch.manual_seed(0)
    ours = Recurrence(cell, CHANNELS, 8, bidirectional=True)
    theirs = cell(CHANNELS, 8, batch_first=True, bidirectional=True)
    assert ours.backwards is not None
    forwards = ours.forwards.state_dict()
    backwards = {f"{key}_reverse": value for key, value in ours.backwards.state_dict().items()}
    theirs.load_state_dict(forwards | backwards)
    x, mask = tensors(samples(PADDED))
    lengths = mask.sum(1)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True, total_length=STEPS)
    found = ours(x, mask)
    seen = mask != 0
    torch.testing.assert_close(found[seen], expected[seen])
    torch.testing.assert_close(ours(x, None), theirs(x)[0])


def test_a_block_is_torchs_encoder_layer() -> None:
    torch.manual_seed(0)
    ours = Block(16, 2, 32, 0.0).eval()
    theirs = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    names = {
        "self_attn.in_proj_weight": "qkv.weight",
        "self_attn.in_proj_bias": "qkv.bias",
        "self_attn.out_proj.weight": "proj.weight",
        "self_attn.out_proj.bias": "proj.bias",
        "linear1.weight": "mlp.0.weight",
        "linear1.bias": "mlp.0.bias",
        "linear2.weight": "mlp.3.weight",
        "linear2.bias": "mlp.3.bias",
    }
    state = ours.state_dict()
    theirs.load_state_dict({key: state[names.get(key, key)] for key in theirs.state_dict()})
    x, (_, mask) = torch.randn(5, STEPS, 16), tensors(samples(TEXTS))
    expected = theirs(x, src_key_padding_mask=mask == 0)
    found = ours(x, (mask == 0).float()[:, None, None] * -1e4)
    torch.testing.assert_close(found[mask != 0], expected[mask != 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_a_sample_that_is_all_padding_gives_finite_logits(name: str) -> None:
    network, given = made(name, TEXTS), samples(TEXTS)
    empty = outputs(network, given | {"mask": np.zeros_like(given["mask"])})["logits"]
    assert np.isfinite(empty).all()


def test_what_distillation_taps_is_there() -> None:
    network = made("transformer", TEXTS)
    seen: dict[str, Tensor] = {}
    for path, module in network.module.named_modules():
        if path.endswith(".qkv") or path in ("blocks.0", "blocks.1"):
            module.register_forward_hook(lambda _, __, output, path=path: seen.update({path: output}))
    network(*tensors(samples(TEXTS)))
    assert {path: tuple(value.shape) for path, value in seen.items()} == {
        "blocks.0": (5, STEPS, 16),
        "blocks.0.qkv": (5, STEPS, 48),
        "blocks.1": (5, STEPS, 16),
        "blocks.1.qkv": (5, STEPS, 48),
    }
    recurrent = made("lstm", TEXTS, layers=2).module
    assert isinstance(recurrent, Recurrent)
    assert [path for path, module in recurrent.named_modules() if isinstance(module, Recurrence)] == [
        "layers.0",
        "layers.1",
    ]
    assert (recurrent.state_dict()["layers.0.forwards.bias_ih_l0"][8:16] == 1).all()  # forget gates


def test_a_narrow_embedding_is_widened() -> None:
    wide, narrow = made("transformer", TEXTS).module, made("transformer", TEXTS, embedding=4).module
    assert isinstance(wide, Transformer)
    assert isinstance(narrow, Transformer)
    assert wide.embedding is not None
    assert narrow.embedding is not None
    assert (wide.embedding.weight.shape, narrow.embedding.weight.shape) == ((IDS, 16), (IDS, 4))
    assert isinstance(wide.widen, nn.Identity)
    assert isinstance(narrow.widen, nn.Linear)


# ---------------------------------------------------------------- several heads


@pytest.mark.parametrize("name", SMALL)
def test_several_heads_give_logits_by_name(name: str) -> None:
    network = made(name, TEXTS, {"topic": 4, "mood": 2})
    found = network(*tensors(samples(TEXTS)))
    assert isinstance(found, dict)
    assert {head: tuple(logits.shape) for head, logits in found.items()} == {"topic": (5, 4), "mood": (5, 2)}
    assert {key for key in network.module.state_dict() if key.startswith("linear")} == {
        f"linear.{head}.{kind}" for head in ("topic", "mood") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("head", ["a.b", "keys"])
def test_a_head_whose_name_is_impossible_is_told(head: str) -> None:
    with pytest.raises(ModelError, match="a head cannot have that name"):
        made("lstm", TEXTS, {head: 2, "other": 2})


# ---------------------------------------------------------------- what is wrong

PLAIN = (TensorSpec("ids", "int64", ("batch", STEPS)), MASK)


@pytest.mark.parametrize(
    ("name", "inputs", "options", "told"),
    [
        ("lstm", PLAIN, {}, "vocabulary is None; expected the number of ids. Set vocabulary"),
        ("transformer", TEXTS, {"vocabulary": 39}, "vocabulary is 39; expected at least 40, as the data has"),
        ("gru", WINDOWS, {"vocabulary": 39}, "vocabulary is for ids"),
        ("lstm", (MASK, *TEXTS), {}, "it takes one sequence"),
        ("lstm", (TEXTS[0], TensorSpec("mask", "int64", ("batch", 4))), {}, "it takes one sequence"),
        ("lstm", (TensorSpec("x", "float32", ("batch", 4)),), {}, "the data has x float32 ('batch', 4)"),
        ("gru", (TensorSpec("image", "uint8", ("batch", 8, 8, 3)),), {}, "it takes one sequence"),
        ("lstm", TEXTS, {"width": 0}, "width is 0; expected at least 1"),
        ("gru", TEXTS, {"layers": 0}, "gru: layers is 0"),
        ("transformer", TEXTS, {"depth": 0}, "depth is 0"),
        ("transformer", TEXTS, {"heads": 3}, "3 heads cannot share a width of 16"),
        ("transformer", (TensorSpec("ids", "int64", ("batch", "time"), 9),), {}, "sequences differ in length ('time')"),
    ],
)
def test_what_does_not_fit_is_told(
    name: str, inputs: tuple[TensorSpec, ...], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError) as caught:
        made(name, inputs, **options)
    assert told in str(caught.value)


def test_vocabulary_may_be_said_by_the_recipe() -> None:
    module = made("gru", PLAIN, vocabulary=77).module
    assert isinstance(module, Recurrent)
    assert module.embedding is not None
    assert module.embedding.num_embeddings == 77
    assert transformer(2, WINDOWS, width=8, heads=2, depth=1).embedding is None


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize(
    ("name", "options", "inputs", "opset", "operators"),
    [
        ("lstm", {"bidirectional": True, "layers": 2}, TEXTS, 18, {"LSTM": 4, "Gather": 1, "GatherElements": 4}),
        ("gru", {}, WINDOWS, 17, {"GRU": 1}),
        ("transformer", {"embedding": 8}, TEXTS, 17, {"Softmax": 2, "LayerNormalization": 5, "Split": 2, "Gather": 1}),
    ],
)
def test_exported_graphs_compute_the_same(
    name: str,
    options: dict[str, Any],
    inputs: tuple[TensorSpec, ...],
    opset: int,
    operators: dict[str, int],
    tmp_path: Path,
) -> None:
    network, given = made(name, inputs, **options), samples(inputs)
    assert export(network, given, opset=opset, preprocessing=True, path=tmp_path / "m.onnx") == {"static_batch": None}
    session = onnxruntime().load(tmp_path / "m.onnx", 1)
    assert [(s.name, s.dtype, s.shape) for s in session.inputs] == [(s.name, s.dtype, s.shape) for s in inputs]
    check_parity(outputs(network, given), session(given), "fp32", where=name)
    one = {key: array[:1] for key, array in given.items()}
    check_parity(outputs(network, one), session(one), "fp32", where=name)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert {kind: kinds[kind] for kind in operators} == operators
    assert not kinds.keys() & {"Loop", "Scan", "If"}


@pytest.mark.parametrize(("name", "quantized"), [("transformer", 9), ("lstm", 1)])
def test_quantized_graphs_stay_close(name: str, quantized: int, tmp_path: Path) -> None:
    network, given = made(name, TEXTS), samples(TEXTS, 8)
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
    assert meta["quantizer"] == "pt2e"
    assert isinstance(meta["quantized"], list)
    assert len(meta["quantized"]) == quantized
    found = parity(outputs(network, given), onnxruntime().load(tmp_path / "q.onnx", 1)(given))
    assert found.cosine > 0.99
