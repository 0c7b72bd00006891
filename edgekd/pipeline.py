"""compress(): the order of the steps, and nothing else.

recipe ─► teacher, student, data ─► distill ─► export ─► quantize ─► compile ─► bench ─► report ─► bundle
          └──── shared by every target ─────┘  └──────────── for each target ──────────────────────────┘
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import edgekd
from edgekd import bundle, data, distill, export, measure, models, plugins, report
from edgekd.bench import conditions
from edgekd.deploy import Deployment, Source, Workshop, deploy, row_id, samples
from edgekd.errors import ModelError, nearest
from edgekd.models import weights
from edgekd.models.network import Network
from edgekd.recipe import Recipe
from edgekd.store import Store, copy, sha256_of, write_text
from edgekd.types import (
    Artifact,
    Comparison,
    Dataset,
    Json,
    ModelSpec,
    Report,
    Say,
    Stage,
    Target,
    TrainOptions,
    Variant,
)

WEIGHTS = "weights.safetensors"
GOLDEN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Run:
    """What every step needs; `timings_s` and `notes` are filled as the run goes on."""

    recipe: Recipe
    data: Dataset
    store: Store
    say: Say
    opset: int  # that models are tried with before they are trained
    timings_s: dict[str, float]
    notes: list[str]

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to `stage`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timings_s[stage] = round(self.timings_s.get(stage, 0.0) + time.perf_counter() - begun, 3)

    def note(self, text: str) -> None:
        """Something the reader of the report must know: a fallback, or what was not done here."""
        if text not in self.notes:
            self.notes.append(text)
            self.say("note", text=text)


def compress(
    recipe: Recipe, targets: Sequence[Target], out: Path, *, store: Path, threads: int, quick: bool, say: Say
) -> Report:
    """Do all that the recipe asks for, for each target, and leave report, models and bundles in `out`.

    Training is shared by the targets; what the store holds already is not built again.

    Args:
        recipe: what to make.
        targets: where it shall run.
        out: the run folder, which exists.
        store: the folder of finished builds.
        threads: that latency is measured with.
        quick: a tenth of the epochs and short measurements.
        say: told what happens.

    Raises:
        EdgekdError: the user's data, model, recipe or disk stands in the way; `out` holds no half-written file.
    """
    run = _begin(recipe, targets[0].opset, store, quick, say)
    with run.timed("teacher"):
        teacher = _teacher(run)
    with run.timed("distill"):
        student = _student(run, teacher)
    sources: dict[Stage, Source] = {
        "teacher": Source(_network(run, recipe.teacher, teacher), teacher),
        "student": Source(_network(run, recipe.student, student), student),
    }
    shop = Workshop(run.store, run.data, recipe.export.preprocessing, recipe.quantize.precisions, say)
    with run.timed("accuracy"):
        examiner, rows = measure.weights_rows(sources, shop)
    made: list[Deployment] = []
    comparisons: list[Comparison] = []
    for target in targets:
        with run.timed(f"deploy {target.name}"):
            made.append(deploy(shop, target, sources["teacher"], sources["student"]))
        with run.timed(f"bench {target.name}"):
            found, compared, told = measure.target_rows(examiner, made[-1], sources, shop, threads=threads, quick=quick)
        rows += found
        comparisons += compared
        for text in (*made[-1].notes, *told):
            run.note(f"{target.name}: {text}")
        if made[-1].unavailable is not None:
            run.note(f"{target.name}: no engine was built here. {made[-1].unavailable}")
    return _publish(run, made, rows, comparisons, sources, shop, out)


def _publish(
    run: Run, made: Sequence[Deployment], rows: Sequence[Variant], comparisons: Sequence[Comparison],
    sources: Mapping[Stage, Source], shop: Workshop, out: Path,
) -> Report:  # fmt: skip
    """Judge, choose, and leave everything in the run folder."""
    files = {row_id(each.target, graph): graph.file for each in made for graph in each.graphs}
    paths = {name: f"models/{name}{file.suffix}" for name, file in files.items()}
    rows = [replace(row, path=paths.get(row.id)) for row in rows]
    rows = [replace(row, verdict=report.judge(row, rows[0], run.recipe.budget)) for row in rows]
    chosen = report.choose(rows, run.recipe.budget, comparisons)
    resolved = run.recipe.to_toml(out)
    found = Report(
        schema=report.SCHEMA, name=run.recipe.name, teacher="teacher", variants=tuple(rows),
        chosen={each.target.name: chosen.get(each.target.name) for each in made}, budget=run.recipe.budget,
        environment=conditions.environment(), recipe_sha256=hashlib.sha256(resolved.encode()).hexdigest(),
        timings_s=run.timings_s, notes=tuple(run.notes), comparisons=tuple(comparisons),
    )  # fmt: skip
    for name, file in files.items():
        copy(file, out / paths[name])
    write_text(out / "recipe.toml", resolved)
    by_id = {row.id: row for row in rows}
    for each in made:
        _bundle(run, each, found.chosen[each.target.name], by_id, sources, shop, out / "bundles" / each.target.name)
    report.render(found, out)
    return found


def _bundle(
    run: Run, made: Deployment, chosen: str | None, rows: Mapping[str, Variant], sources: Mapping[Stage, Source],
    shop: Workshop, folder: Path,
) -> None:  # fmt: skip
    """The bundle of one target: the chosen model first; where none meets the budget, the one that loses least."""
    graphs = {row_id(made.target, graph): graph for graph in made.graphs if graph.stage != "teacher"}
    deployable = {name: graph for name, graph in graphs.items() if graph.file.suffix == ".onnx"}
    drops = {name: row.drop.value for name, row in rows.items() if name in deployable and row.drop is not None}
    first = chosen if chosen in deployable else min(drops, key=lambda name: (drops[name], name))
    others = [name for name in deployable if name != first and deployable[name].precision in made.target.precisions]
    kept = [first, *others] if made.backend.engine else [first]  # a board builds either precision and compares them
    models = [bundle.Source(deployable[name].file, deployable[name].precision, made.typing) for name in kept]
    models += [bundle.Source(file, precision, "weak") for precision, file in made.legacy.items()]
    _, golden = samples(shop, sources["student"].network, GOLDEN_SAMPLES)
    provenance: dict[str, Json] = {
        "edgekd": edgekd.__version__, "data": run.data.fingerprint, "teacher": sources["teacher"].weights.key,
        "student": sources["student"].weights.key, "models": {n: deployable[n].artifact.key for n in kept},
    }  # fmt: skip
    bundle.write(
        folder, name=run.recipe.name, target=made.target, models=models, samples=golden, labels=run.data.classes,
        preprocessing=sources["student"].network.preprocessing, provenance=provenance, verdict=rows[first].verdict,
    )  # fmt: skip


def _begin(recipe: Recipe, opset: int, store: Path, quick: bool, say: Say) -> Run:
    if quick:
        recipe = replace(recipe, teacher_train=_shorter(recipe.teacher_train), distill=_shorter(recipe.distill))
    timings: dict[str, float] = {}
    begun = time.perf_counter()
    found = data.load(recipe.data, recipe.seed, where=f"{recipe.source}: data")
    timings["data"] = round(time.perf_counter() - begun, 3)
    sizes = {"train": len(found.train), "calibration": len(found.calibration), "test": len(found.test)}
    say("data", name=found.name, classes=len(found.classes), **sizes)
    run = Run(recipe, found, Store(store, say), say, opset, timings, [])
    for text in found.notes:
        run.note(f"data: {text}")
    if quick:
        run.note("--quick: a tenth of the epochs and short measurements; for trying out, not for deciding")
    return run


def _shorter(options: TrainOptions) -> TrainOptions:
    return replace(options, epochs=max(1, options.epochs // 10))


# ---------------------------------------------------------------- weights, shared by every target


def _teacher(run: Run) -> Artifact:
    """The teacher's weights: the user's, checked and saved in our form, or trained first."""
    spec, recipe = run.recipe.teacher, run.recipe
    options = _identity(run, spec)
    if spec.weights is not None:

        def take(work: Path) -> Mapping[str, Json]:
            network = _built(run, spec)
            weights.save(work / WEIGHTS, network.module, {})
            return {"source": "given"}

        return run.store.step("weights", weights.VERSION, options, [], take)

    def train(work: Path) -> Mapping[str, Json]:
        _rehearse(run, spec)
        _rehearse(run, recipe.student)
        return distill.train(
            _built(run, spec), run.data, recipe.teacher_train, recipe.augment, seed=recipe.seed, work=work, say=run.say
        )

    options |= {"train": asdict(recipe.teacher_train), "augment": asdict(recipe.augment), "seed": recipe.seed}
    return run.store.step("teacher", distill.VERSION, options, [], train)


def _student(run: Run, teacher: Artifact) -> Artifact:
    """The student's weights, distilled from the teacher."""
    recipe = run.recipe

    def build(work: Path) -> Mapping[str, Json]:
        _rehearse(run, recipe.student)
        losses = [(t.weight, plugins.bind("losses", t.part, where="loss")) for t in recipe.losses]
        return distill.distill(
            _built(run, recipe.student), _network(run, recipe.teacher, teacher), run.data, losses,
            recipe.distill, recipe.augment, seed=recipe.seed, work=work, say=run.say,
        )  # fmt: skip

    terms = [{"name": t.part.name, "weight": t.weight} | plugins.defaults("losses", t.part) for t in recipe.losses]
    options = _identity(run, recipe.student) | {
        "losses": terms, "distill": asdict(recipe.distill), "augment": asdict(recipe.augment), "seed": recipe.seed,
    }  # fmt: skip
    return run.store.step("student", distill.VERSION, options, [teacher], build)


