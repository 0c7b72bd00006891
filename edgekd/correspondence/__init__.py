"""Correspondence: which places of the student learn from which of the teacher, found without a rule for any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from edgekd import plugins
from edgekd.correspondence import table
from edgekd.correspondence.both import Both
from edgekd.correspondence.choice import Relation, default, given, suited
from edgekd.correspondence.inputs import Probe, mask_of
from edgekd.correspondence.pair import Pair
from edgekd.correspondence.projectors import FEATURES, Adapter, wanted
from edgekd.correspondence.taps import Tap, Taps
from edgekd.correspondence.validate import check
from edgekd.errors import ModelError
from edgekd.types import Json, LossTerm, Part

__all__ = [
    "FEATURES", "Adapter", "Correspondence", "Pair", "Tap", "Taps", "mask_of", "match", "pair_of", "pairs_for",
    "resolve", "wanted",
]  # fmt: skip

_OUTPUTS = frozenset({"student", "teacher"})  # parameters of a loss that looks at all that is tapped


@dataclass(frozen=True, slots=True)
class Correspondence:
    """The pairs that were found between a student and a teacher.

    Args:
        pairs: shallow to deep, then penultimate features and attention relations; of weight 0 what is not used.
        family: what the networks are to each other.
        notes: what was left out, and why.
    """

    pairs: tuple[Pair, ...]
    family: Relation
    notes: tuple[str, ...] = ()

    @property
    def pays(self) -> bool:
        """Whether its losses are known to be worth more than those of outputs alone (benchmarks/quality.py)."""
        return self.family == "same" and bool(self.terms())

    def terms(self) -> tuple[LossTerm, ...]:
        """What is written to the recipe: a term for each loss, with its pairs."""
        used = [pair for pair in self.pairs if pair.weight]
        return table.grouped((Part(pair.loss, pair.options), pair.weight, pair.paths) for pair in used)

    def pairs_of(self, term: LossTerm) -> tuple[Pair, ...]:
        """The pairs of one of its `terms`; none of another term."""
        of_loss = [pair for pair in self.pairs if (pair.loss, pair.options) == (term.part.name, term.part.options)]
        return tuple(pair for pair in of_loss if pair.paths in (term.pairs or ()))

    def table(self) -> str:
        """A line a pair. Loss and weight may be edited, and the text read back by `table.read`."""
        return table.write(self.pairs, (f"family: {self.family}", *self.notes))

    def as_json(self) -> dict[str, Json]:
        """For the report."""
        return {
            "family": self.family,
            "pairs": [table.told(pair) for pair in self.pairs],
            "notes": list(self.notes),
        }


def match(
    teacher: nn.Module, student: nn.Module, probe: Probe, *, losses: Sequence[str] | None = None
) -> Correspondence:
    """Find which places of the student correspond to which of the teacher, and a loss for each pair.

    Both networks run on the probe, recorded by hooks; which dimension is what follows from runs on another batch and on
    other sides. Stages end where the grid changes; a network of equal blocks is paired by its blocks. Stages are
    aligned in order by stride, relative depth (multiply-accumulates) and similarity (CKA, of 16 samples or more), at
    most four of them, the last with the last; then the inputs of both heads, and the last self-attention of both. Each
    pair that is used is tried: shapes at two batch sizes, gradients, the minimum at the teacher. Neither network is
    changed: no hook stays, and weights, modes, buffers and random states are as they were.

    Args:
        teacher, student: modules, or Networks; paths are relative to the module inside.
        probe: samples that both take, batch first: a tensor, a tuple, or a mapping by keyword or by a Network's
            inputs. 256 real ones are a good number; a few are enough without CKA.
        losses: names of feature losses to use, each on the pairs it is made for; None: the table of defaults.

    Returns:
        The pairs, with notes on what was left out.

    Raises:
        ModelError: a network fails on the probe, nothing can be paired, or a pair does not pass its trial.
        PartError: there is no such loss.
    """
    both = Both.read(teacher, student, probe)
    pairs = both.matched()
    notes = both.notes(pairs)
    if not pairs:
        raise ModelError("no place of the student corresponds to one of the teacher", fix="; ".join(notes))
    between = both.relation
    if losses is None:
        relations = any(pair.role == "relations" for pair in pairs)
        pairs = tuple(default(pair, between, relations=relations) for pair in pairs)
    else:
        pairs = tuple(pair for loss in losses for pair in _suited(pairs, loss, notes))
    check(both, pairs)
    return Correspondence(pairs, between, notes)


def pairs_for(correspondence: Correspondence, loss: str) -> tuple[Pair, ...]:
    """The pairs of a correspondence that a loss is made for, with that loss; all of them for a user's own loss."""
    return suited(correspondence.pairs, loss)


def pair_of(
    teacher: nn.Module, student: nn.Module, probe: Probe, student_path: str, teacher_path: str, *, loss: str = ""
) -> Pair:
    """The pair that somebody names by its two paths.

    Args:
        teacher, student, probe: as `match` takes them.
        student_path, teacher_path: as a Tap has them: "layer3", "linear:in", "encoder#2", "a.q+a.k+a.v".
        loss: of the pair, so that it gets the options that follow from its channels.

    Raises:
        ModelError: there is nothing to tap at a path; the nearest one is named.
    """
    (pair,) = Both.read(teacher, student, probe).chosen([(student_path, teacher_path)])
    return given(pair, loss, 1.0)


def resolve(
    teacher: nn.Module, student: nn.Module, probe: Probe, terms: Sequence[LossTerm]
) -> tuple[tuple[Pair, ...], ...]:
    """The pairs of each term of a recipe: those that it names, else those found that its loss is made for.

    A term whose loss takes no features has none; one that takes all Outputs has those that it names. The others are
    tried, as `match` does.

    Raises:
        ModelError: there is nothing to tap at a path, nothing can be paired, or a pair does not pass its trial.
        PartError: there is no such loss.
    """
    named = [frozenset(wanted(plugins.bind("losses", term.part))) for term in terms]
    if not any(names & FEATURES or term.pairs for term, names in zip(terms, named, strict=True)):
        return tuple(() for _ in terms)
    both = Both.read(teacher, student, probe)
    found: tuple[Pair, ...] | None = None
    resolved: list[tuple[Pair, ...]] = []
    for term, names in zip(terms, named, strict=True):
        if term.pairs is not None:
            resolved.append(_of_term(both.chosen(term.pairs), term))
        elif not names & FEATURES:
            resolved.append(())
        else:
            found = both.matched() if found is None else found
            resolved.append(_of_term(_suited(found, term.part.name, both.notes(found)), term))
    check(both, [pair for pairs, names in zip(resolved, named, strict=True) if not _OUTPUTS & names for pair in pairs])
    return tuple(resolved)


def _suited(pairs: Sequence[Pair], loss: str, notes: Sequence[str]) -> tuple[Pair, ...]:
    found = suited(pairs, loss)
    if not found:
        told = f"the pairs are {', '.join(' and '.join(pair.paths) for pair in pairs) or 'none'}"
        raise ModelError(f"no pair of the two networks suits '{loss}'", fix="; ".join((told, *notes)))
    return found


def _of_term(pairs: Sequence[Pair], term: LossTerm) -> tuple[Pair, ...]:
    """With the loss, weight and options of the recipe, and where it is silent those that follow from the channels."""
    weighted = [given(pair, term.part.name, term.weight) for pair in pairs]
    return tuple(dataclasses.replace(pair, options={**pair.options, **term.part.options}) for pair in weighted)
