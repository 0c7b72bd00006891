"""The recipe: one TOML file, read top to bottom, without inheritance or expressions; an unknown key is an error.

Relative paths in a recipe are relative to the recipe's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, MinLen

from edgekd import toml, units
from edgekd.errors import RecipeError
from edgekd.types import Augment, Budget, ModelSpec, Part, Precision, TrainOptions

DEFAULT_FILE = Path("edgekd.toml")


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One addend of the distillation loss."""

    part: Part
    weight: float


@dataclass(frozen=True, slots=True)
class Export:
    """How models become ONNX."""

    preprocessing: bool = True  # image models take the image itself (uint8, height × width × channels)


@dataclass(frozen=True, slots=True)
class Quantize:
    """Which precisions are built; left out: what the target allows."""

    precisions: tuple[Precision, ...] | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything a run is made of. `source` is the file it came from (for messages only)."""

    name: str
    seed: int
    data: Part
    teacher: ModelSpec
    teacher_train: TrainOptions
    student: ModelSpec
    losses: tuple[LossTerm, ...]
    distill: TrainOptions
    augment: Augment
    export: Export
    quantize: Quantize
    budget: Budget
    source: str

    def to_toml(self, folder: Path) -> str:
        """This recipe with every default filled in, its paths made relative to `folder`: it reruns the same run."""
        import tomli_w

        from edgekd import plugins

        def without_none(table: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in table.items() if value is not None}

        def model(spec: ModelSpec) -> dict[str, Any]:
            plain = {"model": spec.name, "weights": spec.weights, "mean": spec.mean, "std": spec.std}
            return without_none(plain) | dict(spec.options)

        table: dict[str, Any] = {
            "name": self.name,
            "seed": self.seed,
            "teacher": model(self.teacher) | {"train": asdict(self.teacher_train)},
            "data": {"name": self.data.name} | plugins.defaults("data", self.data),
            "student": model(self.student),
            "loss": [
                {"name": t.part.name, "weight": t.weight} | plugins.defaults("losses", t.part) for t in self.losses
            ],
            "distill": asdict(self.distill),
            "augment": asdict(self.augment),
            "export": asdict(self.export),
            "quantize": without_none(asdict(self.quantize)),
            "budget": without_none(asdict(self.budget)),
        }
        for section in ("teacher", "student", "data"):
            for key in _PATHS:
                if isinstance(table[section].get(key), str):
                    table[section][key] = os.path.relpath(table[section][key], folder)
        return tomli_w.dumps(table)


def load(path: Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown, missing, or of another type.
        PartError: a loss, model or data part does not exist, or does not take an option.
    """
    return parse(toml.load(path), source=str(path), folder=path.resolve().parent)


def overridden(
    recipe: Recipe, *, seed: int | None, max_drop: str | None, max_latency: str | None, max_size: str | None
) -> Recipe:
    """The recipe with what the command line says instead."""
    budget = budget_of(recipe.budget, max_drop, max_latency, max_size)
    return replace(recipe, seed=recipe.seed if seed is None else seed, budget=budget)


def budget_of(budget: Budget, max_drop: str | None, max_latency: str | None, max_size: str | None) -> Budget:
    """The budget with the limits that the command line sets, as it writes them: "1%", "5ms", "4MB"."""
    if max_drop is not None:
        budget = replace(budget, max_accuracy_drop=units.fraction(max_drop, "--max-drop"))
    if max_latency is not None:
        budget = replace(budget, max_latency_ms=units.milliseconds(max_latency, "--max-latency"))
    if max_size is not None:
        budget = replace(budget, max_size_bytes=units.size_bytes(max_size, "--max-size"))
    return budget


_SECTIONS = ("name", "seed", "teacher", "data", "student", "loss", "distill", "augment", "export", "quantize", "budget")
_PATHS = ("path", "root", "weights", "pretrained")  # options of parts that name a file or a folder
_MODEL_KEYS = ("model", "weights", "mean", "std", "train")