def _identity(run: Run, spec: ModelSpec) -> dict[str, Json]:
    """What a network's weights depend on besides training: never a path, so that another folder gives the same key."""
    kept = asdict(replace(spec, weights=None))
    if spec.weights is not None:
        kept["weights"] = _content(spec.weights)
    if "pretrained" in spec.options:
        kept["options"] = dict(spec.options) | {"pretrained": _content(str(spec.options["pretrained"]))}
    return kept | {"data": run.data.fingerprint}


def _content(path: str) -> str:
    if not Path(path).is_file():
        neighbours = [file.name for file in Path(path).parent.glob("*")] if Path(path).parent.is_dir() else []
        raise ModelError("no such file of weights", where=path, nearest=nearest(Path(path).name, neighbours))
    return sha256_of(Path(path))


def _rehearse(run: Run, spec: ModelSpec) -> None:
    """Export the network untrained: a model that cannot become ONNX is known before hours of training, not after."""
    stored = next(iter(run.data.calibration.batches([np.arange(1)]))).inputs
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        export.export(
            _built(run, replace(spec, weights=None)), stored, opset=run.opset,
            preprocessing=run.recipe.export.preprocessing, path=Path(folder) / "rehearsal.onnx",
        )  # fmt: skip


def _built(run: Run, spec: ModelSpec) -> Network:
    torch.manual_seed(run.recipe.seed)
    return models.build(spec, classes=len(run.data.classes), inputs=run.data.inputs, images=run.data.images)


def _network(run: Run, spec: ModelSpec, trained: Artifact) -> Network:
    network = _built(run, replace(spec, weights=None))
    weights.load(trained.path / WEIGHTS, network.module)
    return network.eval()
