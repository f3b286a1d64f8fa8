"""The launchers: what they run or would run, and that macOS' bash can read them."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT

from lib.cli import flags
from lib.results.read import COMPLETE

PAPER = ROOT / "scripts" / "paper"
SHELL = [*sorted(ROOT.glob("*.sh")), *sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]
MODELS = {
    "llama_7b.sh": ("huggyllama/llama-7b", 1),
    "llama_2_7b.sh": ("meta-llama/Llama-2-7b-hf", 2),
    "llama_2_13b.sh": ("meta-llama/Llama-2-13b-hf", 2),
    "llama_2_70b.sh": ("meta-llama/Llama-2-70b-hf", 2),
}


def printed(launcher, *flags, **variables) -> list[list[str]]:
    """The commands that --dry_run prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "TABLES", "NSAMPLES", "SAMPLES")}
    done = subprocess.run(
        ["bash", PAPER / launcher, "--dry_run", *flags], env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def value_of(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


@pytest.fixture(scope="module")
def commands():
    return printed("llama_2_7b.sh")


def test_every_table_of_the_paper_is_there(commands):
    runs = [words for words in commands if words[1] == "main.py"]
    cases = [
        tuple(
            value_of(words, flag) for flag in ("--prune_method", "--sparsity_type", "--sparsity_ratio", "--nsamples", "--seed")
        )
        for words in runs
    ]
    for method in ("magnitude", "wanda", "gradient", "gblm", "sparsegpt"):
        for pattern in ("4:8", "2:4"):
            assert (method, pattern, None, "128", "0") in cases
        for tenths in range(1, 9):
            assert (method, "unstructured", f"0.{tenths}", "128", "0") in cases
    for method in ("wanda", "gblm"):
        assert {n for m, _, r, n, s in cases if (m, r, s) == (method, "0.5", "0")} == {str(2**k) for k in range(8)}
        assert {s for m, _, r, n, s in cases if (m, r, n) == (method, "0.5", "128")} == set("01234")
    norms = {(value_of(words, "--prune_method"), value_of(words, "--gradient_path").split("_norm_")[1][:2]) for words in runs
             if value_of(words, "--gradient_path")}  # fmt: skip
    assert norms == {(method, norm) for method in ("gradient", "gblm") for norm in ("l1", "l2")}
    assert {value_of(words, "--alpha") for words in runs} == {None, "1", "10", "1000", "10000", "100000"}
    assert len({tuple(words) for words in commands}) == len(commands) and len({value_of(w, "--save") for w in runs}) == len(
        runs
    )


def test_gradients_come_before_the_runs_that_need_them_and_of_the_same_samples(commands):
    made = {}
    for words in commands:
        if words[1] == "gradient_computation.py":
            folder = f"{value_of(words, '--output_dir')}/llama{value_of(words, '--llama_version')}"
            made[f"{folder}/gradients_aggregrate_norm_{value_of(words, '--norms')}_model_Llama-2-7b-hf"] = words
        elif path := value_of(words, "--gradient_path"):
            for flag in ("--nsamples", "--seed", "--model"):
                assert value_of(words, flag) == value_of(made[path], flag)


@pytest.mark.parametrize("launcher", MODELS)
def test_the_launchers_differ_in_the_model_alone(launcher, commands):
    model, version = MODELS[launcher]
    own = [" ".join(words) for words in printed(launcher)]
    expected = [
        " ".join(words).replace("meta-llama/Llama-2-7b-hf", model).replace("Llama-2-7b-hf", model.split("/")[1])
        .replace("/llama2/", f"/llama{version}/").replace("--llama_version 2", f"--llama_version {version}")
        for words in commands
    ]  # fmt: skip
    assert own == expected


def test_flags_go_to_both_commands_and_those_behind_dashes_to_one():
    for words in printed("smollm2.sh", "--dtype", "float32", "--", "--batch_size", "4", TABLES="methods"):
        assert value_of(words, "--dtype") == "float32" and value_of(words, "--seq_length") == "512"
        assert value_of(words, "--batch_size") == ("4" if words[1] == "main.py" else None)
        assert value_of(words, "--eval_dataset") == ("demo/evaluation.jsonl" if words[1] == "main.py" else None)


def test_what_is_complete_is_left_out_and_what_was_interrupted_is_repeated(tmp_path):
    shutil.copytree(PAPER, tmp_path / "scripts" / "paper")
    launcher = tmp_path / "scripts" / "paper" / "smollm2.sh"
    before = printed(launcher, TABLES="methods")
    folder = tmp_path / value_of(before[0], "--save")
    folder.mkdir(parents=True)
    (folder / "log.txt").touch()
    assert printed(launcher, TABLES="methods") == before
    for status in ("pruned; the zero-shot tasks are being scored", COMPLETE):
        (folder / "results.json").write_text(json.dumps({"status": status, "flags": {}}, indent=2))
        assert printed(launcher, TABLES="methods") == (before[1:] if status == COMPLETE else before)


def test_finished_gradients_are_used_again(tmp_path):
    shutil.copytree(PAPER, tmp_path / "scripts" / "paper")
    launcher = tmp_path / "scripts" / "paper" / "smollm2.sh"
    before = printed(launcher, TABLES="alpha")
    folder = tmp_path / value_of(before[1], "--gradient_path")
    folder.mkdir(parents=True)
    assert printed(launcher, TABLES="alpha") == before
    (folder / "index.json").touch()
    assert before[0][1] == "gradient_computation.py" and printed(launcher, TABLES="alpha") == before[1:]


def test_an_unknown_table_is_refused():
    done = subprocess.run(
        ["bash", PAPER / "llama_7b.sh", "--dry_run"],
        env=os.environ | {"TABLES": "all"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "table all is not one of methods" in done.stderr


def called(folder, *words) -> list[list[str]]:
    """How a launcher calls `python`: here one that only tells how."""
    shutil.copytree(ROOT / "scripts", folder / "scripts", dirs_exist_ok=True)
    for launcher in ROOT.glob("*.sh"):
        shutil.copy(launcher, folder)
    calls, python = folder / "calls", folder / "python"
    calls.unlink(missing_ok=True)
    python.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' \"$(printf '%q ' \"$@\")\" >> {shlex.quote(str(calls))}\n")
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": "one"}
    environment = {name: value for name, value in environment.items() if name not in ("MODEL", "LLAMA_VERSION")}
    subprocess.run(["bash", *words], cwd=folder, env=environment, check=True)
    return [shlex.split(line) for line in calls.read_text().splitlines()]


def shared_flags() -> list[argparse.Action]:
    parser, groups = flags.parser_of("")
    flags.add_common_flags(groups)
    flags.add_memory_flags(groups)
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


@pytest.mark.parametrize("form", ["--flag value", "--flag=value"])
def test_every_flag_that_the_commands_share_reaches_both(form, tmp_path):
    given, takes_value = [], {}
    for number, action in enumerate(shared_flags()):
        (flag,) = action.option_strings
        takes_value[flag] = value = None if action.nargs == 0 else f"a value {number}"
        given += [flag] if value is None else [flag, value] if form == "--flag value" else [f"{flag}={value}"]
    compute, prune = called(tmp_path, "run_gblm_prune.sh", *given, "--force")
    assert compute[0] == "gradient_computation.py" and prune[0] == "main.py"
    assert prune[-len(given) - 1 :] == [*given, "--force"] and "--force" not in compute
    for flag, value in takes_value.items():
        assert flag in compute and (value is None or value_of(compute, flag) == value), flag


def test_a_run_without_gradients_needs_none(tmp_path):
    ((program, *words),) = called(
        tmp_path, "run_gblm_prune.sh", "--model", "m", "--prune_method", "wanda", "--sparsity_type", "2:4"
    )
    assert program == "main.py" and "--gradient_path" not in words and "--sparsity_ratio" not in words


# What bash 3.2 does not have, which macOS comes with.
NEWER = {
    "associative array": r"\b(declare|local|typeset)\s+-\w*A",
    "reference to a variable": r"\b(declare|local|typeset)\s+-\w*n",
    "mapfile": r"\b(mapfile|readarray|coproc)\b",
    "case of a value": r"\$\{\w+(\[[^]]*\])?(\^|,)",
    "value, transformed": r"\$\{\w+(\[[^]]*\])?@",
    "last of an array": r"\$\{\w+\[-",
    "both outputs, appended": r"&>>",
    "both outputs, piped": r"\|&",
    "fall through in case": r";;?&",
    "whether set": r"(\[|test) -v ",
    "globstar": r"\bglobstar\b",
    # to `set -u` an empty array is an unset variable
    "array without a guard": r"\$\{\w+\[[@*]\]",
}
GUARDED = re.compile(r"""\$\{(\w+)\[@\]\+"\$\{\1\[@\]\}"\}""")


def newer_than_bash_3_2(script: str) -> list[str]:
    script = GUARDED.sub("", script)
    return [what for what, pattern in NEWER.items() if re.search(pattern, script)]


@pytest.mark.parametrize("script", SHELL, ids=lambda script: str(script.relative_to(ROOT)))
def test_the_bash_of_macos_can_read_it(script):
    assert newer_than_bash_3_2(script.read_text()) == []


@pytest.mark.parametrize(
    "line, what",
    [
        ("declare -A seen=()", "associative array"),
        ("local -A seen", "associative array"),
        ("local -n other=$1", "reference to a variable"),
        ("mapfile -t lines < file", "mapfile"),
        ("readarray -t lines < file", "mapfile"),
        ('echo "${x^^}"', "case of a value"),
        ('echo "${x,,}"', "case of a value"),
        ('echo "${x@Q}"', "value, transformed"),
        ('echo "${x[-1]}"', "last of an array"),
        ("python main.py &>> log", "both outputs, appended"),
        ("python main.py |& tee log", "both outputs, piped"),
        ("a) echo a ;;& ", "fall through in case"),
        ("[ -v x ]", "whether set"),
        ("shopt -s globstar", "globstar"),
        ('python main.py "${x[@]}"', "array without a guard"),
        ('python main.py ${x[@]+"${y[@]}"}', "array without a guard"),
        ('echo "${x[*]}"', "array without a guard"),
    ],
)
def test_the_check_sees_what_is_too_new(line, what):
    assert newer_than_bash_3_2(f"set -u\n{line}\n") == [what]


def test_the_check_lets_pass_what_is_old_enough():
    old = 'for ((i = 0; i < ${#x[@]}; i++)); do x+=("${y/:/-}" "${z%%=*}"); done; python ${x[@]+"${x[@]}"} "$@" > log 2>&1 || exit'
    assert newer_than_bash_3_2(old) == []
