"""The recipe: one TOML file, read top to bottom, without inheritance or expressions; an unknown key is an error.

Relative paths in a recipe are relative to the recipe's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen

from edgekd import toml, units
from edgekd.errors import RecipeError
from edgekd.goals import Measure, Prune
from edgekd.types import Augment, Budget, LossTerm, ModelSpec, Part, Precision, QuantizationMethod, TrainOptions

DEFAULT_FILE = Path("edgekd.toml")
PRUNED = "pruned"  # the model of a student that starts from its teacher's weights


@dataclass(frozen=True, slots=True)
class TeacherSpec:
    """A network to learn from: its model, how it is trained where it has no weights, and what its word counts."""

    model: ModelSpec
    train: TrainOptions
    weight: float  # of its answers among the teachers'


@dataclass(frozen=True, slots=True)
class Assistant:
    """A network between teacher and student: distilled from the one before it, and the teacher of the next."""

    model: ModelSpec
    epochs: int | None = None  # None: as many as the student


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task of the student: what its outputs are, the data, the teachers, and the losses of distillation."""

    head: str | None  # None: the student has one output
    task: Part
    data: Part
    teachers: tuple[TeacherSpec, ...]
    losses: tuple[LossTerm, ...] | None  # None: the task's own


@dataclass(frozen=True, slots=True)
class Export:
    """How models become ONNX."""

    preprocessing: bool = True  # image models take the image itself (uint8, height × width × channels)


