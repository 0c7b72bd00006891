"""int8 of a student for one target: post-training, with some layers in float, or distilled while it rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from edgekd import qad, quantize
from edgekd.deploy.graphs import (
    MODEL,
    PARITY_SAMPLES,
    Calibration,
    Graph,
    Source,
    Workshop,
    as_graph,
    engine,
    halved,
    outputs_of,
    parity,
    reference,
    row_id,
    samples,
    typed,
)
from edgekd.errors import EdgekdError, StoreError
from edgekd.quantize import examination, saturation, state
from edgekd.types import (
    Artifact,
    Backend,
    Json,
    Sensitivity,
    Target,
)  # fmt: skip

# (backend, files of one network, the network) → which is the fastest, and how that was found
Timed: TypeAlias = Callable[[Backend, Sequence[Path], Source], tuple[int, str]]
_SLOWER = 2.0  # an epoch that simulates rounding, about, against one that does not


@dataclass(frozen=True, slots=True)
class Mixed:
    """int8 with some layers in float."""

    graph: Graph
    ready: Graph  # the same as it is deployed: what is float is float16 where the target wants that
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Int8:
    """What int8 of a student came to."""

    plain: Graph | None = None  # by post-training quantization
    ready: tuple[Graph, ...] = ()  # what can be deployed
    for_older_runtimes: Graph | None = None  # the best of it, with float32 where it is float
    sensitivity: Sensitivity | None = None


def made(shop: Workshop, target: Target, backend: Backend, before: Graph, source: Source, timed: Timed | None) -> Int8:
    """int8 of a student, cheapest first: post-training; where that loses too much, mixed precision and distillation.

    Where both of the last two hold, both are deployed and measured: whole int8 is faster, and may lose more.

    Args:
        before: the float32 graph.
        timed: as `deploy` takes it.
    """
    plain = _quantized(shop, target, before, source)
    mixed = _mixed(shop, target, backend, plain, before, source, timed)
    whole, taught = _taught(shop, target, plain, before, source)
    ready = [halved(shop, whole, before, source) if typed(target) else whole]
    ready += [] if mixed is None else [mixed.ready]
    best = whole if mixed is None or taught else mixed.graph
    return Int8(plain, tuple(ready), best, _looked_into(target, plain, mixed))


def _taught(shop: Workshop, target: Target, plain: Graph, before: Graph, source: Source) -> tuple[Graph, bool]:
    """`plain`, or what quantization-aware distillation makes of it where it lost too much; and whether it is that."""
    if shop.recovery is None or quantize.holds(plain.artifact.meta):
        return plain, False
    if plain.artifact.meta.get("fallback"):
        why = "it was quantized as ONNX, where nothing can be trained"
        return _noted(plain, f"there is no quantization-aware distillation of {plain.id}: {why}"), False
    try:
        return _recovered(shop, shop.recovery, target, plain, before, source)
    except StoreError:
        raise
    except EdgekdError as problem:  # of a network that cannot be trained so, or a training that diverges
        why = f"{plain.id} lost more than max_drop, and quantization-aware distillation could not be done: {problem}"
        return _noted(plain, why), False


def _quantized(shop: Workshop, target: Target, before: Graph, source: Source, mix: Sequence[str] = ()) -> Graph:
    """int8; `mix` are layers that are in float besides those of the recipe."""
    name, asked = "student-int8-mixed" if mix else "student-int8", shop.quantize
    float_layers = (*asked.float_layers, *mix)
    search = asked.mixed == "auto" and not mix
    options: dict[str, Any] = {
        "rules": asdict(target.quantization), "opset": target.opset, "preprocessing": shop.preprocessing,
        "calibration": shop.data.fingerprint, "method": asked.method, "max_drop": asked.max_drop,
        "float_layers": float_layers, "task": None if shop.task is None else shop.task.name,
        "sensitivity": 0 if mix else examination.VERSION, "mixed": search,
    }  # fmt: skip
    there = shop.store.find("int8", quantize.VERSION, options, [source.weights])
    if there is not None:  # it takes no time, however little is left
        return as_graph(name, "quantized", "int8", there)
    hasty = not shop.deadline.fits(f"learned rounding of {name}, if it had been needed", quantize.SECONDS)
    if hasty:
        options["hasty"] = True

    def build(work: Path) -> Mapping[str, Json]:
        path = work / MODEL
        meta = quantize.quantize(
            source.network, Calibration(shop.data), target.quantization,
            opset=target.opset, preprocessing=shop.preprocessing, path=path, say=shop.say, task=shop.task,
            method=asked.method, max_drop=asked.max_drop, float_layers=float_layers, sensitivity=not mix, mixed=search,
            keep=None if mix else work / state.FILE, seconds=0.0 if hasty else quantize.SECONDS,
        )  # fmt: skip
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        if target.quantization.sums_16_bit:
            meta |= saturation.relieve(path, given)
        # Not refused here however large: whether int8 is good enough is what its accuracy on the test split says.
        return meta | parity(outputs_of(before.file, given), outputs_of(path, given), name)

    made = shop.store.step("int8", quantize.VERSION, options, [source.weights], build)
    return as_graph(name, "quantized", "int8", made)


def _mixed(
    shop: Workshop, target: Target, backend: Backend, plain: Graph, before: Graph, source: Source, timed: Timed | None
) -> Mixed | None:
    """int8 with the layers in float that it cannot do without; None where no such set was looked for, or found.

    Each set is quantized anew, and of those that hold on all samples held out the fastest is taken.
    """
    meta: Any = plain.artifact.meta
    made = []
    for layers in examination.sets(meta):
        graph = _quantized(shop, target, before, source, layers)
        made.append(Mixed(graph, halved(shop, graph, before, source) if typed(target) else graph, layers))
    if not made:
        return None
    told = "on all samples held out no set of layers in float is within the limit, and this one loses least"
    holding = [one for one in made if examination.kept(one.graph.artifact.meta)["within"]]
    best = min(made, key=lambda one: float(examination.kept(one.graph.artifact.meta)["expected_drop"]))
    if len(holding) == 1:
        (best,) = holding
        told = "it holds on all samples held out" + (f", alone of {len(made)} sets" if len(made) > 1 else "")
    elif holding and timed is not None:
        ready = [one.ready for one in holding]
        files = [engine(shop, backend, backend.engine(), g) for g in ready] if backend.engine else ready
        index, told = timed(backend, [graph.file for graph in files], source)
        best = holding[index]
    elif holding:
        best = min(holding, key=lambda one: (examination.in_float(meta, one.layers), len(one.layers)))
        told = f"of {len(holding)} sets of layers in float that hold, it has the fewest multiply-accumulates in float"
    note = f"student-int8-mixed has {', '.join(best.layers)} in float: {'; '.join((*meta['mixed']['why'], told))}"
    return replace(best, ready=_noted(best.ready, note))


def _recovered(
    shop: Workshop, recovery: qad.Recovery, target: Target, graph: Graph, before: Graph, source: Source
) -> tuple[Graph, bool]:
    """The int8 student distilled anew, where that helps; else `graph`. Either says what was found, and which it is."""
    trained = _trained(shop, recovery, target, graph, source)
    if trained is None:
        return graph, False
    graph = _noted(graph, f"{graph.id}: {qad.told(trained.meta, recovery.task.metric)}")
    if not trained.meta["kept"]:
        return graph, False

    def write(work: Path) -> Mapping[str, Json]:
        path = work / MODEL
        meta = qad.write(
            source.network, trained.path / state.FILE, target.quantization, recovery, reference,
            preprocessing=shop.preprocessing, opset=target.opset, path=path,
        )  # fmt: skip
        _, given = samples(shop, source.network, PARITY_SAMPLES)
        if target.quantization.sums_16_bit:
            meta |= saturation.relieve(path, given)
        return meta | parity(outputs_of(before.file, given), outputs_of(path, given), graph.id)

    options = {"opset": target.opset, "preprocessing": shop.preprocessing}
    made = shop.store.step("int8", quantize.VERSION, options, [trained, source.weights], write)
    return replace(as_graph(graph.id, "quantized", "int8", made), notes=graph.notes), True


def _trained(shop: Workshop, recovery: qad.Recovery, target: Target, graph: Graph, source: Source) -> Artifact | None:
    """The training that starts from `graph`; None where it is not in the store and does not fit into the time."""
    start, losses = graph.artifact.path / state.FILE, qad.terms(source.weights, recovery.task)
    identity, parents = qad.identity(recovery, losses), [graph.artifact, source.weights, *recovery.artifacts]
    there = shop.store.find("qad", qad.VERSION, identity, parents)
    if there is not None:
        return there
    meta: Any = source.weights.meta
    an_epoch_s = float(meta.get("train_s", 0.0)) / max(1, int(meta.get("epochs", 1)))
    about_s = _SLOWER * an_epoch_s * recovery.options.epochs
    if not shop.deadline.fits(f"quantization-aware distillation of {graph.id}", about_s):
        return None

    def train(work: Path) -> Mapping[str, Json]:
        return qad.train(
            source.network, start, target.quantization, recovery, losses, preprocessing=shop.preprocessing, work=work,
            say=shop.say,
        )  # fmt: skip

    return shop.store.step("qad", qad.VERSION, identity, parents, train)


def _noted(graph: Graph, note: str) -> Graph:
    return replace(graph, notes=(*graph.notes, note))


def _looked_into(target: Target, plain: Graph, mixed: Mixed | None) -> Sensitivity | None:
    found = None if mixed is None else (row_id(target, mixed.graph), mixed.layers, mixed.graph.artifact.meta)
    return examination.sensitivity_of(target.name, row_id(target, plain), plain.artifact.meta, found)
