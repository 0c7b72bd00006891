"""Recipes: defaults filled in, unknown keys refused with the nearest, paths relative to the file, rerunnable."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgekd import recipe
from edgekd.errors import EdgekdError, PartError, RecipeError
from edgekd.starter import BUILT_IN, built_in, init
from edgekd.types import LossTerm, Part

SMALL = """
name = "plants"
[data]
name = "imagefolder"
path = "images dir"
[teacher]
model = "resnet20"
weights = "teacher.safetensors"
width = 8
[student]
model = "resnet8"
"""


def _load(folder: Path, text: str) -> recipe.Recipe:
    (folder / "edgekd.toml").write_text(text)
    return recipe.load(folder / "edgekd.toml")


# Two tasks of one student, each with data, teachers and losses of its own; both have the losses at the top otherwise.
TASKS = """
name = "both"
[[task]]
head = "plant"
[task.data]
name = "imagefolder"
path = "plants"
[[task.teacher]]
model = "resnet20"
weight = 2
[task.teacher.train]
epochs = 7
[[task.teacher]]
model = "resnet32"
weights = "other.safetensors"
[[task.loss]]
name = "dist"

[[task]]
head = "leaf"
name = "multilabel"
[task.data]
name = "npz"
path = "leaves.npz"
[task.teacher]
model = "resnet56"

[student]
model = "own_models:two_heads"
width = 4
[[loss]]
name = "kd"
temperature = 2
[[loss]]
name = "srd"
weight = 0.5
pairs = [["layer2", "layer2"], ["body:in", "layer3.1"]]
[distill]
views = 4
cache_gb = 1.5
teacher_augment = "output"
compile = "off"
[augment]
mixup = 0.5
seed = 3
"""

# Two teachers, and two networks between them and the student.
CHAIN = """
name = "chain"
[data]
name = "digits"
[[teacher]]
model = "resnet56"
weight = 3
train = {epochs = 5}
[[teacher]]
model = "resnet20"
[distill]
epochs = 12
[[distill.assistants]]
model = "resnet32"
width = 8
epochs = 9
[[distill.assistants]]
model = "resnet20"
[student]
model = "resnet8"
[[loss]]
name = "auto"
weight = 0.5
"""

OWN = """
from edgekd.models.resnet import resnet8

def two_heads(classes: dict[str, int], inputs, *, width: int = 8):
    return resnet8(sum(classes.values()), inputs, width=width)
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


def test_defaults_are_the_tasks_and_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    read = _load(tmp_path, SMALL)
    (teacher,) = read.task.teachers
    assert read.task.head is None
    assert read.task.task == Part("classification")
    assert read.task.losses is None
    assert teacher.model.weights == str(tmp_path / "teacher.safetensors")
    assert teacher.model.options == {"width": 8}
    assert teacher.weight == 1.0
    assert read.task.data.options["path"] == str(tmp_path / "images dir")
    assert read.assistants == ()
    assert read.export.preprocessing


@pytest.mark.usefixtures("own_models")
def test_several_tasks_have_what_is_theirs(tmp_path: Path) -> None:
    read = _load(tmp_path, TASKS)
    plant, leaf = read.tasks
    assert [(each.head, each.task.name, each.data.name) for each in read.tasks] == [
        ("plant", "classification", "imagefolder"), ("leaf", "multilabel", "npz"),
    ]  # fmt: skip
    assert [(each.model.name, each.weight, each.train.epochs) for each in plant.teachers] == [
        ("resnet20", 2.0, 7), ("resnet32", 1.0, 30),
    ]  # fmt: skip
    assert plant.teachers[1].model.weights == str(tmp_path / "other.safetensors")
    assert [each.model.name for each in leaf.teachers] == ["resnet56"]
    assert leaf.data.options["path"] == str(tmp_path / "leaves.npz")
    assert plant.losses == (LossTerm(Part("dist")),)
    assert leaf.losses == (
        LossTerm(Part("kd", {"temperature": 2.0})),
        LossTerm(Part("srd"), 0.5, (("layer2", "layer2"), ("body:in", "layer3.1"))),
    )
    found = read.distill
    assert (found.views, found.cache_gb, found.teacher_augment, found.compile) == (4, 1.5, "output", "off")
    assert (read.augment.mixup, read.augment.seed) == (0.5, 3)
    with pytest.raises(RecipeError, match=r"edgekd\.toml: task: .* for each task \(plant, leaf\).*`edgekd distill`"):
        read.task  # noqa: B018