@dataclass(frozen=True, slots=True)
class Quantize:
    """Which precisions are built, left out: what the target allows; and how int8 is come to."""

    precisions: tuple[Precision, ...] | None = None
    method: Literal["auto"] | tuple[QuantizationMethod, ...] = "auto"  # auto: cheapest first, until it holds
    max_drop: Annotated[float, Ge(0), Le(1)] = 0.005  # of the metric against the float student, on held-out samples
    float_layers: tuple[str, ...] = ()  # paths of layers, or of modules around them, that int8 leaves in float
    mixed: Literal["auto", "off"] = "auto"  # auto: where int8 loses more than max_drop, find layers to leave in float
    qad: Literal["auto", "off"] = "auto"  # auto: where int8 loses more than max_drop it is distilled anew, rounding
    qad_epochs: Annotated[int, Ge(1)] = 2  # of that distillation


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything a run is made of. `source` is the file it came from (for messages only)."""

    name: str
    seed: int
    tasks: tuple[TaskSpec, ...]  # one, or one for each head of a multi-task student
    student: ModelSpec
    distill: TrainOptions
    assistants: tuple[Assistant, ...]
    augment: Augment
    export: Export
    quantize: Quantize
    budget: Budget
    source: str
    prune: Prune | None = None  # of a student with model = "pruned"

    @property
    def task(self) -> TaskSpec:
        """The one task of this recipe.

        Raises:
            RecipeError: it has several, or one that is a head of the student.
        """
        if self.tasks[0].head is not None:
            heads = ", ".join(str(task.head) for task in self.tasks)
            raise RecipeError(
                f"the student has an output for each task ({heads}), and one output can be deployed",
                where=f"{self.source}: task",
                fix="`edgekd distill` trains it; a recipe of one task, as [task], can be deployed",
            )
        return self.tasks[0]

    def to_toml(self, folder: Path) -> str:
        """This recipe with every default filled in, its paths made relative to `folder`: it reruns the same run."""
        import tomli_w

        from edgekd import plugins

        def without_none(table: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in table.items() if value is not None}

        def placed(table: dict[str, Any]) -> dict[str, Any]:
            return table | {key: relative(table[key]) for key in _PATHS if table.get(key)}

        def relative(path: Any) -> Any:
            return os.path.relpath(path, folder) if isinstance(path, str) else [relative(each) for each in path]

        def model(spec: ModelSpec) -> dict[str, Any]:
            plain = {"model": spec.name, "weights": spec.weights, "mean": spec.mean, "std": spec.std}
            return placed(without_none(plain) | dict(spec.options))

        def teacher(spec: TeacherSpec) -> dict[str, Any]:
            return model(spec.model) | {"weight": spec.weight, "train": asdict(spec.train)}

        def one_task(spec: TaskSpec) -> dict[str, Any]:
            losses = None if spec.losses is None else [loss_table(term) for term in spec.losses]
            return without_none(
                {
                    "data": placed({"name": spec.data.name} | plugins.defaults("data", spec.data)),
                    "teacher": [teacher(each) for each in spec.teachers],
                    "loss": losses,
                }
            )

        def task(spec: TaskSpec) -> dict[str, Any]:
            return {"name": spec.task.name} | plugins.defaults("tasks", spec.task)

        table: dict[str, Any] = {"name": self.name, "seed": self.seed}
        if self.tasks[0].head is None:
            table |= {"task": task(self.tasks[0])} | one_task(self.tasks[0])
        else:
            table["task"] = [{"head": each.head} | task(each) | one_task(each) for each in self.tasks]
        assistants = [without_none(model(each.model) | {"epochs": each.epochs}) for each in self.assistants]
        table |= {
            "student": model(self.student),
            "distill": asdict(self.distill) | {"assistants": assistants},
            "augment": asdict(self.augment),
            "export": asdict(self.export),
            "quantize": without_none(asdict(self.quantize)),
            "budget": without_none(asdict(self.budget)),
        }
        if self.prune is not None:
            table["prune"] = without_none(asdict(self.prune))
        return tomli_w.dumps(table)


def load(path: Path, *, alone: bool = False) -> Recipe:
    """The recipe in a TOML file.

    Args:
        alone: it may be of one model, [teacher], which then stands for the student too.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown, missing, or of another type.
        PartError: a loss, model or data part does not exist, or does not take an option.
    """
    table = toml.load(path)
    if alone and isinstance(table.get("teacher"), Mapping):
        table = {"student": {k: v for k, v in table["teacher"].items() if k not in ("train", "weight")}} | table
    return parse(table, source=str(path), folder=path.resolve().parent)


def overridden(recipe: Recipe, *, seed: int | None = None, **limits: str | None) -> Recipe:
    """The recipe with what the command line says instead; `limits` are those of `budget_of`."""
    return replace(recipe, seed=recipe.seed if seed is None else seed, budget=budget_of(recipe.budget, **limits))


def budget_in(run: Path, otherwise: Budget) -> Budget:
    """The budget that a run was made for: of the recipe in its folder; where there is none, `otherwise`."""
    path = run / "recipe.toml"
    return toml.read(Budget, toml.load(path).get("budget", {}), f"{path}: budget") if path.exists() else otherwise


def budget_of(
    budget: Budget,
    max_drop: str | None = None,
    max_latency: str | None = None,
    max_size: str | None = None,
    max_memory: str | None = None,
) -> Budget:
    """The budget with the limits that the command line sets, as it writes them: "1%", "5ms", "4MB", "64MB"."""
    if max_drop is not None:
        budget = replace(budget, max_accuracy_drop=units.fraction(max_drop, "--max-drop"))
    if max_latency is not None:
        budget = replace(budget, max_latency_ms=units.milliseconds(max_latency, "--max-latency"))
    if max_size is not None:
        budget = replace(budget, max_size_bytes=units.size_bytes(max_size, "--max-size"))
    if max_memory is not None:
        budget = replace(budget, max_memory_bytes=units.size_bytes(max_memory, "--max-memory"))
    return budget


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """How many students are tried, and where the trials are kept. It is of a command line, and in no recipe."""

    candidates: int
    epochs: int | None = None  # of a candidate; None: as many as the recipe's student
    storage: str | None = None  # a file, or the URL of a database; None: a file in the run folder


def search_of(candidates: int | None, epochs: int | None, storage: str | None) -> SearchPlan | None:
    """What the command line says of a search; None where it asks for none.

    Raises:
        RecipeError: a number below 1, or options of a search without one.
    """
    for name, value in (("--search", candidates), ("--search-epochs", epochs)):
        if value is not None and value < 1:
            raise RecipeError(f"{value} is too few", where=name, expected="a number from 1")
    if candidates is None:
        for name, given in (("--search-epochs", epochs), ("--search-storage", storage)):
            if given is not None:
                raise RecipeError("there is no search", where=name, fix="say how many students to try: --search 12")
        return None
    return SearchPlan(candidates, epochs, storage)


_SECTIONS = (
    "name", "seed", "task", "teacher", "data", "student", "loss", "distill", "augment", "export", "quantize", "budget",
    "prune",
)  # fmt: skip
# Options of parts that name files or folders; a list names several.
_PATHS = ("path", "root", "weights", "pretrained", "tokenizer", "corpus")
_MODEL_KEYS = ("model", "weights", "mean", "std")


def parse(table: Mapping[str, Any], *, source: str, folder: Path) -> Recipe:
    """The recipe in a TOML table; `folder` is what its relative paths are relative to."""
    toml.known(table, _SECTIONS, source)
    for key in ("name", "student"):
        if key not in table:
            raise RecipeError(f"'{key}' is missing", where=source, fix="`edgekd init` writes a recipe to start from")

    def place(key: str) -> str:
        return f"{source}: {key}"

    name = toml.validated(table["name"], Annotated[str, MinLen(1)], place("name"))
    if name != Path(name).name or name.startswith("."):
        raise RecipeError(f"'{name}' cannot name a folder", where=place("name"), expected="a plain word, e.g. plants")
    distill = dict(toml.as_table(table.get("distill", {}), place("distill")))
    assistants = _assistants(distill.pop("assistants", []), place("distill.assistants"), folder)
    recipe = Recipe(
        name=name,
        seed=toml.validated(table.get("seed", 0), int, place("seed")),
        tasks=_tasks(table, source, folder),
        student=_model(table["student"], place("student"), folder),
        distill=toml.read(TrainOptions, distill, place("distill")),
        assistants=assistants,
        augment=toml.read(Augment, table.get("augment", {}), place("augment")),
        export=toml.read(Export, table.get("export", {}), place("export")),
        quantize=toml.read(Quantize, table.get("quantize", {}), place("quantize")),
        budget=toml.read(Budget, table.get("budget", {}), place("budget")),
        source=source,
        prune=toml.read(Prune, table["prune"], place("prune")) if "prune" in table else None,
    )
    _check_pruning(recipe)
    if "train" in recipe.student.options:
        raise RecipeError("unknown key 'train'", where=place("student"), fix="the student is trained by [distill]")
    _check_parts(recipe)
    return recipe


def pruned(recipe: Recipe, goals: Mapping[Measure, float]) -> Recipe:
    """The recipe with a student cut out of its teacher; where goals are given, by these instead of its own.

    Raises:
        RecipeError: there is no goal, or more than one.
    """
    prune = recipe.prune or Prune()
    if goals:
        prune = replace(
            prune, macs=goals.get("macs"), parameters=goals.get("parameters"), latency_ms=goals.get("latency_ms"),
            size_bytes=int(goals["size_bytes"]) if "size_bytes" in goals else None,
        )  # fmt: skip
    made = replace(recipe, prune=prune)
    if recipe.student.name != PRUNED:  # assistants are on the way to a student of another architecture
        made = replace(made, student=ModelSpec(PRUNED), assistants=())
    _check_pruning(made)
    return made


def _check_pruning(recipe: Recipe) -> None:
    """[prune] goes with a student cut out of its one task's teacher, and names one goal."""
    where, prune = f"{recipe.source}: prune", recipe.prune
    if recipe.student.name != PRUNED:
        if prune is not None:
            fix = f'write model = "{PRUNED}" in [student], or leave [prune] out'
            raise RecipeError(f"the student is {recipe.student.name}, not cut out of its teacher", where=where, fix=fix)
        return
    fix = "write [prune] with one of macs, parameters, size_bytes and latency_ms, e.g. macs = 0.5"
    if prune is None or not prune.goals:
        raise RecipeError("there is no goal to prune for", where=where, fix=fix)
    if len(prune.goals) > 1:
        raise RecipeError(f"there are several goals: {', '.join(prune.goals)}", where=where, fix="keep one of them")
    student = f"{recipe.source}: student"
    given = recipe.student.options or recipe.student.weights or recipe.student.mean or recipe.student.std
    if given:
        raise RecipeError("it takes no option: it is its teacher, cut", where=student, fix="keep model alone")
    if recipe.assistants:
        fix = "leave them out: every round of pruning is distilled from the teacher"
        raise RecipeError("a pruned student has no assistants", where=f"{recipe.source}: distill.assistants", fix=fix)
    if recipe.tasks[0].head is not None:
        raise RecipeError("a student of several tasks cannot be cut out of one teacher", where=student)


