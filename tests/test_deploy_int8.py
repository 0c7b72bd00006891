"""int8 as deploy makes it: distilled anew or mixed where it lost too much, and within the time there is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trainings
from broken_network import recovery, silent
from command_line import call

from edgekd import qad, quantize, target, training
from edgekd.clock import Deadline
from edgekd.deploy import Source, Workshop, deploy
from edgekd.errors import EdgekdError
from edgekd.models.network import Network
from edgekd.recipe import Quantize, load
from edgekd.store import Store
from edgekd.types import Artifact


def source(network: Network, key: str) -> Source:
    return Source(network, Artifact("weights", key, Path(), {}))


def shop(folder: Path, network: Network, **choices: Any) -> Workshop:
    data, task = trainings.handwritten(), trainings.task()
    taught_by = replace(recovery(network, data), artifacts=(source(network, "t").weights,))
    given: dict[str, Any] = {"method": ("minmax",), "max_drop": 0.005, "mixed": "off"} | choices
    return Workshop(
        Store(folder, silent), data, True, ("int8",), silent, quantize=Quantize(("int8",), **given), task=task,
        recovery=taught_by,
    )  # fmt: skip


def test_deploy_distils_anew_where_int8_loses_too_much(broken: Network, tmp_path: Path) -> None:
    there, host = shop(tmp_path, broken), target.load("host")
    both = source(broken, "t"), source(broken, "s")
    made = deploy(there, host, *both)
    (note,) = (text for text in made.notes if "quantization-aware distillation" in text)
    assert note.startswith("student-int8: ")
    assert note.endswith(": kept")
    graph = next(each for each in made.graphs if each.precision == "int8")
    assert graph.artifact.meta["simulated"]
    steps = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir() if path.name[0] != ".")
    assert steps == ["int8", "int8", "onnx", "onnx", "qad"]
    again = deploy(there, replace(host, name="another"), *both)  # the same rules: nothing is trained again
    assert next(each for each in again.graphs if each.precision == "int8").artifact.key == graph.artifact.key
    plain = deploy(replace(there, recovery=None), host, *both)
    assert not any("distillation" in text for text in plain.notes)
    assert next(each for each in plain.graphs if each.precision == "int8").artifact.key != graph.artifact.key
    held = deploy(shop(tmp_path, broken, max_drop=1.0), host, *both)
    assert not any("distillation" in text for text in held.notes)


def test_what_is_no_better_is_not_kept_and_what_fails_is_said(
    broken: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, host = shop(tmp_path, broken), target.load("host")
    both = source(broken, "t"), source(broken, "s")

    def int8(of: Workshop) -> tuple[str, list[str]]:
        made = deploy(of, host, *both)
        found = next(each for each in made.graphs if each.precision == "int8").artifact.key
        return found, [text for text in made.notes if "distillation" in text]

    plain, _ = int8(replace(there, recovery=None))
    assert there.recovery is not None
    wild = replace(there.recovery.options, learning_rate=1e9, epochs=1)
    found, (note,) = int8(replace(there, recovery=replace(there.recovery, options=wild)))
    assert found == plain
    assert note.endswith(": not kept") or "could not be done" in note
    monkeypatch.setattr(qad, "better", lambda one, other: False)
    quick = replace(there.recovery.options, epochs=1)
    found, (note,) = int8(replace(there, recovery=replace(there.recovery, options=quick)))
    assert found == plain
    assert note.endswith(": not kept")


def test_older_runtimes_get_the_mixed_file_unless_distillation_is_kept(
    broken: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, jetson = shop(tmp_path, broken, mixed="auto"), target.load("jetson")

    def older(recovered: qad.Recovery | None) -> Path:
        made = deploy(replace(there, recovery=recovered), jetson, source(broken, "t"), source(broken, "s"))
        assert "student-int8-mixed" in {graph.id for graph in made.graphs}
        return made.legacy["int8"]

    assert there.recovery is not None
    mixed = older(None)
    kept = replace(there.recovery, options=replace(there.recovery.options, epochs=1))
    assert older(kept) != mixed
    monkeypatch.setattr(qad, "better", lambda one, other: False)
    assert older(replace(kept, seed=1)) == mixed, "tried, and not kept"

    def diverge(*_: Any, **__: Any) -> None:
        raise EdgekdError("the loss is not finite")

    monkeypatch.setattr(qad, "train", diverge)
    assert older(replace(kept, seed=2)) == mixed, "could not be done"


def test_what_was_quantized_as_onnx_is_not_distilled_and_the_reason_is_told(
    broken: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("edgekd.quantize.Simulation", refuse)
    both = source(broken, "t"), source(broken, "s")
    made = deploy(shop(tmp_path, broken, max_drop=0.0), target.load("host"), *both)
    (note,) = (text for text in made.notes if "distillation" in text)
    why = "it was quantized as ONNX, where nothing can be trained"
    assert note == f"there is no quantization-aware distillation of student-int8: {why}"


def test_what_is_finished_is_used_however_little_time_is_left(broken: Network, tmp_path: Path) -> None:
    def made(store: Path, deadline: Deadline) -> tuple[set[tuple[str, str]], tuple[str, ...]]:
        there = shop(store, broken, mixed="auto")
        assert there.recovery is not None
        quick = replace(there.recovery, options=replace(there.recovery.options, epochs=1))
        there = replace(there, deadline=deadline, recovery=quick)
        found = deploy(there, target.load("host"), source(broken, "t"), source(broken, "s"))
        return {(graph.id, graph.artifact.key) for graph in found.graphs}, found.notes

    whole, late = made(tmp_path / "whole", Deadline()), Deadline(0.0)
    assert {"student-int8", "student-int8-mixed"} < {name for name, _ in whole[0]}
    assert any("quantization-aware distillation" in note for note in whole[1])
    assert made(tmp_path / "whole", late) == whole
    assert late.left_out == [], "nothing of it had to be built"
    hasty = made(tmp_path / "hasty", late)
    left = [text.partition(";")[0].partition(" (")[0] for text in late.left_out]
    assert left == [
        "left out: learned rounding of student-int8, if it had been needed",
        "left out: learned rounding of student-int8-mixed, if it had been needed",
        "left out: quantization-aware distillation of student-int8",
    ]
    assert made(tmp_path / "hasty", Deadline())[0] == whole[0], "with time, what was left out is done"
    assert hasty[0].isdisjoint(pair for pair in whole[0] if "int8" in pair[0])


RECIPE = """
name = "small"
[data]
name = "digits"
[teacher]
model = "resnet8"
width = 4
[teacher.train]
epochs = 1
precision = "fp32"
[student]
model = "resnet8"
width = 4
[distill]
epochs = 1
precision = "fp32"
[quantize]
precisions = ["fp32", "int8"]
method = ["minmax"]
qad = "{qad}"
"""


def test_compress_says_in_the_report_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize, "holds", lambda meta: False)
    (tmp_path / "edgekd.toml").write_text(RECIPE.format(qad="auto"))
    assert call("compress", "--quick", "--max-drop", "100%", "--target", "host") == 0
    report = json.loads((tmp_path / "runs" / "small" / "report.json").read_text())
    (note,) = (text for text in report["notes"] if "quantization-aware distillation" in text)
    assert note.startswith("host: student-int8: quantization-aware distillation (1 epochs, ")
    assert "qad_epochs = 1" in (tmp_path / "runs" / "small" / "recipe.toml").read_text()


def test_the_recipe_says_whether_and_how_long(broken: Network, tmp_path: Path) -> None:
    def wanted(text: str) -> qad.Recovery | None:
        (tmp_path / "edgekd.toml").write_text(text)
        recipe = load(tmp_path / "edgekd.toml")
        subjects = (training.read(recipe.task, recipe.seed, "edgekd.toml"),)
        school = training.School(recipe, subjects, Store(tmp_path, silent), tmp_path, None, silent)
        return training.recovery(school, [source(broken, "t")])

    assert wanted(RECIPE.format(qad="off")) is None
    found = wanted(RECIPE.format(qad="auto") + "qad_epochs = 7\n")
    assert found is not None
    assert found.options.epochs == 7
    assert [each.key for each in found.artifacts] == ["t"]
    assert found.teachers[0].network is broken
