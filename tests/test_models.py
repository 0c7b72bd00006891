"""Networks, the built-in families, and the door to timm's, torchvision's and a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import ModelError, PartError
from edgekd.models import build
from edgekd.models.network import Network
from edgekd.models.resnet import PadShortcut, ResNet, convolution_shortcuts
from edgekd.types import ModelSpec, Preprocessing, TensorSpec

RGB = (TensorSpec("image", "uint8", ("batch", 32, 32, 3)),)
GREY = (TensorSpec("image", "uint8", ("batch", 32, 32, 1)),)
WIDE = (TensorSpec("image", "uint8", ("batch", 32, 48, 3)),)
OURS = ["resnet8", "resnet20", "resnet32", "resnet56", "googlenet", "dscnn"]


def made(
    name: str, inputs: tuple[TensorSpec, ...] = RGB, *, classes: int = 10, images: bool = True, **options: Any
) -> Network:
    return build(ModelSpec(name, options), classes=classes, inputs=inputs, images=images)


def photos(inputs: tuple[TensorSpec, ...], count: int = 2) -> Tensor:
    sides = [side for side in inputs[0].shape[1:] if isinstance(side, int)]
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, *sides), np.uint8))


# ---------------------------------------------------------------- network


def test_preprocessing_is_the_usual_formula() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    network = Network(nn.Identity(), RGB, Preprocessing((32, 32), mean, std))
    images = photos(RGB)
    expected = (images.permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).reshape(3, 1, 1).double()) / (
        torch.tensor(std).reshape(3, 1, 1).double()
    )
    (prepared,) = network.prepare(images)
    assert prepared.dtype == torch.float32
    assert prepared.shape == (2, 3, 32, 32)
    torch.testing.assert_close(prepared.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(network(images), prepared)
    assert prepared.is_contiguous(memory_format=torch.channels_last)


def test_preprocessing_adds_nothing_to_the_state() -> None:
    network = made("resnet8")
    assert {key.removeprefix("module.") for key in network.state_dict()} == set(network.module.state_dict())


def test_network_runs_in_half_precision_and_under_autocast() -> None:
    network = made("resnet8").eval()
    exact = network(photos(RGB))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(network(photos(RGB)).float(), exact, atol=0.2, rtol=0.1)
    halved = network.to(torch.bfloat16)
    assert halved.prepare(photos(RGB))[0].dtype == torch.bfloat16
    assert halved(photos(RGB)).shape == (2, 10)
    assert torch.isfinite(made("resnet8").to(memory_format=torch.channels_last)(photos(RGB))).all()


def test_other_inputs_pass_through() -> None:
    class Added(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    specs = (TensorSpec("a", "float32", ("batch", 4)), TensorSpec("b", "float32", ("batch", 4)))
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(Network(Added(), specs, None)(a, b), a + b)


@pytest.mark.parametrize(("name", "most"), [("resnet8", 27), ("dscnn", 32)])
def test_network_exports_to_few_nodes_with_a_dynamic_batch(name: str, most: int, tmp_path: Path) -> None:
    network, path = made(name).eval(), tmp_path / "model.onnx"
    torch.onnx.export(
        network,
        (photos(RGB, 4),),
        path,
        dynamo=True,
        opset_version=18,
        external_data=False,
        verbose=False,
        optimize=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=(({0: torch.export.Dim("batch", min=1, max=64)},),),
    )
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds[:4] == ["Cast", "Transpose", "Mul", "Add"]
    assert kinds[-2:] == ["ReduceMean", "Gemm"]
    assert len(kinds) <= most
    session = onnxruntime.InferenceSession(path)
    for count in (1, 7):
        (logits,) = session.run(None, {"image": photos(RGB, count).numpy()})
        np.testing.assert_allclose(logits, network(photos(RGB, count)).detach().numpy(), atol=1e-4)


# ---------------------------------------------------------------- families


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("inputs", [RGB, GREY, WIDE], ids=["rgb", "grey", "wide"])
def test_every_family_takes_every_kind_of_image(name: str, inputs: tuple[TensorSpec, ...]) -> None:
    network = made(name, inputs, classes=7)
    assert network.eval()(photos(inputs, 3)).shape == (3, 7)


def test_every_model_is_found_by_name() -> None:
    assert {*OURS, "timm", "torchvision"} <= plugins.names("models").keys()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018)],  # 0.27, 0.46, 0.85 M in the paper, table 6
)
def test_parameters_are_the_papers(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in made(name).parameters()) == parameters


@pytest.mark.parametrize("name", OURS)
def test_building_follows_torchs_seed(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(made(name).module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_pad_shortcut_is_subsampling_and_zero_channels() -> None:
    x = torch.randn(2, 4, 7, 6)
    y = PadShortcut(4, 9, 2)(x)
    assert y.shape == (2, 9, 4, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("width", [16, 5])
def test_convolution_shortcuts_compute_exactly_the_same(width: int) -> None:
    network = made("resnet20", width=width).eval()
    assert isinstance(network.module, ResNet)
    replaced = convolution_shortcuts(network.module)
    (prepared,) = network.prepare(photos(RGB, 8))
    assert torch.equal(replaced(prepared), network.module(prepared))
    assert set(replaced.state_dict()) - set(network.module.state_dict()) == {
        "layer2.0.shortcut.weight",
        "layer3.0.shortcut.weight",
    }
    assert isinstance(network.module.layer2[0].shortcut, PadShortcut)  # the original is left as it was


def test_shortcut_option_changes_no_function() -> None:
    outputs = []
    for shortcut in ("pad", "conv"):
        torch.manual_seed(3)
        outputs.append(made("resnet8", shortcut=shortcut).eval()(photos(RGB)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("name", "options"), [("resnet8", {"width": 0}), ("googlenet", {"width": 0.0}), ("dscnn", {"width": -1.0})]
)
def test_impossible_widths_are_told(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="width is"):
        made(name, **options)


def test_families_tell_when_the_data_is_no_image() -> None:
    tokens = (TensorSpec("ids", "int64", ("batch", "length")),)
    with pytest.raises(ModelError, match="takes one image, the data has ids int64"):
        made("resnet8", tokens, images=False)


# ---------------------------------------------------------------- normalisation


def test_mean_and_std_are_the_recipes_the_models_or_the_usual() -> None:
    def told(spec: ModelSpec, inputs: tuple[TensorSpec, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        preprocessing = build(spec, classes=2, inputs=inputs, images=True).preprocessing
        assert preprocessing is not None
        return preprocessing.mean, preprocessing.std

    assert told(ModelSpec("resnet8"), RGB) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert told(ModelSpec("resnet8"), GREY) == ((0.5,), (0.5,))
    assert told(ModelSpec("timm.vit_tiny_patch16_224"), RGB)[0] == (0.5, 0.5, 0.5)
    assert told(ModelSpec("resnet8", mean=(0.1,), std=(0.2,)), GREY) == ((0.1,), (0.2,))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (ModelSpec("resnet8", mean=(0.5,), std=(0.5,)), "mean has 1 values; expected 3, one a channel"),
        (ModelSpec("resnet8", mean=(123.7, 116.3, 103.5)), "Divide them by 255"),
        (ModelSpec("resnet8", std=(0.0, 0.1, 0.1)), "values of std above 0"),
    ],
)
def test_wrong_mean_and_std_are_told(spec: ModelSpec, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(spec, classes=2, inputs=RGB, images=True)
    assert told in str(caught.value)


# ---------------------------------------------------------------- timm and torchvision


@pytest.mark.parametrize("name", ["timm.resnet18", "timm.mobilenetv3_small_050", "torchvision.mobilenet_v3_small"])
@pytest.mark.parametrize("inputs", [GREY, WIDE], ids=["grey", "wide"])
def test_library_models_take_the_datas_channels_size_and_classes(name: str, inputs: tuple[TensorSpec, ...]) -> None:
    assert made(name, inputs).eval()(photos(inputs, 3)).shape == (3, 10)


def test_models_of_one_size_get_the_datas() -> None:
    assert made("timm.vit_tiny_patch16_224", WIDE).eval()(photos(WIDE)).shape == (2, 10)
    square = (TensorSpec("image", "uint8", ("batch", 64, 64, 3)),)
    assert made("torchvision.vit_b_32", square).eval()(photos(square)).shape == (2, 10)


def test_auxiliary_outputs_are_off() -> None:
    assert isinstance(made("torchvision.googlenet").train()(photos(RGB)), Tensor)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("timm.resnet19", {}, "did you mean 'resnet"),
        ("timm.resnet18", {"drop_rte": 0.1}, "drop_rte"),
        ("torchvision.resnet19", {}, "did you mean 'resnet"),
        ("torchvision.resnet18", {"widht": 1}, "widht"),
        ("torchvision.inception_v3", {}, "fails on a batch of two"),
    ],
)
def test_library_errors(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as caught:
        made(name, **options)
    assert told in str(caught.value)


def test_a_misspelt_model_names_the_nearest() -> None:
    with pytest.raises(PartError, match="did you mean 'dscnn'"):
        made("dscn")
    with pytest.raises(PartError, match="did you mean 'width'"):
        made("resnet8", witdh=8)


# ---------------------------------------------------------------- a user's own

OWN = """
import torch
from torch import nn

