"""The ladder stops where int8 holds, goes on where it does not, and never keeps what is worse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from rules import BOARD, HOST
from wide_networks import chain, simulated

from edgekd import plugins
from edgekd.backends.onnxruntime import fused, onnxruntime
from edgekd.errors import DataError, RecipeError
from edgekd.models.network import Network
from edgekd.quantize import quantize, told
from edgekd.quantize.ladder import Ladder
from edgekd.quantize.measured import Loss, measure
from edgekd.quantize.samples import Halves
from edgekd.types import Batch, Json, Part, QuantizationRules, Task

RULES = pytest.mark.parametrize("rules", [HOST, BOARD], ids=["host", "board"])


def silent(event: str, /, **fields: Json) -> None:
    """Nobody listens."""


def calibration(network: Network, count: int = 64) -> list[dict[str, np.ndarray]]:
    return [networks.samples(network.inputs, 32, seed) for seed in range(count // 32)]


def made(network: Network, rules: QuantizationRules, path: Path, **options: Any) -> dict[str, Any]:
    batches = options.pop("batches", calibration(network, 256))
    return quantize(network, batches, rules, opset=19, preprocessing=True, path=path, say=silent, **options)


def agreement(network: Network, path: Path) -> float:
    given = networks.samples(network.inputs, 256, seed=99)
    wanted = networks.logits(network, given)["logits"].argmax(1)
    return float((onnxruntime(optimizations=False).load(path, 1)(given)["logits"].argmax(1) == wanted).mean())


@RULES
def test_an_easy_network_takes_the_first_rung(rules: QuantizationRules, tmp_path: Path) -> None:
    network = chain(sure=4)
    meta = made(network, rules, tmp_path / "m.onnx")
    assert [one["methods"] for one in meta["methods"]] == [["minmax"]]
    assert meta["methods"][0]["kept"]
    assert meta["methods"][0]["within"]
    assert meta["samples"] == 256
    assert agreement(network, tmp_path / "m.onnx") >= 0.95


@RULES
def test_a_hard_network_is_brought_back(rules: QuantizationRules, tmp_path: Path) -> None:
    network = chain(wide=2.5, sure=4)
    plain = made(network, rules, tmp_path / "plain.onnx", method=["minmax"])
    meta = made(network, rules, tmp_path / "auto.onnx")
    assert plain["methods"][0]["expected_drop"] > 0.05
    tried = {tuple(one["methods"]): one for one in meta["methods"]}
    assert {("minmax",), ("percentile",), ("mse",), ("equalize", "minmax", "bias")} <= set(tried)
    kept = [one for one in meta["methods"] if one["kept"]]
    assert len(kept) == 1
    assert kept[0]["methods"][0] == "equalize"
    assert kept[0]["expected_drop"] <= 0.005
    within = [one for one in meta["methods"] if one["within"]]
    assert kept[0]["divergence"] == min(one["divergence"] for one in within)
    assert agreement(network, tmp_path / "plain.onnx") < 0.6
    assert agreement(network, tmp_path / "auto.onnx") >= 0.93
    if rules is HOST:
        assert fused(tmp_path / "auto.onnx")["float"] == {}
    assert "kept: equalize" in told(meta["methods"])
    assert "128 calibration samples held out" in told(meta["methods"])


def test_what_is_asked_for_is_never_reached_and_the_best_is_kept(tmp_path: Path) -> None:
    network = chain(wide=1.0, sure=4)
    said: list[Any] = []
    meta: dict[str, Any] = quantize(
        network, calibration(network), HOST, opset=19, preprocessing=True, path=tmp_path / "m.onnx", max_drop=0.0,
        say=lambda event, /, **fields: said.append((event, fields.get("next"))),
    )  # fmt: skip
    best = min(meta["methods"], key=lambda one: (not one["within"], one["divergence"]))
    assert best["kept"]
    assert ("not yet within max_drop", "ranges") in said


def test_after_the_ladder_the_simulation_is_the_best_attempt() -> None:
    network = chain(wide=2.0, sure=4)
    simulation = simulated(network, ranges=None)
    ladder = Ladder(simulation, Halves(network, calibration(network), True, False), max_drop=-1.0, task=None)
    ladder.climb(silent)
    losses = [attempt.loss for attempt in ladder.attempts if attempt.loss is not None]
    assert len(losses) == len(ladder.attempts) >= 7
    found = measure(simulation, ladder.samples.held_out)
    assert found.divergence == pytest.approx(min(loss.divergence for loss in losses), rel=1e-6)
    assert "rounding" in ladder.attempts[-1].methods
    assert found.samples == 32


def test_a_method_that_fails_costs_nothing_that_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an operator it does not know")

    monkeypatch.setattr("edgekd.quantize.ladder.correct_biases", fail)
    network = chain(wide=2.5, sure=4)
    meta = made(network, HOST, tmp_path / "m.onnx", batches=calibration(network))
    failed = [one for one in meta["methods"] if "problem" in one]
    assert failed
    assert all("bias" in one["methods"] for one in failed)
    assert meta["quantizer"] == "pt2e"
    assert "failed: an operator it does not know" in told(meta["methods"])


# ---------------------------------------------------------------- what the user asks for


def test_named_methods_are_applied_and_nothing_else(tmp_path: Path) -> None:
    network = chain(wide=1.0)
    meta = made(network, HOST, tmp_path / "m.onnx", method=["rounding", "mse", "equalize"])
    assert [one["methods"] for one in meta["methods"]] == [["equalize", "mse", "rounding"]]
    assert meta["methods"][0]["kept"]


def test_layers_left_in_float(tmp_path: Path) -> None:
    network = networks.small()
    meta = made(network, HOST, tmp_path / "m.onnx", float_layers=["squeeze", "head"])
    assert meta["quantized"] == ["stem.0", "depthwise.0", "project.0"]
    assert set(meta["float"]) == {"squeeze.1", "squeeze.3", "head"}
    with pytest.raises(RecipeError, match="no layer 'squeze'") as problem:
        made(network, HOST, tmp_path / "m.onnx", float_layers=["squeze"])
    assert problem.value.where == "quantize.float_layers"


def test_samples_that_can_be_read_but_once_are_refused(tmp_path: Path) -> None:
    network = chain()
    with pytest.raises(DataError, match="only once"):
        made(network, HOST, tmp_path / "m.onnx", batches=iter(calibration(network)))


# ---------------------------------------------------------------- the samples and the figures


def test_the_two_halves_share_no_sample() -> None:
    network = chain()
    batches = [{"image": np.full((count, 8, 8, 3), 0, np.uint8)} for count in (3, 1, 4)]
    for number, image in enumerate(image for batch in batches for image in batch["image"]):
        image[:] = number
    halves = Halves(network, batches, True, False)

    def numbers(parts: list[torch.Tensor]) -> list[int]:
        return [int(image[0, 0, 0]) for part in parts for image in part]

    assert numbers([inputs[0] for inputs in halves.ranging]) == [0, 2, 4, 6]
    assert numbers([inputs[0] for inputs, _ in halves.held_out]) == [1, 3, 5, 7]
    one = Halves(network, [{"image": batches[0]["image"][:1]}], True, True)
    assert [len(inputs[0]) for inputs, _ in one.held_out] == [1]


def task(name: str) -> Task:
    made: Task = plugins.build("tasks", Part(name))
    return made


class Fixed:
    """A simulation whose logits are given: the float ones and the quantized ones."""

    def __init__(self, wanted: list[list[float]], found: list[list[float]]) -> None:
        self.wanted, self.found = torch.tensor(wanted), torch.tensor(found)

    def logits(self, inputs: Any, *, quantized: bool) -> torch.Tensor:
        return (self.found if quantized else self.wanted)[inputs[0]]


def loss_of(fixed: Fixed, labels: np.ndarray | None = None, of: Task | None = None) -> Loss:
    rows = torch.arange(len(fixed.wanted)).split(2)  # type: ignore[no-untyped-call]
    batches = [((part,), None if labels is None else labels[part.numpy()]) for part in rows]
    return measure(fixed, batches, of)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "sqnr_db"), [([[0.5, 0.1]], None), ([[math.inf, 0.1]], -1000.0), ([[math.nan, 0.1]], -1000.0)]
)
def test_figures_are_numbers_that_json_knows(found: list[list[float]], sqnr_db: float | None) -> None:
    figures = loss_of(Fixed([[0.5, 0.1]], found), np.array([0]), task("classification")).to_json()
    json.dumps(figures, allow_nan=False)
    assert figures["sqnr_db"] == sqnr_db
    kept: dict[str, Any] = {"methods": ["minmax"], "kept": True} | figures
    assert ("no error" in told([kept])) == (sqnr_db is None)


def test_no_signal_and_some_noise_is_no_perfect_match() -> None:
    assert loss_of(Fixed([[0.0, 0.0]], [[0.1, 0.0]])).sqnr_db == -math.inf


def test_figures_by_hand() -> None:
    log = [[float(np.log(p)) for p in row] for row in ((0.5, 0.3, 0.2), (0.6, 0.4, 1e-9), (0.9, 0.1, 1e-9))]
    changed = [log[0], [log[1][1], log[1][0], log[1][2]], log[2]]  # the second sample decides otherwise
    loss = loss_of(Fixed(log, changed), np.array([0, 0, 1]), task("classification"))
    assert loss.samples == 3
    assert loss.changed == pytest.approx(1 / 3)
    assert loss.expected_drop == pytest.approx((0.6 - 0.4) / 3, abs=1e-6)
    assert loss.divergence == pytest.approx((0.6 * np.log(0.6 / 0.4) + 0.4 * np.log(0.4 / 0.6)) / 3, abs=1e-6)
    assert loss.drop == pytest.approx(1 / 3)
    assert loss.drop_error == pytest.approx(float(np.std([0, 1, 0]) / np.sqrt(3)))
    noise = 2 * (log[1][0] - log[1][1]) ** 2
    assert loss.sqnr_db == pytest.approx(10 * np.log10(np.square(log).sum() / noise), abs=1e-4)
    same = loss_of(Fixed(log, log))
    assert (same.divergence, same.expected_drop, same.changed, same.drop) == (0, 0, 0, None)
    assert same.within(0)


def test_figures_of_labels_and_of_values_by_hand() -> None:
    flags = loss_of(Fixed([[2.0, -1.0]], [[2.0, 1.0]]), of=task("multilabel"))
    assert flags.changed == pytest.approx(0.5)
    assert flags.expected_drop == pytest.approx((1 / (1 + np.exp(-1.0)) * 2 - 1) / 2)
    values = loss_of(Fixed([[0.0], [2.0], [4.0]], [[0.0], [2.0], [3.0]]), of=task("regression"))
    assert values.expected_drop == pytest.approx((1 / 3) / (8 / 3))
    assert values.changed is None


def test_a_network_that_gives_no_numbers_is_never_within() -> None:
    loss = loss_of(Fixed([[1.0, 0.0]], [[float("nan"), 0.0]]))
    assert not loss.within(1.0)


@pytest.mark.parametrize(
    ("expected", "drop", "error", "within"),
    [(0.004, None, None, True), (0.006, None, None, False), (0.001, 0.008, 0.004, True), (0.001, 0.02, 0.004, False)],
)
def test_within_knows_the_noise_of_few_labels(
    expected: float, drop: float | None, error: float | None, within: bool
) -> None:
    assert Loss(256, 30.0, 0.001, 0.01, expected, drop, error).within(0.005) is within


def test_labels_are_measured_where_they_are_known(tmp_path: Path) -> None:
    network = chain(sure=4)
    batches = []
    for given in calibration(network):
        labels = networks.logits(network, given)["logits"].argmax(1)
        batches.append(Batch(np.arange(32), given, labels))
    meta = made(network, HOST, tmp_path / "m.onnx", batches=batches, task=task("classification"))
    first = meta["methods"][0]
    assert first["drop"] == pytest.approx(first["changed"])  # the labels are the float network's own decisions
    assert "measured" in told(meta["methods"])
