"""The objective: every loss gets what its parameters are named after, and the sum is what the recipe says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from trainings import HINTON, handwritten, network, own, small, task

from edgekd.correspondence import Pair, Tap
from edgekd.distillation.objective import Objective, Term, asks, build, default_losses, ensemble, name_of
from edgekd.errors import ModelError, PartError, RecipeError
from edgekd.losses import ce, dkd, function_matching, hint, kd, mse, ofa, review, similarity, srd
from edgekd.recipe import loss_term
from edgekd.types import LossTerm, Outputs, Part

ROWS, CLASSES = 6, 4


def outputs(
    seed: int, channels: int = 0, *, grid: tuple[int, ...] = (2, 3), kind: torch.dtype = torch.float32
) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    features = {"body": torch.randn(ROWS, channels, *grid, generator=draw).to(kind)} if channels else {}
    return Outputs(torch.randn(ROWS, CLASSES, generator=draw), features)


def pair(student: int = 3, teacher: int = 5, *, grid: tuple[int, ...] = (2, 3), layout: str = "BCHW") -> Pair:
    mine, theirs = (Tap("body", layout, (-1, n, *grid), n, 0.5, 4.0, "stage", grid) for n in (student, teacher))
    return Pair(mine, theirs, loss="", weight=1.0, cka=None, score=1.0)


def objective(*terms: Term | Callable[..., Tensor], name: str = "classification") -> Objective:
    torch.manual_seed(0)
    made = [term if isinstance(term, Term) else Term(term) for term in terms]
    return Objective(made, task(name), CLASSES)


LABELS = torch.tensor([0, 1, 2, 3, 1, 0])


# ---------------------------------------------------------------- names


def test_a_loss_is_given_what_its_parameters_are_named_after() -> None:
    student, teacher = outputs(0), outputs(1)
    given: dict[str, Any] = {}

    def loss(
        teacher: Outputs, labels: Tensor, student_logits: Tensor, factor: float = 2.0,
        teacher_logits: Tensor | None = None, student: Outputs | None = None, *, option: int = 1,
    ) -> Tensor:  # fmt: skip
        given.update(locals())
        return student_logits.sum() * factor

    assert asks(loss) == ("teacher", "labels", "student_logits", "teacher_logits", "student")
    value = objective(Term(partial(loss, option=7), 0.5))(student, [(1.0, teacher)], LABELS)
    assert given["teacher"] is teacher
    assert given["student"] is student
    assert given["labels"] is LABELS
    assert given["student_logits"] is student.logits
    assert given["teacher_logits"] is teacher.logits  # one teacher's logits are not touched
    assert (given["factor"], given["option"]) == (2.0, 7)
    torch.testing.assert_close(value, student.logits.sum())


def test_names_that_stand_for_nothing_are_refused_with_the_nearest() -> None:
    def misspelt(student_logits: Tensor, teacher_logit: Tensor) -> Tensor:
        return student_logits.sum()

    def by_place(student_logits: Tensor, /) -> Tensor:
        return student_logits.sum()

    def anything(*tensors: Tensor, scale: float = 1.0) -> Tensor:
        return tensors[0].sum()

    with pytest.raises(
        PartError, match=r"misspelt has a positional parameter 'teacher_logit'.*'teacher_logits'\?"
    ) as e:
        asks(misspelt, "loss[2]")
    assert e.value.where == "loss[2]"
    assert "student_feature" in e.value.expected
    with pytest.raises(PartError, match="positional parameter 'student_logits', which"):
        asks(by_place)
    with pytest.raises(PartError, match="anything asks for nothing"):
        asks(anything)
    with pytest.raises(PartError, match="asks for nothing"):
        asks(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("loss", "needs"),
    [(ce, False), (kd, True), (mse, True), (dkd, True), (function_matching, True)],
)
def test_only_what_asks_for_a_teacher_needs_one(loss: Callable[..., Tensor], needs: bool) -> None:
    made = objective(loss, name="regression" if loss is mse else "classification")
    assert made.needs_teacher is needs


def test_without_a_teacher_a_loss_on_labels_works_alone() -> None:
    torch.testing.assert_close(objective(ce)(outputs(0), [], LABELS), ce(outputs(0).logits, LABELS))
    values = torch.randn(ROWS, CLASSES)
    made = objective(partial(mse, to="labels"), name="regression")
    torch.testing.assert_close(made(outputs(0), [], values), (outputs(0).logits - values).square().mean())


def test_labels_may_be_left_out_where_no_loss_asks_for_them() -> None:
    student, teacher = outputs(0), outputs(1)
    assert objective(kd)(student, [(1.0, teacher)], None) > 0
    with pytest.raises(PartError, match=r"edgekd\.losses\.ce\.ce needs labels"):
        objective(kd, ce)(student, [(1.0, teacher)], None)


def test_equal_objectives_have_equal_words() -> None:
    first = objective(Term(partial(kd, temperature=2.0), 0.9), Term(hint, 1.0, (pair(),)))
    assert str(first) == str(objective(Term(partial(kd, temperature=2.0), 0.9), Term(hint, 1.0, (pair(),))))
    assert "0x" not in str(first)
    others = [
        objective(Term(partial(kd, temperature=3.0), 0.9), Term(hint, 1.0, (pair(),))),
        objective(Term(partial(kd, temperature=2.0), 0.8), Term(hint, 1.0, (pair(),))),
        objective(Term(partial(kd, temperature=2.0), 0.9), Term(similarity, 1.0, (pair(),))),
        objective(Term(partial(kd, temperature=2.0), 0.9)),
    ]
    assert len({str(first), *map(str, others)}) == 5
    assert name_of(partial(kd, temperature=2.0)) == "edgekd.losses.kd.kd(temperature=2.0)"


# ---------------------------------------------------------------- sums and several teachers


def test_the_sum_is_weighted() -> None:
    student, teacher = outputs(0), outputs(1)
    made = objective(Term(partial(kd, temperature=2.0), 0.9), Term(ce, 0.1), Term(dkd, 3.0))
    expected = (
        0.9 * kd(student.logits, teacher.logits, temperature=2.0)
        + 0.1 * ce(student.logits, LABELS)
        + 3.0 * dkd(student.logits, teacher.logits, LABELS)
    )
    torch.testing.assert_close(made(student, [(2.0, teacher)], LABELS), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_several_teachers_are_the_weighted_mean_of_their_probabilities(temperature: float) -> None:
    first, second, third = (outputs(seed).logits * 5 for seed in range(3))
    found = ensemble([(3.0, first), (1.0, second), (2.0, third)], temperature)
    mean = sum(w * softmax(z / temperature, 1) for w, z in ((0.5, first), (1 / 6, second), (1 / 3, third)))
    torch.testing.assert_close(softmax(found / temperature, 1), mean)
    assert ensemble([(0.3, first)], temperature) is first
    huge = ensemble([(1.0, first * 1e4), (1.0, second * 1e4)], temperature)
    assert torch.isfinite(huge).all()


def test_each_loss_gets_the_ensemble_at_its_own_temperature() -> None:
    seen: dict[str, Tensor] = {}

    def remembered(student_logits: Tensor, teacher_logits: Tensor, *, name: str, temperature: float = 3.0) -> Tensor:
        seen[name] = teacher_logits
        return student_logits.sum()

    def without(student_logits: Tensor, teacher_logits: Tensor, *, temperature: str = "none") -> Tensor:
        seen["none"] = teacher_logits
        return student_logits.sum()

    teachers = [(1.0, outputs(1)), (2.0, outputs(2))]
    hot = partial(remembered, name="hot", temperature=8.0)
    objective(hot, partial(remembered, name="default"), without)(outputs(0), teachers, LABELS)
    for name, temperature in (("hot", 8.0), ("default", 3.0), ("none", 1.0)):
        expected = ensemble([(w, each.logits) for w, each in teachers], temperature)
        torch.testing.assert_close(seen[name], expected)
    assert not torch.allclose(softmax(seen["hot"], 1), softmax(seen["none"], 1))


def test_values_of_several_teachers_are_averaged() -> None:
    student, first, second = (outputs(seed) for seed in range(3))
    mean = (3 * first.logits + second.logits) / 4
    value = objective(mse, name="regression")(student, [(3.0, first), (1.0, second)], None)
    torch.testing.assert_close(value, (student.logits - mean).square().mean())


def test_dense_outputs_and_flags_are_rows_for_every_loss() -> None:
    pixels = Outputs(torch.randn(2, CLASSES, 3, 3)), Outputs(torch.randn(2, CLASSES, 3, 3))
    maps = torch.randint(0, CLASSES, (2, 3, 3))
    maps[0, 0, 0] = 255  # counts for nothing, whatever the two say there
    made = objective(kd, ce, name="segmentation")
    before = made(pixels[0], [(1.0, pixels[1])], maps)
    pixels[0].logits[0, :, 0, 0] = 100 * torch.randn(CLASSES)
    torch.testing.assert_close(made(pixels[0], [(1.0, pixels[1])], maps), before)

    flags = torch.randint(0, 2, (ROWS, CLASSES))
    student = outputs(0)
    expected = nn.functional.binary_cross_entropy_with_logits(student.logits, flags.float())
    torch.testing.assert_close(objective(ce, name="multilabel")(student, [], flags), expected)


# ---------------------------------------------------------------- features


def test_a_feature_loss_is_summed_over_its_pairs_and_reaches_student_and_projector() -> None:
    student, teacher = outputs(0, 3), outputs(1, 5)
    for each in (student, teacher):
        each.features["body"].requires_grad_()
    made = objective(Term(hint, 0.5, (pair(), pair())))
    projectors = list(made.parameters())
    assert sum(parameter.numel() for parameter in projectors) == 2 * (3 * 5 + 5)
    value = made(student, [(1.0, teacher)], None)
    aligned, wanted, _ = pair().aligned(student.features["body"], teacher.features["body"])
    weight, bias, *_ = projectors
    projected = aligned @ weight.T + bias
    one = hint(projected, wanted)
    assert 0 < float(0.5 * one.detach()) < float(value.detach())
    value.backward()
    assert student.features["body"].grad is not None
    assert teacher.features["body"].grad is None
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in projectors)


def test_only_the_first_teachers_features_are_asked_for() -> None:
    made = objective(kd, Term(similarity, 1.0, (pair(),)))
    assert [tap.channels for tap in made.student_taps] == [3]
    assert [tap.channels for tap in made.teacher_taps] == [5]
    value = made(outputs(0, 3), [(1.0, outputs(1, 5)), (1.0, outputs(2))], LABELS)
    assert torch.isfinite(value)


def test_features_in_half_precision_meet_projectors_in_float32() -> None:
    made = objective(Term(srd, 1.0, (pair(),)), Term(review, 1.0, (pair(),)), Term(ofa, 1.0, (pair(),)))
    whole = made(outputs(0, 3), [(1.0, outputs(1, 5))], LABELS)
    student, teacher = outputs(0, 3, kind=torch.bfloat16), outputs(1, 5, kind=torch.float16)
    half = made(student, [(1.0, teacher)], LABELS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.02, atol=0.02)


def test_a_mask_leaves_padding_out() -> None:
    def sequence(seed: int, channels: int) -> Outputs:
        made = outputs(seed, channels, grid=(5,))
        return Outputs(made.logits, {"body": made.features["body"].transpose(1, 2).clone()})

    made = objective(Term(hint, 1.0, (pair(grid=(5,), layout="BNC"),)))
    student, teacher = sequence(0, 3), sequence(1, 5)
    mask = torch.ones(ROWS, 5, dtype=torch.bool)
    mask[:, 3:] = False
    before = made(student, [(1.0, teacher)], None, mask)
    teacher.features["body"][:, 3:] += 100
    torch.testing.assert_close(made(student, [(1.0, teacher)], None, mask), before)
    assert made(student, [(1.0, teacher)], None) > before + 1


def test_exits_of_flags_are_rows_as_the_outputs_are() -> None:
    made = objective(Term(ofa, 1.0, (pair(),)), name="multilabel")
    flags = torch.randint(0, 2, (ROWS, CLASSES))
    value = made(outputs(0, 3), [(1.0, outputs(1, 5))], flags)
    value.backward()
    assert torch.isfinite(value)
    assert all(parameter.grad is not None for parameter in made.parameters())


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("term", "name", "message"),
    [
        (Term(kd), "regression", "compares class logits, and the outputs of regression are values"),
        (Term(ofa, 1.0, (pair(),)), "regression", "compares class logits"),
        (Term(mse), "classification", "compares values, and the outputs of classification are class logits"),
        (Term(ofa, 1.0, (pair(),)), "segmentation", "classifies a whole sample"),
        (Term(hint), "classification", "needs pairs of layers"),
        (Term(kd, 1.0, (pair(),)), "classification", "compares outputs, not layers"),
    ],
)
def test_a_loss_that_does_not_fit_the_task_or_its_pairs_is_refused(term: Term, name: str, message: str) -> None:
    with pytest.raises(PartError, match=message) as caught:
        Objective([term], task(name), CLASSES)
    assert caught.value.fix


# ---------------------------------------------------------------- from a recipe


def built(terms: list[LossTerm], probe: Callable[[], Any] | None = None, name: str = "classification") -> Any:
    data = handwritten()
    teacher, student = network(data, width=16, seed=1), network(data)

    def samples() -> dict[str, Tensor]:
        batch = next(iter(data.train.batches([torch.arange(32).numpy()])))
        return {"image": torch.from_numpy(batch.inputs["image"])}

    torch.manual_seed(0)
    return build(teacher, student, terms, task(name), 10, probe or samples)


def test_losses_on_outputs_do_not_look_at_the_networks() -> None:
    def no_probe() -> Any:
        raise AssertionError

    found = built(list(HINTON), no_probe)
    assert found.terms == HINTON
    assert found.correspondence is None
    assert not found.objective.student_taps
    assert not list(found.objective.parameters())


def test_every_pair_is_named_in_the_terms_and_named_pairs_make_the_same_objective() -> None:
    matched = built([*HINTON, LossTerm(Part("srd"), 2.0)])
    assert matched.terms[:2] == HINTON
    assert matched.terms[2].part.name == "srd"
    assert matched.terms[2].weight == 2.0
    assert ("norm", "norm") in (matched.terms[2].pairs or ())
    again = built(list(matched.terms))
    assert again.terms == matched.terms
    assert str(again.objective) == str(matched.objective)
    both = [list(each.objective.parameters()) for each in (again, matched)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_auto_stands_for_the_losses_that_match_chooses() -> None:
    found = built([LossTerm(Part("kd")), LossTerm(Part("auto"), 0.5)])
    assert found.correspondence is not None
    chosen = found.correspondence.terms()
    assert chosen
    assert [(term.part.name, term.weight, term.pairs) for term in found.terms[1:]] == [
        (term.part.name, 0.5 * term.weight, term.pairs) for term in chosen
    ]
    assert list(found.objective.parameters())
    named = built(list(found.terms)).objective
    assert str(named) == str(found.objective)
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), found.objective.parameters(), strict=True))


def test_auto_alone_stands_for_the_losses_of_outputs_too() -> None:
    found = built([LossTerm(Part("auto"))])
    assert found.correspondence is not None
    assert found.correspondence.family == "same"
    assert found.terms == (*task().beside_layers, *found.correspondence.terms())
    assert default_losses(task()) == (LossTerm(Part("auto")),)


def test_auto_alone_is_the_losses_of_a_task_that_leaves_no_layers_to_it() -> None:
    plain = dataclasses.replace(task(), beside_layers=())
    teacher, student = Opaque(), Opaque()
    found = build(teacher, student, [LossTerm(Part("auto"), 2.0)], plain, 10, lambda: pytest.fail("no look is needed"))
    assert [(term.part, term.weight) for term in found.terms] == [(t.part, 2.0 * t.weight) for t in plain.losses]
    assert default_losses(plain) == plain.losses


class Opaque(nn.Module):
    """A network in whose inside there is nothing to tap: one function of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10, 64))

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1).float() @ self.weight.T