def loss_term(loss: str | Mapping[str, Any] | LossTerm, where: str) -> LossTerm:
    """A loss by its name, or as a [[loss]] table has it: `name`, `weight`, `pairs` and the loss's own options."""
    if isinstance(loss, LossTerm):
        return loss
    part = _part({"name": loss} if isinstance(loss, str) else loss, where)
    own = dict(part.options)
    weight = toml.validated(own.pop("weight", 1.0), Annotated[float, Gt(0)], f"{where}.weight")
    pairs = own.pop("pairs", None)
    if pairs is not None:
        hint = Annotated[tuple[tuple[str, str], ...], MinLen(1)]
        pairs = toml.validated(pairs, hint, f"{where}.pairs")
    if part.name == AUTO and (own or pairs is not None):
        key = next(iter(own), "pairs")
        fix = "name the loss that it is for: what `match` chooses brings its own"
        raise RecipeError(f"unknown key '{key}'; {AUTO} takes weight", where=where, fix=fix)
    return LossTerm(Part(part.name, own), weight, pairs)


def loss_terms(losses: str | Sequence[str | Mapping[str, Any] | LossTerm]) -> tuple[LossTerm, ...]:
    """Losses as a Python call names them: one by its name, or several as `loss_term` takes them."""
    given = [losses] if isinstance(losses, str) else losses
    return tuple(loss_term(loss, f"losses[{at}]") for at, loss in enumerate(given))


