"""The shape of the code: imports go down, the heavy half stays out of the light half, and files stay small."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgekd"

# What may import what: a module imports from the rows above its own, and from its own folder.
LAYERS = [
    {"outcome", "clock"},
    {"types", "errors"},
    {"processes"},
    {"toml", "units", "store"},
    {"plugins", "goals"},
    {"recipe", "target"},
    {"data", "models", "losses", "tasks", "backends"},
    {"graph", "correspondence"},
    {"distillation", "pruning", "export", "quantize"},
    {"bench", "qad"},
    {"report", "bundle"},
    {"deploy"},
    {"measure"},
    {"onnx_file"},
    {"training", "direct"},
    {"rounds"},
    {"pipeline", "doctor", "view", "starter", "progress"},
    {"search", "alone"},
    {"cli"},
    {"__main__"},
]
TORCH_AT_TOP = {
    "models", "losses", "correspondence", "distillation", "pruning", "graph", "export", "quantize", "qad", "deploy",
    "training", "direct", "rounds", "pipeline", "search",
}  # fmt: skip
FORBIDDEN_NAMES = {"utils", "common", "helpers", "manager", "handler", "handlers", "misc"}
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("benchmarks", "targets", "tests", "tools")
SCRIPTS = sorted(
    path for folder in FOLDERS for names in ("*.py", "[!.]*/**/*.py") for path in (ROOT / folder).glob(names)
)


def _layer(path: Path) -> int:
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return next(i for i, names in enumerate(LAYERS) if top in names)


def _imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    mine, folder = _layer(path), path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "edgekd" or len(parts) < 2 or parts[1] == "__version__":
            continue
        theirs = next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)
        assert theirs is not None, f"{path.name} imports {name}, which is in no layer"
        assert parts[1] == folder or theirs < mine, f"{path.name} imports {name}: that climbs"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_imported_at_the_top_only_where_weights_are(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in TORCH_AT_TOP:
        return
    heavy = {name.split(".")[0] for name in _imports(path, top_level=True)} & {
        "torch",
        "torchvision",
        "timm",
        "torchao",
    }
    assert not heavy, f"{path.name} imports {heavy} at module level"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert path.stem not in FORBIDDEN_NAMES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1  # a long docstring is no fault
            assert length <= 60, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_are_documented(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_the_light_half_works_without_torch() -> None:
    script = """
import importlib, pkgutil, sys
sys.modules["torch"] = None
import edgekd, edgekd.cli
for package in ("bench", "report", "bundle", "backends"):
    module = importlib.import_module(f"edgekd.{package}")
    for info in pkgutil.walk_packages(module.__path__, f"edgekd.{package}."):
        importlib.import_module(info.name)
print("light")
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stdout == "light\n", done.stderr


def test_import_edgekd_does_not_import_torch_and_help_is_fast() -> None:
    check = "import sys, edgekd; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", "--help"]
    seconds = []
    for _ in range(5):  # of the processor: on a busy machine the clock on the wall says nothing of the program
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.3


def test_no_machine_path_is_in_the_code() -> None:
    marks = ("/work" + "/", "/root" + "/", "/home" + "/")
    for path in [*MODULES, *(PACKAGE.parent / "targets").rglob("*.*"), *(PACKAGE.parent / "docs").rglob("*.md")]:
        if path.suffix in {".py", ".toml", ".md", ".sh"}:
            text = path.read_text(encoding="utf-8")
            assert not [mark for mark in marks if mark in text], path
