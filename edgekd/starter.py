"""Recipes to start from: the one that `edgekd init` writes, and the built-in one that runs where there is none."""

from __future__ import annotations

import os
from pathlib import Path

from edgekd import toml
from edgekd.errors import RecipeError
from edgekd.recipe import Recipe, parse
from edgekd.store import write_text

# The built-in recipe: handwritten digits that come with scikit-learn, a wide ResNet-20 teacher, a ResNet-8 student.
# One thread: on images of 8 × 8 a second one gains little and loses much on a busy machine.
BUILT_IN = """\
name = "digits"
seed = 0

[data]
name = "digits"

[teacher]
model = "resnet20"
width = 32
[teacher.train]
epochs = 30
precision = "fp32"
threads = 1

[student]
model = "resnet8"

[distill]
epochs = 80
precision = "fp32"
threads = 1
views = 8

[augment]
crop_pixels = 1

[budget]
max_accuracy_drop = 0.01
"""

_STARTER = """\
# edgekd recipe. `edgekd compress --target {target}` runs it; docs/recipe.md explains every key.
name = "{name}"
seed = 0

[data]
name = "imagefolder"        # also: digits, npz, torchvision, or "my_package.my_module:load"
path = "{path}"             # <class>/*.jpg, or train/<class>/*.jpg and test/<class>/*.jpg; a folder or a zip
# size = [32, 32]           # height, width; left out: the images' own size where they share one, else 224 x 224

[teacher]
model = "{teacher}"         # resnet56, timm.NAME, torchvision.NAME, or "my_package.my_module:build"
# weights = "teacher.safetensors"   # left out: the teacher is trained first, by [teacher.train]
# mean = [0.485, 0.456, 0.406]      # of the images the weights were trained on; left out: the model's own
# std = [0.229, 0.224, 0.225]
[teacher.train]
epochs = 30
optimizer = "adamw"         # "sgd" with learning_rate = 0.1 suits ResNets better
learning_rate = 0.002
weight_decay = 0.01

[student]
model = "{student}"

[[loss]]
name = "auto"               # the default: labels, the teacher's outputs and, between CNNs, the layers that correspond;
                            # report.json and the recipe left in runs/ name them. Your own losses may take its place

[distill]
epochs = 30
optimizer = "adamw"
learning_rate = 0.002
weight_decay = 0.01

[augment]
crop_pixels = 4
flip = true

[budget]
max_accuracy_drop = 0.01    # fraction of the test samples, against the teacher
# max_latency_ms = 5.0
# max_size_bytes = 4_000_000
"""


def built_in() -> Recipe:
    """The recipe that `compress` runs where there is no edgekd.toml."""
    return parse(toml.loads(BUILT_IN), source="built-in recipe", folder=Path.cwd())


def init(path: Path, *, name: str, data: str, teacher: str, student: str, target: str) -> None:
    """Write a starter recipe for an image folder to `path`.

    Raises:
        RecipeError: the file is there already; it is left as it is.
        StoreError: the folder cannot be written.
    """
    if path.exists():
        raise RecipeError(
            "is there already", where=str(path), fix="choose another file with --recipe, or delete it first"
        )
    if path.parent != Path() and not Path(data).is_absolute():
        data = os.path.relpath(data, path.parent)  # paths in a recipe are relative to the recipe
    words = {"name": name, "path": data, "teacher": teacher, "student": student, "target": target}
    if any('"' in word or "\\" in word or "\n" in word for word in words.values()):
        raise RecipeError("a quote or backslash cannot stand in a recipe", where=str(path), fix="edit the file instead")
    write_text(path, _STARTER.format_map(words))