class Tokens(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, classes)
    def forward(self, ids, mask):
        return self.head((self.embed(ids) * mask[..., None]).mean(1))

def tokens(classes): return Tokens(classes)

class Flat(nn.Module):
    def __init__(self, classes, wrap=None):
        super().__init__()
        self.head, self.wrap = nn.LazyLinear(classes), wrap or (lambda y: y)
    def forward(self, x): return self.wrap(self.head(x.flatten(1)))

def three(): return Flat(3)
def pair(classes): return Flat(classes, lambda y: (y, y))
def named(classes): return Flat(classes, lambda y: {"logits": y})
def whole(classes): return Flat(classes, lambda y: y.argmax(1))
def nan(classes): return Flat(classes, lambda y: y * float("nan"))
def fails(classes): return Flat(classes, lambda y: y.reshape(-1, 7))
def grid(classes): return nn.Conv2d(3, classes, 3, 2, 1)
class Heads(nn.Module):
    def __init__(self, classes, odd=""):
        super().__init__()
        self.heads = nn.ModuleDict({head: nn.Linear(3072, count) for head, count in classes.items() if head != odd})
    def forward(self, x): return {head: layer(x.flatten(1)) for head, layer in self.heads.items()}
def heads(classes): return Heads(classes)
def one_head_short(classes): return Heads(classes, "b")
def nothing(classes): return None
def raises(classes): raise ValueError("no such file: teacher.yaml")
class Padded(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, classes)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    def forward(self, ids, mask):
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=mask == 0)[:, 0])
def padded(classes): return Padded(classes)
def frozen(classes, inputs, *, rate=0.5):
    m = nn.Sequential(nn.Flatten(), nn.Linear(3072, classes), nn.Dropout(rate))
    m[2].eval()
    return m
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_models_here.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_models_here"


