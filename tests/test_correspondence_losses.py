"""Pairs of layers as losses, recipes, tables and engines take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matched_networks import built, ids_of, paths, pixels, pruned_copy, vit
from torch import Tensor, nn
from varied_networks import Encoder, hooks

from edgekd.correspondence import Adapter, Correspondence, Taps, match, pair_of, pairs_for, resolve, table, wanted
from edgekd.correspondence.inputs import mask_of
from edgekd.errors import ModelError, RecipeError
from edgekd.losses.hidden import hidden
from edgekd.types import LossTerm, Outputs, Part

FEATURE_LOSSES = ("srd", "review", "cosine", "attention", "similarity", "hint", "hidden", "ofa")


# ---------------------------------------------------------------- losses, recipes, tables


@pytest.mark.parametrize("loss", FEATURE_LOSSES)
@pytest.mark.parametrize("networks", ["cnn", "vit to cnn", "cnn to vit"])
def test_every_feature_loss_on_its_pairs(loss: str, networks: str) -> None:
    cnn: Callable[[], nn.Module] = lambda: built("resnet8", shortcut="conv").module  # noqa: E731
    teacher, student = {
        "cnn": lambda: (cnn(), built("dscnn", width=0.25).module),
        "vit to cnn": lambda: (vit(depth=3), cnn()),
        "cnn to vit": lambda: (cnn(), vit(depth=3)),
    }[networks]()
    found = match(teacher, student, torch.randn(4, 3, 32, 32), losses=[loss])
    assert found.pairs
    assert {pair.loss for pair in found.pairs} == {loss}
    (term,) = found.terms()
    assert term.pairs == tuple(paths(found))


def test_terms_of_a_recipe_are_resolved_to_the_same_pairs() -> None:
    teacher, student = pruned_copy()
    found = match(teacher, student, pixels())
    terms = (LossTerm(Part("kd"), 0.9), *found.terms(), LossTerm(Part("similarity"), 3000.0))
    logits, hints, similar = resolve(teacher, student, pixels(), terms)
    assert logits == ()
    assert [(pair.paths, pair.channel_map) for pair in hints] == [
        (pair.paths, pair.channel_map) for pair in found.pairs if pair.weight
    ]
    assert [pair.paths for pair in similar] == [("layer1", "layer1"), ("layer2", "layer2"), ("layer3", "layer3")]
    assert {(pair.loss, pair.weight) for pair in similar} == {("similarity", 3000.0)}


def test_options_of_a_recipe_come_before_what_follows_from_the_channels() -> None:
    terms = [LossTerm(Part("minilm", {"heads": 2})), LossTerm(Part("minilm"))]
    chosen, followed = resolve(Encoder(48, 4, 2), Encoder(32, 4, 2), ids_of(), terms)
    assert chosen[0].options == {"heads": 2}
    assert followed[0].options == {"heads": 8}


def looks_at_all(student: Outputs, teacher: Outputs) -> Tensor:
    """A loss of one's own, of everything that is tapped."""
    return (student.features["layer1"] - teacher.features["layer1"]).square().mean()


def test_a_loss_of_all_outputs_has_the_pairs_that_it_names() -> None:
    own = Part(f"{__name__}:looks_at_all")
    terms = [LossTerm(own, 1.0, (("layer1", "layer1"),)), LossTerm(own)]
    named, nothing = resolve(built("resnet8"), built("resnet8"), pixels(), terms)
    assert [pair.paths for pair in named] == [("layer1", "layer1")]
    assert nothing == ()


def test_a_loss_without_pairs_is_refused() -> None:
    with pytest.raises(ModelError, match="no pair of the two networks suits 'minilm'"):
        match(built("resnet8"), built("resnet8"), pixels(), losses=["minilm"])
    with pytest.raises(ModelError, match="no pair of the two networks suits 'minilm'"):
        resolve(built("resnet8"), built("resnet8"), pixels(), [LossTerm(Part("minilm"))])