def loss_table(term: LossTerm) -> dict[str, Any]:
    """A [[loss]] table with every default filled in."""
    from edgekd import plugins

    filled = {} if term.part.name == AUTO else plugins.defaults("losses", term.part)
    pairs = {} if term.pairs is None else {"pairs": [list(pair) for pair in term.pairs]}
    return {"name": term.part.name, "weight": term.weight} | filled | pairs


AUTO = "auto"  # a loss of this name stands for those of the layers that `match` finds; alone, for all losses


def _check_parts(recipe: Recipe) -> None:
    """Every named part exists and takes its options: known before anything is trained."""
    from edgekd import plugins

    def bind(kind: str, part: Part, place: str) -> None:
        plugins.bind(kind, part, where=f"{recipe.source}: {place}")

    for number, task in enumerate(recipe.tasks):
        prefix = f"task[{number}]." if task.head else ""
        bind("tasks", task.task, prefix.rstrip(".") or "task")
        bind("data", task.data, f"{prefix}data")
        for index, teacher in enumerate(task.teachers):
            place = f"{prefix}teacher" + (f"[{index}]" if len(task.teachers) > 1 else "")
            bind("models", Part(teacher.model.name, teacher.model.options), place)
        for index, term in enumerate(task.losses or ()):
            if term.part.name != AUTO:
                bind("losses", term.part, f"{prefix}loss[{index}]")
    if recipe.student.name != PRUNED:
        bind("models", Part(recipe.student.name, recipe.student.options), "student")
    for index, assistant in enumerate(recipe.assistants):
        bind("models", Part(assistant.model.name, assistant.model.options), f"distill.assistants[{index}]")


