"""`edgekd view`: a model in Netron, on this machine only."""

from __future__ import annotations

from pathlib import Path

from edgekd.errors import ModelError, RecipeError


def model_file(path: Path) -> Path:
    """The model that `path` means: a file itself, or the one to deploy in a bundle or a run folder.

    Raises:
        ModelError: nothing is there, or nothing in the folder is a model.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise ModelError("no such file or folder", where=str(path))
    found = sorted(path.glob("*.onnx")) or sorted(path.glob("bundles/*/*.onnx"))
    if not found:
        raise ModelError(
            "no .onnx file is in it", where=str(path), fix="give the file itself, or a bundle or run folder"
        )
    preferred = [file for file in found if ".int8" in file.name]
    return (preferred or found)[0]


def view(path: Path, *, port: int, browse: bool) -> None:
    """Serve the model on localhost and wait until interrupted.

    Raises:
        ModelError: `path` holds no model.
        RecipeError: the port is taken.
    """
    import netron

    file = model_file(path)
    try:
        netron.start(str(file), address=("localhost", port) if port else None, browse=browse)
    except OSError as problem:
        raise RecipeError(
            f"port {port} cannot be used: {problem.strerror}", where="--port", fix="use --port 0"
        ) from problem
    netron.wait()
