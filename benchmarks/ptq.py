"""Post-training quantization against ONNX Runtime, NNCF and ai-edge-quantizer, on the networks of trained.py.

    python benchmarks/ptq.py [--models mobilenetv3_small …] [--tools edgekd ort nncf litert] [--latency]
    python benchmarks/ptq.py --table

The same trained network, the same 512 calibration images (held out of training) and the same 5,000 test images for
all. edgekd is called as a recipe without a [quantize] section calls it; the peers as their documentation says, in each
of the ways it proposes: every way is a line, and the best of them counts. The drop is paired, sample by sample, against
the fp32 network on the same runtime. Files that run on ONNX Runtime are timed against each other, one thread, in
interleaved rounds of one process; what runs on its own runtime alone (OpenVINO's IR, LiteRT) tells its own fp32 time
beside it.

One JSON line for each network and tool goes to results/ptq.jsonl, one for ours beside the best of all peers' ways on
the same images to results/ptq-against.jsonl, and one for each network's latencies to results/ptq-latency.jsonl; what is
there with the same settings is not done again. The peers' environments are made once in benchmarks/.store/peers
(ptq_peers/requirements-*.txt: 0.7 and 6 GB); trained.py must have run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgekd import export, plugins, quantize
from edgekd import target as targets
from edgekd.bench import accuracy, compare, latency
from edgekd.deploy import Calibration
from edgekd.models.network import Network
from edgekd.store import sha256_of
from edgekd.types import Arrays, Backend, Interval, Session, Split

from ledger import DATA, RESULTS, STORE, Ledger  # isort: skip  # a script beside this one
from trained import TEACHER, TRAINEES, Cifar, path, trained  # isort: skip
from vit import say  # isort: skip

HERE = Path(__file__).resolve().parent
PEERS = HERE / "ptq_peers"
ENVIRONMENTS = {"ort": "onnx", "nncf": "onnx", "litert": "litert"}  # tool → requirements-NAME.txt
TOOLS = ("edgekd", *ENVIRONMENTS)
MODELS = [*TRAINEES, TEACHER]
TARGET, BATCH = "host", 250
Found = dict[str, dict[str, Any]]  # variant → what a tool tells of it


def main() -> None:
    """Quantize what is not there yet, time it, or print the tables."""
    parser = argparse.ArgumentParser(description="Post-training quantization against peers")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--models", nargs="+", default=list(TRAINEES), choices=MODELS, metavar="MODEL")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS), metavar="TOOL")
    parser.add_argument("--latency", action="store_true", help="time the files again, whether or not they were timed")
    parser.add_argument("--quick", action="store_true", help="time for a short while only")
    parser.add_argument("--results", type=Path, default=RESULTS / "ptq.jsonl")
    parser.add_argument("--against", type=Path, default=RESULTS / "ptq-against.jsonl")
    parser.add_argument("--latencies", type=Path, default=RESULTS / "ptq-latency.jsonl")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, run nothing")
    asked = parser.parse_args()
    ledger, against, times = Ledger(asked.results), Ledger(asked.against), Ledger(asked.latencies)
    if not asked.table:
        cifar = Cifar(asked.data)
        for name in asked.models:
            bench = Bench(cifar, name, asked.store)
            for tool in asked.tools:
                bench.run(tool, ledger)
            bench.compare(ledger, against)
            bench.time(ledger, times, again=asked.latency, quick=asked.quick)
    print(table(ledger.rows(), against.rows(), times.rows()))


@dataclass(frozen=True)
class Bench:
    """One network, and the files that all tools get."""

    cifar: Cifar
    name: str
    store: Path

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.store / "ptq" / self.name

    @cached_property
    def weights(self) -> str:
        """What the network is known by."""
        return sha256_of(path(self.cifar, self.name, self.store))

    @cached_property
    def network(self) -> Network:
        """Trained, in eval mode."""
        return trained(self.cifar, self.name, self.store)

    @property
    def sample(self) -> Arrays:
        """One image, as its ONNX files take it."""
        image = np.load(self.store / "ptq" / "test.npy", mmap_mode="r")[:1].copy()
        return {self.cifar.data.inputs[0].name: image}

    def settings(self, tool: str) -> dict[str, Any]:
        """What a result hangs on."""
        versions = {"edgekd": quantize.VERSION} if tool == "edgekd" else {"peers": requirements(ENVIRONMENTS[tool])}
        return {
            "model": self.name, "tool": tool, "weights": self.weights, "data": self.cifar.data.fingerprint,
            "calibration": len(self.cifar.data.calibration), **versions,
        }  # fmt: skip

    def run(self, tool: str, ledger: Ledger) -> None:
        """Quantize with one tool and judge what it gives, unless the same is there."""
        settings = self.settings(tool)
        row = ledger.find(settings)
        if row is not None and all(Path(self.folder / tool / file).exists() for file in files(row)):
            return
        self.prepare()
        out = self.folder / tool
        out.mkdir(parents=True, exist_ok=True)
        found = self.ours(out) if tool == "edgekd" else self.peer(tool, out)
        ledger.add(settings, variants=self.judged(found, out), cpu_threads=1)
        print(self.name, tool, shown(ledger.rows()[-1]), file=sys.stderr, flush=True)

    def prepare(self) -> None:
        """The float network as ONNX and as an exported program, and the images as both take them."""
        shared, made = self.store / "ptq", self.folder / f"made-{self.weights[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for split in ("calibration", "test"):
            if not (shared / f"{split}.npy").exists():
                np.save(shared / f"{split}.npy", prepared(self.network, getattr(self.cifar.data, split)))
        if made.exists():
            return
        with torch.no_grad():
            image = torch.from_numpy(np.load(shared / "calibration.npy", mmap_mode="r")[:1].copy())
            torch.export.save(torch.export.export(self.network.module, (image,)), self.folder / "float.pt2")
        stored = next(iter(self.cifar.data.calibration.batches([np.arange(2)]))).inputs
        opset = targets.load(TARGET).opset
        export.export(self.network, stored, opset=opset, preprocessing=False, path=self.folder / "float.onnx")
        made.touch()

    def ours(self, out: Path) -> Found:
        """edgekd, through the door that the pipeline uses, with a recipe's defaults."""
        rules, said = targets.load(TARGET), list[str]()

        def note(event: str, /, **fields: Any) -> None:
            said.append(" ".join([event, *(str(each) for each in fields.values())]))

        begun = time.time()
        meta = quantize.quantize(
            self.network, Calibration(self.cifar.data), rules.quantization,
            opset=rules.opset, preprocessing=False, path=out / "auto.onnx", say=note,
        )  # fmt: skip
        told = {name: meta[name] for name in meta if name not in ("quantized", "nodes")}
        seconds = round(time.time() - begun, 1)
        return {"auto": {"file": str(out / "auto.onnx"), "seconds": seconds, "meta": told, "said": said}}

    def peer(self, tool: str, out: Path) -> Found:
        """A peer, in its own environment."""
        job = {
            "float": str(self.folder / "float.onnx"), "program": str(self.folder / "float.pt2"), "out": str(out),
            "calibration": str(self.store / "ptq" / "calibration.npy"), "test": str(self.store / "ptq" / "test.npy"),
            "input": self.cifar.data.inputs[0].name,
        }  # fmt: skip
        (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [environment(ENVIRONMENTS[tool], self.store), PEERS / f"{tool}_run.py", out / "job.json"]
        # Threads: the machine may have other work; telemetry of NNCF stays off.
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "NNCF_CI": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (out / "log").open("w") as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables, check=False)
        if done.returncode:
            sys.exit(f"{tool} ended with {done.returncode}; see {out / 'log'}")
        found: Found = json.loads(done.stdout.splitlines()[-1])
        return found

    def judged(self, found: Found, out: Path) -> Found:
        """With the accuracy of each variant, and its drop against fp32 on the same runtime."""
        images = np.load(self.store / "ptq" / "test.npy", mmap_mode="r")
        plain = outputs(self.folder / "float.onnx", images)
        own = next((each for name, each in found.items() if name.startswith("fp32")), None)
        references = {None: plain, **({own["runtime"]: np.load(own["logits"])} if own else {})}
        judged: Found = {}
        for name, each in found.items():
            if "failed" in each:
                judged[name] = each
                continue
            logits = outputs(Path(each["file"]), images) if "file" in each else np.load(each["logits"])
            told = {key: value for key, value in each.items() if key not in ("file", "logits")}
            if "file" in each:
                file = Path(each["file"])
                told |= {"file": file.name, "size_bytes": file.stat().st_size, "nodes": nodes(file)}
            judged[name] = told | self.scored(logits, references[each.get("runtime")])
        return judged

    def scored(self, logits: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
        """Accuracy, and drop and agreement against the reference."""
        task, truth = self.cifar.task, accuracy.labels(self.cifar.data.test)
        scores, before = task.scores(logits, truth), task.scores(reference, truth)
        return {
            "accuracy": asdict(accuracy.mean(scores)), "fp32": float(before.mean()),
            "drop": asdict(accuracy.drop(before, scores)),
            "agreement": accuracy.agreement(task.decisions(reference), task.decisions(logits)),
        }  # fmt: skip

    def time(self, ledger: Ledger, times: Ledger, *, again: bool, quick: bool) -> None:
        """Time fp32 and every file for ONNX Runtime in the same rounds, and compare ours with each."""
        found = {"fp32": self.folder / "float.onnx"}
        for tool in TOOLS:
            row = ledger.find(self.settings(tool))
            for variant, each in (row["variants"] if row else {}).items():
                if "file" in each:
                    found[f"{tool} {variant}"] = self.folder / tool / each["file"]
        if "edgekd auto" not in found:
            return
        settings = {"model": self.name, "files": {name: sha256_of(file) for name, file in found.items()}}
        if times.find(settings) is not None and not again:
            return
        timed = timings(found, self.sample, quick=quick)
        times.add(settings, **timed, quick=quick)

    def compare(self, ledger: Ledger, against: Ledger) -> None:
        """What our file loses more than the best of all peers' ways, paired on the test images.

        Twice: the best on these very images, which luck has a part in; and, on each half of the images, the best on the
        other half, which is what the best way is worth to somebody who has labels to find it by.
        """
        rows = {tool: row for tool in TOOLS if (row := ledger.find(self.settings(tool)))}
        names = [name.partition(" ")[::2] for name in peers_drops(rows)]
        settings = {"model": self.name, "drops": {tool: row["settings"] for tool, row in rows.items()}}
        if not names or "edgekd" not in rows or against.find(settings) is not None:
            return
        task, truth = self.cifar.task, accuracy.labels(self.cifar.data.test)
        theirs = {
            f"{tool} {variant}": task.scores(self.logits(tool, variant, rows[tool]["variants"][variant]), truth)
            for tool, variant in names
        }
        ours = task.scores(self.logits("edgekd", "auto", {"file": "auto.onnx"}), truth)
        best = max(theirs, key=lambda name: theirs[name].mean())
        picked, apart = picked_apart(theirs)
        against.add(
            settings, peer=best, lost_more=asdict(accuracy.drop(theirs[best], ours)),
            picked=picked, lost_more_than_picked=asdict(accuracy.drop(apart, ours)),
        )  # fmt: skip

    def logits(self, tool: str, variant: str, told: Mapping[str, Any]) -> np.ndarray:
        """What a variant says of the test images; that of a runtime of its own is kept beside it."""
        if "file" in told:
            images = np.load(self.store / "ptq" / "test.npy", mmap_mode="r")
            return outputs(self.folder / tool / told["file"], images)
        kept: np.ndarray = np.load(self.folder / tool / f"{variant.partition(' ')[0]}.npy")
        return kept


def times_of(files: Mapping[str, Path], sample: Arrays, *, quick: bool) -> latency.Timing:
    """Nanoseconds of every file on ONNX Runtime with one thread, in interleaved rounds."""
    backend: Backend = plugins.build("backends", targets.load(TARGET).backend)
    sessions: dict[str, Session] = {name: backend.load(file, 1) for name, file in files.items()}
    timing = latency.measure(sessions, sample, threads=1, quick=quick, say=say)
    for session in sessions.values():
        session.close()
    return timing


def timings(files: Mapping[str, Path], sample: Arrays, *, quick: bool, ours: str = "edgekd auto") -> dict[str, Any]:
    """Milliseconds of each file, and how ours compares with each other one."""
    timing = times_of(files, sample, quick=quick)
    compared = compare.pairs(timing.series_ns, [(ours, other) for other in files if other != ours])
    return {
        "p50_ms": {name: float(np.median(series)) / 1e6 for name, series in timing.series_ns.items()},
        "ours_over": {each.baseline: asdict(each.ratio) | {"verdict": each.verdict} for each in compared},
        # Of a machine with other work a median may hold interruptions, which meet slow files more often than fast ones.
        "p5_ms": {name: float(np.percentile(series, 5)) / 1e6 for name, series in timing.series_ns.items()},
        "load": busy(), "rounds": len(next(iter(timing.series_ns.values()))), "notes": list(timing.notes),
    }  # fmt: skip


def busy() -> float:
    """Processes that want a CPU, the mean of the last minute: above 1 beside this one, times are worth little."""
    return round(os.getloadavg()[0], 1)


def files(row: Mapping[str, Any]) -> list[str]:
    """Names of the files of a result."""
    return [each["file"] for each in row["variants"].values() if "file" in each]


def prepared(network: Network, split: Split) -> np.ndarray:
    """The images of a split as the network's module takes them: float32, samples × channels × height × width."""
    order = np.arange(len(split))
    parts = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    name = network.inputs[0].name
    with torch.no_grad():
        found = [
            network.prepare(torch.from_numpy(batch.inputs[name]))[0].contiguous().numpy()
            for batch in split.batches(parts)
        ]
    return np.concatenate(found)


def outputs(file: Path, images: np.ndarray) -> np.ndarray:
    """The logits that ONNX Runtime computes for images as a file takes them."""
    backend: Backend = plugins.build("backends", targets.load(TARGET).backend)
    session = backend.load(file, 1)
    (spec,) = session.inputs
    size = spec.shape[0] if isinstance(spec.shape[0], int) else BATCH
    parts = [session({spec.name: images[at : at + size]}) for at in range(0, len(images), size)]
    session.close()
    return np.concatenate([next(iter(part.values())) for part in parts])


def nodes(file: Path) -> dict[str, int]:
    """How many operators of each type a file has."""
    counts: dict[str, int] = {}
    for node in onnx.load(file).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def requirements(name: str) -> list[str]:
    """The pinned packages of a peer's environment."""
    lines = (PEERS / f"requirements-{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def environment(name: str, store: Path, run: Callable[..., Any] = subprocess.run) -> Path:
    """The interpreter of a peer's environment, which is made where it is not there or has other packages."""
    folder, wanted = store / "peers" / f"ptq-{name}", "\n".join(requirements(name))
    made = folder / "made"
    if not made.exists() or made.read_text(encoding="utf-8") != wanted:
        run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        run([*install, "-r", str(PEERS / f"requirements-{name}.txt")], check=True)
        folder.mkdir(parents=True, exist_ok=True)
        made.write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def shown(row: Mapping[str, Any]) -> str:
    """The drops of a result in points."""
    drops = {name: each["drop"]["value"] for name, each in row["variants"].items() if "drop" in each}
    return ", ".join(f"{name} {100 * value:+.2f}" for name, value in drops.items())


def table(rows: Sequence[dict[str, Any]], against: Sequence[dict[str, Any]], times: Sequence[dict[str, Any]]) -> str:
    """A line for each variant of each network, the last result of each; then ours against the best peer."""
    last = {(row["settings"]["model"], row["settings"]["tool"]): row for row in rows}
    timed = {row["settings"]["model"]: row for row in times}
    lines = [
        "| network | tool | accuracy | drop, points | 95 % | agreement | KB | ms | ours / this |",
        "|---" * 9 + "|",
    ]
    for (model, tool), row in sorted(last.items(), key=lambda item: (item[0][0], TOOLS.index(item[0][1]))):
        found = timed.get(model, {"p50_ms": {}, "ours_over": {}})
        for variant, each in row["variants"].items():
            name = f"{tool} {variant}"
            if "failed" in each:
                lines.append(f"| {model} | {name} | failed: {each['failed'][:60]} |" + " |" * 6)
                continue
            drop, ratio = Interval(**each["drop"]), found["ours_over"].get(name)
            own = f"{each['p50_ms']:.3f} (own runtime)" if "p50_ms" in each else ""
            cells = [model, name, f"{100 * each['accuracy']['value']:.2f}", f"{100 * drop.value:+.2f}"]
            cells += [f"{100 * drop.low:+.2f} … {100 * drop.high:+.2f}", f"{each['agreement']:.4f}"]
            cells += [f"{each['size_bytes'] / 1000:.0f}" if "size_bytes" in each else ""]
            cells += [f"{found['p50_ms'][name]:.3f}" if name in found["p50_ms"] else own]
            cells += [f"{ratio['value']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})" if ratio else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *goals(last, {row["settings"]["model"]: row for row in against}, timed)])


def picked_apart(scores: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """For the even and for the odd images the best candidate on the others, and its scores on all, each in its half."""
    half = np.arange(len(next(iter(scores.values())))) % 2
    picked = [max(scores, key=lambda name: scores[name][half != each].mean()) for each in (0, 1)]
    return picked, np.where(half == 0, scores[picked[0]], scores[picked[1]])


def peers_drops(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By "tool variant", what every quantized variant of the peers lost."""
    return {
        f"{tool} {name}": each["drop"]["value"]
        for tool, row in rows.items()
        for name, each in row["variants"].items()
        if tool in ENVIRONMENTS and "drop" in each and not name.startswith("fp32")
    }


def goals(
    last: Mapping[tuple[str, str], dict[str, Any]],
    against: Mapping[str, dict[str, Any]],
    timed: Mapping[str, dict[str, Any]],
) -> list[str]:
    """Ours against the best way of the best peer, network by network: drop, then latency on ONNX Runtime."""
    lines = ["| network | fp32 | our drop | best peer's | which | we lose more (95 %) | than the best on others |"]
    lines[0] += " ours / fastest peer | which | ours / fp32 | load |"
    lines.append("|---" * 11 + "|")
    for model in dict.fromkeys(model for model, _ in last):
        ours = last.get((model, "edgekd"), {"variants": {}})["variants"].get("auto")
        peers = peers_drops({tool: row for (of, tool), row in last.items() if of == model})
        if ours is None or not peers:
            continue
        best = min(peers, key=peers.__getitem__)
        cells = [model, f"{100 * ours['fp32']:.2f}", f"{100 * ours['drop']['value']:+.2f}"]
        cells += [f"{100 * peers[best]:+.2f}", best]
        for figure in ("lost_more", "lost_more_than_picked"):
            lost = Interval(**against[model][figure]) if model in against else None
            cells.append(f"{100 * lost.value:+.2f} ({100 * lost.low:+.2f} … {100 * lost.high:+.2f})" if lost else "")
        speeds = timed.get(model, {"p50_ms": {}, "ours_over": {}})
        known = {name: ms for name, ms in speeds["p50_ms"].items() if name in peers}
        fastest = min(known, key=known.__getitem__, default=None)
        for name in (fastest, "fp32"):
            ratio = speeds["ours_over"].get(name)
            cells.append(f"{ratio['value']:.2f}, {ratio['verdict']}" if ratio else "")
            cells += [name or ""] if name != "fp32" else []
        cells.append(str(speeds.get("load", "")))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