def parse(table: Mapping[str, Any], *, source: str, folder: Path) -> Recipe:
    """The recipe in a TOML table; `folder` is what its relative paths are relative to."""
    toml.known(table, _SECTIONS, source)
    for key in ("name", "teacher", "data", "student"):
        if key not in table:
            raise RecipeError(f"'{key}' is missing", where=source, fix="`edgekd init` writes a recipe to start from")

    def place(key: str) -> str:
        return f"{source}: {key}"

    name = toml.validated(table["name"], Annotated[str, MinLen(1)], place("name"))
    if name != Path(name).name or name.startswith("."):
        raise RecipeError(f"'{name}' cannot name a folder", where=place("name"), expected="a plain word, e.g. plants")
    data = _part(table["data"], place("data"))
    data = replace(data, options=_placed(data.options, folder, place("data")))
    teacher, student = (_model(table[kind], place(kind), folder) for kind in ("teacher", "student"))
    if "train" in table["student"]:
        raise RecipeError("unknown key 'train'", where=place("student"), fix="the student is trained by [distill]")
    quantize = toml.read(Quantize, table.get("quantize", {}), place("quantize"))
    recipe = Recipe(
        name=name,
        seed=toml.validated(table.get("seed", 0), int, place("seed")),
        data=data,
        teacher=teacher,
        teacher_train=toml.read(TrainOptions, table["teacher"].get("train", {}), place("teacher.train")),
        student=student,
        losses=_losses(table.get("loss", HINTON), source),
        distill=toml.read(TrainOptions, table.get("distill", {}), place("distill")),
        augment=toml.read(Augment, table.get("augment", {}), place("augment")),
        export=toml.read(Export, table.get("export", {}), place("export")),
        quantize=quantize,
        budget=toml.read(Budget, table.get("budget", {}), place("budget")),
        source=source,
    )
    _check_parts(recipe)
    return recipe


# Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, NIPS workshop 2014: mostly the teacher's soft
# targets, a little of the labels; T = 4 and 0.9 : 0.1 are what the reference implementations of the field use.
HINTON = [{"name": "kd", "weight": 0.9, "temperature": 4.0}, {"name": "ce", "weight": 0.1}]


def _check_parts(recipe: Recipe) -> None:
    """Every named part exists and takes its options: known before anything is trained."""
    from edgekd import plugins

    plugins.bind("data", recipe.data, where=f"{recipe.source}: data")
    for kind, spec in (("teacher", recipe.teacher), ("student", recipe.student)):
        plugins.bind("models", Part(spec.name, spec.options), where=f"{recipe.source}: {kind}")
    for index, term in enumerate(recipe.losses):
        plugins.bind("losses", term.part, where=f"{recipe.source}: loss[{index}]")


def _part(table: Any, where: str) -> Part:
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise RecipeError("'name' is missing", where=where, fix="say which part it is: name = …")
    return Part(table["name"], {key: value for key, value in table.items() if key != "name"})


def _model(table: Any, where: str, folder: Path) -> ModelSpec:
    if not isinstance(table, Mapping) or not isinstance(table.get("model"), str):
        raise RecipeError("'model' is missing", where=where, fix="say which model it is: model = …")
    hint = tuple[Annotated[float, Gt(0)], ...]
    return ModelSpec(
        name=table["model"],
        options=_placed({key: value for key, value in table.items() if key not in _MODEL_KEYS}, folder, where),
        weights=_resolved(folder, table["weights"], f"{where}.weights") if "weights" in table else None,
        mean=toml.validated(table["mean"], tuple[float, ...], f"{where}.mean") if "mean" in table else None,
        std=toml.validated(table["std"], hint, f"{where}.std") if "std" in table else None,
    )


def _losses(tables: Any, source: str) -> tuple[LossTerm, ...]:
    if not isinstance(tables, list) or not tables:
        raise RecipeError(
            "no loss is named", where=f"{source}: loss", fix='write [[loss]] with name = "kd", or leave it out'
        )
    terms = []
    for index, table in enumerate(tables):
        where = f"{source}: loss[{index}]"
        part = _part(table, where)
        weight = toml.validated(part.options.get("weight", 1.0), Annotated[float, Gt(0)], f"{where}.weight")
        terms.append(LossTerm(Part(part.name, {k: v for k, v in part.options.items() if k != "weight"}), weight))
    return tuple(terms)


def _placed(options: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The options with those that name files made absolute."""
    paths = {key: _resolved(folder, options[key], f"{where}.{key}") for key in _PATHS if key in options}
    return dict(options) | paths


def _resolved(folder: Path, path: Any, where: str) -> str:
    return str(folder / Path(toml.validated(path, str, where)).expanduser())
