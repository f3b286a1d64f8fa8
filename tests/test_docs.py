"""The documentation against the code: links, anchors, paths, symbols, flags with their defaults, and every command.

Conventions: a path is written `lib/room/module.py`, a symbol in it `lib/room/module.py:name` or `...:Class.name`. Commands are
in code blocks, or in `code` that begins with one; capitals such as SEED stand for a value. A default in `code` is the parser's.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import collect_results
import pytest
import torch
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "install.md", ROOT / "MODEL_ZOO.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [ROOT / "main.py", ROOT / "gradient_computation.py", *sorted((ROOT / "scripts").rglob("*.py"))]
NO_LAUNCHERS = ("environment.sh", "test.sh", "gpu_check.sh")
LAUNCHERS = [*sorted(ROOT.glob("*.sh")), *sorted(p for p in (ROOT / "scripts").rglob("*.sh") if p.name not in NO_LAUNCHERS)]
LONGEST = 110  # characters of a line that is not a row of a table
HELP_WIDTH = 80

FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
IMAGE = re.compile(r"""(?:src|srcset)="([^"]+)"|!\[[^\]]*\]\(([^)\s]+)\)""")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
PATH = re.compile(r"((?:lib|tests|scripts|docs)/[\w./]*|[\w]+\.(?:py|sh|md))(?::([\w.]+))?")
PLACEHOLDERS = {"SEED": "0", "ALPHA": "100", "METHOD": "gblm", "PATTERN": "2:4", "N": "4"}
PROGRAMS = ("python", "python3", "bash", "torchrun", "accelerate")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose_of(page: str) -> str:
    return FENCE.sub("", page)


# Links and symbols


def anchors_of(page: str) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not k else f"{slug}-{k}" for slug, count in found.items() for k in range(count + 1)}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose_of(page.read_text())):
        if re.match(r"\w+:", link):  # another site
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
            broken.append(link)
    return broken + [path for path in map("".join, IMAGE.findall(page.read_text())) if not (page.parent / path).exists()]


def missing_symbols(page: str) -> list[str]:
    """The paths and symbols of a page that are not there."""
    missing = []
    for span in SPAN.findall(prose_of(page)):
        match = PATH.fullmatch(span)
        if match and not ((ROOT / match[1]).exists() and (not match[2] or has(ROOT / match[1], match[2]))):
            missing.append(span)
    return missing


def has(path: Path, symbol: str) -> bool:
    """Whether a module has a symbol; of tests, which import pytest's fixtures, by their source."""
    if path.is_relative_to(ROOT / "tests"):
        return re.search(rf"^(?:(?:def|class) {symbol}\b|{symbol} = )", path.read_text(), re.MULTILINE) is not None
    if path.is_relative_to(ROOT / "lib"):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    else:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    for part in symbol.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_symbols_exist(page):
    assert missing_symbols(page.read_text()) == []


def test_every_published_symbol_has_its_place():
    section = (ROOT / "docs" / "differences.md").read_text().split("\n## ")[1]
    rows = [line.split(" | ")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        assert any(PATH.fullmatch(span) for span in SPAN.findall(row)) or "the same" in row, row


def test_every_report_has_its_test():
    page = (ROOT / "docs" / "what_users_met.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what users met")]
    assert len(rows) > 30
    for row in rows:
        _, met, here, test, _ = re.split(r"(?<!\\)\|", row)
        assert met.strip() and here.strip() and re.search(r"`tests/[\w/]+\.py:test_\w+`", test), row


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page):
    assert [
        line for line in page.read_text().splitlines() if len(line) > LONGEST and not line.startswith(("|", "<!-- table"))
    ] == []


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '# One `two`, three: 4:8\n[a](#one-two-three-48) [b](#one) [c](none.md) [d](https://none.example/none) ![e](f.png) <img src="g.png">'
    )
    assert broken_links(page) == ["#one", "none.md", "f.png", "g.png"]
    wrong = [
        "lib/nothing.py",
        "lib/data/sources.py:nothing",
        "lib/models/decoder.py:Decoder.nothing",
        "tests/test_docs.py:test_nothing",
    ]
    right = ["lib/pruning/", "main.py", "lib/models/decoder.py:Decoder.enter", "scripts/check_sparsity.py:compare", "`x`"]
    assert missing_symbols(" and ".join(f"`{span}`" for span in wrong + right)) == wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_versions_are_those_of_the_requirements(page):
    pinned = (ROOT / "requirements.txt").read_text().split()
    assert [version for version in re.findall(r"\b[\w-]+==[\w.]+", page.read_text()) if version not in pinned] == []


