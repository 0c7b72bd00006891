"""Captured graphs in plain form: what may be folded is, what may not is left, and every layer is seen as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import pytest
import torch
from rules import BOARD, HOST, RULES
from torch import Tensor, nn
from torch.nn.functional import conv2d

from edgekd import export, quantize
from edgekd.backends.onnxruntime import fused, onnxruntime
from edgekd.errors import ModelError
from edgekd.graph.program import capture, graph_inputs
from edgekd.models.network import Network
from edgekd.quantize.simulation import Simulation
from edgekd.types import QuantizationRules, TensorSpec

IMAGE = (TensorSpec("x", "float32", ("batch", 3, 12, 12)),)
VECTOR = (TensorSpec("x", "float32", ("batch", 20)),)


class Ordinary(nn.Module):
    """Each convolution has a normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.b1, self.b2, self.head = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.told(self.b2(self.c(self.b1(self.a(x)).relu())).relu())

    def told(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class PreActivation(Ordinary):
    """A residual branch that begins with its normalisation (He et al., ECCV 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.told(x + self.c(self.b1(x).relu()))


class Recurring(Ordinary):
    """One convolution, a normalisation for each of its uses."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.told(self.b2(self.c(self.b1(self.c(x)).relu())).relu())


class Repeated(Ordinary):
    """The same pair, called twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.told(self.b1(self.c(self.b1(self.c(x)).relu())).relu())


class TwoReaders(Ordinary):
    """Two normalisations of one convolution."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.told(self.b1(x).relu() + self.b2(x).relu())


class Tied(Ordinary):
    """Two convolutions of one weight, each with a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.told(self.b2(self.d(self.b1(self.c(x)).relu())).relu())


class LinearTwice(nn.Module):
    """A linear layer that its normalisation and a shortcut read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        logits: Tensor = self.head(self.b(y).relu() + y)
        return logits


def of(make: Callable[[], nn.Module], specs: tuple[TensorSpec, ...] = IMAGE) -> Network:
    """With statistics of batch normalisation far from the ones at the start."""
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
                layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                layer.weight.uniform_(0.5, 2)
    return Network(module.eval(), specs, None)


def simulated(network: Network, rules: QuantizationRules = HOST) -> tuple[Simulation, tuple[Tensor, ...]]:
    args, specs = graph_inputs(network, networks.samples(network.inputs, 16), preprocessing=False)
    return Simulation(capture(network, args, specs, preprocessing=False), rules), args


def written(network: Network, path: Path, rules: QuantizationRules = HOST) -> dict[str, Any]:
    batches = [networks.samples(network.inputs, 32, seed) for seed in range(2)]
    return quantize.quantize(
        network, batches, rules, opset=19, preprocessing=False, path=path, say=lambda event, /, **fields: None,
        method=("minmax",),
    )  # fmt: skip


def answers(path: Path, network: Network) -> tuple[np.ndarray, np.ndarray]:
    given = networks.samples(network.inputs, 16, seed=9)
    session = onnxruntime(optimizations=False).load(path, 1)
    found = session(given)["logits"]
    session.close()
    return found, networks.logits(network, given)["logits"]


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[TensorSpec, ...], int]] = {  # normalisations that stay
    "ordinary": (Ordinary, IMAGE, 0),
    "pre-activation": (PreActivation, IMAGE, 1),
    "recurring": (Recurring, IMAGE, 2),
    "repeated": (Repeated, IMAGE, 2),
    "two readers": (TwoReaders, IMAGE, 2),
    "tied": (Tied, IMAGE, 2),
    "linear": (LinearTwice, VECTOR, 1),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_is_folded_only_where_nobody_else_would_notice(name: str, tmp_path: Path) -> None:
    make, specs, left = NORMS[name]
    network = of(make, specs)
    with torch.no_grad():
        for rules in RULES.values():
            simulation, args = simulated(network, rules)
            torch.testing.assert_close(simulation(*args), network(*args), rtol=0, atol=1e-4)
            assert (
                sum(node.target is torch.ops.aten.batch_norm.default for node in simulation.graph.graph.nodes) == left
            )
    export.export(network, networks.samples(specs, 4), opset=19, preprocessing=False, path=tmp_path / "fp32.onnx")
    found, exact = answers(tmp_path / "fp32.onnx", network)
    np.testing.assert_allclose(found, exact, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rules"), [("pre-activation", HOST), pytest.param("linear", BOARD, marks=pytest.mark.slow)]
)
def test_a_normalisation_that_is_left_has_an_int8_form(name: str, rules: QuantizationRules, tmp_path: Path) -> None:
    """One of them is written, since torchao takes 15 seconds to look for what training would have left of it."""
    make, specs, left = NORMS[name]
    network = of(make, specs)
    meta = written(network, tmp_path / "int8.onnx", rules)
    assert meta["fallback"] is None
    found, exact = answers(tmp_path / "int8.onnx", network)
    assert np.abs(found - exact).max() < 0.1 * np.abs(exact).max()
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node)
    assert counts["BatchNormalization"] == left


