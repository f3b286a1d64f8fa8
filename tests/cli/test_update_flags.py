"""--update, --stages, --reconstruct and --recipe through main.py."""

import json

import pytest
import torch
from test_commands import run
from transformers import AutoModelForCausalLM

import main as pruning
from lib.pruning.updates.recipe import RECIPES


@pytest.fixture(scope="module")
def command(saved_model, documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return [
        "--model", saved_model, "--dataset", folder / "text.jsonl", "--eval_dataset", folder / "text.jsonl", "--nsamples", 9,
        "--seq_length", 16, "--cache_dir", folder, "--dtype", "float32", "--sparsity_type", "2:4",
    ]  # fmt: skip


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "flags", ["--update obs", "--update lsq --stages 2", "--reconstruct 1", "--recipe max --reconstruct 2"]
)
def test_a_checkpoint_holds_the_updated_weights(command, method, flags, memory, saved_model, tmp_path):
    printed = run(
        "main.py", *command, "--prune_method", method, *flags.split(), "--memory", memory,
        "--save", tmp_path, "--save_model", tmp_path / "model",
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert f"pruned perplexity {results['perplexity']['pruned']:.4f}" in printed and results["sparsity"] == 0.5
    errors = results["errors_by_block"]
    assert list(errors) == ["0", "1", "2"]
    for found in errors.values():
        assert len(found["linears"]) == (0 if flags == "--reconstruct 1" else 7)
        for error in found["linears"].values():
            assert 0 < error["updated"] < 1 and (error["updated"] <= error["masked"] or "lsq" not in flags)
        assert (found["output"] is not None) == ("reconstruct" in flags)
        if found["output"]:
            assert 0 < found["output"]["after"] <= found["output"]["before"]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (saved_model, tmp_path / "model"))
    for name, weight in after.state_dict().items():
        original = before.state_dict()[name]
        if "proj" in name:
            assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
            assert not torch.equal(weight, original.masked_fill(weight == 0, 0)) or flags == "--reconstruct 1"
        else:
            assert torch.equal(weight, original)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_errors_on_windows_held_out(command, memory, tmp_path):
    """They are told beside those on the calibration windows, and change nothing."""
    flags = [*command, "--prune_method", "wanda", "--recipe", "fast", "--memory", memory]
    run("main.py", *flags, "--save", tmp_path / "without")
    run("main.py", *flags, "--save", tmp_path / "with", "--held_out", 5)
    without, found = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("without", "with"))
    assert found["perplexity"] == without["perplexity"] | {"dense_reused": True}
    for i, block in found["errors_by_block"].items():
        for name, errors in block["linears"].items():
            assert without["errors_by_block"][i]["linears"][name].items() < errors.items()
            assert errors["masked"] != errors["masked_held_out"] and errors["updated_held_out"] > errors["updated"]
    assert (tmp_path / "with" / "errors_held_out.png").exists()
    assert not (tmp_path / "without" / "errors_held_out.png").exists()
    run("main.py", *flags, "--save", tmp_path / "with")
    assert not (tmp_path / "with" / "errors_held_out.png").exists()  # that was of results that are gone


def test_published_methods_have_no_errors_to_tell(command, tmp_path):
    run("main.py", *command, "--prune_method", "sparsegpt", "--save", tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["errors_by_block"] == {}


def test_results_say_what_a_recipe_set(command, tmp_path):
    run("main.py", *command, "--prune_method", "wanda", "--recipe", "best", "--save", tmp_path)
    flags, recipe = json.loads((tmp_path / "results.json").read_text())["flags"], RECIPES["best"]
    assert flags["recipe"] == "best" and flags["prune_method"] == "wanda"
    assert (flags["update"], flags["stages"], flags["reconstruct"]) == (recipe.update, recipe.stages, recipe.epochs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--update cg", "invalid choice"),
        ("--stages 4", "add --update lsq"),
        ("--update none --stages 4", "add --update lsq"),
        ("--update lsq --stages 0", "not above 0"),
        ("--reconstruct -1", "at least 0"),
        ("--reconstruct_lr 1e-4", "--reconstruct EPOCHS: add it"),
        ("--held_out 4", "weights that are updated: add --update lsq or obs"),
        ("--reconstruct 2 --reconstruct_lr 0", "not above 0"),
        ("--recipe fastest", "invalid choice"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, capsys):
    with pytest.raises(SystemExit):
        pruning.parse(["--model", "owner/name", "--prune_method", "wanda", "--sparsity_ratio", "0.5", *arguments.split()])
    assert message in capsys.readouterr().err
