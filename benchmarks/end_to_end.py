"""CIFAR-10 end to end against peers: the best variant of ResNet-56 that loses a point at most, and the peers' int8.

    python benchmarks/end_to_end.py [--student shallow:shallow] [--width 32] [--epochs 40] [--pruned-macs 0.25]
    python benchmarks/end_to_end.py --table

edgekd may do all that it can: `edgekd compress` distils a student (or prunes the teacher, `--pruned-macs`) by the
losses that are its default, quantizes it and measures. The peers quantize the teacher as it is, which is all that they
offer: ONNX Runtime's `quantize_static` and NNCF, in each way that their documentation proposes (ptq.py). All files take
the same normalised images and are timed with one thread of ONNX Runtime, in interleaved rounds of one process.

One JSON line a student goes to results/end_to_end.jsonl: accuracies with intervals, paired drops against the fp32
teacher, latencies, how many times faster the best variant of at most `--max-drop` is than the teacher and than each
peer's, and both goals. What is there with the same settings is not done again; a training that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import distillation, quantize
from edgekd.bench import accuracy, compare

from ledger import CACHE_GB, DATA, HERE, RESULTS, STORE, Ledger, key  # isort: skip  # a script beside this one
from ptq import Bench, busy, files, outputs, times_of  # isort: skip
from trained import MEAN, STD, TEACHER, TEACHER_FILE, Cifar  # isort: skip

PEERS = ("ort", "nncf")
GOALS = {"over_teacher": 8.0, "over_peers": 3.0}  # times faster
RECIPE = """\
name = "end-to-end"
seed = {seed}

[data]
name = "imagefolder"
path = "{data}/cifar10/cifar10-images.zip"

[teacher]
model = "{teacher}"
weights = "{data}/teachers/{file}"
mean = {mean}
std = {std}

[student]
{student}

[distill]
epochs = {epochs}
batch_size = 128
learning_rate = {learning_rate}
precision = "bf16"
views = {views}
cache_gb = {cache_gb}
compile = "off"

[augment]
crop_pixels = 4
flip = true

[export]
preprocessing = false

[budget]
max_accuracy_drop = {max_drop}
"""


def main() -> None:
    """Run what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description="CIFAR-10 end to end against peers")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--student", default="shallow:shallow", help="a model as a recipe names it; shallow.py is one")
    parser.add_argument("--width", type=int, default=32, help="channels of its first stage")
    parser.add_argument("--pruned-macs", type=float, help="prune the teacher to this part of its MACs instead")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the training")
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, short measurements")
    parser.add_argument("--results", type=Path, default=RESULTS / "end_to_end.jsonl")
    parser.add_argument("--peers", type=Path, default=RESULTS / "ptq.jsonl", help="results of the peers on the teacher")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if not asked.table:
        run(asked, ledger)
    print(table(ledger.rows()))


def run(asked: argparse.Namespace, ledger: Ledger) -> None:
    """Compress, let the peers quantize the teacher, and time all of it, unless that was done."""
    settings = {
        "student": student(asked), "losses": "auto", "training": distillation.VERSION, "epochs": asked.epochs,
        "views": asked.views, "seed": asked.seed, "learning_rate": asked.learning_rate, "max_drop": asked.max_drop,
        "quick": asked.quick, "quantize": quantize.VERSION,
    }  # fmt: skip
    if ledger.find(settings) is not None:
        return
    begun, out = time.time(), asked.store / "end_to_end" / key(settings)
    report = compressed(asked, out)
    bench = Bench(Cifar(asked.data), TEACHER, asked.store)
    theirs = Ledger(asked.peers)
    for tool in PEERS:
        bench.run(tool, theirs)
    found = {"teacher": bench.folder / "float.onnx"} | ours(report, out)
    for tool in PEERS:
        row = theirs.find(bench.settings(tool))
        assert row is not None
        found |= {f"{tool} {file.removesuffix('.onnx')}": bench.folder / tool / file for file in files(row)}
    judged = scored(bench, found)
    timing = times_of(found, bench.sample, quick=asked.quick)
    told = summary(judged, timing.series_ns, asked.max_drop)
    ledger.add(
        settings, **told, load=busy(), notes=[*report["notes"], *timing.notes], timings_s=report["timings_s"],
        wall_s=round(time.time() - begun, 1),
    )  # fmt: skip


def student(asked: argparse.Namespace) -> str:
    """The [student] of the recipe, and [prune] where it is the pruned teacher."""
    if asked.pruned_macs is not None:
        return f'model = "pruned"\n\n[prune]\nmacs = {asked.pruned_macs}'
    return f'model = "{asked.student}"\nwidth = {asked.width}'


