"""The launchers of the paper's tables and of the baselines: what they would run."""

import os
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT

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
        ["bash", ROOT / "scripts" / launcher, "--dry_run", *flags], env=environment | variables, capture_output=True, text=True
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


def test_what_is_finished_is_left_out(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    before = printed(tmp_path / "scripts" / "smollm2.sh", TABLES="methods")
    done = tmp_path / value_of(before[0], "--save") / "log.txt"
    done.parent.mkdir(parents=True)
    done.touch()
    assert printed(tmp_path / "scripts" / "smollm2.sh", TABLES="methods") == before[1:]


def test_an_unknown_table_is_refused():
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "llama_7b.sh", "--dry_run"],
        env=os.environ | {"TABLES": "all"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "table all is none of methods" in done.stderr