def cells(text: str) -> list[list[str]]:
    """The rows of the tables in a text, the two of each head included."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_figures_of_the_readme_are_the_model_zoos():
    results = (ROOT / "README.md").read_text().split("\n## Results")[1].split("\n## ")[0]
    zoo = (ROOT / "MODEL_ZOO.md").read_text()
    published = cells(zoo.split("With seed 0:")[1].split("Three draws")[0])[2:]
    updates = cells(zoo.split("### Updates")[1].split("end of table")[0])[2:]
    measured = {("64, 148", method, pattern): found for pattern, method, alpha, found, *_ in published if alpha in ("", "100")}
    measured |= {
        ("16, 16", method, pattern): found
        for pattern, ratio, method, shares, found, *_ in updates
        if ratio in ("", "0.5") and not shares
    }
    rows = cells(results)[2:]
    assert len(rows) == 12
    for setting, method, *values in rows:
        method = method.replace(", `--recipe", "").replace("`", "")
        patterns = [""] * 3 if method == "dense" else ["unstructured", "4:8", "2:4"]
        assert values == [measured.get((setting, method, pattern), "-") for pattern in patterns], (setting, method)


# Flags


class Parsed(BaseException):
    """A script's parser has read the command line; nothing after that is run."""

    def __init__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace | None):
        self.parser, self.namespace = parser, namespace


def parse(script: Path, arguments: list[str] | None, monkeypatch) -> Parsed:
    """Run a script up to its parser; `arguments` None: take the parser as it is. SystemExit: it refuses the arguments."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(parser, *_):
        raise Parsed(parser, None if arguments is None else read(parser, arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.syspath_prepend(str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Parsed as parsed:
        return parsed
    finally:
        monkeypatch.undo()
    raise AssertionError(f"{script} ended without reading its flags")


def has_flags(script: Path) -> bool:
    return "argparse" in script.read_text()


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {option: action for action in parser._actions for option in action.option_strings if option not in ("-h", "--help")}


def documented_flags(page: str) -> dict[str, dict[str, tuple[str, str]]]:
    """{section: {flag: (default, meaning)}} of docs/flags.md."""
    sections = {}
    for section in page.split("\n## ")[1:]:
        rows = {}
        for line in section.splitlines():
            if line.startswith("| `--"):
                flag, default, meaning = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
                rows[flag.strip("`")] = default, meaning
        if rows:
            sections[section.splitlines()[0]] = rows
    return sections


def written_default(action: argparse.Action) -> str:
    """How docs/flags.md has to write an action's default; "" where words have to say what happens without the flag."""
    if action.required:
        return "required"
    if action.nargs == 0:
        return "off"
    if action.default in (None, [], ()):
        return ""
    values = action.default if isinstance(action.default, list | tuple) else [action.default]
    return f"`{' '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)}`"


@pytest.mark.parametrize("script", ["main.py", "gradient_computation.py"])
def test_flags_are_documented_with_their_defaults(script, monkeypatch):
    documented = documented_flags((ROOT / "docs" / "flags.md").read_text())
    assert list(documented) == ["Both commands", "gradient_computation.py", "main.py"]
    rows = documented["Both commands"] | documented[script]
    flags = flags_of(parse(ROOT / script, None, monkeypatch).parser)
    assert set(rows) == set(flags)
    for flag, (default, meaning) in rows.items():
        expected = written_default(flags[flag])
        assert default == expected if expected else default and "`" not in default, flag
        if flags[flag].choices:
            assert {str(choice) for choice in flags[flag].choices} <= set(SPAN.findall(meaning)), flag


