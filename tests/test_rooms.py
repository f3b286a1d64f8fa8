"""The rooms of lib/: which may import which, and that functions on tensors need no transformers."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# What a module may import of lib, by its room ("" is lib itself); a room always sees itself.
ARROWS = {
    "models": {"parallel", "files", "hub"},
    "pruning": {"models", "parallel"},
    "gradients": {"models", "parallel", "files"},
    "evaluation": {"models", "parallel", "data", "files"},
    "data": {"hub"},
    "parallel": set(),
    "files": set(),
    "hub": set(),
    "figures": {"files"},
    "results": set(),
    "tables": set(),
    "card": {"tables", "files", "models"},
    "report": {"files", "figures", "parallel", "models", "pruning", "results"},
    "flags": {"files", "data", "models"},
    "prune_flags": {"flags", "files", "data", "evaluation", "pruning"},
    "inputs": {"data", "evaluation", "gradients", "models"},
    "entry": {"parallel", "models"},
}
MODULES = sorted((ROOT / "lib").rglob("*.py"))


def imported_rooms(source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lib."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lib.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT / "lib").parts[0].removesuffix(".py")
    if room != "__init__":
        assert imported_rooms(path.read_text()) <= ARROWS[room] | {room}


def test_the_check_sees_an_arrow_that_runs_back():
    assert imported_rooms("from lib.gradients.walk import SCALE\nimport lib.data\nfrom lib import entry") == {
        "gradients",
        "data",
        "entry",
    }


def test_functions_on_tensors_need_no_transformers():
    code = "import sys; from lib.pruning import scores, masks; from lib.pruning.updates import sparsegpt, least_squares, admm; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
