"""The README.md of a bundle: what this one holds and how to use it, for someone who has never heard of edgekd."""

from __future__ import annotations

from edgekd.bundle.manifest import Manifest
from edgekd.types import TensorSpec


def render(manifest: Manifest) -> str:
    """Markdown, from the manifest alone."""
    board = manifest.backend == "tensorrt"
    parts = [
        f"# {manifest.name} for {manifest.target}\n",
        f"Written by edgekd {manifest.edgekd}. `edgekd.json` lists every file with its SHA-256, what the model takes "
        "and gives, and where it comes from. Nothing here calls home.\n",
        "## Run it\n",
        _run(manifest, board),
    ]
    if board:
        parts += ["## Build the engine on the board\n", _board(manifest)]
    parts += [
        "## What it takes and gives\n",
        _tensors(manifest),
        "## Models\n",
        _models(manifest),
        "## Embed it\n",
        _embed(manifest),
        "## Limits\n",
        _limits(manifest, board),
    ]
    return "\n".join(parts)


def _run(manifest: Manifest, board: bool) -> str:
    given = "photo.jpg" if manifest.preprocessing else "inputs.npz"
    needs = "numpy and TensorRT's bindings (a Jetson's system python3 has them)" if board else "numpy and onnxruntime"
    return (
        f"Python 3.8 or later, {needs}; Pillow for JPEG and PNG files.\n\n```\n"
        f"python3 run.py --selftest        # does it compute here what it should? exit code 1 where not\n"
        f"python3 run.py {given:<18}# a prediction\n"
        f"python3 run.py --bench           # latency, as JSON\n```\n"
    )


def _board(manifest: Manifest) -> str:
    eights = any(model.typing == "weak" for model in manifest.models)
    versions = "TensorRT 8.5 to 11.x" if eights else "TensorRT 10.x and 11.x"
    return (
        "An engine works with one TensorRT version on one kind of board, so it is built there:\n\n```\n"
        "./build.sh                       # builds each precision, then checks it against the golden samples\n"
        "./build.sh --measure             # and times it with trtexec; record the power mode (nvpmodel -q) with it\n"
        "python3 run.py --bench --runtime tensorrt\n```\n\n"
        f"This bundle is for {versions}. The recipe finds the version, keeps the workspace to a quarter of the RAM "
        "(CPU and GPU share it) and writes to `engine/`. Before measuring, fix the clocks: `sudo nvpmodel -m MODE` and "
        "`sudo jetson_clocks`.\n\n"
        "Without an engine, `run.py` runs the ONNX file on ONNX Runtime's CPU provider: that checks the numbers and "
        "says nothing about speed.\n"
    )


def _tensors(manifest: Manifest) -> str:
    lines = [_row("input", item) for item in manifest.inputs] + [_row("output", item) for item in manifest.outputs]
    text = "| | name | type | shape |\n|---|---|---|---|\n" + "".join(lines) + "\n"
    if manifest.preprocessing is None:
        return text + (f"\nThe output is {_output(manifest)}.\n" if manifest.labels else "")
    size = " × ".join(str(side) for side in manifest.preprocessing.size)
    if manifest.preprocessing_in_graph:
        text += f"The image is uint8, {size} pixels, height × width × channels; the graph normalises it itself.\n"
    else:
        mean, std = manifest.preprocessing.mean, manifest.preprocessing.std
        text += f"The image is resized to {size}, divided by 255, minus {mean}, divided by {std}, channels first.\n"
    if manifest.labels:
        text += f"\nThe output is {_output(manifest)}.\n"
    return text


def has_apps(manifest: Manifest) -> bool:
    """Whether the sample apps fit: they classify images as a camera gives them."""
    return manifest.preprocessing_in_graph and bool(manifest.labels) and manifest.task.labels == "classes"


def _output(manifest: Manifest) -> str:
    count, listed = len(manifest.labels), "(`labels.txt`, in order)"
    return {
        "classes": f"one logit for each of {count} classes {listed}",
        "flags": f"one logit for each of {count} labels {listed}; its sigmoid is how likely the label holds",
        "maps": f"one logit for each of {count} classes {listed} at each point of the grid",
        "values": f"{count} values {listed}",
    }[manifest.task.labels]


def _row(kind: str, item: TensorSpec) -> str:
    shape = " × ".join(str(size) for size in item.shape)
    return f"| {kind} | {item.name} | {item.dtype} | {shape} |\n"


def _models(manifest: Manifest) -> str:
    uses = {"any": "", "strong": "TensorRT 10 and 11 (strongly typed)", "weak": "TensorRT 8.5 and 8.6 (weakly typed)"}
    sizes = {file.path: file.size_bytes for file in manifest.files}
    lines = []
    for model in manifest.models:
        mark = " (default)" if model.path == manifest.model else ""
        size = f", {sizes[model.path]:,} bytes" if model.path in sizes else ""
        use = f", for {uses[model.typing]}" if uses[model.typing] else ""
        lines.append(f"- `{model.path}`{mark}: {model.precision}, ONNX opset {model.opset}{use}{size}\n")
    if manifest.verdict:
        reasons = "; ".join(manifest.verdict.reasons)
        lines.append(f"\nBudget: {manifest.verdict.status}" + (f" ({reasons})" if reasons else "") + ".\n")
    return "".join(lines)


def _embed(manifest: Manifest) -> str:
    given = (
        "image" if manifest.preprocessing else "{" + ", ".join(f'"{item.name}": …' for item in manifest.inputs) + "}"
    )
    text = f'With edgekd installed: `edgekd.load("path/to/this/folder")({given})`.\n'
    if has_apps(manifest):
        text += (
            "\nWithout it, copy from `app/`: `app/app.py` (Python, with `run.py` beside it) and `app/cpp/` (C++, ONNX "
            "Runtime's C++ API).\n"
        )
    return text


def _limits(manifest: Manifest, board: bool) -> str:
    text = "- `edgekd.json` is not signed: its hashes find damage, they do not say who wrote the bundle.\n"
    squashed = {"classes": "softmax", "flags": "sigmoid"}.get(manifest.task.labels)
    if squashed:
        text += f"- Confidence is a {squashed} of the logits, not a calibrated probability.\n"
    if board:
        text += (
            "- The TensorRT part was never run on a board by edgekd's authors: the command lines and calls are checked "
            "against each version's sources and bindings, and `run.py --selftest` decides on yours.\n"
            "- No DLA: see `./build.sh --dla` for why.\n"
        )
    return text
