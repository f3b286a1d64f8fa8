"""The rooms of lib/: which may import which, that modules stay small, and that functions on tensors need no transformers."""

import argparse
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

OUTSIDE = ("parallel", "atomic", "errors")
# What a room imports of lib beside itself and what lies outside the rooms: only arrows that exist are allowed.
ARROWS = {
    "data": {"models.files"},
    "models.files": {"models"},
    "models": {"models.files"},
    "gradients": {"models"},
    "pruning.updates": {"pruning", "models"},
    "pruning": {"models", "pruning.updates"},
    "evaluation": {"models"},
    "results": {"models", "models.files"},
    "cli": {"data", "models", "models.files", "gradients", "pruning", "pruning.updates", "evaluation", "results"},
    "parallel": set(),
    "atomic": set(),
    "errors": set(),
}
MODULES = sorted(path for path in (ROOT / "lib").rglob("*.py") if path.name != "__init__.py")
LONGEST_MODULE, LONGEST_FUNCTION = 250, 60  # lines
SOURCES = [*MODULES, ROOT / "main.py", ROOT / "gradient_computation.py"]


def module_of(path) -> str:
    """ "models.files.hub" of lib/models/files/hub.py."""
    return ".".join(path.relative_to(ROOT / "lib").with_suffix("").parts)


NAMES = {module_of(path) for path in MODULES}


def imported(source: str) -> set[str]:
    """The modules of lib that a source imports, as `module_of` calls them; what only annotations use counts as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lib":
            module = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                found.add(inner if inner in NAMES else module)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("lib.") for alias in node.names if alias.name.startswith("lib.")}
    return found


def room_of(module: str) -> str:
    return module.rpartition(".")[0] or module


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_rooms_import_only_what_they_may(path):
    room = room_of(module_of(path))
    rooms = {room_of(module) for module in imported(path.read_text())}
    assert rooms <= ARROWS[room] | {room, *OUTSIDE}


def test_every_arrow_exists():
    seen = {room: set() for room in ARROWS}
    for path in MODULES:
        room = room_of(module_of(path))
        seen[room] |= {room_of(module) for module in imported(path.read_text())} - {room, *OUTSIDE}
    assert seen == ARROWS


def test_no_modules_import_each_other_in_a_circle():
    arrows = {module_of(path): imported(path.read_text()) & NAMES for path in MODULES}
    open_modules = dict(arrows)
    while free := [module for module, imports in open_modules.items() if not imports & open_modules.keys()]:
        for module in free:
            del open_modules[module]
    assert open_modules == {}


def test_the_checks_see_an_arrow_that_runs_back():
    source = "from lib.gradients.walk import SCALE\nimport lib.data\nfrom lib import parallel\nfrom lib.models.files import hub"
    assert imported(source) == {"gradients.walk", "data", "parallel", "models.files.hub"}


def test_few_modules_lie_outside_the_rooms():
    assert {path.stem for path in (ROOT / "lib").glob("*.py")} == {"__init__", *OUTSIDE}


def test_no_argparse_below_the_command_line():
    for path in MODULES:
        if not module_of(path).startswith("cli."):
            assert not re.search(r"\bargparse\b|\bNamespace\b|\bargs\.\w", path.read_text()), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= LONGEST_FUNCTION, node.name


def test_flags_are_never_written_to(monkeypatch, tmp_path):
    """What flags mean is found out in values of its own: a namespace that has been parsed stays as it is."""
    import main as pruning

    args = pruning.parse(
        ["--model", str(tmp_path), "--prune_method", "wanda", "--sparsity_type", "2:4", "--eval_dataset", "c4"]
    )
    assert isinstance(args, argparse.Namespace)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            for target in targets:
                written = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "args"
                assert not written, f"{path}:{node.lineno}"


def test_functions_on_tensors_need_no_transformers():
    code = (
        "import sys; from lib.pruning import scores, masks; from lib.pruning.updates import sparsegpt, least_squares, admm; "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