def test_teachers_and_assistants_of_one_student(tmp_path: Path) -> None:
    read = _load(tmp_path, CHAIN)
    assert [(each.model.name, each.weight, each.train.epochs) for each in read.task.teachers] == [
        ("resnet56", 3.0, 5), ("resnet20", 1.0, 30),
    ]  # fmt: skip
    assert [(each.model.name, dict(each.model.options), each.epochs) for each in read.assistants] == [
        ("resnet32", {"width": 8}, 9), ("resnet20", {}, None),
    ]  # fmt: skip
    assert read.distill.epochs == 12
    assert read.task.losses == (LossTerm(Part("auto"), 0.5),)


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize("text", ["SMALL", "TASKS", "CHAIN"])
def test_what_is_written_reads_as_what_it_was(tmp_path: Path, text: str) -> None:
    first = _load(tmp_path, globals()[text])
    (tmp_path / "again.toml").write_text(first.to_toml(tmp_path))
    second = recipe.load(tmp_path / "again.toml")
    (tmp_path / "again.toml").write_text(second.to_toml(tmp_path))
    assert replace(recipe.load(tmp_path / "again.toml"), source="") == replace(second, source="")
    kept = ("name", "seed", "distill", "augment", "assistants", "export", "quantize", "budget")
    assert [getattr(second, key) for key in kept] == [getattr(first, key) for key in kept]
    for one, other in zip(first.tasks, second.tasks, strict=True):
        assert (one.head, one.task.name, one.teachers) == (other.head, other.task.name, other.teachers)
        assert [(term.part.name, term.weight, term.pairs) for term in one.losses or ()] == [
            (term.part.name, term.weight, term.pairs) for term in other.losses or ()
        ]
        assert (one.losses is None) == (other.losses is None)


