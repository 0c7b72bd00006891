"""Networks that min-max int8 ruins, brought back without labels: accuracy after each method.

    python benchmarks/hard_ptq.py [--data digits cifar10] [--epochs 10] [--seeds 0]
    python benchmarks/hard_ptq.py --table

A depthwise-separable network (`dscnn`) is trained, and three networks are quantized:

- `trained`: as it is.
- `rescaled`: each channel between two layers multiplied by exp(spread · n), n normal, and the next layer's weights
  divided by it. ReLU lets any positive factor through, so it computes the same; but channels now differ in range as
  they do where batch normalisation is badly conditioned (Nagel et al., ICCV 2019, figure 2). This is the inverse of
  equalisation, and no network met in the wild.
- `wide` (digits only): trained with batch normalisation factors that began at exp(spread / 2 · n), nothing rescaled.

What `auto` takes it takes without labels, on the calibration split; the other rows are one fixed set of methods each.
Accuracies are those of the test split, of the written file, by ONNX Runtime; both formats: u8 affine (host) and s8
symmetric (jetson: its numbers, not its speed). One JSON line a file goes to results/hard_ptq.jsonl; what is there
with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgekd import data, models, quantize, target
from edgekd.backends.onnxruntime import onnxruntime
from edgekd.export import export
from edgekd.models.network import Network
from edgekd.types import Arrays, Dataset, Json, ModelSpec, Part, Split

from ledger import DATA, RESULTS, STORE, Ledger, key  # isort: skip  # a script beside this one

METHODS: dict[str, list[str]] = {
    "float": [], "minmax": ["minmax"], "percentile": ["percentile"], "mse": ["mse"], "mse + bias": ["mse", "bias"],
    "equalize + mse": ["equalize", "mse"], "equalize + mse + bias": ["equalize", "mse", "bias"],
    "mse + rounding": ["mse", "rounding"], "equalize + mse + rounding": ["equalize", "mse", "rounding"], "auto": [],
}  # fmt: skip
BATCH = 128


def main() -> None:
    """Run what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description="int8 of networks whose channels differ widely")
    parser.add_argument("--data", nargs="+", default=["digits"], choices=["digits", "cifar10"])
    parser.add_argument("--epochs", type=int, default=None, help="30 on digits, 10 on CIFAR-10")
    parser.add_argument("--width", type=float, default=None, help="of dscnn: 1.0 on digits, 0.5 on CIFAR-10")
    parser.add_argument("--spread", type=float, default=1.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "hard_ptq.jsonl")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if not asked.table:
        for name in asked.data:
            for seed in asked.seeds:
                everything(ledger, asked, name, seed)
    print(table(ledger.rows()))


def everything(ledger: Ledger, asked: argparse.Namespace, name: str, seed: int) -> None:
    """Every network, target and method for one data set."""
    small = name == "digits"
    settings = {
        "data": name, "seed": seed, "model": "dscnn", "width": asked.width or (1.0 if small else 0.5),
        "epochs": asked.epochs or (30 if small else 10), "spread": asked.spread,
    }  # fmt: skip
    part = Part("digits") if small else Part("imagefolder", {"path": str(DATA / "cifar10" / "cifar10-images.zip")})
    samples = data.load(part, seed)
    for kind in ("trained", "rescaled", "wide") if small else ("trained", "rescaled"):
        for board in ("host", "jetson"):
            for method in METHODS:
                row = settings | {"kind": kind, "target": board, "method": method, "quantizer": quantize.VERSION}
                if ledger.find(row) is None:
                    network = trained(samples, row)
                    found = written(network, samples, board, method, STORE / "hard_ptq" / f"{key(row)}.onnx")
                    print(kind, board, method, found["accuracy"], flush=True)
                    ledger.add(row, **found)


def trained(samples: Dataset, settings: dict[str, Any]) -> Network:
    """The network of these settings: trained here, or read where it was trained before."""
    kind = settings["kind"]
    own = {name: settings[name] for name in ("data", "seed", "model", "width", "epochs")}
    own |= {"began": settings["spread"] / 2} if kind == "wide" else {}
    torch.manual_seed(settings["seed"])
    spec = ModelSpec("dscnn", {"width": settings["width"]})
    network = models.build(spec, classes=len(samples.classes), inputs=samples.inputs, images=True)
    file = STORE / "hard_ptq" / f"{key(own)}.safetensors"
    if file.exists():
        network.module.load_state_dict(load_file(file))
    else:
        if kind == "wide":
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.weight, std=own["began"])
                    module.weight.data.exp_()
        train(network, samples, settings["epochs"], settings["seed"], flip=settings["data"] == "cifar10")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.module.state_dict(), file)
    network.eval()
    if kind == "rescaled":
        rescale(network, settings["spread"], settings["seed"])
    return network