def compressed(asked: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What `edgekd compress` tells of its run, whose files are in `out`.

    Raises:
        SystemExit: it failed; what it says is on stderr.
    """
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "edgekd.toml"
    text = RECIPE.format(
        seed=asked.seed, data=asked.data.resolve(), teacher=TEACHER, file=TEACHER_FILE, mean=list(MEAN), std=list(STD),
        student=student(asked), epochs=asked.epochs, learning_rate=asked.learning_rate, views=asked.views,
        cache_gb=CACHE_GB, max_drop=asked.max_drop,
    )  # fmt: skip
    recipe.write_text(text.replace("compile =", f"threads = {asked.threads}\ncompile ="), encoding="utf-8")
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", "compress", str(recipe), "--target", "host"]
    command += ["--store", str(asked.store), "-o", str(out / "run"), "--json", *(["--quick"] if asked.quick else [])]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    }  # shallow.py
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables, check=False)
    if done.returncode not in (0, 3):  # 3: no variant keeps the budget, which is a result
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ours(report: Mapping[str, Any], out: Path) -> dict[str, Path]:
    """The files of the run that ONNX Runtime loads, but for the teacher's."""
    rows = [row for row in report["variants"] if row["path"] and row["stage"] != "teacher" and row["target"] == "host"]
    return {f"edgekd {row['id']}": out / "run" / row["path"] for row in rows}


def scored(bench: Bench, found: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Accuracy of each file on the test images, its drop against the fp32 teacher, and its bytes."""
    task, truth = bench.cifar.task, accuracy.labels(bench.cifar.data.test)
    images = np.load(bench.store / "ptq" / "test.npy", mmap_mode="r")
    scores = {name: task.scores(outputs(file, images), truth) for name, file in found.items()}
    return {
        name: {
            "accuracy": asdict(accuracy.mean(own)), "drop": asdict(accuracy.drop(scores["teacher"], own)),
            "size_bytes": found[name].stat().st_size,
        }
        for name, own in scores.items()
    }  # fmt: skip


def summary(
    judged: Mapping[str, Mapping[str, Any]], series_ns: Mapping[str, np.ndarray], max_drop: float
) -> dict[str, Any]:
    """The fastest of our variants that loses no more than allowed, against the teacher and the peers.

    "The best peer's int8" is the fastest one that loses no more than allowed either; where none does, the one that
    loses least.
    """
    p50_ms = {name: float(np.median(series)) / 1e6 for name, series in series_ns.items()}
    drops = {name: each["drop"]["value"] for name, each in judged.items()}
    own = [name for name in judged if name.startswith("edgekd ")]
    peers = [name for name in judged if name != "teacher" and name not in own]
    best = min((name for name in own if drops[name] <= max_drop), key=p50_ms.__getitem__, default=None)
    rival = min((name for name in peers if drops[name] <= max_drop), key=p50_ms.__getitem__, default=None)
    rival = rival or min(peers, key=drops.__getitem__)
    # Without a variant inside the budget the fastest one is told of, and the goals are missed.
    shown = best or min(own, key=p50_ms.__getitem__)
    compared = compare.pairs(series_ns, [(other, shown) for other in ("teacher", *peers)])
    times_faster = {each.candidate: asdict(each.ratio) for each in compared}
    return {
        "variants": {name: {**each, "p50_ms": p50_ms[name]} for name, each in judged.items()},
        "best": best, "shown": shown, "best_peer": rival, "times_faster": times_faster,
        "goals": {
            "drop": best is not None,
            "over_teacher": best is not None and times_faster["teacher"]["value"] >= GOALS["over_teacher"],
            "over_peers": best is not None and times_faster[rival]["value"] >= GOALS["over_peers"],
        },
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a variant, then what came of the goals, for each student."""
    lines = list[str]()
    for row in rows:
        lines += [f"{row['settings']['student']!r}, {row['settings']['epochs']} epochs", ""]
        lines += ["| variant | accuracy | drop, points | KB | ms | times slower than the best |", "|---" * 6 + "|"]
        for name, each in row["variants"].items():
            ratio = row["times_faster"].get(name)
            cells = [name, f"{100 * each['accuracy']['value']:.2f}", f"{100 * each['drop']['value']:+.2f}"]
            cells += [f"{each['size_bytes'] / 1000:.0f}", f"{each['p50_ms']:.3f}"]
            cells += [f"{ratio['value']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})" if ratio else ""]
            lines.append(f"| {' | '.join(cells)} |")
        reached = ", ".join(f"{name}: {'reached' if met else 'missed'}" for name, met in row["goals"].items())
        lines += ["", f"best: {row['best']}; best peer's: {row['best_peer']}; {reached}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
