"""Pruning: what is cut, what is left alone, how near the goal, and that the cut network is what it claims to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers.attention
import torch
from cuts import PIXELS, Branches, built, cut_to, images, reasons
from torch import Tensor, nn
from torch.nn.functional import pad

from edgekd import pruning
from edgekd.correspondence.pruned import remembered
from edgekd.errors import ModelError, RecipeError
from edgekd.goals import Importance, Prune
from edgekd.models import weights
from edgekd.models.resnet import resnet8
from edgekd.models.transformer import transformer
from edgekd.pruning import cost
from edgekd.pruning.cut import Group, cut, masked
from edgekd.pruning.heads import attentions
from edgekd.pruning.rank import search
from edgekd.pruning.trace import FAILS, OUTPUT, SHARED, UNLIKE, UNTRIED, trace
from edgekd.rounds import count
from edgekd.types import TensorSpec

# ---------------------------------------------------------------- the goal


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("round_to", [1, 4])
def test_the_goal_is_kept_and_nearly_reached_and_channels_are_rounded(together: bool, round_to: int) -> None:
    module = built(lambda: resnet8(10, PIXELS, width=16))
    made = cut_to(module, images(), 0.5, global_ranking=together, round_to=round_to)
    whole = cost.macs(module, (images(),))
    assert 0.5 * whole >= made.after > (0.46 if round_to == 1 else 0.42) * whole
    assert made.after == cost.macs(made.module, (images(),))
    assert made.layers
    for layer in made.module.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels % round_to == 0
            assert layer.weight.shape[0] == layer.out_channels
    assert made.module(images()).shape == (2, 10)
    assert not made.module.training


@pytest.mark.parametrize("measure", ["parameters", "size_bytes"])
def test_parameters_and_the_weights_file_are_goals_too(measure: Any, tmp_path: Path) -> None:
    module = built(lambda: resnet8(10, PIXELS, width=8))
    whole = pruning.measured(measure, module, (images(),), None)
    made: Any = pruning.prune(module, (images(),), measure, 0.4 * whole, Prune(macs=0.5))
    assert 0.33 * whole < made.after <= 0.4 * whole
    weights.save(tmp_path / "w.safetensors", made.module, {})
    if measure == "size_bytes":
        assert (tmp_path / "w.safetensors").stat().st_size <= 0.4 * whole
    else:
        assert sum(p.numel() for p in made.module.parameters()) == made.after


def test_a_later_round_keeps_everything_where_the_goal_is_kept_already() -> None:
    module = built(lambda: resnet8(10, PIXELS, width=8))
    first = cut_to(module, images(), 0.6)
    again: Any = pruning.prune(
        first.module, (images(),), "macs", first.after, Prune(macs=0.5), round_to=8, architecture=module
    )
    assert again.before == again.after == first.after
    assert again.layers == {}
    assert again.shapes == first.shapes
    assert torch.equal(again.module(images()), first.module(images()))


def test_a_goal_out_of_reach_or_reached_already_is_refused() -> None:
    module = built(lambda: resnet8(10, PIXELS, width=8))
    with pytest.raises(ModelError, match="nine tenths of every layer that can be cut leaves"):
        cut_to(module, images(), 0.001)
    with pytest.raises(
        ModelError, match=r"it costs 809 k multiply-accumulates already, and 1 T multiply-accumulates is the goal"
    ):
        pruning.prune(module, (images(),), "macs", 1e12, Prune(macs=0.5))


def test_nothing_to_cut_is_one_clear_error() -> None:
    module: Any = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    with pytest.raises(ModelError, match=r"nothing in the network can be cut.*1: it gives the output"):
        cut_to(module, images(), 0.5)


def test_the_search_ranks_all_units_together_or_each_group_by_itself() -> None:
    one, two = (Group(name, 4, 1, ()) for name in ("one", "two"))
    ranked = {one: torch.tensor([0.1, 0.2, 0.3, 0.4]), two: torch.tensor([4.0, 3.0, 2.0, 1.0])}

    def total(keep: Any) -> float:
        return sum(len(units) for units in keep.values())

    found = search(ranked, total, 5, measure="macs", together=True, round_to=1)
    assert found == {one: (3,), two: (0, 1, 2, 3)}
    found = search(ranked, total, 4, measure="macs", together=False, round_to=1)
    assert found == {one: (2, 3), two: (0, 1)}
    found = search(ranked, total, 6, measure="macs", together=False, round_to=2)
    assert sorted(map(len, found.values())) == [2, 4]


def test_rounds_take_at_most_a_step_each() -> None:
    assert [count(part, 1 / 3) for part in (0.9, 2 / 3, 0.5, 0.25)] == [1, 1, 2, 4]
    assert count(0.01, 1.0) == 1


def test_work_is_predicted_as_it_is_counted() -> None:
    """The search believes a prediction, so that it need not run every candidate."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, depth=1, embed_dim=48, num_heads=4)
    for module, size in ((built(Branches), 16), (vit.eval(), 32)):
        inputs = (images(size),)
        predicted = cost.predicted_macs(module, inputs)
        for group in trace(copy.deepcopy(module), inputs).groups:
            plan = {group: tuple(range(0, group.units, 2))}
            small = copy.deepcopy(module)
            cut(small, plan)
            assert predicted(plan) == pytest.approx(cost.macs(small, inputs))
            assert predicted(plan) < cost.macs(module, inputs)


