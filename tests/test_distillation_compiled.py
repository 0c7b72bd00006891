"""torch.compile: tried where it may pay, used where it does, and then with taps, resume and results as without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.data.digits import digits
from edgekd.distillation import compiled, distill
from edgekd.distillation.precision import Choice
from edgekd.errors import EdgekdError
from edgekd.models.network import Network
from edgekd.recipe import loss_term
from edgekd.types import Augment, Json, Part, Preprocessing, TrainOptions

Asked = Literal["auto", "on", "off"]
CPU = torch.device("cpu")
PLAIN, MADE = cast("Network", nn.Identity()), cast("Network", nn.Identity())


class Clock:
    """Seconds that pass only while a network runs, and how often each did."""

    def __init__(self, plain_s: float, compiled_s: float, compiling_s: float) -> None:
        self.now_s = 0.0
        self.runs = {"plain": 0, "compiled": 0}
        self._plain_s, self._compiled_s, self._compiling_s = plain_s, compiled_s, compiling_s

    def run(self, network: Network) -> None:
        if network is PLAIN:
            self.runs["plain"] += 1
            self.now_s += self._plain_s
        else:
            self.runs["compiled"] += 1
            self.now_s += self._compiling_s if self.runs["compiled"] == 1 else self._compiled_s


def _decided(monkeypatch: pytest.MonkeyPatch, clock: Clock, steps: int, against: str = "") -> Choice:
    monkeypatch.setattr("edgekd.distillation.compiled.time.perf_counter", lambda: clock.now_s)
    monkeypatch.setattr(compiled, "_compiled", lambda network: MADE)
    monkeypatch.setattr(compiled, "unable", lambda: "")
    return compiled.decided(
        Choice("fp32", "as asked"), PLAIN, clock.run, asked="auto", steps=steps, device=CPU, against=against
    )


def test_it_has_to_save_a_tenth_after_what_compiling_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    # 100 min of computing; a second shape is compiled too: 70 min, and 10 of compiling
    pays = _decided(monkeypatch, Clock(0.6, 0.42, 300.0), 10_000)
    assert pays.compiled
    assert pays.compile_reason == (
        "600 ms a batch, compiled 420 ms, and 600 s of compiling: 20.0 of 100.0 min saved"
    )  # fmt: skip
    assert not _decided(monkeypatch, Clock(0.6, 0.5, 300.0), 10_000).compiled  # 7 saved
    slower = _decided(monkeypatch, Clock(0.6, 0.7, 60.0), 10_000)
    assert not slower.compiled
    assert "18.7 of 100.0 min lost" in slower.compile_reason


def test_a_short_training_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.6, 0.1, 10.0)
    chosen = _decided(monkeypatch, clock, 900)
    assert chosen == Choice("fp32", "as asked", False, "9.0 min of computing are too few to try it")
    assert clock.runs == {"plain": 1, "compiled": 0}
    nothing = _decided(monkeypatch, clock, 0)
    assert nothing.compile_reason == "nothing is left to compute"
    assert clock.runs == {"plain": 1, "compiled": 0}


def test_what_stands_against_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.6, 0.1, 10.0)
    assert _decided(monkeypatch, clock, 10_000, "the moon").compile_reason == "the moon"
    assert clock.runs["compiled"] == 0
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert compiled.unable() == "there is no C++ compiler here (/no/such/compiler)"
    with pytest.raises(EdgekdError, match="cannot be compiled: there is no C\\+\\+ compiler"):
        compiled.decided(Choice("fp32", ""), PLAIN, clock.run, asked="on", steps=9, device=CPU)
    off = compiled.decided(Choice("fp32", ""), PLAIN, clock.run, asked="off", steps=9, device=CPU)
    assert (off.compiled, off.compile_reason) == (False, "as asked")


def test_what_fails_when_it_is_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Clock):
        def run(self, network: Network) -> None:
            super().run(network)
            if network is MADE:
                raise RuntimeError("backend failed\nmore")

    chosen = _decided(monkeypatch, Failing(0.6, 0.1, 10.0), 10_000)
    assert not chosen.compiled
    assert chosen.compile_reason == "compiled it does not run: backend failed"


# ---------------------------------------------------------------- with torch's compiler


class Small(nn.Module):
    """Batch normalisation, and layers to tap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Linear(16 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(self.conv(x)).relu().flatten(1))
        return logits


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def _run(
    work: Path, student: Network, teacher: Network, asked: Asked, stop: int = 0
) -> tuple[dict[str, Json], list[str]]:
    work.mkdir(exist_ok=True)
    events: list[str] = []

    def say(event: str, /, **fields: Json) -> None:
        events.append(event)
        if event == "epoch" and fields["epoch"] == stop:
            raise Interrupted

    options = TrainOptions(epochs=2, batch_size=512, learning_rate=0.05, precision="fp32", threads=1)
    torch.manual_seed(0)  # of the projectors
    meta = distill(
        student, teacher, digits(0), [loss_term({"name": name}, "loss") for name in ("kd", "srd")],
        replace(options, compile=asked), Augment(crop_pixels=1), task=plugins.build("tasks", Part("classification")),
        seed=0, work=work, cache=None, say=say,
    )  # fmt: skip
    return meta, events


def _networks() -> Callable[[], tuple[Network, Network]]:
    torch.manual_seed(0)
    preprocessing, inputs = Preprocessing((8, 8), (0.5,), (0.5,)), digits(0).inputs
    made = Network(Small(4), inputs, preprocessing), Network(Small(8), inputs, preprocessing)
    return lambda: copy.deepcopy(made)


@pytest.mark.slow
def test_compiled_networks_learn_the_same_and_resume_to_the_bit(tmp_path: Path) -> None:
    networks = _networks()
    plain, _ = networks()
    _run(tmp_path / "plain", plain, networks()[1], "off")
    student, teacher = networks()
    meta, events = _run(tmp_path / "a", student, teacher, "on")
    assert (meta["compiled"], meta["compile_reason"]) == (True, "as asked")
    assert events.count("compile") == 2
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())
    expected = plain.module.state_dict()
    for name, value in student.module.state_dict().items():
        np.testing.assert_allclose(value, expected[name], rtol=0.05, atol=0.01, err_msg=name)
    again, teacher = networks()
    with pytest.raises(Interrupted):
        _run(tmp_path / "b", again, teacher, "on", stop=1)
    _, events = _run(tmp_path / "b", again, teacher, "on")
    assert "resumed" in events
    for name, value in student.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value), name