@pytest.mark.parametrize("script", [script for script in SCRIPTS if has_flags(script)], ids=name_of)
def test_help_says_what_every_flag_does_in_80_columns(script, monkeypatch):
    parser = parse(script, None, monkeypatch).parser
    monkeypatch.setenv("COLUMNS", str(HELP_WIDTH))
    assert [option for option, action in flags_of(parser).items() if not action.help] == []
    assert [line for line in parser.format_help().splitlines() if len(line) > HELP_WIDTH] == []
    if name_of(script) in ("main.py", "gradient_computation.py"):
        sections = re.findall(r"^(\w[\w ]*):$", parser.format_help(), re.MULTILINE)
        pruning = ["beyond the paper", "evaluation"] if script.name == "main.py" else []
        first = ["options", "as in the published code", "model", "data", "method"]
        assert sections == [*first, *pruning, "memory", "output", "example"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_those_of_their_results(page):
    assert page.read_text() == collect_results.filled(page.read_text()), (
        f"python scripts/collect_results.py --fill {name_of(page)}"
    )


# Commands


def commands_in(text: str) -> list[list[str]]:
    """The words of every command of ours in lines of shell; environment variables, prompts and comments are left out."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.strip().removeprefix("$ ").split("&&"):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # an apostrophe: not a command
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if len(words) > 1 and words[0] in PROGRAMS:
                commands.append(words)
    return commands


def written_commands() -> list[tuple[str, list[str]]]:
    """(where, words) of every command in the pages, in the docstrings of scripts and in the comments of launchers."""
    found = []
    for page in PAGES:
        text = page.read_text()
        code = [*FENCE.findall(text), *SPAN.findall(prose_of(text))]
        found += [(name_of(page), words) for block in code for words in commands_in(block)]
    for script in SCRIPTS:
        found += [(name_of(script), words) for words in commands_in(ast.get_docstring(ast.parse(script.read_text())))]
    for script in [*sorted(ROOT.glob("*.sh")), *sorted((ROOT / "scripts").rglob("*.sh"))]:
        comments = "\n".join(line[1:] for line in script.read_text().splitlines() if line.startswith("# "))
        found += [(name_of(script), words) for words in commands_in(comments)]
    return found


def dry_run(words: list[str], folder: Path, monkeypatch) -> str | None:
    """Run a command up to where it would load something; returns what is wrong with it, or None.

    The files it names are made in `folder`, so that a command that only lacks its files passes, and one whose flags do
    not exist or contradict each other does not.
    """
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[0].startswith("python") and words[1] in ("-m", "-c"):
        return next(
            (f"{word} does not exist" for word in words if word.startswith("tests/") and not (ROOT / word).exists()), None
        )
    at = next((k for k, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
    if at is None or not (script := ROOT / words[at]).is_file():
        return f"{' '.join(words[:3])} names no script"
    if script.suffix == ".sh":
        return next(filter(None, (dry_run(inner, folder, monkeypatch) for inner in launched(words[at:], folder))), None)
    if not has_flags(script):
        return "it has no flags" if words[at + 1 :] else None
    arguments, refused = words[at + 1 :], io.StringIO()
    try:
        with contextlib.redirect_stderr(refused), contextlib.redirect_stdout(refused):
            namespace = parse(script, arguments, monkeypatch).namespace
            if "def parse(" in script.read_text():
                make_files(namespace, folder)
                monkeypatch.chdir(folder)
                # What is not installed here, or not plugged in, says nothing about the command.
                monkeypatch.setattr("lib.evaluation.zero_shot.require", lambda: None)
                monkeypatch.setattr("lib.models.loading.resolve_device", lambda device: torch.device("cpu"))
                runpy.run_path(str(script))["parse"](arguments)
    except SystemExit as stop:
        return refused.getvalue().splitlines()[-1] if stop.code else None
    finally:
        monkeypatch.undo()
    return None


def make_files(namespace: argparse.Namespace, folder: Path) -> None:
    """What the flags of a command name, empty or nearly so, and nothing where there is something."""
    values = vars(namespace)
    for name in ("model", "gradient_path", "checkpoint", "against", "include_path"):
        if values.get(name):
            (folder / values[name]).mkdir(parents=True, exist_ok=True)
    for name in ("dataset", "eval_dataset", "layer_ratios"):
        given = values.get(name) or []
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and Path(value).suffix:
                file = folder / value
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"0": 0.3}) if name == "layer_ratios" else json.dumps({"text": "text"}))
    if values.get("data_dir"):
        from lib.data.sources import HUB

        for repository, file in [entry for purposes in HUB.values() for entry in purposes.values()]:
            path = folder / values["data_dir"] / repository / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def launched(words: list[str], folder: Path) -> list[list[str]]:
    """The Python commands that a launcher runs, or prints for --dry_run; those of scripts/test.sh are not ours."""
    if words[0] not in map(name_of, LAUNCHERS):
        missing = [word for word in words[1:] if word not in (ROOT / words[0]).read_text()]
        return [["python", f"{words[0]} does not know {missing}"]] if missing else []
    home = folder / "home"
    shutil.copytree(ROOT / "scripts", home / "scripts", dirs_exist_ok=True)
    for launcher in ROOT.glob("*.sh"):
        shutil.copy(launcher, home)
    (home / "bin").mkdir(exist_ok=True)
    python, log = home / "bin" / "python", home / "log"
    python.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' \"$(printf '%q ' python \"$@\")\" >> {shlex.quote(str(log))}\n")
    python.chmod(0o755)
    log.unlink(missing_ok=True)
    log.touch()
    environment = {
        **os.environ,
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(home),
        "MODEL": "owner/model",
    }
    if "MODEL:?" not in (ROOT / words[0]).read_text():
        del environment["MODEL"]
    done = subprocess.run(["bash", *words], cwd=home, env=environment, capture_output=True, text=True)
    if done.returncode:
        return [["python", done.stderr]]
    return [shlex.split(line) for line in (log.read_text() + done.stdout).splitlines() if line.startswith("python ")]


COMMANDS = written_commands()


@pytest.mark.parametrize("where, words", COMMANDS, ids=[f"{where}-{k}" for k, (where, _) in enumerate(COMMANDS)])
def test_commands_can_be_run(where, words, tmp_path, monkeypatch):
    assert dry_run(words, tmp_path, monkeypatch) is None, shlex.join(words)


def test_every_script_and_launcher_has_a_command():
    written = {word for _, words in COMMANDS for word in words}
    for script in [*(script for script in SCRIPTS if "__main__" in script.read_text()), *LAUNCHERS]:
        assert name_of(script) in written or name_of(script) in (ROOT / "run_gblm_prune.sh").read_text(), script


def test_a_launcher_runs_what_it_is_said_to(tmp_path, monkeypatch):
    inner = launched(["run_gblm_prune.sh", "--sparsity_type", "2:4", "--seed", "3"], tmp_path)
    assert [words[1] for words in inner] == ["scripts/fetch_demo.py"] * 2 + ["gradient_computation.py", "main.py"]
    assert inner[2][-2:] == ["--seed", "3"] and "2:4" in inner[3]


@pytest.mark.parametrize(
    "command, problem",
    [
        ("python main.py --model m --prune_method wanda --no_such_flag", "--no_such_flag"),
        ("python main.py --model m --prune_method wanda", "--sparsity_ratio"),
        ("torchrun --nproc_per_node=2 main.py --model m --prune_method gblm --sparsity_type 2:4", "--gradient_path"),
        ("python nothing.py", "names no script"),
        ("python -m pytest tests/test_nothing.py", "does not exist"),
        ("bash scripts/test.sh --slow", "--slow"),
        ("bash run_gblm_prune.sh --sparsity_type 2:5:8", "2:5:8"),
        ("python scripts/fetch_demo.py --model m", "no flags"),
    ],
)
def test_the_dry_run_sees_what_is_wrong(command, problem, tmp_path, monkeypatch):
    (words,) = commands_in(command)
    assert problem in dry_run(words, tmp_path, monkeypatch)


def test_commands_are_found():
    text = "$ OMP_NUM_THREADS=2 python a.py  # b\nMODEL=m bash c.sh \\\n  --d && python e.py\nprints a python\nIt's no command"
    assert commands_in(text) == [["python", "a.py"], ["bash", "c.sh", "--d"], ["python", "e.py"]]
