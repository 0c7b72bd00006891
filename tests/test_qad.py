"""A student that rounding cost too much is distilled anew, rounding: it loses less, and its graph says what it says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import networks
import numpy as np
import onnx
import pytest
import trainings
from broken_network import KD, recovery, silent
from rules import RULES

from edgekd import qad, quantize
from edgekd.backends.onnxruntime import onnxruntime
from edgekd.deploy import Calibration, reference
from edgekd.errors import ParityError
from edgekd.graph.program import capture, graph_inputs
from edgekd.models.network import Network
from edgekd.quantize import state
from edgekd.quantize.measured import Loss
from edgekd.quantize.simulation import Simulation
from edgekd.recipe import loss_term
from edgekd.types import (
    Arrays,
    Artifact,
    Json,
    LossTerm,
    QuantizationRules,
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A network quantized by the smallest and largest values, and then distilled anew."""

    network: Network
    rules: QuantizationRules
    folder: Path
    quantized: dict[str, Json]
    trained: dict[str, Any]
    told: list[tuple[str, dict[str, Json]]]

    @property
    def start(self) -> Path:
        return self.folder / "start"

    def train(self, work: Path, say: Callable[..., None] = silent) -> dict[str, Any]:
        """The distillation of the quantized network."""
        work.mkdir(exist_ok=True)
        return qad.train(
            self.network, self.start, self.rules, recovery(self.network, trainings.handwritten()), KD,
            preprocessing=True, work=work, say=say,
        )  # fmt: skip

    def loaded(self, file: Path) -> Simulation:
        data = trainings.handwritten()
        args, specs = graph_inputs(self.network, next(iter(Calibration(data))).inputs, preprocessing=True)
        return state.load(capture(self.network, args, specs, preprocessing=True), self.rules, file)


