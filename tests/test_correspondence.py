"""match: pairs of teacher and student of many families, with no rule for any of them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from matched_networks import built, ids_of, of_timm, paths, pixels, pruned_copy, vit
from torch import Tensor, nn
from varied_networks import WORDS, Encoder, Odd, Packed, Recurrent, Stack, UNet, hooks

from edgekd.correspondence import Correspondence, match
from edgekd.errors import ModelError, PartError
from edgekd.types import Part


def _used(found: Correspondence) -> list[tuple[str, str]]:
    return [(pair.role, pair.loss) for pair in found.pairs if pair.weight]


def _monotone(found: Correspondence) -> bool:
    stages = [pair for pair in found.pairs if pair.role in ("earlier", "last")]
    depths = [(pair.student.depth, pair.teacher.depth) for pair in stages]
    return all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(depths))


# ---------------------------------------------------------------- families


def test_residual_networks_are_paired_stage_by_stage() -> None:
    found = match(built("resnet56"), built("resnet8"), pixels())
    names = ("layer1", "layer2", "layer3", "linear:in")
    assert paths(found) == [(name, name) for name in names]
    assert found.family == "same"
    assert _used(found) == [("last", "srd"), ("penultimate", "srd")]
    assert [pair.student.grid for pair in found.pairs] == [(32, 32), (16, 16), (8, 8), ()]
    assert [pair.student.stride for pair in found.pairs] == [1, 2, 4, None]


def test_depthwise_student() -> None:
    found = match(built("resnet8"), built("dscnn", width=0.5), pixels())
    assert paths(found) == [(name, name) for name in ("layer1", "layer2", "layer3", "linear:in")]
    assert [(pair.student.channels, pair.teacher.channels) for pair in found.pairs[:3]] == [
        (32, 16),
        (64, 32),
        (128, 64),
    ]


@pytest.mark.parametrize(
    ("teacher", "student", "last", "head"),
    [
        ("resnet18", "mobilenetv3_small_050", ("blocks", "layer4"), ("classifier:in", "fc:in")),
        ("efficientnet_lite0", "regnetx_002", ("final_conv", "bn2"), ("head.fc:in", "classifier:in")),
        ("resnet18", "convnext_atto", ("norm_pre", "layer4"), ("head.fc:in", "fc:in")),
    ],
)
def test_convolutional_networks_of_other_families(
    teacher: str, student: str, last: tuple[str, str], head: tuple[str, str]
) -> None:
    found = match(of_timm(teacher), of_timm(student), torch.randn(4, 3, 64, 64))
    assert found.family == "same"
    assert paths(found, "last") == [last]
    assert paths(found, "penultimate") == [head]
    assert _monotone(found)
    assert len(found.pairs) == 5
    assert all(pair.student.stride == pair.teacher.stride for pair in found.pairs)


def test_vision_transformer_teaches_convolutions_and_the_reverse() -> None:
    transformer, cnn, x = vit(), built("resnet8").module, torch.randn(4, 3, 32, 32)
    found = match(transformer, cnn, x)
    assert found.family == "cnn-vit"
    assert paths(found, "last", "penultimate") == [("layer3", "blocks.5"), ("linear:in", "head:in")]
    assert _used(found) == [("penultimate", "srd")]  # of unlike families the maps do not compare
    assert _monotone(found)
    (last,) = (pair for pair in found.pairs if pair.role == "last")
    assert (last.teacher.grid, last.teacher.prefix) == ((8, 8), 1)
    back = match(cnn, transformer, x)
    assert paths(back, "last", "penultimate") == [("blocks.5", "layer3"), ("head:in", "linear:in")]
    assert _monotone(back)


def test_a_distillation_token_is_left_out() -> None:
    teacher, student = vit("deit_tiny_distilled_patch16_224"), vit(depth=3)
    found = match(teacher, student, torch.randn(4, 3, 32, 32))
    assert found.family == "transformer"
    assert _used(found) == [("relations", "minilm")]
    assert {(pair.student.prefix, pair.teacher.prefix) for pair in found.pairs if pair.student.grid} == {(1, 2)}
    assert paths(found, "earlier", "last") == [(f"blocks.{i}", f"blocks.{2 * i + 1}") for i in range(3)]
    assert paths(found, "relations") == [("blocks.2.attn.qkv", "blocks.5.attn.qkv")]


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_to_a_smaller_one(batch_first: bool) -> None:
    probe = {"ids": ids_of(), "mask": torch.ones(4, 9, dtype=torch.long)}
    found = match(Encoder(48, 4, 6), Encoder(32, 4, 2, batch_first=batch_first), probe)
    assert found.family == "transformer"
    layers = [(f"encoder.layers.{mine}", f"encoder.layers.{theirs}") for mine, theirs in ((0, 2), (1, 5))]
    assert paths(found, "earlier", "last") == layers  # every third, as TinyBERT
    assert paths(found, "relations") == [
        (f"{mine}.self_attn:qkv", f"{theirs}.self_attn:qkv") for mine, theirs in layers[1:]
    ]
    (term,) = found.terms()
    assert term.part == Part("minilm", {"heads": 8})  # the most, up to 12, that divide 32 and 48 channels


def test_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers")

    def bert(width: int, layers: int) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=2 * width, max_position_embeddings=16, num_labels=3,
        )  # fmt: skip
        network: nn.Module = transformers.BertForSequenceClassification(config)
        return network

    probe = {"input_ids": ids_of(), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    found = match(bert(48, 4), bert(32, 2), probe)
    assert found.family == "transformer"
    layers = [("bert.encoder.layer.0", "bert.encoder.layer.1"), ("bert.encoder.layer.1", "bert.encoder.layer.3")]
    assert paths(found, "earlier", "last") == layers
    attention = "{0}.attention.self.query+{0}.attention.self.key+{0}.attention.self.value"
    assert paths(found, "relations") == [(attention.format(layers[1][0]), attention.format(layers[1][1]))]
    assert _used(found) == [("relations", "minilm")]


def test_recurrent_networks() -> None:
    teacher = Recurrent(nn.LSTM, 24, layers=2)
    student = Recurrent(nn.LSTM, 16, batch_first=False)
    found = match(teacher, student, ids_of())
    assert found.family == "recurrent"
    assert paths(found) == [("rnn", "rnn"), ("head:in", "head:in")]
    assert _used(found) == []  # they gain nothing from it, unless it is asked for
    asked = match(teacher, student, ids_of(), losses=["cosine"])
    assert _used(asked) == [("last", "cosine"), ("penultimate", "cosine")]
    assert "teacher: rnn: of its 2 layers the last can be tapped" in found.notes
    grus = match(Recurrent(nn.GRU, 24, frames=True), Recurrent(nn.GRU, 16, frames=True), ids_of(), losses=["cosine"])
    assert _used(grus) == [("last", "cosine")]  # what the head is given is the last stage


def test_a_student_that_runs_forward_learns_from_the_forward_half() -> None:
    found = match(Recurrent(nn.LSTM, 24, both_ways=True), Recurrent(nn.LSTM, 16), ids_of())
    (last,) = (pair for pair in found.pairs if pair.role == "last")
    assert last.channel_map == tuple(range(24))
    assert (last.target_channels, last.projector) == (24, "linear")
    assert any("forward half" in note for note in found.notes)


def test_stacked_recurrent_layers_are_blocks() -> None:
    found = match(Stack(24, 6), Stack(8, 2), torch.randn(4, 12, 6))
    assert paths(found, "earlier", "last") == [("layers.0", "layers.2"), ("layers.1", "layers.5")]
    assert "teacher: 4 of 6 blocks have no counterpart" in found.notes


def test_packed_sequences() -> None:
    mask = torch.arange(9) < torch.tensor([9, 4, 6, 2])[:, None]
    found = match(Packed(24), Packed(16), {"ids": ids_of(), "mask": mask}, losses=["cosine"])
    assert _used(found) == [("last", "cosine"), ("penultimate", "cosine")]


def test_unet_is_paired_up_to_its_last_map() -> None:
    found = match(UNet(8), UNet(4), torch.randn(4, 3, 32, 32))
    assert found.family == "dense"
    assert paths(found) == [(path, path) for path in ("down.1", "down.2", "merge.0", "merge.1")]
    assert {pair.loss for pair in found.pairs if pair.weight} == {"cosine"}
    assert [pair.student.grid for pair in found.pairs] == [(16, 16), (8, 8), (16, 16), (32, 32)]


def test_networks_of_vectors_have_their_heads_inputs() -> None:
    def dense(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))

    found = match(dense(16), dense(8), torch.randn(4, 7))
    assert paths(found) == [("2:in", "2:in")]  # before the dropout
    assert _used(found) == [("penultimate", "srd")]


def test_convolutions_over_time() -> None:
    def network(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(4, width, 5, 2), nn.ReLU(), nn.Conv1d(width, 2 * width, 5, 2), nn.ReLU(),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * width, 3),
        )  # fmt: skip

    found = match(network(16), network(8), torch.randn(4, 4, 100))
    assert paths(found) == [("1", "1"), ("3", "3"), ("6:in", "6:in")]
    assert found.pairs[0].student.layout == "BCN"


def test_images_with_their_channels_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = built("resnet8").module

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.network(x.permute(0, 3, 1, 2))
            return logits

    found = match(Last(), Last(), torch.randn(4, 32, 32, 3))
    assert paths(found, "earlier", "last") == [(f"network.layer{at}",) * 2 for at in (1, 2, 3)]
    assert [pair.student.stride for pair in found.pairs] == [1, 2, 4, None]
    channels_last = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    assert len(match(built("resnet8").module, built("resnet8").module, channels_last).pairs) == 4


def test_a_decoder_that_looks_at_an_encoder() -> None:
    def network(width: int) -> nn.Module:
        return nn.Transformer(width, 4, 2, 2, 2 * width, batch_first=True)

    class Translates(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.enter, self.inside, self.head = nn.Linear(6, width), network(width), nn.Linear(width, 9)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            logits: Tensor = self.head(self.inside(self.enter(x), self.enter(y)))
            return logits

    found = match(Translates(32), Translates(16), (torch.randn(4, 7, 6), torch.randn(4, 12, 6)))
    last = "inside.decoder.layers.1"
    assert paths(found, "last", "relations") == [(last, last), (f"{last}.self_attn:qkv", f"{last}.self_attn:qkv")]


def test_a_traced_graph_without_blocks() -> None:
    graph = torch.fx.symbolic_trace(built("resnet8", shortcut="conv").module)
    found = match(built("resnet20").module, graph, torch.randn(4, 3, 32, 32))
    assert [pair.teacher.path for pair in found.pairs] == ["layer1", "layer2", "layer3", "linear:in"]
    assert [pair.student.grid for pair in found.pairs] == [(32, 32), (16, 16), (8, 8), ()]


def test_modules_called_again_and_wrapped_outputs() -> None:
    found = match(Odd(), Odd(), torch.randn(4, 5, 8))
    assert any(pair.role == "penultimate" for pair in found.pairs)


# ---------------------------------------------------------------- a pruned copy


def test_a_pruned_copy_knows_its_channels() -> None:
    teacher, student = pruned_copy()
    found = match(teacher, student, pixels(16))
    assert found.family == "pruned"
    assert paths(found) == [(name, name) for name in ("layer1", "layer2", "layer3", "linear:in")]
    assert _used(found) == [("last", "hint"), ("penultimate", "hint")]
    assert all(pair.projector == "none" for pair in found.pairs)
    penultimate = found.pairs[-1]
    assert penultimate.channel_map is not None
    of_teacher, of_student = (network.module.state_dict()["linear.weight"] for network in (teacher, student))
    assert torch.equal(of_teacher[:, list(penultimate.channel_map)], of_student)
    assert found.pairs[2].channel_map == penultimate.channel_map  # one residual stream


def test_a_pruned_copy_that_was_trained_since_gets_projectors() -> None:
    teacher, student = pruned_copy()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    found = match(teacher, student, pixels())
    assert found.family == "same"
    assert all(pair.channel_map is None and pair.projector == "linear" for pair in found.pairs)


def test_a_copy_is_compared_channel_by_channel() -> None:
    teacher = built("resnet8")
    found = match(teacher, copy.deepcopy(teacher), pixels(16))
    assert found.family == "pruned"
    assert found.pairs[0].channel_map == tuple(range(16))
    assert [round(pair.cka or 0, 3) for pair in found.pairs] == [1, 1, 1, 1]


def test_a_copy_without_batch_normalisation_passes_its_trial() -> None:
    teacher = vit(depth=2)  # its features are the student's: no gradient, were they compared as they are
    found = match(teacher, copy.deepcopy(teacher), torch.randn(4, 3, 32, 32))
    assert found.family == "pruned"
    assert _used(found) == [("last", "hint"), ("penultimate", "hint")]


# ---------------------------------------------------------------- what match leaves behind, and refuses


def _fingerprint(network: nn.Module) -> tuple[Any, ...]:
    state = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    return state, modes, hooks(network), [p.grad for p in network.parameters()]


def test_nothing_is_left_changed() -> None:
    teacher, student = built("resnet8").eval(), built("dscnn", width=0.5).train()
    student.module.get_submodule("layer1").eval()
    before = [_fingerprint(network) for network in (teacher, student)]
    drawn = torch.get_rng_state()
    match(teacher, student, pixels(16))
    assert torch.equal(drawn, torch.get_rng_state())
    for network, (state, modes, _, _) in zip((teacher, student), before, strict=True):
        after = _fingerprint(network)
        assert all(torch.equal(state[key], after[0][key]) for key in state)
        assert after[1] == modes
        assert after[2] == 0
        assert after[3] == [None] * len(after[3])


def test_nothing_is_left_changed_after_a_failure() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            raise ValueError("I never work")

    network = Fails().train()
    with pytest.raises(ModelError, match=r"Fails: the network fails on the probe \(float32 \(3, 7\)\): I never work"):
        match(network, network, torch.randn(4, 7))
    assert hooks(network) == 0
    assert network.training


def test_a_probe_of_one_sample_is_refused() -> None:
    with pytest.raises(ModelError, match="the probe is one sample"):
        match(built("resnet8"), built("resnet8"), pixels(1))


def test_nothing_in_common() -> None:
    with pytest.raises(ModelError, match="no place of the student corresponds"):
        match(nn.Sequential(nn.Tanh()), nn.Sequential(nn.Tanh()), torch.randn(4, 7))


def test_a_student_that_no_gradient_reaches_is_refused() -> None:
    teacher, student = built("resnet8"), built("resnet8")
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="reaches no weight of the student"):
        match(teacher, student, pixels())


def above_teacher(projected_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """A loss with its minimum in the wrong place."""
    return -(projected_feature - teacher_feature.detach()).square().mean()


def leaky(projected_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """A loss that trains the teacher."""
    return (projected_feature - teacher_feature).square().mean()


def test_losses_that_are_wrong_are_refused() -> None:
    teacher, student = built("resnet8"), built("resnet8")
    with pytest.raises(ModelError, match="expected its minimum at the teacher"):
        match(teacher, student, pixels(), losses=[f"{__name__}:above_teacher"])
    with pytest.raises(ModelError, match="gradient reaches the teacher"):
        match(teacher, student, pixels(), losses=[f"{__name__}:leaky"])
    with pytest.raises(ModelError, match="takes no features"):
        match(teacher, student, pixels(), losses=["kd"])
    with pytest.raises(PartError, match="did you mean 'review'"):
        match(teacher, student, pixels(), losses=["reviw"])
