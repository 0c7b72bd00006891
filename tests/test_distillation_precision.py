"""fp32 or bf16: chosen by a measurement, told, kept, and without a trace of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from trainings import OPTIONS, Interrupted, Told, state, taught

from edgekd.distillation import precision
from edgekd.types import Json


def _measured(monkeypatch: pytest.MonkeyPatch, fp32_s: float, bf16_s: float | Callable[[], float]) -> precision.Choice:
    clock = [0.0]
    monkeypatch.setattr("edgekd.distillation.precision.time.perf_counter", lambda: clock[0])

    def run(computed: precision.Computed) -> None:
        took_s = fp32_s if computed == "fp32" else bf16_s
        clock[0] += took_s() if callable(took_s) else took_s

    return precision.measured(run, torch.device("cpu"))


def test_bf16_has_to_earn_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _measured(monkeypatch, 0.116, 0.100).precision == "bf16"
    chosen = _measured(monkeypatch, 0.114, 0.100)
    assert chosen.precision == "fp32"
    assert "1.14x" in chosen.reason
    assert "114 ms" in chosen.reason
    slow_start = iter([9.0] + [0.1] * 20)
    assert _measured(monkeypatch, 0.2, lambda: next(slow_start)).precision == "bf16"


@pytest.mark.parametrize("kind", [RuntimeError, TypeError])  # the second of numpy in a user's forward
def test_a_network_that_bf16_cannot_run_stays_in_fp32(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> float:
        raise kind("not implemented for 'BFloat16'\nmore")

    chosen = _measured(monkeypatch, 0.1, refuse)
    assert chosen == precision.Choice("fp32", "bf16 does not run: not implemented for 'BFloat16'")


def test_the_choice_is_told_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(OPTIONS, precision="auto")
    measured: list[precision.Computed] = []

    def choose(run: Callable[[precision.Computed], None], device: torch.device) -> precision.Choice:
        run("fp32")
        run("bf16")
        measured.append("bf16")
        return precision.Choice("bf16", "measured")

    monkeypatch.setattr(precision, "measured", choose)
    told = Told("epoch", 1)
    with pytest.raises(Interrupted):
        taught(tmp_path, told, options=options)
    assert [fields["step"] for fields in told.of("precision")] == ["distill", "teacher"]
    monkeypatch.setattr(precision, "measured", None)
    meta = taught(tmp_path, options=options)
    assert len(measured) == 2
    assert meta["precision"] == "bf16"
    assert meta["precision_reason"] == "measured"
    (teacher,) = cast("list[dict[str, Json]]", meta["teachers"])
    assert (teacher["precision"], teacher["reason"]) == ("bf16", "measured")
    # the measurement leaves no trace: a training that is asked for bf16 gives the same bits
    taught(tmp_path / "asked", options=replace(OPTIONS, precision="bf16"))
    assert state(tmp_path) == state(tmp_path / "asked")
