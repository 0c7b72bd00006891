"""Reports to test with: realistic ones, and each edge of what a run may leave behind."""

from __future__ import annotations

import dataclasses
from typing import Any

from edgekd.bench.accuracy import paired_difference, wilson
from edgekd.bench.conditions import environment
from edgekd.outcome import Candidate, Layer, LayerPair, Matched, Search
from edgekd.report import choose, concluded, judge
from edgekd.types import (
    Budget,
    Comparison,
    Estimate,
    Interval,
    Latency,
    LayerSensitivity,
    LossTerm,
    Parity,
    Part,
    Precision,
    Report,
    Sensitivity,
    Stage,
    Training,
    Variant,
)

NO_BOARD = "TensorRT is not installed here; run.py --bench in the bundle measures it on the board"
BUDGET = Budget(max_accuracy_drop=0.01, max_latency_ms=5.0, max_size_bytes=400_000)


def latency(p50: float, *, spread: float = 0.01, device: str = "AMD EPYC", **changes: Any) -> Latency:
    """A plausible latency around a median, in milliseconds."""
    made = Latency(
        p50=p50, p90=p50 * 1.04, p99=p50 * 1.19, mean=p50 * 1.02, n=9200,
        low=p50 * (1 - spread), high=p50 * (1 + spread), origin="host", device=device, threads=1, power_mode=None,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def variant(
    name: str, stage: Stage, *, target: str | None = None, precision: Precision = "fp32", **given: Any
) -> Variant:
    """A row with nothing measured but what is given."""
    empty: dict[str, Any] = {field.name: None for field in dataclasses.fields(Variant)}
    empty |= {"id": name, "stage": stage, "target": target, "precision": precision, "estimates": ()}
    empty |= {"missing": {}, "metrics": {}}
    return Variant(**(empty | given))


def scored(hits: int, teacher_hits: int, n: int) -> dict[str, Any]:
    """Accuracy, drop and agreement of a variant that is right on `hits` of n samples, mostly the teacher's."""
    lost = max(teacher_hits - hits, 0) + min(2, n - teacher_hits)
    won = hits - teacher_hits + lost
    drop = paired_difference(teacher_hits - lost, lost, won, n - teacher_hits - won)
    return {"accuracy": wilson(hits, n), "drop": drop, "agreement": 1 - (lost + won) / n}


def realistic(*, n: int = 450, budget: Budget = BUDGET) -> Report:
    """Two targets: this machine, measured, and Jetson without a board; digits, a teacher of 272 kparameters."""
    top = round(n * 0.9933)
    host, jetson = {"target": "host"}, {"target": "jetson"}
    no_latency = {"latency_ms": NO_BOARD, "peak_memory_bytes": NO_BOARD, "energy_mj": "no power sensor was found"}
    host_missing = {"energy_mj": "no power sensor was found"}
    estimates = tuple(
        Estimate(device, mode, bound, None, None, None)
        for device, mode, bound in (
            ("Jetson Orin Nano 8 GB Super", "15W", 0.0061), ("Jetson Orin Nano 8 GB Super", "25W", 0.0041),
            ("Jetson AGX Orin 64 GB", "MAXN", 0.0014),
        )
    )  # fmt: skip
    weights_missing = {
        "latency_ms": "weights are not deployed; their ONNX file is timed", "path": "kept in the store",
        "peak_memory_bytes": "weights are not deployed; their ONNX file is timed",
        "parity": "nothing stands before it", "energy_mj": "no power sensor was found",
    }  # fmt: skip
    ort = "onnxruntime 1.32.0"
    tiny: dict[str, Any] = {"parameters": 17_674, "macs": 1_031_000}
    same = scored(top - 1, top, n)
    exact, halved = Parity(2.9e-6, 0.99999999, 64), Parity(4.1e-3, 0.999998, 64)
    on_host: dict[str, Any] = {**host, **tiny, "runtime": ort, "missing": host_missing}
    on_jetson: dict[str, Any] = {**jetson, **tiny, "estimates": estimates, "missing": no_latency}
    rows = [
        variant("teacher", "teacher", runtime=ort, size_bytes=1_094_000, parameters=272_474, macs=10_153_000,
                accuracy=wilson(top, n), latency_ms=latency(1.118), peak_memory_bytes=9_830_000,
                missing={"parity": "nothing stands before it", "energy_mj": "no power sensor was found"}),
        variant("student", "student", size_bytes=74_300, **tiny, **same, missing=weights_missing),
        variant("host-fp32", "onnx", **on_host, path="models/host/fp32.onnx", sha256="a" * 64, size_bytes=76_900,
                **same, parity=exact, latency_ms=latency(0.2184), peak_memory_bytes=3_120_000),
        variant("host-fp16", "onnx", **on_host, precision="fp16", path="models/host/fp16.onnx", size_bytes=40_100,
                **same, parity=halved, latency_ms=latency(0.311), peak_memory_bytes=3_520_000),
        variant("host-int8", "quantized", **on_host, precision="int8", path="models/host/int8.onnx", size_bytes=29_800,
                **same, parity=Parity(0.41, 0.99912, 64), latency_ms=latency(0.1329, spread=0.02),
                peak_memory_bytes=2_710_000),
        variant("jetson-fp32", "onnx", **on_jetson, path="models/jetson/fp32.onnx", size_bytes=76_900, **same,
                parity=exact),
        variant("jetson-fp16", "onnx", **on_jetson, precision="fp16", path="models/jetson/fp16.onnx", size_bytes=40_100,
                **same, parity=halved),
        variant("jetson-int8", "quantized", **on_jetson, precision="int8", path="models/jetson/int8.onnx",
                size_bytes=33_400, **scored(top - 9, top, n), parity=Parity(0.83, 0.9961, 64)),
    ]  # fmt: skip
    comparisons = (
        Comparison("host-fp32", "teacher", Interval(0.1953, 0.1941, 0.1967, 40), "faster"),
        Comparison("host-int8", "host-fp32", Interval(0.6085, 0.599, 0.619, 40), "faster"),
        Comparison("host-fp16", "host-fp32", Interval(1.424, 1.41, 1.44, 40), "slower"),
    )
    return finished(rows, budget, comparisons=comparisons, training=taught(), correspondence=(matched(),))


def of_values() -> Report:
    """A regression: R², which may be below 0, with RMSE and MAE, and no agreement of values."""
    missing = {"agreement": "values are never the same"}
    host: dict[str, Any] = {"target": "host", "runtime": "onnxruntime 1.32.0", "missing": missing}
    rows = [
        variant("teacher", "teacher", accuracy=Interval(0.912, 0.89, 0.934, 400), metrics={"RMSE": 0.297, "MAE": 0.21},
                size_bytes=90_000, missing=missing),
        variant("host-fp32", "onnx", **host, accuracy=Interval(0.905, 0.88, 0.93, 400), size_bytes=30_000,
                drop=Interval(0.007, -0.002, 0.016, 400), metrics={"RMSE": 0.308, "MAE": 0.22}, latency_ms=latency(1)),
        variant("host-int8", "quantized", **host, precision="int8", accuracy=Interval(-0.2, -0.5, 0.1, 400),
                drop=Interval(1.112, 0.8, 1.4, 400), metrics={"RMSE": 1.095, "MAE": 0.9}, latency_ms=latency(0.8),
                size_bytes=9_000),
    ]  # fmt: skip
    return finished(rows, BUDGET, metric="R²")


def taught(**changes: Any) -> Training:
    """A training with a loss of outputs, one of labels and one of layers, half of it from the cache."""
    pairs = (("layer3", "layer3"), ("linear:in", "linear:in"))
    losses = (
        LossTerm(Part("kd", {"temperature": 4.0}), 0.9),
        LossTerm(Part("ce"), 0.1),
        LossTerm(Part("srd"), 1.0, pairs),
    )
    made = Training(
        teachers=("resnet56",), assistants=(), losses=losses, epochs=30, seconds=724.3, precision="bf16", recalled=0.5
    )
    return dataclasses.replace(made, **changes)


def pair(
    student: str, teacher: str, loss: str, weight: float, *, depth: float, channels: int = 64, side: int = 8,
    cka: float | None = 0.61,
) -> LayerPair:  # fmt: skip
    """Two layers at the same depth, of which the teacher's is the wider one."""
    grid = (side, side) if side else ()
    mine, theirs = Layer(student, channels, grid, depth), Layer(teacher, 2 * channels, grid, depth + 0.01)
    projector = f"{channels}>{2 * channels}" if weight else "none"
    return LayerPair(mine, theirs, loss, weight, cka, projector)


def matched(head: str | None = None) -> Matched:
    """Stages of two convolutional networks: two pairs that a loss compares, and two that were found beside them."""
    pairs = (
        pair("layer3", "layer3.8.relu", "srd", 1.0, depth=0.99),
        pair("linear:in", "head.fc:in", "srd", 1.0, depth=0.995, side=0),
        pair("layer1", "layer1", "review", 0.0, depth=0.33, channels=16, side=32, cka=None),
        pair("layer2", "layer2", "review", 0.0, depth=0.66, channels=32, side=16, cka=-0.02),
    )
    return Matched(head, "same", pairs, ("teacher: no counterpart for maxpool",))


def finished(rows: list[Variant], budget: Budget, **changes: Any) -> Report:
    """A report on these rows, judged and chosen."""
    teacher = rows[0]
    comparisons, metric = changes.get("comparisons", ()), changes.get("metric", "accuracy")
    judged = tuple(
        v if v.stage in ("teacher", "student") else dataclasses.replace(v, verdict=judge(v, teacher, budget, metric))
        for v in rows
    )
    made = Report(
        schema=1, name="digits", teacher=teacher.id, variants=judged, chosen=choose(judged, budget, comparisons),
        budget=budget, environment=environment(), recipe_sha256="5d41402abc4b2a76b9719d911017c592" * 2,
        timings_s={"teacher": 74.1, "distill": 103.4, "export": 3.2, "quantize": 21.0, "bench": 38.9},
        notes=("jetson: engines are built on the board by the bundle's run.py, since TensorRT is not installed here",),
    )  # fmt: skip
    return concluded(dataclasses.replace(made, **changes))


def searched(*, budget: Budget = BUDGET, widths: int = 10, timed: bool = True) -> Report:
    """What a search leaves: students of several widths in two precisions, of which the first three are no finalists."""
    n, top = 2000, 1960
    missing = {"energy_mj": "no power sensor was found", "peak_memory_bytes": "not asked for"}
    if not timed:
        missing["latency_ms"] = NO_BOARD
    rows = [
        variant("teacher", "teacher", size_bytes=1_094_000, accuracy=wilson(top, n), missing=missing),
        variant("host/teacher-fp32", "teacher", target="host", size_bytes=1_094_000, accuracy=wilson(top, n),
                latency_ms=latency(1.118) if timed else None, macs=10_153_000, missing=missing),
    ]  # fmt: skip
    candidates = []
    for at in range(1, widths + 1):
        name, hits = f"w{2 * at}", top + 10 - round(300 / at)
        rounds = None if at > 3 else name
        candidates.append(Candidate(name, {"width": 2.0 * at}, 30, 41.5 + at))
        own: dict[str, Any] = {"target": "host", "candidate": name, "macs": 60_000 * at * at, "missing": missing}
        for precision, shorter, lighter, lost in (("fp32", 1.0, 1.0, 0), ("int8", 0.6, 0.35, 3)):
            figures = scored(hits - lost, top, n) | {"size_bytes": round(900 * at * at * lighter) + 6000}
            took = latency(0.05 + 0.021 * at * shorter, rounds=rounds) if timed else None
            stage: Stage = "onnx" if precision == "fp32" else "quantized"
            kind: Precision = "fp32" if precision == "fp32" else "int8"
            rows.append(variant(f"host/{name}/student-{precision}", stage, precision=kind, latency_ms=took,
                                **own, **figures))  # fmt: skip
    axes = ("drop", "latency_ms" if timed else "macs", "size_bytes")
    refused = Candidate("w99", {"width": 99.0}, 30, None, "model resnet8: it cannot be built")
    search = Search(widths + 1, "Optuna 5.0.0 (TPE)", axes, (*candidates, refused), 30, 2)
    return finished(rows, budget, search=search)


def sensitive(count: int = 20, *, mixed: bool = True, hurt: bool = True, labels: bool = True) -> Sensitivity:
    """Of so many layers one costs a lot and another a little (`hurt`), and all have some error."""
    rows = []
    bad, second = count // 2, max(count // 2 - 3, 0)
    for i in range(count):
        cost = (0.061 if i == bad else 0.004 if i == second else 0.0008 * (i % 3)) if hurt else 0.0
        noise = 8.5 if i == bad and hurt else 30.0 + 7 * (i % 4)
        value = i % 11 == 9 and i not in (bad, second)
        name = f"blocks.{i // 4}.{('conv_pw', 'conv_dw', 'se', 'conv_pwl')[i % 4]}"
        rows.append(LayerSensitivity(
            layer=name, kind="value" if value else "layer", sqnr_db=noise, divergence=10 ** (-noise / 10),
            changed=cost * 2, expected_drop=cost, rest=0.007 if i == bad and mixed else None,
            drop=Interval(cost, cost - 0.01, cost + 0.012, 256) if labels else None,
            macs=0.0 if value else 1 / count, parameters=0 if value else 1200 + 10 * i,
        ))  # fmt: skip
    kept = (rows[bad].layer, rows[second].layer) if mixed else ()
    return Sensitivity(
        target="host", variant="host-int8", samples=256, layers=tuple(rows), float_layers=kept,
        mixed="host-int8-mixed" if mixed else None, whole=0.068 if hurt else 0.0002,
        remaining=0.0031 if mixed else None,
        notes=("with every layer in int8 the expected drop is 6.80%, and 0.50% is allowed",) if mixed else (),
    )  # fmt: skip