def test_auto_leaves_networks_whose_layers_do_not_correspond_to_the_other_losses() -> None:
    teacher, student = Opaque(), Opaque()
    found = build(
        teacher, student, [LossTerm(Part("kd")), LossTerm(Part("auto"))], task(), 10, lambda: torch.rand(8, 1, 8, 8)
    )
    assert [term.part.name for term in found.terms] == ["kd"]
    (note,) = found.notes
    assert note.startswith("outputs alone are compared, no layers: no place of the student corresponds")
    assert found.pairs() == {"family": None, "pairs": [], "notes": [note]}
    alone = build(teacher, student, [LossTerm(Part("auto"))], task(), 10, lambda: torch.rand(8, 1, 8, 8))
    assert (alone.terms, alone.notes) == (task().losses, found.notes)


class Reader(nn.Module):
    """A small LSTM whose last state is classified."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(image.squeeze(1))[0][:, -1])
        return logits


def test_auto_compares_no_layers_where_none_is_by_default() -> None:
    terms = [LossTerm(Part("kd")), LossTerm(Part("auto"))]
    found = build(Reader(16), Reader(8), terms, task(), 10, lambda: torch.rand(8, 1, 8, 8))
    assert [term.part.name for term in found.terms] == ["kd"]
    assert found.correspondence is not None
    assert found.notes[-1] == "outputs alone are compared: of recurrent networks no layers are, unless asked for"
    assert found.pairs() == {"family": "recurrent", "pairs": [], "notes": list(found.notes)}
    alone = build(Reader(16), Reader(8), [LossTerm(Part("auto"))], task(), 10, lambda: torch.rand(8, 1, 8, 8))
    assert (alone.terms, alone.notes) == (task().losses, found.notes)


def test_a_loss_of_ones_own_goes_through_the_same_door() -> None:
    def distance(student_feature: Tensor, teacher_feature: Tensor, *, power: float = 2.0) -> Tensor:
        student, teacher = (each.float().mean(2) for each in (student_feature, teacher_feature.detach()))
        return (student - teacher).abs().pow(power).mean()

    term = own(distance, 0.25, power=3.0, pairs=[["conv", "conv"]])
    found = built([term])
    assert found.terms == (term,)
    assert [tap.path for tap in found.objective.student_taps] == ["conv"]
    assert not list(found.objective.parameters())


def test_a_loss_on_all_outputs_sees_the_layers_it_names() -> None:
    seen: list[tuple[Outputs, Outputs]] = []

    def everything(student: Outputs, teacher: Outputs) -> Tensor:
        seen.append((student, teacher))
        return student.features["norm"].square().mean()

    found = built([own(everything, pairs=[["norm", "conv"], ["linear:in", "linear:in"]])])
    assert [tap.path for tap in found.objective.student_taps] == ["norm", "linear:in"]
    assert [tap.path for tap in found.objective.teacher_taps] == ["conv", "linear:in"]
    given = Outputs(torch.randn(4, 10), {"norm": torch.ones(4, 8, 4, 4)})
    teacher = Outputs(torch.randn(4, 10))
    assert float(found.objective(given, [(1.0, teacher)], None)) == 1.0
    assert seen[-1] == (given, teacher)


def test_what_a_recipe_may_get_wrong() -> None:
    with pytest.raises(RecipeError, match="no loss to distil with"):
        built([])
    with pytest.raises(PartError, match=r"loss\[1\]: there is no 'kdd'.*'kd'"):
        built([LossTerm(Part("ce")), LossTerm(Part("kdd"))])
    with pytest.raises(PartError, match=r"loss\[0\]: unknown option 'temprature'.*'temperature'"):
        built([LossTerm(Part("kd", {"temprature": 2.0}))])
    with pytest.raises(PartError, match=r"loss\[0\]: kd compares outputs, not layers"):
        built([LossTerm(Part("kd"), 1.0, (("conv", "conv"),))])
    with pytest.raises(ModelError, match=r"nothing can be tapped at 'conb'.*'conv'"):
        built([LossTerm(Part("hint"), 1.0, (("conb", "conv"),))])
    with pytest.raises(PartError, match="compares values"):
        built([LossTerm(Part("mse"))])
    with pytest.raises(PartError, match=r"loss\[0\].*positional parameter 'logits', which"):
        built([own(lambda logits: logits.sum())])
    with pytest.raises(RecipeError, match=r"unknown key 'temperature'; auto takes weight"):
        loss_term({"name": "auto", "temperature": 2.0}, "loss[0]")


def test_the_networks_are_as_they_were() -> None:
    data = handwritten()
    teacher, student = network(data, width=16, seed=1), network(data)
    before = [[value.clone() for value in each.module.state_dict().values()] for each in (teacher, student)]
    probe = {"image": torch.from_numpy(next(iter(data.train.batches([torch.arange(8).numpy()]))).inputs["image"])}
    build(teacher, student, [LossTerm(Part("srd")), LossTerm(Part("auto"))], task(), 10, lambda: probe)
    for each, values in zip((teacher, student), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(each.module.state_dict().values(), values, strict=True))
        assert each.training
        assert not small(each).conv._forward_hooks
