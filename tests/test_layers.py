"""Imports point one way; rules and kernels need nothing but torch; no import picks a backend."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stepsmith

ROOT = Path(stepsmith.__file__).parent

# Each layer may import itself and what stands below it.
LAYERS = [
    {"names", "version", "layout", "terminal"},
    {"rules"},
    {"store", "kernels"},
    {"hub", "subspace"},
    {"optim", "tasks", "machine"},
    {"unroll", "testing"},
    {"meta", "evaluate"},
    {"report"},
    {"demo", "recipes", "tables"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
APART = [{"optim", "tasks"}, {"meta", "evaluate"}]
"""Of one level, and none of the other's business."""


def imports(path: Path) -> set[str]:
    """Subpackages of stepsmith a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "stepsmith":
                names = [f"stepsmith.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("stepsmith.")}
    return found


def owner(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


FILES = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path):
    own = owner(path)
    for other in imports(path) - {own}:
        assert other in LEVEL, f"{other} stands in no layer"
        assert LEVEL[other] <= LEVEL[own], f"{own} must not import {other}"
        assert not any({own, other} <= pair for pair in APART), f"{own} and {other} stand apart"


@pytest.mark.parametrize("layer", ["rules", "kernels"])
def test_rules_and_kernels_need_only_torch(layer):
    for path in (ROOT / layer).rglob("*.py"):
        allowed = {"torch", "stepsmith", *sys.stdlib_module_names}
        if path.parent.name == "native":
            allowed |= {"numba", "llvmlite", "numpy"}
        if path.name == "triton_lstm.py":
            allowed |= {"triton"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] in allowed, path


def test_deploying_imports_no_plotting_and_no_data_library():
    code = (
        "import sys, stepsmith.optim; "
        "print(sorted({'matplotlib', 'datasets', 'pyarrow', 'typer', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_pickle():
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load" not in text, path
        assert "torch.save" not in text, path
