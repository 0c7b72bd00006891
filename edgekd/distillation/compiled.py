"""torch.compile, where a measurement shows that it pays over what is left of a training."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

import torch

from edgekd.distillation.precision import Choice
from edgekd.errors import EdgekdError
from edgekd.models.network import Network

LEAST_S = 600.0  # of computing that is ahead; below, nothing is tried
WORTH = 0.1  # of that time it has to save, after what compiling takes
_SHAPES = 2  # that are compiled: of a whole batch, and of the last one of an epoch
_ROUNDS, _LONGEST_S = 5, 4.0


def decided(
    choice: Choice,
    network: Network,
    run: Callable[[Network], None],
    *,
    asked: Literal["auto", "on", "off"],
    steps: int,
    device: torch.device,
    against: str = "",
) -> Choice:
    """The choice with whether the network is to be compiled for so many steps.

    Args:
        choice: what it computes in.
        network: what would be compiled; it is left as it is.
        run: does one step with the network, compiled or not, with all that training does with it: where a tensor
            that is tapped inside does not come out, it raises.
        asked: "auto": it is tried where ten minutes of computing are ahead, and used where it saves a tenth of them.
        steps: that are ahead.
        against: why it must not be compiled, or nothing.

    Raises:
        EdgekdError: it was asked for and cannot be done.
    """
    if asked == "off":
        return replace(choice, compile_reason="as asked")
    if not steps:
        return replace(choice, compile_reason="nothing is left to compute")
    against = against or unable()
    if asked == "on":
        against = against or _failure(network, run)
        if against:
            raise EdgekdError(f"the network cannot be compiled: {against}", where="compile", fix='say compile = "auto"')
        return replace(choice, compiled=True, compile_reason="as asked")
    ahead_s = steps * _shortest(lambda: run(network), device, rounds=1)  # at most: the first run is the slowest
    if ahead_s < LEAST_S:
        return replace(choice, compile_reason=f"{ahead_s / 60:.1f} min of computing are too few to try it")
    if against:
        return replace(choice, compile_reason=against)
    return _measured(choice, network, run, steps, device)


def as_chosen(network: Network, choice: Choice) -> Network:
    """The network to call: itself, or compiled, with the same weights and hooks."""
    return _compiled(network) if choice.compiled else network


def unable() -> str:
    """Why this machine cannot compile, or nothing."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    if any(shutil.which(each) for each in compilers):
        return ""
    return f"there is no C++ compiler here ({', '.join(compilers)})"


def _compiled(network: Network) -> Network:
    # A batch has one of two sizes, and kernels for any size are slower than those for one.
    return cast("Network", torch.compile(network, dynamic=False))  # torch's wrapper has its attributes


def _measured(
    choice: Choice, network: Network, run: Callable[[Network], None], steps: int, device: torch.device
) -> Choice:
    plain_s = _shortest(lambda: run(network), device)
    if plain_s * steps < LEAST_S:
        return replace(choice, compile_reason=f"{plain_s * steps / 60:.1f} min of computing are too few to try it")
    begun_s = time.perf_counter()
    failed = _failure(network, run)
    if failed:
        return replace(choice, compile_reason=failed)
    compiling_s = _SHAPES * (time.perf_counter() - begun_s)
    made = _compiled(network)
    compiled_s = _shortest(lambda: run(made), device)
    saved_s = (plain_s - compiled_s) * steps - compiling_s
    reason = (
        f"{1e3 * plain_s:.3g} ms a batch, compiled {1e3 * compiled_s:.3g} ms, and {compiling_s:.0f} s of compiling: "
        f"{abs(saved_s) / 60:.1f} of {plain_s * steps / 60:.1f} min {'saved' if saved_s > 0 else 'lost'}"
    )
    return replace(choice, compiled=saved_s > WORTH * plain_s * steps, compile_reason=reason)


def _failure(network: Network, run: Callable[[Network], None]) -> str:
    """Why the network does not run compiled, or nothing: torch raises a RuntimeError for all that it cannot compile."""
    try:
        run(_compiled(network))
    except (RuntimeError, EdgekdError) as problem:
        return f"compiled it does not run: {(str(problem).strip() or type(problem).__name__).splitlines()[0]}"
    return ""


def _shortest(run: Callable[[], None], device: torch.device, rounds: int = _ROUNDS) -> float:
    """Seconds of the shortest of a few runs: other programs only ever lengthen them."""
    shortest_s = float("inf")
    begun_s = time.perf_counter()
    for _ in range(rounds):
        start_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        shortest_s = min(shortest_s, time.perf_counter() - start_s)
        if time.perf_counter() - begun_s > _LONGEST_S:
            break
    return shortest_s