def test_a_users_model_of_named_inputs(own: str) -> None:
    inputs = (TensorSpec("ids", "int64", ("batch", "length")), TensorSpec("mask", "float32", ("batch", "length")))
    network = made(f"{own}:tokens", inputs, images=False)
    assert network(torch.zeros(3, 5, dtype=torch.int64), torch.ones(3, 5)).shape == (3, 10)
    padded = made(f"{own}:padded", inputs, images=False)  # attention to nothing but padding would be a NaN
    assert padded(torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 5)).shape == (3, 10)
    with pytest.raises(ModelError, match="mean and std are for images"):
        build(ModelSpec(f"{own}:tokens", mean=(0.5,)), classes=10, inputs=inputs, images=False)


def test_a_dense_model_has_a_grid_behind_its_classes(own: str) -> None:
    network = build(ModelSpec(f"{own}:grid"), classes=4, inputs=RGB, images=True, dense=True)
    assert network(photos(RGB)).shape == (2, 4, 16, 16)
    with pytest.raises(
        ModelError, match=r"float32 of shape \(2, 4, 16, 16\); expected .* logits of shape \(2, 4\) for"
    ):
        build(ModelSpec(f"{own}:grid"), classes=4, inputs=RGB, images=True)
    with pytest.raises(ModelError, match=r"float32 of shape \(2, 4\); expected .* logits of shape \(2, 4, grid\) for"):
        build(ModelSpec("resnet8"), classes=4, inputs=RGB, images=True, dense=True)


def test_a_model_of_several_heads_gives_a_dictionary(own: str) -> None:
    heads = {"a": 3, "b": 5}
    output = build(ModelSpec(f"{own}:heads"), classes=heads, inputs=RGB, images=True)(photos(RGB))
    assert {head: tuple(logits.shape) for head, logits in output.items()} == {"a": (2, 3), "b": (2, 5)}
    with pytest.raises(ModelError, match="expected a dictionary of logits: 'a', 'b'"):
        build(ModelSpec(f"{own}:one_head_short"), classes=heads, inputs=RGB, images=True)
    with pytest.raises(ModelError, match="resnet8: it has one head, and several tasks are asked for"):
        build(ModelSpec("resnet8"), classes=heads, inputs=RGB, images=True)


def test_a_users_model_keeps_its_modes_and_the_random_state(own: str) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    network = made(f"{own}:frozen", rate=0.9)
    assert [module.training for module in network.module.modules()] == [True, True, True, False]
    assert not torch.equal(before, torch.random.get_rng_state())  # its layers were initialised from it


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("three", "it returns float32 of shape (2, 3); expected floating-point logits of shape (2, 10)"),
        ("pair", "a tuple of float32 of shape (2, 10), float32 of shape (2, 10)"),
        ("named", "a dictionary of 'logits' (float32 of shape (2, 10))"),
        ("whole", "it returns int64 of shape (2,)"),
        ("nan", "NaN or infinite logits"),
        ("fails", "it fails on a batch of two (image uint8 (2, 32, 32, 3))"),
        ("nothing", "it returned a NoneType; expected a torch.nn.Module"),
        ("raises", "it cannot be built: ValueError: no such file: teacher.yaml"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning:torch.nn.modules.lazy")
def test_a_users_model_that_gives_no_logits_is_told_what_it_gave(own: str, name: str, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        made(f"{own}:{name}")
    assert told in str(caught.value)
