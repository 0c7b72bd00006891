"""A network whose quantization is simulated in PyTorch: one graph in which every integer place can be switched.

Everything that is decided about int8 is decided here: which ranges, which corrections, which layers. What was decided
is what `convert` writes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from edgekd.errors import ModelError, nearest
from edgekd.graph.program import Program, quiet
from edgekd.quantize.fake_quantizer import FakeQuantizer, Range, State
from edgekd.quantize.gates import put_gates, take_gates
from edgekd.quantize.histogram import Histogram
from edgekd.quantize.quantizer import CLIP, CONV, LINEAR, TRANSPOSED, RulesQuantizer, layer_name
from edgekd.types import QuantizationRules

Inputs: TypeAlias = "tuple[Tensor, ...]"  # what the graph takes, batch first
FOLDING_TOLERANCE = 1e-3  # of the largest logit, or of 1; folding changes the order of sums (measured: 1e-6)
Kind: TypeAlias = Literal["input", "output", "weight"]


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a value becomes an integer."""

    name: str  # of the value: the node that makes it; of a weight its path in the graph
    kind: Kind  # input: quantized where it is read; output: where it is made
    values: tuple[str, ...]  # nodes that make the values which share this site's range, the first is its name
    layers: tuple[str, ...]  # convolutions and linear layers that read it, own it (a weight), or make it (an output)
    quantizer: FakeQuantizer


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer of the graph whose weight is stored, quantized or not."""

    name: str  # path in the user's model
    node: Node
    weight: str  # path of the parameter in the graph
    axis: int  # of the weight: output channels
    groups: int
    site: Site | None  # of its weight; None: it stays in float
    shared: bool  # the weight is read elsewhere too
    clip: Node | None  # the ReLU (or other clip) behind it, where nothing else reads its output

    @property
    def linear(self) -> bool:
        """A linear layer, not a convolution."""
        return self.node.target in LINEAR

    @property
    def transposed(self) -> bool:
        """A transposed convolution."""
        return self.node.target in TRANSPOSED


@dataclass(frozen=True)
class Snapshot:
    """Ranges, weights and biases of a simulation at one time."""

    ranges: Mapping[str, Range]
    floats: Mapping[str, nn.Parameter]
    adjusted: Mapping[str, nn.Parameter]


class Simulation:
    """A captured network with a switchable fake-quantizer at every place that the rules make an integer.

    Batch normalisation is folded into weights. A parameter has a float value, and may have an adjusted one, which
    holds in place of it wherever its layer's weight is simulated: a corrected bias, a learned rounding.

    At rest everything is off: calling it gives what the float network gives.
    """

    def __init__(self, program: Program, rules: QuantizationRules, keep_float: Collection[str] = ()) -> None:
        """Prepare the program.

        Args:
            keep_float: layers that stay in float, by their path in the user's model or that of a module around them.
        """
        with quiet():
            from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

            quantizer = RulesQuantizer(rules, keep_float)
            self.graph: GraphModule = prepare_pt2e(program.exported.module(), quantizer)
        self.program, self.rules, self.keep_float = program, rules, frozenset(keep_float)
        self._device = torch.device("cpu")
        self.quantized: tuple[str, ...] = tuple(quantizer.quantized)
        self.left: Mapping[str, str] = dict(quantizer.left)  # layer → why it stays in float
        if rules.quantize_outputs:
            put_gates(self.graph)
        self.sites = _sites(self.graph)
        self.layers = _layers(self.graph, self.sites)
        self._floats: dict[str, nn.Parameter] = {}
        for layer in self.layers:
            for path in (layer.weight, self.bias_path(layer)):
                if path is not None:
                    self._floats[path] = nn.Parameter(_get(self.graph, path).detach(), requires_grad=False)
        self._captured = dict(self._floats)
        self._adjusted: dict[str, nn.Parameter] = {}
        for path, parameter in self._floats.items():
            _set(self.graph, path, parameter)
        self._check()

    def _check(self) -> None:
        """At rest it is the float network: what folds batch normalisation is not ours."""
        with torch.no_grad():
            wanted, found = self.program.exported.module()(*self.program.args), self(*self.program.args)
        if not torch.allclose(found, wanted, rtol=0, atol=FOLDING_TOLERANCE * max(1.0, float(wanted.abs().max()))):
            worst = float((found - wanted).abs().max())
            raise ModelError(f"the graph that is to be quantized differs from the network by up to {worst:.3g}")

    # ---------------------------------------------------------------- what is simulated

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Logits in the present state; gradients flow if they are enabled."""
        logits: Tensor = self.graph(*inputs)
        return logits

    def logits(self, inputs: Inputs, *, quantized: bool) -> Tensor:
        """Logits of the simulated network, or of the float one."""
        with torch.no_grad(), self.simulating(quantized):
            return self(*inputs)

    @contextlib.contextmanager
    def simulating(
        self, on: bool = True, *, layers: Collection[str] | None = None, sites: Collection[Site] | None = None
    ) -> Iterator[None]:
        """Within, the named places round as int8 would and all others let values through in float.

        Args:
            on: False: none rounds.
            layers: those whose weight, inputs and (where the target makes it one) output are integers; None: all.
            sites: the places themselves, instead of `layers`.

        Raises:
            ModelError: a site has no range yet.
        """
        chosen: list[Site] = []
        if on and sites is not None:
            chosen = list(sites)
        elif on:
            chosen = [s for s in self.sites if layers is None or any(name in layers for name in s.layers)]
            if layers is not None:  # a value between two layers belongs to both; a weight to its own alone
                chosen = [s for s in chosen if s.kind != "weight" or s.layers[0] in layers]
        for site in chosen:
            if site.quantizer.range is None:
                raise ModelError(f"{site.name} has no range yet", expected="observe() and a range method first")
        with self._states({id(site): "simulate" for site in chosen}):
            yield

    def observe(
        self, batches: Iterable[Inputs], *, histograms: bool = False, sites: Collection[Site] | None = None
    ) -> int:
        """Run the float network and keep, for each activation, the range of its values; the number of samples seen.

        What was seen before is forgotten. Memory does not grow with the number of batches.

        Args:
            histograms: count values too, for the range methods that ask for more than the ends.
        """
        watched = [s for s in (self.sites if sites is None else sites) if s.kind != "weight"]
        for site in watched:
            site.quantizer.seen = Histogram(counting=histograms)
        samples = 0
        with torch.no_grad(), self._states({id(site): "observe" for site in watched}):
            for batch in batches:
                samples += len(batch[0])
                self(*batch)
        return samples

    def outputs(self, inputs: Inputs, layers: Sequence[str]) -> dict[str, Tensor]:
        """What the named layers give (before any clip behind them) in the present state."""
        wanted = {self.layer(name).node: name for name in layers}
        seen = _Watching(self.graph, wanted)
        seen.run(*inputs)
        return seen.found

    @contextlib.contextmanager
    def _states(self, states: Mapping[int, State]) -> Iterator[None]:
        before = [(site.quantizer, site.quantizer.state) for site in self.sites]
        placed: dict[str, nn.Parameter] = {}
        for site in self.sites:
            site.quantizer.state = states.get(id(site), "off")
        for layer in self.layers:
            simulated = layer.site is not None and layer.site.quantizer.state == "simulate"
            bias = self.bias_path(layer)
            wanted = {layer.weight: self._adjusted.get(layer.weight) if simulated else None}
            if bias is not None:
                wanted[bias] = self.simulated_bias(layer) if simulated else None
            for path, value in wanted.items():
                now, value = _get(self.graph, path), value if value is not None else self._floats[path]
                if now is not value:
                    placed.setdefault(path, now)
                    _set(self.graph, path, value)
        try:
            yield
        finally:
            for quantizer, state in before:
                quantizer.state = state
            for path, value in placed.items():
                _set(self.graph, path, value)

    # ---------------------------------------------------------------- ranges, weights and biases

    def layer(self, name: str) -> Layer:
        """The layer of that path (of a module called twice: its first call).

        Raises:
            ModelError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = [layer.name for layer in self.layers]
        raise ModelError(f"the graph has no layer '{name}'", nearest=nearest(name, names))

    def weight(self, layer: Layer) -> Tensor:
        """The weight that is quantized: adjusted where it was, else float."""
        return self._adjusted.get(layer.weight, self._floats[layer.weight])

    def float_weight(self, layer: Layer) -> Tensor:
        """The weight of the float network."""
        return self._floats[layer.weight]

    def bias(self, layer: Layer) -> Tensor | None:
        """The bias beside the quantized weight: adjusted where it was, else float; None: the layer has none."""
        path = self.bias_path(layer)
        return None if path is None else self._adjusted.get(path, self._floats[path])

    def simulated_bias(self, layer: Layer) -> nn.Parameter | None:
        """The bias as the graph will have it: where the rules make it an integer, on the grid of the layer's sums.

        b ≈ round(b / (x_scale · weight_scale)) · x_scale · weight_scale (Jacob et al., CVPR 2018, eq. 11).
        """
        path = self.bias_path(layer)
        if path is None:
            return None
        bias, step = self._adjusted.get(path, self._floats[path]), self.bias_step(layer)
        if step is None:
            return bias
        return nn.Parameter((torch.round(bias.double() / step) * step).float(), requires_grad=False)

    def bias_step(self, layer: Layer) -> Tensor | None:
        """The grid of a bias (float64, one for each channel or for all); None: it is no integer."""
        data: Any = layer.node.args[0]
        given = fake_quantizer(self.graph, data)
        if not self.rules.quantize_bias or layer.site is None or given is None:
            return None
        if given.range is None or layer.site.quantizer.range is None or (layer.linear and rank(layer.node) > 2):
            return None
        return (given.scale * layer.site.quantizer.scale).double()

    def float_bias(self, layer: Layer) -> Tensor | None:
        """The bias of the float network; None: the layer has none."""
        path = self.bias_path(layer)
        return None if path is None else self._floats[path]

    def adjust(self, layer: Layer, *, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Another weight or bias where the layer is quantized; the float network stays as it is."""
        if weight is not None:
            self._adjusted[layer.weight] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            path = self._bias_for(layer)
            self._adjusted[path] = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def rewrite(self, layer: Layer, *, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Another weight or bias of the float network itself; what was adjusted in its place is forgotten."""
        given = {layer.weight: weight} | ({self._bias_for(layer): bias} if bias is not None else {})
        for path, value in given.items():
            if value is not None:
                self._floats[path] = nn.Parameter(value.detach().clone(), requires_grad=False)
                self._adjusted.pop(path, None)
                _set(self.graph, path, self._floats[path])

    def adjusted(self) -> Mapping[str, nn.Parameter]:
        """The parameters that `adjust` made, by path: the very ones that are in the graph while their layer rounds."""
        return dict(self._adjusted)

    def rewritten(self) -> Mapping[str, nn.Parameter]:
        """Parameters of the float network that are not the captured ones, but were put in their place, by path."""
        return {path: value for path, value in self._floats.items() if value is not self._captured.get(path)}

    def ranges(self) -> dict[str, Range]:
        """The range of each site that has one, by the site's name."""
        return {site.name: site.quantizer.range for site in self.sites if site.quantizer.range is not None}

    def set_ranges(self, ranges: Mapping[str, Range]) -> None:
        """Give sites their ranges by the name of any of their values, as another simulation of the network has them."""
        for site in self.sites:
            known = [ranges[value] for value in site.values if value in ranges]
            if known:
                low = torch.stack([low for low, _ in known]).amin(0)
                site.quantizer.set_range(low, torch.stack([high for _, high in known]).amax(0))

    def snapshot(self) -> Snapshot:
        """What `restore` needs to come back to this state of ranges, weights and biases."""
        return Snapshot(self.ranges(), dict(self._floats), dict(self._adjusted))

    def restore(self, snapshot: Snapshot) -> None:
        """Ranges, weights and biases as they were."""
        self.set_ranges(snapshot.ranges)
        added = {path: value for path, value in self._floats.items() if path not in snapshot.floats}
        self._floats = dict(snapshot.floats) | {path: _zeros(value) for path, value in added.items()}
        self._adjusted = dict(snapshot.adjusted)
        for path, parameter in self._floats.items():
            _set(self.graph, path, parameter)

    def to(self, device: torch.device) -> None:
        """Compute on this device from now on."""
        if device == self._device:
            return
        self._device = device
        self.graph.to(device)
        for parameters in (self._captured, self._floats, self._adjusted):
            for parameter in parameters.values():
                parameter.data = parameter.data.to(device)
        for node in self.graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": device}
        self.graph.recompile()
        for quantizer in (site.quantizer for site in self.sites):
            if quantizer.range is not None:
                quantizer.set_range(quantizer.range[0].to(device), quantizer.range[1].to(device))

    # ---------------------------------------------------------------- the result

    def convert(self) -> GraphModule:
        """The module with Q/DQ operators and integer weights; the simulation can be used on."""
        with quiet(), torch.no_grad(), self.simulating():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

            copied = copy.deepcopy(self.graph)
            take_gates(copied)
            converted: GraphModule = convert_pt2e(copied)
        return converted

    def bias_path(self, layer: Layer) -> str | None:
        """Path of the layer's bias in the graph."""
        bias = layer.node.args[2] if len(layer.node.args) > 2 else None
        return str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else None

    def _bias_for(self, layer: Layer) -> str:
        """The layer's own bias, made of zeros where it has none."""
        path = self.bias_path(layer)
        if path is not None:
            return path
        if len(layer.node.args) > 2 and layer.node.args[2] is not None:
            raise ModelError(f"the bias of {layer.name} is computed, not stored")
        outputs = self._floats[layer.weight].shape[layer.axis] * (layer.groups if layer.transposed else 1)
        path = f"{layer.node.name}_added_bias"
        self._floats[path] = nn.Parameter(torch.zeros(outputs), requires_grad=False)
        self.graph.register_parameter(path, self._floats[path])
        with self.graph.graph.inserting_before(layer.node):
            made = self.graph.graph.get_attr(path)
        layer.node.args = (*layer.node.args[:2], made, *layer.node.args[3:])
        self.graph.recompile()
        return path


class _Watching(Interpreter):
    """Runs a graph node by node and keeps what some of them give."""

    def __init__(self, graph: GraphModule, wanted: Mapping[Node, str]) -> None:
        super().__init__(graph)
        self.wanted, self.found = wanted, dict[str, Tensor]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.found[self.wanted[n]] = value.clone()  # a clip behind it may work in place
        return value


def fake_quantizer(graph: GraphModule, node: Node) -> FakeQuantizer | None:
    """The fake-quantizer that this node calls, if it calls one."""
    module = _get(graph, str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, FakeQuantizer) else None


def traced(node: Any) -> Tensor | None:
    """What the node gives, as it was traced; a fake-quantizer gives what it was given."""
    while isinstance(node, Node) and node.op == "call_module":
        node = node.args[0]
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def rank(node: Any) -> int:
    """Dimensions of what the node gives; 0 where that is not known."""
    value = traced(node)
    return 0 if value is None else value.dim()


def source(node: Node, passes: Callable[[Node], bool]) -> Node:
    """The node behind any that only pass on their first argument."""
    while passes(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _sites(graph: GraphModule) -> tuple[Site, ...]:
    def is_quantizer(node: Node) -> bool:
        return fake_quantizer(graph, node) is not None

    found: dict[FakeQuantizer, list[Node]] = {}
    for node in graph.graph.nodes:
        quantizer = fake_quantizer(graph, node)
        if quantizer is not None:
            found.setdefault(quantizer, []).append(node)
    sites = []
    for quantizer, nodes in found.items():
        values = [source(node, is_quantizer) for node in nodes]
        annotations = [value.meta.get("quantization_annotation") for value in values]
        kind: Kind = "input"
        if values[0].op == "get_attr":
            kind = "weight"
        elif any(note is not None and note.output_qspec is not None for note in annotations):
            kind = "output"
        readers = [user for node in nodes for user in node.users]
        makers = [value.args[0] if value.target in CLIP else value for value in values]
        layers = [layer_name(n) for n in (*(makers if kind == "output" else ()), *readers) if _is_layer(n)]
        names = [str(value.target) if kind == "weight" else value.name for value in values]
        sites.append(Site(names[0], kind, tuple(dict.fromkeys(names)), tuple(dict.fromkeys(layers)), quantizer))
    return tuple(sites)


def names_of_layers(program: Program) -> tuple[str, ...]:
    """The paths of a captured network's layers in the user's model."""
    return tuple(layer_name(node) for node in program.exported.graph.nodes if _is_layer(node))


def _is_layer(node: Any) -> bool:
    return isinstance(node, Node) and node.target in CONV | TRANSPOSED | LINEAR


def _layers(graph: GraphModule, sites: Sequence[Site]) -> tuple[Layer, ...]:
    by_quantizer = {site.quantizer: site for site in sites}
    layers = []
    readers: dict[str, int] = {}
    for node in graph.graph.nodes:
        if not _is_layer(node):
            continue
        quantizer = fake_quantizer(graph, node.args[1])
        stored = node.args[1] if quantizer is None else node.args[1].args[0]
        if not isinstance(stored, Node) or stored.op != "get_attr":
            continue
        users = list(node.users)
        clip = users[0] if len(users) == 1 and users[0].target in CLIP else None
        path, transposed = str(stored.target), node.target in TRANSPOSED
        groups = node.args[6] if len(node.args) > 6 else 1
        site = None if quantizer is None else by_quantizer[quantizer]
        readers[path] = readers.get(path, 0) + 1
        layers.append(Layer(layer_name(node), node, path, 1 if transposed else 0, groups, site, False, clip))
    return tuple(
        Layer(one.name, one.node, one.weight, one.axis, one.groups, one.site, readers[one.weight] > 1, one.clip)
        for one in layers
    )


def _get(graph: GraphModule, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(graph.get_submodule(parent), name)


def _set(graph: GraphModule, path: str, value: nn.Parameter) -> None:
    parent, _, name = path.rpartition(".")
    module = graph.get_submodule(parent)
    if name in module._buffers:
        del module._buffers[name]
    setattr(module, name, value)


def _zeros(value: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.zeros_like(value), requires_grad=False)