def test_pairs_by_name() -> None:
    teacher, student = built("resnet20"), built("resnet8")
    pair = pair_of(teacher, student, pixels(), "layer2.0.conv1", "layer2.1.bn2", loss="hint")
    assert (pair.role, pair.loss, pair.student.channels) == ("chosen", "hint", 32)
    with pytest.raises(ModelError, match="nothing can be tapped at 'layr2'; did you mean 'layer2'"):
        pair_of(teacher, student, pixels(), "layr2", "layer2")
    with pytest.raises(ModelError, match="channels cannot be joined"):
        pair_of(teacher, student, pixels(), "layer1+layer2", "layer2")


def test_pairs_for_a_loss() -> None:
    found = match(built("resnet8"), built("resnet8"), pixels())
    roles = {loss: [pair.role for pair in pairs_for(found, loss)] for loss in ("srd", "review", "minilm", "own:loss")}
    assert roles == {
        "srd": ["last", "penultimate"],
        "review": ["earlier", "earlier", "last"],
        "minilm": [],
        "own:loss": ["earlier", "earlier", "last", "penultimate"],
    }


def test_the_table_is_read_back() -> None:
    found = match(built("resnet56"), built("resnet8"), pixels())
    text = found.table()
    assert table.read(text) == found.terms()
    edited = text.replace("review | 0     ", "review | 5     ")
    assert table.read(edited) == (
        LossTerm(Part("review"), 5.0, (("layer1", "layer1"), ("layer2", "layer2"))),
        *found.terms(),
    )
    with pytest.raises(RecipeError, match="line 2 has the weight 'x'"):
        table.read(text.replace("| 0 ", "| x ", 1))
    with pytest.raises(RecipeError, match="no column 'loss'"):
        table.read(text.replace("loss", "lost", 1))


def test_json_of_a_correspondence() -> None:
    found = match(built("resnet8"), built("resnet8"), pixels())
    told = found.as_json()
    assert told["family"] == "same"
    pairs = told["pairs"]
    assert isinstance(pairs, list)
    assert len(pairs) == 4


def test_cka_takes_a_probe() -> None:
    few = match(built("resnet8"), built("resnet8"), pixels(8))
    assert all(pair.cka is None for pair in few.pairs)
    assert "CKA was not measured: it takes a probe of 16 samples" in few.notes
    many = match(built("resnet8"), built("resnet8"), pixels(40))
    assert all(pair.cka is not None for pair in many.pairs)


# ---------------------------------------------------------------- as an engine uses it


def _loss(found: Correspondence, teacher: nn.Module, student: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # of the projectors
    pairs = pairs_for(found, "hidden")
    adapter = Adapter(pairs, wanted(hidden))
    of_teacher, of_student = Taps(teacher, [p.teacher for p in pairs]), Taps(student, [p.student for p in pairs])
    with of_teacher, of_student:
        with torch.inference_mode():
            teacher(**inputs)
        student(**inputs)
        calls: list[dict[str, Any]] = list(adapter(of_student.take(), of_teacher.take(), mask_of(inputs)))
    return torch.stack([hidden(**features) for features in calls]).sum()


def test_padding_does_not_count() -> None:
    teacher, student = Encoder(48, 4, 4).eval(), Encoder(32, 4, 2).eval()
    mask = (torch.arange(9) < torch.tensor([9, 4, 6, 2])[:, None]).long()
    inputs = {"ids": ids_of(), "mask": mask}
    found = match(teacher, student, inputs)
    loss = _loss(found, teacher, student, inputs)
    other = _loss(found, teacher, student, {"ids": torch.where(mask.bool(), inputs["ids"], 7), "mask": mask})
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)
    without = _loss(found, teacher, student, {"ids": inputs["ids"]})
    assert without.item() != pytest.approx(loss.item(), rel=1e-3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.embed.weight.grad is not None
    assert hooks(teacher) == hooks(student) == 0
