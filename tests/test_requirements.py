"""Every package that the code imports has its pinned version in a requirements file, and is not there by another's grace."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

REQUIREMENTS = sorted(ROOT.glob("requirements*.txt"))
SOURCES = [ROOT / "main.py", ROOT / "gradient_computation.py"]
SOURCES += [path for folder in ("lib", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
OURS = {"lib"} | {part for path in SOURCES if not path.is_relative_to(ROOT / "lib") for part in path.relative_to(ROOT).parts}
OURS = {part.removesuffix(".py") for part in OURS}
WITHOUT = {"compression", "zstandard"}  # scripts/speed_2_4.py does with zlib where neither is there
DISTRIBUTIONS = packages_distributions()


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> set[str]:
    lines = [line.partition("#")[0].strip() for path in REQUIREMENTS for line in path.read_text().splitlines()]
    return {normalised(line.partition("==")[0]) for line in lines if line}


def imported(source: str) -> set[str]:
    """The third-party packages that a module imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - OURS


def unnamed(source: str) -> set[str]:
    """Those of them that no requirements file names. One that is not installed, as lm_eval may be, is taken to be called so."""
    return {
        name
        for name in imported(source) - WITHOUT
        if required().isdisjoint(normalised(distribution) for distribution in DISTRIBUTIONS.get(name, [name]))
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_required(path):
    assert unnamed(path.read_text()) == set()


def test_every_requirement_is_pinned():
    for path in REQUIREMENTS:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        assert [line for line in lines if line and not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == [], path.name


def test_the_check_sees_what_is_not_required():
    source = (
        "import os, torch\nfrom lib.data import sources\ntry:\n    import regex.x as r\nexcept ImportError:\n    import nothing"
    )
    assert imported(source) == {"torch", "regex", "nothing"} and unnamed(source) == {"regex", "nothing"}
    assert unnamed("import yaml, lm_eval.tasks\nfrom huggingface_hub.errors import HfHubHTTPError") == set()
