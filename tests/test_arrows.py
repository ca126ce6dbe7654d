"""Imports point one way and without a circle, and no two modules define a class of one name."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import moe_jax

ROOT = Path(moe_jax.__file__).parent
# From the ground up. A room may import itself and every room above its line.
ROOMS = [
    *("errors", "precision", "ranges", "signals", "files", "processes"),
    *("routing", "parallel", "grouped", "attend", "transport", "nn", "models", "data"),
    *("monitor", "config", "quantised"),
    *("counting", "training", "interop", "decoding", "analysis", "planning", "run"),
    *("surgery", "offload", "serving"),
    *("ablation", "sweeps", "benchmark", "cli"),
]
# The public names and the thin doors of ``python -m moe_jax.train`` stand above all rooms.
DOORS = {path.stem for path in ROOT.glob("*.py")} - {*ROOMS}


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    paths = {path.relative_to(ROOT.parent).with_suffix(""): path for path in ROOT.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("moe_jax.")}


def room(module: str) -> str:
    """The first part of a module's name below the package."""
    return module.split(".")[1]


def test_every_import_points_down():
    known = modules()
    up = [
        f"{name} -> {other}"
        for name, path in known.items()
        if name != "moe_jax" and room(name) not in DOORS
        for other in imported(path, known)
        if room(other) not in ROOMS or ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert sorted(up) == []


def test_no_modules_import_each_other():
    known = modules()
    graph = {name: imported(path, known) - {name} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


# A class that a config names by its type: a map of tokens to logits, and a schedule.
BOTH = {"Cosine", "Linear"}


def test_a_name_belongs_to_one_class():
    trees = {name: ast.parse(path.read_text()) for name, path in modules().items()}
    homes: dict[str, set[str]] = {}
    for name, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(name)
    assert {name for name, found in homes.items() if len(found) > 1} == BOTH
