"""Which runs are one but for their seeds: by all that their perplexity depends on, and by nothing else."""

import json

import pytest
from test_collect_results import FLAGS, collect, write

import main as pruning
from lib.results import read

# A value other than the default of every flag of main.py: of those that the perplexity depends on, and of the others.
SETTINGS = {
    "model": "m/other", "nsamples": 64, "seq_length": 8, "prune_method": "wanda", "sparsity_type": "2:4", "gradient_inv": True,
    "use_variant": True, "layer_no": 2, "revision": "r", "trust_remote_code": True, "dataset": "t.txt", "text_column": "t",
    "bos": "every", "pack": True, "alpha": 10.0, "include": ["*.o_proj"], "exclude": ["*.o_proj"], "layer_ratios": "line:0.3",
    "recipe": "best", "update": "lsq", "stages": 4, "asymmetric": 0.5, "reconstruct": 2, "eval_dataset": "t.txt",
}  # fmt: skip
NO_SETTINGS = {
    "seed": 3, "cache_dir": "c", "grad_norm": "l1", "grad_exponent": True, "save": "s", "save_model": "s", "device": "cuda",
    "force": True, "data_dir": "d", "held_out": 4, "no_cache": True, "eval_zero_shot": True, "eval_dense": True,
    "tasks": ["boolq"], "num_fewshot": 2, "limit": 5.0, "include_path": "i", "memory": "streamed", "activation_memory": 2.0,
    "batch_size": 4, "plots": True, "reconstruct_lr": 0.1, "gradient_path": "h/gradients_aggregrate_norm_l2_model_tiny",
}  # fmt: skip
ELSEWHERE = {"sparsity_ratio", "dtype"}  # results.json says what was asked for in all, and which dtype it was


def every_flag() -> dict:
    """The flags of main.py with their defaults, as results.json has them."""
    flags = vars(pruning.parse(["--model", "models/tiny", "--prune_method", "wanda", "--sparsity_ratio", "0.5"]))
    return flags | FLAGS | {"bos": "first", "eval_dataset": "text"}


def test_every_flag_of_main_py_is_a_setting_or_none():
    assert SETTINGS.keys() | NO_SETTINGS.keys() | ELSEWHERE == every_flag().keys()
    assert not SETTINGS.keys() & NO_SETTINGS.keys()


@pytest.mark.parametrize("name, value", [*SETTINGS.items(), *NO_SETTINGS.items()], ids=str)
def test_flags_split_runs_if_and_only_if_the_perplexity_depends_on_them(name, value, tmp_path):
    write(tmp_path, "a", **every_flag())
    write(tmp_path, "b", **every_flag() | {"seed": 1, name: value})
    assert len(read.by_settings(read.read([tmp_path]))) == (2 if name in SETTINGS else 1)


def test_windows_that_a_search_compares_on_are_a_setting(tmp_path):
    write(tmp_path, "a", alpha="auto", held_out=8)
    write(tmp_path, "b", alpha="auto", held_out=16, seed=1)
    assert len(read.by_settings(read.read([tmp_path]))) == 2


def write_with(folder, name: str, more: dict, perplexity: float = 40.0, **flags) -> None:
    path = write(folder, name, perplexity, **flags)
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_what_a_file_of_layer_ratios_says_is_a_setting_and_not_its_name(tmp_path, caplog):
    shares, edited = {"0": 0.3, "*.down_proj": "4:8"}, {"0": 0.4, "*.down_proj": "4:8"}
    write_with(tmp_path, "a", {"layer_ratios": shares}, 40.0, layer_ratios="ratios.json")
    write_with(tmp_path, "b", {"layer_ratios": edited}, 41.0, layer_ratios="ratios.json")
    write_with(tmp_path, "c", {"layer_ratios": shares}, 42.0, layer_ratios="copy.json", seed=1)
    write_with(tmp_path, "d", {"layer_ratios": {"0": 0.2, "1": 0.4}}, 43.0, layer_ratios="line:0.2")
    rows = collect(tmp_path, "--output", tmp_path / "table")
    assert {(row["layer_ratios"], row["seeds"], row["perplexity"]) for row in rows} == {
        ("0=0.3 *.down_proj=4:8", "0 1", "41.0"), ("0=0.4 *.down_proj=4:8", "0", "41.0"), ("line:0.2", "0", "43.0")
    }  # fmt: skip
    assert "left out" not in caplog.text
    (row,) = collect(tmp_path, "--output", tmp_path / "table", "--where", "layer_ratios=0=0.4 *.down_proj=4:8")
    assert row["perplexity"] == "41.0"


def test_models_of_one_name_and_other_weights_are_told_apart(tmp_path):
    write_with(tmp_path, "a", {"weights": "0123456789abcdef"}, 40.0, model="a/model")
    write_with(tmp_path, "b", {"weights": "fedcba9876543210"}, 41.0, model="b/model")
    assert [run.settings["model"] for run in read.read([tmp_path])] == ["model 01234567", "model fedcba98"]
    assert [run.settings["model"] for run in read.read([tmp_path / "a"])] == ["model"]
