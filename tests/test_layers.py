"""Imports point only up the one way that data flows; nothing below the search space knows a method."""

import ast
from pathlib import Path

import pytest

import espalier

ROOT = Path(espalier.__file__).parent

# Each room, and the rooms that its files may import from (itself aside).
LEAVES = {"modes", "batchnorm"}  # know nothing but torch and each other, and may be known by all
MAY_IMPORT = {
    "errors": set(),
    "modes": set(),
    "batchnorm": set(),
    "graph": {"errors", "architecture"},
    "rules": {"errors", "graph"},
    "space": {"errors", "graph", "rules"},
    "saliency": {"errors", "graph", "space"},
    "curvature": {"errors", "graph", "space"},
    "sparsify": {"errors", "graph", "space", "saliency"},
    "select": {"errors", "graph", "space", "saliency", "curvature", "data"},
    "own_class": {"errors", "graph", "rules", "space", "own_sizes"},
    "own_sizes": {"errors", "graph", "rules", "space"},
    "construct": {"errors", "graph", "rules", "space", "own_class"},
    "api": {"errors", "space", "saliency", "curvature", "sparsify", "select", "construct"},
    "architecture": {"errors", "graph"},
    "export": {"errors", "architecture"},
    "models": set(),
    "nas": {"errors", "graph", "space", "construct", "sparsify", "saliency", "models", "data", "export", "report"},
    "data": {"errors"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "espalier" and len(parts) > 1:
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_up(path: Path) -> None:
    if room(path) in MAY_IMPORT:
        assert imported(path) - {room(path)} <= MAY_IMPORT[room(path)] | LEAVES


def test_no_file_is_longer_than_400_lines() -> None:
    long = {p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_examples_of_the_docstrings_run() -> None:
    import doctest
    import importlib

    failed = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>>" in path.read_text():
            name = ".".join(("espalier", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
            if doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed:
                failed.append(name)
    assert not failed
