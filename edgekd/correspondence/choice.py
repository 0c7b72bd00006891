"""Which loss a pair gets: the one table of defaults, by what the two networks are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from edgekd.correspondence.pair import Pair, Role
from edgekd.correspondence.stages import Survey
from edgekd.types import Json

Relation: TypeAlias = Literal["pruned", "same", "dense", "cnn-vit", "transformer", "recurrent", "mixed"]

# Loss and weight by relation of the networks and role of the pair. Weight 0: the pair is told, and not used. A linear
# projector and srd hold up best among convolutional networks, beside cross-entropy and kd at T = 1 (Miles, Mikolajczyk,
# AAAI 2024; benchmarks/quality.py), relations in the last layer among transformers (Wang et al., ACL
# 2021). Unlike families do not compare before their heads (Hao et al., NeurIPS 2023): srd on the last maps of a ViT
# costs its convolutional student what the outputs gave it (benchmarks/vit.py). LSTMs gain nothing from their layers
# (benchmarks/recurrent.py).
DEFAULTS: Mapping[Relation, Mapping[Role, tuple[str, float]]] = {
    "pruned": {
        "earlier": ("hint", 0.0),
        "last": ("hint", 1.0),
        "penultimate": ("hint", 1.0),
        "relations": ("minilm", 0.0),
    },
    "same": {"earlier": ("review", 0.0), "last": ("srd", 2.0), "penultimate": ("srd", 2.0)},
    "dense": {"earlier": ("cosine", 1.0), "last": ("cosine", 1.0), "penultimate": ("cosine", 0.0)},
    "cnn-vit": {"earlier": ("similarity", 0.0), "last": ("srd", 0.0), "penultimate": ("srd", 1.0)},
    "transformer": {
        "relations": ("minilm", 1.0),
        "earlier": ("hidden", 0.0),
        "last": ("hidden", 0.0),  # 1 where there are no relations
        "penultimate": ("cosine", 0.0),
    },
    "recurrent": {"earlier": ("cosine", 0.0), "last": ("cosine", 0.0), "penultimate": ("cosine", 0.0)},
    "mixed": {"earlier": ("similarity", 0.0), "last": ("cosine", 1.0), "penultimate": ("cosine", 1.0)},
}

# Which pairs a loss is made for; a loss that is not here takes all of them.
SUITED: Mapping[str, tuple[Role, ...]] = {
    "srd": ("last", "penultimate"),
    "cosine": ("last", "penultimate"),
    "hint": ("earlier", "last"),
    "review": ("earlier", "last"),
    "attention": ("earlier", "last"),
    "similarity": ("earlier", "last"),
    "hidden": ("earlier", "last"),
    "ofa": ("earlier", "last"),
    "minilm": ("relations",),
}
_MOST_HEADS = 12  # relation heads of minilm, where both widths allow so many


def relation(teacher: Survey, student: Survey) -> Relation:
    """What the two networks are to each other, by their structure; "pruned" is found by weights, not here."""
    families = {teacher.family, student.family} - {"vectors"}
    if families == {"recurrent"}:
        return "recurrent"
    if families == {"tokens"}:
        return "transformer"
    if families == {"convolutional", "tokens"}:
        return "cnn-vit"
    if families <= {"convolutional"}:
        return "dense" if teacher.dense and student.dense else "same"
    return "mixed"


def default(pair: Pair, between: Relation, *, relations: bool) -> Pair:
    """The pair with the loss and weight of the table.

    Args:
        relations: there is a pair of attention relations.
    """
    loss, weight = DEFAULTS[between][pair.role]
    if between == "transformer" and pair.role == "last" and not relations:
        weight = 1.0
    return given(pair, loss, weight)


def given(pair: Pair, loss: str, weight: float) -> Pair:
    """The pair with another loss, and the options that follow from its channels."""
    return dataclasses.replace(pair, loss=loss, weight=weight, options=_options(pair, loss))


def suited(pairs: Iterable[Pair], loss: str) -> tuple[Pair, ...]:
    """The pairs that a loss is made for; all of one kind where the loss is a user's own.

    A pair that a user chose is taken for any loss. Where one position is all that is shared, `attention` has no map.
    """
    roles = SUITED.get(loss)
    found = []
    for pair in pairs:
        fits = roles is None or pair.role in roles or pair.role == "chosen"
        alone = min(math.prod(pair.student.grid), math.prod(pair.teacher.grid)) <= 1
        if fits and not (loss == "attention" and alone):
            found.append(given(pair, loss, 1.0))
    return tuple(found)


def _options(pair: Pair, loss: str) -> dict[str, Json]:
    if loss != "minilm":
        return {}
    shared = math.gcd(pair.student.channels, pair.target_channels) // 3
    return {"heads": max(heads for heads in range(1, _MOST_HEADS + 1) if shared % heads == 0)}