# ---------------------------------------------------------------- the cut network


def test_cutting_channels_that_are_zero_changes_nothing() -> None:
    """Where the least important channels are exactly zero, the cut network computes what the whole one did."""
    module = built(Branches)
    groups = {group.name: group for group in trace(copy.deepcopy(module), (images(),)).groups}
    plan = {groups["stem.0"]: range(1, 16), groups["left.0"]: (0, 2, 5, 7), groups["hidden"]: range(0, 20, 2)}
    zeroed = masked(module, plan)
    small = copy.deepcopy(module)
    cut(small, plan)
    assert torch.allclose(small(images()), zeroed(images()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(zeroed(images()), module(images()), rtol=1e-4, atol=1e-5)


def test_the_least_important_channels_go() -> None:
    module = built(lambda: resnet8(10, PIXELS, width=8, shortcut="conv"))
    dead = [1, 4, 6]
    with torch.no_grad():
        for layer in (module.layer1[0].conv1, module.layer1[0].bn1):
            for parameter in layer.parameters():
                parameter[dead] = 0
        module.layer1[0].conv2.weight[:, dead] = 0
    (group,) = (each for each in trace(copy.deepcopy(module), (images(),)).groups if each.name == "layer1.0.conv1")
    without = copy.deepcopy(module)
    cut(without, {group: (0, 2, 3, 5, 7)})
    made = cut_to(module, images(), (cost.macs(without, (images(),)) + 1) / cost.macs(module, (images(),)))
    record = remembered(made.module)
    assert record is not None
    assert not set(dead) & set(record[0]["layer1.0.conv1.weight"][0])
    assert made.layers["layer1.0.conv1"] == (8, 5)
    assert torch.allclose(made.module(images()), module(images()), rtol=1e-4, atol=1e-4)


def test_layers_that_are_ignored_keep_every_weight() -> None:
    module = built(lambda: resnet8(10, PIXELS, width=8))
    made = cut_to(module, images(), 0.6, ignore=("layer3",))
    before, after = module.layer3.state_dict(), made.module.layer3.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert reasons(made)["layer3.0.conv1"] == "asked to be left alone"
    with pytest.raises(RecipeError, match=r"no module 'layer9'.*did you mean 'layer"):
        cut_to(module, images(), 0.6, ignore=("layer9",))


def test_a_users_module_is_cut_where_it_is_understood_and_left_alone_where_not() -> None:
    module = built(Branches)
    made = cut_to(module, images(), 0.5)
    assert made.module(images()).shape == (2, 5)
    why = reasons(made)
    assert why["head"] == OUTPUT
    assert why["wide"] == UNLIKE  # the shuffle would mix channels up: shapes alone would not tell
    assert made.module.right[0].groups == 2
    assert made.module.right[0].out_channels == made.module.right[1].num_channels == made.module.right[2].num_parameters
    assert made.module.right[0].out_channels % 4 == 0  # as many in each of its groups
    assert made.module.joined.in_channels == made.module.left[0].out_channels + made.module.right[0].out_channels
    assert made.module.hidden.in_features == 16 * made.module.down.out_channels
    assert made.module.wide.out_channels == 32


class Reversed(nn.Module):
    """Channels of `first` go to `second` in reverse, which no tracer follows; `given` makes the output of logits."""

    def __init__(self, given: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head, self.given = nn.Linear(16, 10), given

    def forward(self, x: Tensor) -> Any:
        x = self.second(self.first(x).relu().flip(1)).relu()
        return self.given(self.head(x.mean((2, 3))))


@dataclass
class Answer:
    logits: Tensor


@pytest.mark.parametrize(
    "given",
    [
        lambda y: [{"logits": y}],
        lambda y: {"task": {"logits": y}},
        lambda y: ((y.argmax(1), y), None),
        lambda y: [Answer(y), y.new_zeros(4, 0)],
    ],
    ids=["mappings in a list", "mappings in a mapping", "a tuple in a tuple", "a dataclass, and something empty"],
)
def test_groups_are_tried_however_deep_the_output_lies(given: Callable[[Tensor], object]) -> None:
    made = cut_to(built(lambda: Reversed(given)), images(), 0.6)
    why = reasons(made)
    assert why["head"] == OUTPUT
    assert why["first"] == UNLIKE
    assert set(made.layers) == {"second"}


def test_a_network_that_returns_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ModelError, match="no floating tensors, so that no cut can be tried"):
        cut_to(built(lambda: Reversed(lambda y: y.argmax(1))), images(), 0.6)


def test_what_is_not_finite_confirms_no_group() -> None:
    """Divided by its spread a channel of zeros is NaN, and so is every difference from it."""

    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.hidden, self.head = nn.Linear(16, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x).sigmoid())
            x = x / x.flatten(2).std(2)[..., None, None]
            logits: Tensor = self.head(self.hidden(x.mean((2, 3))).relu())
            return logits

    made = cut_to(built(Divided), images(), 0.7)
    assert reasons(made)["second"] == UNTRIED
    assert {"first"} <= set(made.layers) <= {"first", "hidden"}


def test_a_padding_of_channels_and_shared_weights_are_left_alone() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
            self.shrink, self.inside, self.again = (nn.Conv2d(c, 12, 1) for c in (16, 12, 12))
            self.again.weight = self.inside.weight
            self.free, self.head = nn.Linear(12, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = self.second(x.relu()) + pad(x, (0, 0, 0, 0, 4, 4))
            x = self.again(self.inside(self.shrink(x)).relu()).relu()
            logits: Tensor = self.head(self.free(x.mean((2, 3))).relu())
            return logits

    module = built(Padded)
    made: Any = pruning.prune(module, (images(),), "parameters", 0.9 * cost.parameters(module), Prune(parameters=0.9))
    why = reasons(made)
    assert why["first"].startswith(FAILS)
    assert why["inside"] == SHARED
    assert set(made.layers) == {"free"}


def test_a_part_of_channels_that_could_be_cut_to_nothing_is_left_alone() -> None:
    """A layer that reads the first channels alone would have none left where just these are cut."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.part = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 6, 1)
            self.cached: Tensor | None = None
            self.head = nn.Linear(14, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu()
            y = self.part(x[:, :4])
            self.cached = y.mean()  # under autograd no leaf, which cannot be copied
            logits: Tensor = self.head(torch.cat([x, y.relu()], 1).mean((2, 3)))
            return logits

    module = built(Sliced)
    made = pruning.prune(module, (images(),), "parameters", 0.97 * cost.parameters(module), Prune(parameters=0.9))
    assert reasons(made)["conv"].startswith(FAILS)
    assert set(made.layers) == {"part"}


def test_recurrent_layers_are_left_alone() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen, self.lstm = nn.Linear(6, 16), nn.LSTM(16, 12, batch_first=True)
            self.hidden, self.head = nn.Linear(12, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.hidden(self.lstm(self.widen(x).relu())[0][:, -1]).relu())
            return logits

    torch.manual_seed(0)
    module, x = Recurrent().eval(), torch.randn(2, 7, 6)
    made: Any = pruning.prune(module, (x,), "parameters", 0.9 * cost.parameters(module), Prune(parameters=0.9))
    assert set(made.layers) == {"hidden"}
    assert reasons(made)["widen"] == reasons(made)["lstm"]
    assert "a torch.nn.LSTM has the same width everywhere" in reasons(made)["lstm"]
    assert made.module(x).shape == (2, 3)


@pytest.mark.parametrize("importance", ["magnitude", "l1", "bn_scale", "taylor", "random"])
def test_every_importance_ranks(importance: Importance) -> None:
    module = built(Branches)

    def gradients(probe: nn.Module) -> None:
        probe(images()).square().sum().backward()

    goal = 0.6 * cost.macs(module, (images(),))
    made: Any = pruning.prune(
        module, (images(),), "macs", goal, Prune(macs=0.6, importance=importance), gradients=gradients, seed=3
    )
    assert made.after <= goal
    assert all(parameter.grad is None for parameter in module.parameters())
    if importance == "bn_scale":
        assert reasons(made)["hidden"] == "'bn_scale' says nothing of its channels"


def test_taylor_keeps_what_the_loss_depends_on() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
            return logits

    module = built(Two)
    with torch.no_grad():
        module.conv.bias.fill_(1.0)
        module.head.weight[:, ::2] = 0.0  # large, and of no use to the loss
        module.conv.weight[::2] *= 100

    def gradients(probe: nn.Module) -> None:
        probe(images()).square().sum().backward()

    options = Prune(macs=0.5, importance="taylor")
    made: Any = pruning.prune(
        module, (images(),), "macs", 0.51 * cost.macs(module, (images(),)), options, gradients=gradients
    )
    record = remembered(made.module)
    assert record is not None
    assert record[0]["conv.weight"][0] == (1, 3, 5, 7)
    assert cut_to(module, images(), 0.51).module.conv.out_channels == 4


# ---------------------------------------------------------------- timm, transformers


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("mobilenetv3_small_050", {}),  # squeeze and excitation, depthwise
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    ],
)
def test_models_of_timm_are_cut_everywhere_but_at_the_output(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module: Any = timm.create_model(name, num_classes=7, **options).eval()
    made = cut_to(module, images(32), 0.6, round_to=8)
    assert made.module(images(32)).shape == (2, 7)
    assert made.after <= 0.6 * cost.macs(module, (images(32),))
    told = reasons(made)
    assert [layer for layer, why in told.items() if why == OUTPUT] == [module.default_cfg["classifier"]]
    assert {why for why in told.values() if why != OUTPUT} <= {
        "too narrow: rounded to multiples of 8 channels nothing can be cut",
        "everything in it ranks above what had to go",
    }
    assert len(made.layers) > 3


def test_heads_of_attention_are_cut_whole() -> None:
    torch.manual_seed(0)
    module: Any = timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, img_size=32, depth=1, embed_dim=48, num_heads=4
    ).eval()
    attention = module.blocks[0].attn
    (found,) = attentions(module)
    assert (found.group.units, found.group.width) == (4, 12)
    with torch.no_grad():  # a head that does nothing is the least important one
        attention.qkv.weight.view(3, 4, 12, 48)[:, 2] *= 1e-6
        attention.proj.weight.view(48, 4, 12)[:, 2] *= 1e-6
        attention.qkv.bias.view(3, 4, 12)[:, 2] = 0
    made = cut_to(module, images(32), 0.9)
    small = made.module.blocks[0].attn
    assert (small.num_heads, small.head_dim, small.attn_dim) == (3, 12, 36)
    assert made.layers["blocks.0.attn"] == (4, 3)
    record = remembered(made.module)
    assert record is not None
    assert set(range(24, 36)).isdisjoint(record[0]["blocks.0.attn.proj.weight"][1])


def test_heads_that_a_block_tells_too_are_those_of_its_attention() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = timm.layers.attention.Attention(24, num_heads=4)
            self.num_heads = 4

        def forward(self, x: Tensor) -> Tensor:
            given: Tensor = self.attn(x)
            return given

    (found,) = attentions(nn.Sequential(Told()))
    assert found.path == "0.attn"
    assert found.made_by == ("0.attn.qkv",)


def test_our_transformer_loses_heads_hidden_channels_and_width() -> None:
    torch.manual_seed(0)
    specs = (TensorSpec("ids", "int64", ("batch", 6), values=20), TensorSpec("mask", "int64", ("batch", 6)))
    module: Any = transformer(3, specs, width=24, depth=2, heads=4, hidden=32).eval()
    inputs = (torch.randint(0, 20, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2]))
    made: Any = pruning.prune(module, inputs, "macs", 0.4 * cost.macs(module, inputs), Prune(macs=0.4))
    assert made.module(*inputs).shape == (2, 3)
    assert {"blocks.0", "blocks.0.mlp.0"} < set(made.layers)
    assert made.module.embedding.embedding_dim == made.module.norm.normalized_shape[0] < 24
    assert made.module.position.shape[1] == made.module.embedding.embedding_dim