@pytest.fixture(scope="module", params=list(RULES))
def made(request: pytest.FixtureRequest, broken: Network, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, data, rules = tmp_path_factory.mktemp(request.param), trainings.handwritten(), RULES[request.param]
    meta = quantize.quantize(
        broken, Calibration(data), rules, opset=19, preprocessing=True, path=folder / "ptq.onnx", say=silent,
        method=("minmax",), task=trainings.task(), keep=folder / "start",
    )  # fmt: skip
    told = trainings.Told()
    half = Made(broken, rules, folder, meta, {}, told.events)
    return replace(half, trained=half.train(folder / "work", told))


# ---------------------------------------------------------------- what training brings


def test_training_lowers_the_loss_and_gives_back_what_rounding_took(made: Made) -> None:
    losses = [row["loss"] for row in made.trained["history"]]
    assert losses[-1] < 0.8 * losses[0]
    before, after = made.trained["before"], made.trained["after"]
    assert before["drop"] > 0.02, "the network is broken"
    assert after["drop"] <= before["drop"]
    assert after["divergence"] < before["divergence"] / 2
    assert made.trained["kept"]
    assert made.trained["precision"] == "fp32"
    assert not quantize.holds(made.quantized)


def test_progress_is_told_of_its_own_step(made: Made) -> None:
    assert {fields["step"] for event, fields in made.told if event in ("epoch", "batch")} == {"qad"}


def test_the_artifact_is_one_file_without_code(made: Made) -> None:
    assert [file.name for file in (made.folder / "work").iterdir()] == [state.FILE]
    assert (made.folder / "work" / state.FILE).read_bytes()[8:9] == b"{"  # safetensors


def test_interrupted_training_goes_on_to_the_same_bits(made: Made) -> None:
    work = made.folder / "interrupted"
    for stop in (1, 1):  # in the first epoch and in the second
        with pytest.raises(trainings.Interrupted):
            made.train(work, trainings.Told("epoch", stop))
    told = trainings.Told()
    made.train(work, told)
    assert told.of("resumed")
    assert (work / state.FILE).read_bytes() == (made.folder / "work" / state.FILE).read_bytes()


def test_told_says_both_figures_and_the_seconds(made: Made) -> None:
    text = qad.told(made.trained, "accuracy")
    before, after = made.trained["before"], made.trained["after"]
    assert f"expected drop {after['expected_drop']:.2%}, {before['expected_drop']:.2%} without it" in text
    assert f" of accuracy, {before['drop']:.2%} without it" in text
    assert f"(3 epochs, {made.trained['train_s']:.0f} s)" in text
    assert "143 samples held out" in text
    assert text.endswith(": kept")
    worse = made.trained | {"kept": False}
    assert qad.told(worse, "accuracy").endswith(": not kept")
    unknown = made.trained | {side: made.trained[side] | {"drop": None} for side in ("before", "after")}
    assert "measured" not in qad.told(unknown, "R²")


# ---------------------------------------------------------------- the graph is what was trained


@pytest.fixture(scope="module")
def graph(made: Made) -> tuple[Path, dict[str, Any]]:
    path = made.folder / "qad.onnx"
    meta = qad.write(
        made.network, made.folder / "work" / state.FILE, made.rules,
        recovery(made.network, trainings.handwritten()), reference, preprocessing=True, opset=19, path=path,
    )  # fmt: skip
    return path, meta


def test_graph_has_the_nodes_that_post_training_quantization_gives(
    made: Made, graph: tuple[Path, dict[str, Any]]
) -> None:
    counts = [
        Counter(node.op_type for node in onnx.load(path).graph.node) for path in (made.folder / "ptq.onnx", graph[0])
    ]
    assert counts[0] == counts[1]
    assert counts[0]["QuantizeLinear"] > 4
    assert graph[1]["quantized"] == made.quantized["quantized"]


@pytest.mark.parametrize("optimizations", [True, False])
def test_graph_is_as_accurate_as_the_simulation(
    made: Made, graph: tuple[Path, dict[str, Any]], optimizations: bool
) -> None:
    data = trainings.handwritten()
    batch = next(iter(data.test.batches([np.arange(len(data.test))])))
    simulation = made.loaded(made.folder / "work" / state.FILE)
    args, _ = graph_inputs(made.network, batch.inputs, preprocessing=True)
    wanted = simulation.logits(args, quantized=True).numpy()
    session = onnxruntime(optimizations=optimizations).load(graph[0], 1)
    found = session(batch.inputs)["logits"]
    session.close()
    right = [float((logits.argmax(1) == batch.labels).mean()) for logits in (wanted, found)]
    assert abs(right[0] - right[1]) <= 0.001
    assert right[0] > 0.9
    assert float(np.abs(wanted - found).mean()) < 0.01 * float(wanted.std())


def test_simulation_and_graph_are_compared_when_it_is_written(made: Made, graph: tuple[Path, dict[str, Any]]) -> None:
    found = graph[1]["simulated"]
    assert found["samples"] == 143
    assert abs(found["simulated"] - found["graph"]) <= 1 / 143

    class Wrong:
        """A runtime that computes something else."""

        def __init__(self, path: Path) -> None:
            self.session = reference(path)
            self.close = self.session.close

        def __call__(self, given: Arrays) -> Arrays:
            return {name: -value for name, value in self.session(given).items()}

    with pytest.raises(ParityError, match=r"of the graph, 0\.\d+ of the simulated network"):
        qad.write(
            made.network, made.folder / "work" / state.FILE, made.rules,
            recovery(made.network, trainings.handwritten()), cast("Any", Wrong), preprocessing=True, opset=19,
            path=made.folder / "wrong.onnx",
        )  # fmt: skip


# ---------------------------------------------------------------- other networks


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_several_inputs_of_which_one_is_tokens(rules: QuantizationRules, tmp_path: Path) -> None:
    data, network = trainings.two_inputs(96), trainings.two_input_network(0)
    quantize.quantize(
        network, Calibration(data), rules, opset=19, preprocessing=True, path=tmp_path / "ptq.onnx", say=silent,
        method=("minmax",), task=trainings.task(), keep=tmp_path / "start",
    )  # fmt: skip
    teachers, work = recovery(network, data, epochs=1, batch_size=32), tmp_path / "work"
    work.mkdir()
    meta = qad.train(network, tmp_path / "start", rules, teachers, KD, preprocessing=True, work=work, say=silent)
    assert meta["steps"] == 3
    found = qad.write(
        network, work / state.FILE, rules, teachers, reference, preprocessing=True, opset=19,
        path=tmp_path / "qad.onnx",
    )  # fmt: skip
    assert cast("Any", found["simulated"])["samples"] == 96


# ---------------------------------------------------------------- which losses, which result


def test_losses_of_layers_are_left_out_and_the_tasks_own_stand_in() -> None:
    task = trainings.task()

    def trained(*names: str) -> Artifact:
        return Artifact("student", "k", Path(), {"losses": {"student": [{"name": name} for name in names]}})

    def kept(artifact: Artifact) -> list[str]:
        return [term.part.name for term in qad.terms(artifact, task)]

    assert kept(trained("kd", "srd", "ce")) == ["kd", "ce"]
    assert kept(trained("hint")) == ["kd", "ce"]
    assert kept(Artifact("weights", "k", Path(), {})) == ["kd", "ce"]


def test_the_one_that_loses_less_is_better() -> None:
    loss = Loss(100, 20.0, 0.1, 0.05, expected_drop=0.01, drop=0.02, drop_error=0.01)
    assert qad.better(replace(loss, drop=0.0, expected_drop=0.02), loss)
    assert not qad.better(replace(loss, drop=0.04, expected_drop=0.0), loss)
    assert qad.better(replace(loss, drop=0.025, expected_drop=0.005), loss), "half a standard error tells nothing"
    assert not qad.better(loss, loss)
    assert not qad.better(replace(loss, drop=None, expected_drop=0.02), replace(loss, drop=None))
    assert qad.better(replace(loss, drop=None, expected_drop=0.0), replace(loss, drop=None))


def test_key_depends_on_what_is_trained_and_not_on_the_disk() -> None:
    data, network = trainings.handwritten(), networks.small()
    plain = recovery(network, data)

    def key(which: qad.Recovery, losses: tuple[LossTerm, ...] = KD) -> str:
        return json.dumps(qad.identity(which, losses), sort_keys=True)

    assert key(plain) == key(replace(plain, options=replace(plain.options, cache_gb=1.0)))
    assert key(plain) != key(replace(plain, options=replace(plain.options, epochs=4)))
    assert key(plain) != key(replace(plain, seed=1))
    assert key(plain) != key(plain, (loss_term("ce", "loss"),))
