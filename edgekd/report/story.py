"""What the report says in sentences: which variant to deploy, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgekd import goals
from edgekd.outcome import Pruning
from edgekd.report import figures, searched
from edgekd.report.judge import deployable, judge, rejections
from edgekd.report.nearest import counted
from edgekd.types import Budget, Latency, LossTerm, Report, Training, Variant

_MOST_REASONS = 8  # lines of why nothing is chosen


@dataclass(frozen=True, slots=True)
class Headline:
    """The outcome for one target in a sentence: `lead` names what to do, `body` what one gets."""

    target: str
    kind: Literal["deploy", "try", "none"]
    chosen: Variant | None
    lead: str
    body: str
    because: tuple[str, ...]  # what speaks against it, or is not known


def headlines(report: Report) -> tuple[Headline, ...]:
    """One for each target, in the order of the report."""
    return tuple(_headline(report, target) for target in report.chosen)


def teacher_of(report: Report) -> Variant:
    """The variant everything is compared with."""
    return next(variant for variant in report.variants if variant.id == report.teacher)


def teacher_on(report: Report, target: str) -> Variant:
    """The teacher as it would be deployed on `target`, which has a size and may have a latency; else the teacher."""
    own = (v for v in report.variants if v.stage == "teacher" and v.target == target)
    return next(own, teacher_of(report))


def turned_down(report: Report) -> dict[str, str]:
    """Variant id → why it is not deployed although it may keep the budget."""
    return rejections(report.variants, report.budget, report.comparisons)


def budget_line(budget: Budget, metric: str = "accuracy") -> str:
    """The limits in one line."""
    parts = []
    if budget.max_accuracy_drop is not None:
        parts.append(f"{metric} drop at most {figures.limit_points(budget.max_accuracy_drop)}")
    if budget.max_latency_ms is not None:
        parts.append(f"latency at most {figures.plain(figures.milliseconds(budget.max_latency_ms))}")
    if budget.max_size_bytes is not None:
        parts.append(f"size at most {figures.plain(figures.size(budget.max_size_bytes))}")
    if budget.max_memory_bytes is not None:
        parts.append(f"peak memory at most {figures.plain(figures.size(budget.max_memory_bytes))}")
    return "; ".join(parts) if parts else "no limit was set"


def footnote(metric: str) -> str:
    """How the figures in the table were made."""
    if metric == "accuracy":
        how = "Accuracy and drop with their 95 % intervals (Wilson; Newcombe, paired on the same samples). "
        how += "Agreement: share of samples on which the class is the teacher's."
    else:
        how = f"{figures.titled(metric)} with its 95 % interval (Wilson's where a sample is right or wrong, else the "
        how += "normal one of the samples' scores); the drop is paired on the same samples, in points: hundredths of "
        how += f"{metric}. Agreement: share of decisions that are the teacher's."
    return (
        f"{how} Parity: the least cosine and the largest difference of outputs from the stage before. Latency of one "
        "sample, with the interval of its median."
    )


def taught(training: Training | None) -> str:
    """How the student was trained; nothing where it is not known."""
    if training is None:
        return ""
    *before, last = (_several(training.teachers), *training.assistants) if training.teachers else ("the labels alone",)
    lineage = last + "".join(f", which had learned from {name}" for name in reversed(before))
    epochs = "1 epoch" if training.epochs == 1 else f"{training.epochs} epochs"
    losses = " + ".join(_term(term) for term in training.losses)
    text = f"The student learned from {lineage}{',' if before else ''} in {epochs}, which took "
    text += f"{figures.duration(training.seconds)} in {training.precision}. Its loss was {losses}"
    if training.recalled is not None:
        part = {0.0: "none", 1.0: "all"}.get(training.recalled, figures.plain(figures.percent(training.recalled)))
        text += f"; {part} of what it was taught came from the cache of teachers' answers"
    return text + "."


def pruned(pruning: Pruning | None) -> str:
    """How the student was cut out of its teacher; nothing where it was not."""
    if pruning is None:
        return ""
    rounds = "1 round" if pruning.rounds == 1 else f"{pruning.rounds} rounds"
    text = f"The student was cut out of its teacher in {rounds}, by {pruning.importance}: {remains(pruning)}"
    left = "; ".join(f"{_named(each.layers)} ({each.reason})" for each in pruning.left_alone)
    return f"{text}. Left alone: {left}." if left else f"{text}."


def remains(pruning: Pruning) -> str:
    """What is left of the teacher, and what was asked for."""
    macs = figures.plain(figures.percent(pruning.macs_after / pruning.macs_before))
    parameters = figures.plain(figures.percent(pruning.parameters_after / pruning.parameters_before))
    text = f"{macs} of the multiply-accumulates and {parameters} of the parameters are left"
    if pruning.round_to > 1:
        text += f", with channels in multiples of {pruning.round_to}"
    return f"{text}; {goals.outcome(pruning)}"


def _named(layers: Sequence[str]) -> str:
    shown = ", ".join(layers[:_SHOWN])
    return shown if len(layers) <= _SHOWN else f"{shown} and {len(layers) - _SHOWN} more"


_SHOWN = 3  # layers that are named before they are only counted


def _several(models: Sequence[str]) -> str:
    return models[0] if len(models) == 1 else f"the weighted mean of {', '.join(models[:-1])} and {models[-1]}"


def _term(term: LossTerm) -> str:
    text = f"{term.weight:g} {figures.TIMES} {term.part.name}"
    if not term.pairs:
        return text
    return f"{text} on {len(term.pairs)} {'pair' if len(term.pairs) == 1 else 'pairs'} of layers"


def relation(family: str | None) -> str:
    """What the two networks were found to be to each other; nothing where that was not looked at."""
    return _RELATIONS.get(family or "", "")


_RELATIONS = {
    "pruned": "The student is the teacher with channels cut out.",
    "same": "Both networks are convolutional.",
    "dense": "Both networks are convolutional, with an output for each point.",
    "cnn-vit": "One network is convolutional, the other one works on tokens.",
    "transformer": "Both networks are transformers.",
    "recurrent": "Both networks are recurrent.",
    "mixed": "The networks are of different kinds.",
}


def speed_up(variant: Variant, teacher: Variant, report: Report) -> float | None:
    """How many times faster than the teacher, where both were measured under the same conditions."""
    if not comparable(variant.latency_ms, teacher.latency_ms):
        return None
    for found in report.comparisons:
        if (found.candidate, found.baseline) == (variant.id, teacher.id):
            return 1 / found.ratio.value
    assert variant.latency_ms is not None
    assert teacher.latency_ms is not None
    return teacher.latency_ms.p50 / variant.latency_ms.p50


def comparable(one: Latency | None, two: Latency | None) -> bool:
    """Whether two latencies were measured on the same device, with the same threads and power mode."""
    if one is None or two is None:
        return False
    return (one.device, one.threads, one.power_mode, one.origin, one.rounds) == (
        two.device,
        two.threads,
        two.power_mode,
        two.origin,
        two.rounds,
    )


def summary(report: Report, folder: str) -> str:
    """The outcome as a few plain lines for a terminal."""
    lines = []
    for told in headlines(report):
        lines += [f"{told.lead} {told.body}".strip(), *(f"  {reason}" for reason in told.because)]
    if not lines:
        lines = ["No target was asked for, so there is nothing to deploy."]
    lines += [searched.line(report)] if report.search else []
    return "\n".join([*lines, f"Report: {folder}/report.html"])


def _headline(report: Report, target: str) -> Headline:
    teacher = teacher_on(report, target)
    name = report.chosen[target]
    if name is None:
        return _nothing(report, target, teacher)
    chosen = next(variant for variant in report.variants if variant.id == name)
    verdict = chosen.verdict or judge(chosen, teacher, report.budget, report.metric)
    body = _figures(chosen, teacher, report)
    unearned = _unearned(chosen, report)
    if verdict.status == "met":
        because = (*_caveats(chosen), *unearned)
        return Headline(target, "deploy", chosen, f"Deploy {figures.short_name(chosen)} on {target}:", body, because)
    unknown = tuple(reason for reason in verdict.reasons if "not measured" in reason or "not known" in reason)
    return Headline(
        target, "try", chosen, f"Try {figures.short_name(chosen)} first on {target}:", body, (
            "Whether it keeps the budget cannot be told yet.", *(unknown or verdict.reasons), *unearned,
        ),
    )  # fmt: skip


def _nothing(report: Report, target: str, teacher: Variant) -> Headline:
    offered = [v for v in report.variants if v.target == target and v.stage != "teacher"]
    refused = turned_down(report)
    because: list[str] = []
    for variant in offered:
        verdict = variant.verdict or judge(variant, teacher, report.budget, report.metric)
        missed = verdict.reasons if verdict.status != "met" else ()
        told = "; ".join(missed) or refused.get(variant.id, "")
        if not told and variant.accuracy is None:
            told = f"its {report.metric} was not measured ({variant.missing.get('accuracy', 'no reason was recorded')})"
        if told:
            because.append(f"{figures.short_name(variant)}: {told}")
    if len(because) > _MOST_REASONS:  # a search leaves dozens: the verdicts tell of each
        because = [counted(deployable(report.variants, target), report.metric)]
    what = "No variant is known to keep the budget." if offered else "No variant was made for it."
    near = report.nearest.get(target)
    if near is not None:
        what += f" Nearest: {near.says}" + (f"; {near.needs}." if near.needs else ".")
    return Headline(target, "none", None, f"Deploy nothing on {target} yet.", what, tuple(because))


def _figures(chosen: Variant, teacher: Variant, report: Report) -> str:
    parts = []
    if chosen.accuracy is not None:
        parts.append(_accuracy(chosen, teacher, report.metric))
    if chosen.size_bytes is not None and teacher.size_bytes:
        parts.append(_ratio(teacher.size_bytes / chosen.size_bytes, "smaller", "larger", "as large as the teacher"))
    faster = speed_up(chosen, teacher, report)
    if faster is not None and chosen.latency_ms is not None:
        where = "this machine" if chosen.latency_ms.origin == "host" else chosen.latency_ms.device
        parts.append(_ratio(faster, "faster", "slower", "as fast as the teacher") + f" on {where}")
    elif chosen.latency_ms is not None:
        parts.append(f"{figures.milliseconds(chosen.latency_ms.p50)} on {chosen.latency_ms.device}")
    return (", ".join(parts) or "none of its figures was measured") + "."


def _accuracy(chosen: Variant, teacher: Variant, metric: str) -> str:
    assert chosen.accuracy is not None
    n = chosen.accuracy.n
    value = figures.percent(chosen.accuracy.value, n)
    text = f"{value} accurate" if metric == "accuracy" else f"{metric} {value}"
    if teacher.accuracy is None:
        return text
    text += f" (teacher {figures.percent(teacher.accuracy.value, teacher.accuracy.n)}"
    if chosen.drop is not None:
        change = figures.points(-chosen.drop.value, n)
        text += f", {change} points" if chosen.drop.value else ", no drop"
    return text + ")"


def _ratio(ratio: float, more: str, less: str, same: str) -> str:
    if 0.97 < ratio < 1.03:
        return same
    return f"{figures.factor(ratio)} {more}" if ratio > 1 else f"{figures.factor(1 / ratio)} {less}"


def _unearned(chosen: Variant, report: Report) -> tuple[str, ...]:
    """int8 that is chosen for its size alone, since nothing was timed: it may be slower than float there."""
    there = [v for v in report.variants if (v.target, v.candidate) == (chosen.target, chosen.candidate)]
    there = [v for v in there if v.stage != "teacher"]
    rivals = [figures.short_name(v) for v in there if v.precision in ("fp16", "fp32")]
    if chosen.precision not in ("int8", "dynamic") or chosen.latency_ms is not None or not rivals:
        return ()
    return (f"int8 has still to earn its place: time it on the device against {' and '.join(rivals)}",)


def _caveats(chosen: Variant) -> tuple[str, ...]:
    """What a reader must know although the verdict is "met"."""
    found = [reason for reason in (chosen.verdict.reasons if chosen.verdict else ()) if "interval reaches" in reason]
    if chosen.latency_ms is None:
        why = chosen.missing.get("latency_ms", "no reason was recorded")
        found.append(f"latency: not measured ({why})")
    return tuple(found)