def _tasks(table: Mapping[str, Any], source: str, folder: Path) -> tuple[TaskSpec, ...]:
    """One task from the top level, or one from each [[task]] table, with the top level's losses for all of them."""
    given = table.get("task", {"name": CLASSIFICATION})
    if isinstance(given, Mapping):
        return (_task(table, None, _part(given, f"{source}: task"), source, folder, ""),)
    where = f"{source}: task"
    if not isinstance(given, list) or not given:
        raise RecipeError("no task is named", where=where, fix="write [task], [[task]], or leave it out")
    for key in ("data", "teacher"):
        if key in table:
            raise RecipeError(f"'{key}' stands beside [[task]]", where=source, fix=f"each [[task]] has its own {key}")
    found: dict[str, TaskSpec] = {}
    for index, one in enumerate(given):
        place = f"{where}[{index}]"
        one = dict(toml.as_table(one, place))
        if "head" not in one:
            raise RecipeError("'head' is missing", where=place, fix="name the student's output for this task: head = …")
        head = toml.validated(one.pop("head"), Annotated[str, MinLen(1)], f"{place}.head")
        if head in found:
            raise RecipeError(f"two tasks have the head '{head}'", where=place, fix="give each its own")
        own = {key: one.pop(key) for key in ("data", "teacher", "loss") if key in one}
        if "loss" in table:
            own.setdefault("loss", table["loss"])
        task = _part({"name": CLASSIFICATION} | one, place)
        found[head] = _task(own, head, task, source, folder, f"task[{index}].")
    return tuple(found.values())


CLASSIFICATION = "classification"


def _task(table: Mapping[str, Any], head: str | None, task: Part, source: str, folder: Path, prefix: str) -> TaskSpec:
    for key in ("data", "teacher"):
        if key not in table:
            fix = "`edgekd init` writes a recipe to start from"
            raise RecipeError(f"'{key}' is missing", where=f"{source}: {prefix.rstrip('.')}".rstrip(": "), fix=fix)
    where = f"{source}: {prefix}data"
    data = _part(table["data"], where)
    data = replace(data, options=_placed(data.options, folder, where))
    teachers = table["teacher"] if isinstance(table["teacher"], list) else [table["teacher"]]
    if not teachers:
        raise RecipeError("no teacher is named", where=f"{source}: {prefix}teacher")
    places = [f"{source}: {prefix}teacher" + (f"[{i}]" if len(teachers) > 1 else "") for i in range(len(teachers))]
    return TaskSpec(
        head, task, data,
        tuple(_teacher(each, place, folder) for each, place in zip(teachers, places, strict=True)),
        _losses(table["loss"], f"{source}: {prefix}loss") if "loss" in table else None,
    )  # fmt: skip


def _teacher(table: Any, where: str, folder: Path) -> TeacherSpec:
    table = dict(toml.as_table(table, where))
    train = toml.read(TrainOptions, table.pop("train", {}), f"{where}.train")
    weight = toml.validated(table.pop("weight", 1.0), Annotated[float, Gt(0)], f"{where}.weight")
    return TeacherSpec(_model(table, where, folder), train, weight)


def _assistants(tables: Any, where: str, folder: Path) -> tuple[Assistant, ...]:
    if not isinstance(tables, list):
        raise RecipeError("it is no list", where=where, fix="write [[distill.assistants]] with model = … for each")
    found = []
    for index, table in enumerate(tables):
        place = f"{where}[{index}]"
        table = dict(toml.as_table(table, place))
        epochs = toml.validated(table.pop("epochs", None), Annotated[int, Ge(1)] | None, f"{place}.epochs")
        found.append(Assistant(_model(table, place, folder), epochs))
    return tuple(found)


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


def _losses(tables: Any, where: str) -> tuple[LossTerm, ...]:
    if not isinstance(tables, list) or not tables:
        raise RecipeError("no loss is named", where=where, fix='write [[loss]] with name = "kd", or leave it out')
    return tuple(loss_term(table, f"{where}[{index}]") for index, table in enumerate(tables))


def _placed(options: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The options with those that name files made absolute."""
    paths = {key: _resolved(folder, options[key], f"{where}.{key}") for key in _PATHS if key in options}
    return dict(options) | paths


def _resolved(folder: Path, path: Any, where: str) -> Any:
    if isinstance(path, list):
        return [_resolved(folder, each, where) for each in path]
    return str(folder / Path(toml.validated(path, str, where)).expanduser())