def train(network: Network, samples: Dataset, epochs: int, seed: int, *, flip: bool) -> None:
    """SGD on labels, one cycle; images are flipped and moved by up to four pixels where `flip`."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(samples.train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    random = np.random.default_rng(seed)
    network.train()
    for epoch in range(epochs):
        begun, total = time.time(), 0.0
        order = random.permutation(len(samples.train))
        parts = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
        for batch in samples.train.batches(parts):
            images = torch.from_numpy(batch.inputs["image"])
            if flip:
                images = torch.flip(images, (2,)) if random.random() < 0.5 else images
                images = torch.roll(images, tuple(int(n) for n in random.integers(-4, 5, 2)), (1, 2))
            loss = nn.functional.cross_entropy(network(images), torch.from_numpy(batch.labels))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch}: loss {total / len(parts):.3f}, {time.time() - begun:.0f} s", flush=True)


def rescale(network: Network, spread: float, seed: int) -> None:
    """Multiply channels between layers by random factors and divide the next weights by them: the same function."""
    random = torch.Generator().manual_seed(seed)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm, following in zip(norms, layers[1:], strict=True):
            factor = torch.exp(spread * torch.randn(norm.num_features, generator=random))
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            own = isinstance(following, nn.Conv2d) and following.groups > 1
            following.weight /= factor.reshape((-1, 1, 1, 1) if own else (1, -1, *[1] * (following.weight.dim() - 2)))


class Images:
    """The calibration split without its labels, as often as it is read."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __iter__(self) -> Iterator[Arrays]:
        order = np.arange(len(self.split))
        for batch in self.split.batches([order[i : i + 32] for i in range(0, len(order), 32)]):
            yield batch.inputs


def written(network: Network, samples: Dataset, board: str, method: str, path: Path) -> dict[str, Any]:
    """Write the file of one method and measure it on the test split."""
    rules = target.load(board)
    begun = time.perf_counter()
    found: dict[str, Any] = {}
    images = Images(samples.calibration)
    if method == "float":
        export(network, next(iter(images)), opset=rules.opset, preprocessing=True, path=path, say=silent)
    else:
        meta = quantize.quantize(
            network, images, rules.quantization, opset=rules.opset, preprocessing=True, path=path, say=silent,
            method="auto" if method == "auto" else METHODS[method],  # type: ignore[arg-type]
        )  # fmt: skip
        found = {"methods": meta["methods"], "fallback": meta["fallback"]}
    seconds = time.perf_counter() - begun
    session = onnxruntime(optimizations=board == "host").load(path, 1)
    order = np.arange(len(samples.test))
    hits = 0
    for batch in samples.test.batches([order[i : i + 256] for i in range(0, len(order), 256)]):
        hits += int((session(batch.inputs)["logits"].argmax(1) == batch.labels).sum())
    path.unlink()
    return {"accuracy": hits / len(order), "test_samples": len(order), "seconds": round(seconds, 2), **found}


def silent(event: str, /, **fields: Json) -> None:
    """Rows tell all there is."""


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in points by method, a line for each network and target."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        own = row["settings"]
        name = tuple(own[one] for one in ("data", "width", "epochs", "spread", "seed", "kind", "target", "quantizer"))
        groups.setdefault(name, {})[own["method"]] = row
    lines = ["| network | " + " | ".join(METHODS) + " | auto took | s |", "|---" * (len(METHODS) + 3) + "|"]
    for name, found in groups.items():
        cells = [f"{100 * found[one]['accuracy']:.2f}" if one in found else "" for one in METHODS]
        tried: list[dict[str, Any]] = found.get("auto", {}).get("methods", [])
        kept: list[str] = next((one["methods"] for one in tried if one["kept"]), [])
        data_name, width, epochs, spread, seed, kind, board, _ = name
        label = f"{data_name}, {kind} (spread {spread:g}), width {width:g}, {epochs} epochs, seed {seed}, {board}"
        seconds = found.get("auto", {}).get("seconds", "")
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {' + '.join(kept)} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