def test_the_resolved_recipe_reruns_the_same_run(tmp_path: Path) -> None:
    read = _load(tmp_path, SMALL)
    run = tmp_path / "runs" / "plants"
    run.mkdir(parents=True)
    text = read.to_toml(run)
    assert str(tmp_path) not in text
    (run / "recipe.toml").write_text(text)
    again = recipe.load(run / "recipe.toml")
    assert again.to_toml(run) == text
    assert Path(str(again.task.data.options["path"])).resolve() == tmp_path / "images dir"
    assert again.distill == read.distill


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[student]", "[studnet]"), "unknown key 'studnet'.*did you mean 'student'"),
        (('name = "plants"', ""), "'name' is missing"),
        (('name = "plants"', 'name = "../plants"'), "cannot name a folder"),
        (('name = "plants"', 'name = "plants"\nseed = "0"'), r"seed: \"0\" does not fit"),
        (("width = 8", "widht = 8"), "teacher: unknown option 'widht'.*did you mean 'width'"),
        (("width = 8", "mean = 1"), r"teacher.mean: 1 does not fit"),
        (('model = "resnet8"', 'model = "resnet9"'), "student: there is no 'resnet9'.*did you mean"),
        (('model = "resnet8"', 'model = "resnet8"\ntrain = {}'), "student is trained by"),
        (('name = "imagefolder"', 'name = "imagefolders"'), "there is no 'imagefolders'.*did you mean 'imagefolder'"),
        (("[student]", "[distill]\nepochs = 0\n[student]"), "distill.epochs: 0 does not fit: input should be greater"),
        (("[student]", "[distill]\nepoch = 3\n[student]"), "distill: unknown key 'epoch'.*did you mean 'epochs'"),
        (("[student]", "[budget]\nmax_accuracy_drop = 2\n[student]"), "budget.max_accuracy_drop: 2 does not fit"),
        (("[student]", '[[loss]]\nname = "kd"\ntemprature = 2\n[student]'), r"loss\[0\]: unknown option 'temprature'"),
        (("[student]", '[[loss]]\nname = "kd"\nweight = -1\n[student]'), r"loss\[0\].weight: -1 does not fit"),
        (("[student]", '[quantize]\nprecisions = ["int4"]\n[student]'), "quantize.precisions"),
        (("[student]", '[quantize]\nmethod = "atuo"\n[student]'), r"quantize.method.*\"atuo\" does not fit"),
        (("[student]", '[quantize]\nmethod = ["entropy"]\n[student]'), "quantize.method.*entropy.* does not fit"),
        (("[student]", "[quantize]\nmax_drop = -0.1\n[student]"), "quantize.max_drop: -0.1 does not fit"),
        (("[student]", "[student"), "not valid TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_where_it_stands(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in SMALL
    with pytest.raises(EdgekdError, match=f"edgekd.toml.*{message}") as caught:
        _load(tmp_path, SMALL.replace(*change))
    assert isinstance(caught.value, RecipeError | PartError)
    assert "\n" not in str(caught.value) or "TOML" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        ("TASKS", ('head = "plant"', ""), r"task\[0\]: 'head' is missing"),
        ("TASKS", ('head = "leaf"', 'head = "plant"'), r"task\[1\]: two tasks have the head 'plant'"),
        ("TASKS", ('[student]', '[data]\nname = "digits"\n[student]'), "'data' stands beside \\[\\[task\\]\\]"),
        ("TASKS", ('[task.teacher]\nmodel = "resnet56"', ""), r"task\[1\]: 'teacher' is missing"),
        ("TASKS", ("weight = 2", "weight = 0"), r"task\[0\]\.teacher\[0\]\.weight: 0 does not fit"),
        ("TASKS", ('"resnet32"', '"resnet33"'), r"task\[0\]\.teacher\[1\]: there is no 'resnet33'.*'resnet32'"),
        ("TASKS", ('"dist"', '"dost"'), r"task\[0\]\.loss\[0\]: there is no 'dost'.*'dist'"),
        ("TASKS", ('"multilabel"', '"multilabels"'), r"task\[1\]: there is no 'multilabels'.*'multilabel'"),
        ("TASKS", ('name = "multilabel"', "nome = 1"), r"task\[1\]: unknown option 'nome'; classification takes"),
        ("TASKS", ('["body:in", "layer3.1"]', '["body:in"]'), r"task\[1\]\.loss\[1\]\.pairs"),
        ("TASKS", ('"output"', '"outputs"'), r"distill\.teacher_augment: \"outputs\" does not fit.*'output'"),
        ("TASKS", ("cache_gb = 1.5", "cache_gb = -1"), r"distill\.cache_gb: -1 does not fit"),
        ("TASKS", ("views = 4", "view = 4"), r"distill: unknown key 'view'.*did you mean 'views'"),
        ("TASKS", ("mixup = 0.5", "mixup = -0.5"), r"augment\.mixup: -0\.5 does not fit"),
        ("TASKS", ('compile = "off"', "compile = false"), r"distill\.compile: false does not fit"),
        ("CHAIN", ("epochs = 9", "epochs = 0"), r"distill\.assistants\[0\]\.epochs: 0 does not fit"),
        ("CHAIN", ('"resnet32"', '"resnet31"'), r"distill\.assistants\[0\]: there is no 'resnet31'"),
        ("CHAIN", ("epochs = 9", "epoch = 9"), r"distill\.assistants\[0\]: unknown option 'epoch'"),
        ("CHAIN", ("weight = 0.5", "temperature = 1"), r"loss\[0\]: unknown key 'temperature'; auto takes weight"),
        ("CHAIN", ("weight = 0.5", 'pairs = [["a", "b"]]'), r"loss\[0\]: unknown key 'pairs'; auto takes weight"),
        ("CHAIN", ('[[loss]]', '[loss]'), r"loss: no loss is named.*\[\[loss\]\]"),
        ("SMALL", ("[student]", "[task]\n[student]"), r"task: 'name' is missing"),
        ("SMALL", ("[student]", '[task]\nname = "classify"\n[student]'), r"task: there is no 'classify'"),
        ("SMALL", ("[student]", "[distill]\nassistants = 3\n[student]"), r"distill\.assistants: it is no list"),
        ("SMALL", ("[teacher]", "teacher = []\n[other]"), r"unknown key 'other'"),
        ("SMALL", ("[student]", "[loss]\n[student]"), r"loss: no loss is named"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("own_models")
def test_what_is_wrong_with_the_new_keys_is_said_with_where_it_stands(
    tmp_path: Path, text: str, change: tuple[str, str], message: str
) -> None:
    whole = globals()[text]
    assert whole.count(change[0]) == 1
    with pytest.raises(EdgekdError, match=f"edgekd.toml.*{message}") as caught:
        _load(tmp_path, whole.replace(*change))
    assert isinstance(caught.value, RecipeError | PartError)


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "edgekd.toml").write_text(SMALL)
    with pytest.raises(RecipeError, match=r"no such file.*did you mean 'edgekd\.toml'"):
        recipe.load(tmp_path / "edgkd.toml")


def test_the_command_line_overrides_seed_and_budget(tmp_path: Path) -> None:
    read = recipe.overridden(
        _load(tmp_path, SMALL), seed=7, max_drop="1%", max_latency="5ms", max_size="4MB", max_memory="64MB"
    )
    assert read.seed == 7
    assert (read.budget.max_accuracy_drop, read.budget.max_latency_ms, read.budget.max_size_bytes) == (
        0.01,
        5,
        4_000_000,
    )
    assert read.budget.max_memory_bytes == 64_000_000
    assert recipe.overridden(read, seed=None, max_drop=None, max_latency=None, max_size=None, max_memory=None) == read


def test_the_built_in_recipe_is_valid_and_needs_no_file() -> None:
    assert built_in().task.data.name == "digits"
    assert 'name = "digits"' in BUILT_IN


def test_init_writes_a_recipe_that_loads_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "edgekd.toml"
    options = {
        "name": "plants",
        "data": "my images",
        "teacher": "timm.resnet18",
        "student": "resnet8",
        "target": "jetson",
    }
    init(path, **options)
    assert recipe.load(path).task.teachers[0].model.name == "timm.resnet18"
    before = path.read_text()
    with pytest.raises(RecipeError, match="is there already"):
        init(path, **options)
    assert path.read_text() == before
    (tmp_path / "recipes").mkdir()
    init(tmp_path / "recipes" / "own.toml", **options | {"data": str(tmp_path / "my images")})
    assert recipe.load(tmp_path / "recipes" / "own.toml").task.data.options["path"] == str(tmp_path / "my images")
    with pytest.raises(RecipeError, match="quote"):
        init(tmp_path / "other.toml", **(options | {"data": 'a"b'}))


def test_how_int8_is_come_to_is_in_the_recipe_and_reruns(tmp_path: Path) -> None:
    plain = _load(tmp_path, SMALL).quantize
    assert (plain.method, plain.max_drop, plain.float_layers) == ("auto", 0.005, ())
    own = '[quantize]\nmethod = ["mse", "bias"]\nmax_drop = 0.01\nfloat_layers = ["layer1.0", "linear"]\n'
    read = _load(tmp_path, SMALL + own)
    assert read.quantize.method == ("mse", "bias")
    assert read.quantize.float_layers == ("layer1.0", "linear")
    again = _load(tmp_path, read.to_toml(tmp_path))
    assert again.quantize == read.quantize
