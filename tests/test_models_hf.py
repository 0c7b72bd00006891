"""Text classifiers of the transformers library: tiny random ones, and nothing from the network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekd.backends.onnxruntime import onnxruntime
from edgekd.data.text import TOKENIZER, text
from edgekd.errors import ModelError
from edgekd.export import check_parity, export
from edgekd.models import build
from edgekd.models.network import Network
from edgekd.types import ModelSpec, TensorSpec

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'edgekd[hf]'")

STEPS, IDS = 12, 60
TEXTS = (TensorSpec("ids", "int64", ("batch", STEPS), IDS), TensorSpec("mask", "int64", ("batch", STEPS)))
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as save_pretrained leaves them: a classifier of four classes, a body alone, a masked language model."""
    root = tmp_path_factory.mktemp("models")
    config = transformers.BertConfig(vocab_size=IDS, max_position_embeddings=16, num_labels=4, **TINY)
    torch.manual_seed(0)
    for name, kind in (("fine", "ForSequenceClassification"), ("body", "Model"), ("masked", "ForMaskedLM")):
        getattr(transformers, f"Bert{kind}")(config).save_pretrained(root / name)
    return root


def made(folder: Path, *, classes: Any = 4, weights: str | None = None, **options: Any) -> Network:
    torch.manual_seed(1)
    return build(ModelSpec(f"hf.{folder}", options, weights), classes=classes, inputs=TEXTS, images=False).eval()


def samples() -> dict[str, np.ndarray]:
    lengths = np.array([STEPS, 7, 2])
    ids: np.ndarray = np.random.default_rng(0).integers(5, IDS, (3, STEPS))
    return {"ids": ids, "mask": (np.arange(STEPS) < lengths[:, None]).astype(np.int64)}


def outputs(network: Network) -> dict[str, np.ndarray]:
    with torch.no_grad():
        logits = network(*map(torch.from_numpy, samples().values()))
    assert isinstance(logits, Tensor)
    return {"logits": logits.numpy()}


def test_a_trained_teacher_gives_the_librarys_logits(models: Path, capfd: Any) -> None:
    network = made(models / "fine", weights=str(models / "fine" / "model.safetensors"))
    theirs = transformers.BertForSequenceClassification.from_pretrained(models / "fine").eval()
    capfd.readouterr()
    ids, mask = map(torch.from_numpy, samples().values())
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits
    np.testing.assert_allclose(outputs(network)["logits"], expected.numpy(), atol=1e-6)


def test_nothing_is_printed(models: Path, capfd: Any) -> None:
    made(models / "fine", pretrained=str(models / "masked" / "model.safetensors"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("start", "classes"), [("fine", 4), ("fine", 3), ("body", 4), ("masked", 2)])
def test_training_starts_from_a_body(models: Path, start: str, classes: int) -> None:
    module = made(models / "fine", classes=classes, pretrained=str(models / start / "model.safetensors")).module
    theirs = transformers.AutoModel.from_pretrained(models / start).state_dict()
    ours = {key.removeprefix("model.bert."): value for key, value in module.state_dict().items()}
    for key in ("embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"):
        assert torch.equal(ours[key], theirs[key])
    assert ours["model.classifier.weight"].shape == (classes, 16)


def test_options_replace_what_the_config_says(models: Path) -> None:
    network = made(models / "fine", num_hidden_layers=1, hidden_size=8)
    state = network.module.state_dict()
    assert state["model.bert.encoder.layer.0.output.dense.weight"].shape == (8, 32)
    assert not any("layer.1." in key for key in state)
    assert outputs(network)["logits"].shape == (3, 4)


def test_the_exported_graph_computes_the_same(models: Path, tmp_path: Path) -> None:
    network = made(models / "fine", weights=str(models / "fine" / "model.safetensors"))
    told = export(network, samples(), opset=18, preprocessing=True, path=tmp_path / "m.onnx")
    assert told == {"static_batch": None}
    check_parity(outputs(network), onnxruntime().load(tmp_path / "m.onnx", 1)(samples()), "fp32", where="hf")


def test_the_models_own_tokenizer_gives_its_ids(models: Path, tmp_path: Path) -> None:
    lines = "".join(f"{word} {other},{n % 2}\n" for n, word in enumerate("abcdefgh") for other in "xyz")
    (tmp_path / "all.csv").write_text(f"text,label\n{lines}")
    kept = tmp_path / "model" / TOKENIZER
    kept.parent.mkdir()
    kept.write_bytes(text(0, path=str(tmp_path / "all.csv"), vocabulary=IDS).assets[TOKENIZER])
    data = text(0, path=str(tmp_path / "all.csv"), tokenizer=str(kept.parent))
    network = build(ModelSpec(f"hf.{models / 'fine'}"), classes=2, inputs=data.inputs, images=False)
    batch = next(iter(data.test.batches([np.arange(len(data.test))])))
    logits = network(*(torch.from_numpy(batch.inputs[spec.name]) for spec in data.inputs))
    assert isinstance(logits, Tensor)
    assert logits.shape == (len(data.test), 2)


# ---------------------------------------------------------------- what is wrong


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    mapped = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own_kind", "auto_map": mapped}))
    with pytest.raises(ModelError, match=r"its config\.json cannot be used"):
        made(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_hidden_layrs": 1}, "its config has no 'num_hidden_layrs'; did you mean 'num_hidden_layers'?"),
        ({"num_attention_heads": 3}, "transformers cannot build it"),
        ({"vocab_size": 59}, "the data has 60 ids, the model 59. Use the model's own tokenizer"),
        ({"max_position_embeddings": 11}, "texts have 12 ids; expected at most 11. Lower length"),
        ({"classes": {"a": 2, "b": 3}}, "it has one head, and several tasks are asked for"),
    ],
)
def test_what_does_not_fit_is_told(models: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as caught:
        made(models / "fine", **options)
    assert told in str(caught.value)


def test_weights_of_another_size_are_told(models: Path) -> None:
    file = str(models / "fine" / "model.safetensors")
    with pytest.raises(ModelError, match=r"weights of hf.* are missing or have another shape"):
        made(models / "fine", pretrained=file, num_hidden_layers=3)
    with pytest.raises(ModelError, match="no such file"):
        made(models / "fine", pretrained=str(models / "nothing.safetensors"))


def test_a_model_that_is_not_here_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no config\.json of that name on this machine"):
        made(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="hf download NAME"):
        build(ModelSpec("hf.some-organisation/some-model"), classes=2, inputs=TEXTS, images=False)


def test_inputs_that_are_no_text_are_told(models: Path) -> None:
    image = (TensorSpec("image", "uint8", ("batch", 8, 8, 3)),)
    with pytest.raises(ModelError, match="it takes ids and a mask, the data has image uint8"):
        build(ModelSpec(f"hf.{models / 'fine'}"), classes=2, inputs=image, images=True)


def test_a_missing_library_is_told(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModelError, match=r"it needs the package transformers. Install it with pip install 'edgekd\[hf\]'"
    ):
        made(models / "fine")
