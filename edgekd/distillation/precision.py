"""fp32 or bf16: decided by a measurement on the machine that trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from edgekd.types import Json

Computed = Literal["fp32", "bf16"]
ALL: tuple[Computed, ...] = ("bf16", "fp32")
WORTH = 1.15  # bf16 costs digits, so it has to earn its place
_ROUNDS, _LONGEST_S = 7, 4.0  # the shortest of the rounds counts, so the first ones are the warm-up


@dataclass(frozen=True, slots=True)
class Choice:
    """What a network computes in and whether it is compiled, and why."""

    precision: Computed
    reason: str
    compiled: bool = False
    compile_reason: str = "not asked for"

    def json(self) -> dict[str, Json]:
        """As it stands in meta."""
        return asdict(self)


def autocast(device: torch.device, precision: Computed) -> AbstractContextManager[Any]:
    """The context in which a forward pass computes in this precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def measured(run: Callable[[Computed], None], device: torch.device) -> Choice:
    """The faster precision of `run`; bf16 only where it is at least 1.15 times as fast.

    The two take turns, so that a change in the machine's load meets both, and the shortest times are compared, because
    other programs only ever lengthen them. It takes about four seconds at most, and longer only if single steps do.
    """
    times_s: dict[Computed, float] = {}
    began_s = time.perf_counter()
    for round_ in range(_ROUNDS):
        for precision in ("fp32", "bf16"):
            start_s = time.perf_counter()
            try:
                run(precision)
            except Exception as problem:  # a user's forward may raise anything
                if precision == "fp32":
                    raise
                told = (str(problem).strip() or type(problem).__name__).splitlines()[0]
                return Choice("fp32", f"bf16 does not run: {told}")
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken_s = time.perf_counter() - start_s
            times_s[precision] = min(taken_s, times_s.get(precision, taken_s))
        if time.perf_counter() - began_s > _LONGEST_S and round_ >= 1:
            break
    gain = times_s["fp32"] / times_s["bf16"]
    reason = f"fp32 {1e3 * times_s['fp32']:.3g} ms a batch, bf16 {1e3 * times_s['bf16']:.3g} ms ({gain:.2f}x)"
    return Choice("bf16" if gain >= WORTH else "fp32", reason)