def test_a_graph_that_is_another_network_is_not_quantized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever rewrites the graph before it is quantized: it is compared with the network, and told."""
    monkeypatch.setattr("edgekd.graph.plain._folds", lambda *_: True)
    network = of(PreActivation)
    with pytest.raises(ModelError, match="differs from the network by up to"):
        simulated(network)
    meta = written(network, tmp_path / "int8.onnx")
    assert meta["quantizer"] == "onnxruntime"
    assert "differs from the network" in meta["fallback"]


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation", "stride"),
    [(3, "same", 1, 1), ((3, 5), "same", (2, 1), 1), (4, "same", 1, 1), ((2, 3), "same", 3, 1), (3, "valid", 1, 2)],
)
def test_padding_by_a_word_is_a_convolution_like_any(
    kernel: Any, padding: str, dilation: Any, stride: int, tmp_path: Path
) -> None:
    class Padded(Ordinary):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(16, 16, kernel, stride, padding, dilation, bias=False)

    network = of(Padded)
    simulation, args = simulated(network)
    with torch.no_grad():
        torch.testing.assert_close(simulation(*args), network(*args), rtol=0, atol=1e-4)
    assert simulation.quantized == ("a", "c", "head")
    meta = written(network, tmp_path / "int8.onnx")
    assert meta["quantized"] == ["a", "c", "head"]
    found, exact = answers(tmp_path / "int8.onnx", network)
    assert np.abs(found - exact).max() < 0.1 * np.abs(exact).max()
    assert fused(tmp_path / "int8.onnx")["float"] == {}


def test_defaults_of_a_padded_convolution() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return conv2d(x, self.w, padding="same").mean((2, 3))

    network = of(Bare)
    simulation, args = simulated(network)
    with torch.no_grad():
        torch.testing.assert_close(simulation(*args), network(*args))
    assert len(simulation.quantized) == 1


class Product(nn.Module):
    """A stored matrix, used in one of the ways that are no linear layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.w, self.b = nn.Parameter(torch.randn(20, 10)), nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "addmm":  # transformers.Conv1D, of GPT-2
            return torch.addmm(self.b, x, self.w)
        if self.way == "scaled":
            return torch.addmm(self.b, x, self.w, alpha=2.0)
        if self.way == "twice":
            return x @ self.w + x.tanh() @ self.w
        return torch.mm(x, self.w) if self.way == "mm" else x @ self.w


@pytest.mark.parametrize("way", ["matmul", "mm", "addmm"])
def test_a_product_with_a_stored_matrix_is_a_linear_layer(way: str, tmp_path: Path) -> None:
    network = of(lambda: Product(way), VECTOR)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    meta = written(network, tmp_path / "int8.onnx")
    assert (meta["fallback"], len(meta["quantized"]), meta["float"]) == (None, 1, {})
    found, exact = answers(tmp_path / "int8.onnx", network)
    assert np.abs(found - exact).max() < 0.1 * np.abs(exact).max()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "the user's weights"


def test_a_matrix_that_is_read_twice_stays_in_float_and_is_told() -> None:
    simulation, _ = simulated(of(lambda: Product("twice"), VECTOR))
    assert simulation.quantized == ()
    assert set(simulation.left.values()) == {"a product with a weight that is read elsewhere too"}


def test_what_has_weights_and_no_integer_form_is_told() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.w, self.head = (
                nn.GRU(4, 8, batch_first=True),
                nn.Parameter(torch.randn(8, 8)),
                nn.Linear(8, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.gru(x.reshape(-1, 5, 4))
            logits: Tensor = self.head(torch.einsum("bi,io->bo", states[:, -1], self.w))
            return logits

    simulation, _ = simulated(of(Recurrent, VECTOR))
    assert simulation.quantized == ("head",)
    assert simulation.left == {"gru": "a recurrent layer", "einsum": "a product by einsum"}


def test_a_network_of_which_nothing_is_quantized_has_no_int8_form(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(20))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    with pytest.raises(ModelError, match="no layer of this model can be quantized"):
        written(of(Scaled, VECTOR), tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_layers_have_the_names_that_the_user_gave_them() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module_list = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
            self.module, self.inner = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 1)
            self.inner_head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.module_list:
                x = layer(x).relu()
            logits: Tensor = self.inner_head(self.inner(self.module(x)).mean((2, 3)))
            return logits

    simulation, _ = simulated(of(Named))
    assert simulation.quantized == ("module_list.0", "module_list.1", "module.1", "inner", "inner_head")
