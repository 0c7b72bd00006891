"""Every pair is tried before it is trained with: shapes, gradients, and where the loss has its minimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.correspondence.both import Both
from edgekd.correspondence.inputs import mask_of, named, unwrapped
from edgekd.correspondence.pair import Pair
from edgekd.correspondence.projectors import FEATURES, Adapter, Features, wanted
from edgekd.correspondence.taps import Taps, first_tensor, inner
from edgekd.correspondence.trace import undisturbed
from edgekd.errors import ModelError
from edgekd.types import Part

_BATCHES = (4, 3)  # samples: two sizes, so that nothing is fixed to one


def check(both: Both, pairs: Sequence[Pair]) -> None:
    """Try the losses of the pairs on a few samples; nothing of the networks is left changed.

    For two batch sizes the loss is a finite scalar, its gradient reaches weights of the student and nothing of the
    teacher, and the teacher's own feature in the student's place is no worse than the same with noise on it.

    Raises:
        ModelError: one of that is not so, with the pair and the loss.
        PartError: there is no such loss, or it refuses what it is given.
    """
    used = [pair for pair in pairs if pair.weight]
    terms: list[tuple[Part, list[Pair]]] = []
    for pair in used:
        part = Part(pair.loss, pair.options)
        group = next((known for other, known in terms if other == part), None)
        if group is None:
            terms.append((part, [pair]))
        else:
            group.append(pair)
    student, teacher = both.student.network, both.teacher.network
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the projectors
        for batch in _BATCHES if used else ():
            with undisturbed(student), undisturbed(teacher), torch.enable_grad():
                outputs = _run(both, used, batch)
                for part, group in terms:
                    _check_term(part, group, student, outputs)


def _run(both: Both, pairs: Sequence[Pair], batch: int) -> dict[str, Any]:
    """Features and logits of both, the student's with gradients, in the mode it is trained in."""
    student, teacher = both.student.network, both.teacher.network
    mine, theirs = (side.inputs.rows(0, batch) for side in (both.student, both.teacher))
    with Taps(teacher, [pair.teacher for pair in pairs]) as taps, torch.no_grad():
        teacher_logits = first_tensor(unwrapped(teacher)(*theirs.args, **theirs.kwargs))[0]
        # a copy gives what the teacher gives, and there no gradient says that the pair works: hence the noise
        teacher_features = {
            path: _noisy(feature.float(), 0.1).requires_grad_() for path, feature in taps.take().items()
        }
    student.train()  # cuDNN has no gradient of a recurrent layer in evaluation mode
    with Taps(student, [pair.student for pair in pairs]) as taps:
        student_logits = first_tensor(unwrapped(student)(*mine.args, **mine.kwargs))[0]
        student_features = {path: feature.float() for path, feature in taps.take().items()}
    return {
        "student": student_features,
        "teacher": teacher_features,
        "mask": mask_of(named(student, mine)),
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
    }


def _check_term(part: Part, pairs: Sequence[Pair], student: nn.Module, outputs: dict[str, Any]) -> None:
    loss = plugins.bind("losses", part)
    names = wanted(loss)
    if not FEATURES & set(names):
        raise ModelError(f"'{part.name}' takes no features", expected="a feature loss: srd, cosine, hint, …")
    logits: Tensor | None = outputs["teacher_logits"]
    classes = None if logits is None or logits.ndim != 2 else logits.shape[1]
    adapter = Adapter(pairs, names, classes=classes)
    device = next(iter(outputs["student"].values())).device
    calls = adapter.to(device)(outputs["student"], outputs["teacher"], outputs["mask"])
    groups = [list(pairs)] if len(calls) != len(pairs) else [[pair] for pair in pairs]
    for group, features in zip(groups, calls, strict=True):
        where = ", ".join(f"{part.name} of {pair.student.path} and {pair.teacher.path}" for pair in group)
        given = {name: _given(name, features, outputs) for name in names}
        value = loss(*given.values())
        if not isinstance(value, Tensor) or value.ndim or not math.isfinite(value.item()):
            raise ModelError(f"it gives {value}", where=where, expected="a finite scalar")
        _check_gradient(value, student, outputs["teacher"], where)
        _check_minimum(loss, names, given, where)


def _given(name: str, features: Features, outputs: dict[str, Any]) -> Any:
    if name == "labels":
        return outputs["teacher_logits"].argmax(1)
    if name in features:
        return features[name]
    if name in outputs and name not in ("student", "teacher"):
        return outputs[name]
    raise ModelError(f"a feature loss cannot be given '{name}'")


def _check_gradient(value: Tensor, student: nn.Module, teacher: dict[str, Tensor], where: str) -> None:
    weights = [parameter for parameter in inner(student).parameters() if parameter.requires_grad]
    features = list(teacher.values())
    gradients = torch.autograd.grad(value, [*weights, *features], retain_graph=True, allow_unused=True)
    if any(gradient is not None and bool(gradient.any()) for gradient in gradients[len(weights) :]):
        raise ModelError(
            "its gradient reaches the teacher", where=where, fix="detach the teacher's feature in the loss"
        )
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients[: len(weights)]):
        fix = "let the probe be real samples that differ, and the student's weights be trained"
        raise ModelError("its gradient reaches no weight of the student", where=where, fix=fix)


def _check_minimum(loss: Callable[..., Any], names: Sequence[str], given: dict[str, Any], where: str) -> None:
    """Only of losses of one feature of each side: what others are least at is not known here."""
    mine = [name for name in names if name in ("student_feature", "projected_feature")]
    if len(mine) != 1 or "teacher_feature" not in names or set(names) - {*mine, "teacher_feature", "mask"}:
        return
    teacher = given["teacher_feature"].detach()
    sides = teacher, _noisy(teacher, 0.5)
    at_teacher, beside = (float(loss(*(given | {mine[0]: side}).values())) for side in sides)
    if at_teacher > beside + 1e-6 * abs(beside):
        raise ModelError(
            f"it is {at_teacher:g} at the teacher and {beside:g} beside it",
            where=where,
            expected="its minimum at the teacher",
        )


def _noisy(feature: Tensor, part: float) -> Tensor:
    """With noise of so much of its spread."""
    return feature + part * feature.std().clamp(min=1e-3) * torch.randn(feature.shape).to(feature)
