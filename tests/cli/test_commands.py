"""Both commands end to end on a tiny saved model, and what they refuse before anything loads."""

import contextlib
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradient_computation
import main as pruning
from lib.cli.command import run as run_command
from lib.data import sources
from lib.gradients.folder import GradientNorms
from lib.models import loading
from lib.pruning import search

COMMANDS = {"main.py": pruning, "gradient_computation.py": gradient_computation}


def run(script: str, *arguments) -> str:
    """Run a command in this process (a new one spends seconds on its imports); returns its standard output."""
    script, printed = COMMANDS[script], io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            device = () if "--device" in arguments else ("--device", DEVICE)
            script.main(script.parse([str(argument) for argument in (*arguments, *device)]))
    finally:
        print(printed.getvalue(), end="")  # what a command that fails printed is the test's to look at
    return printed.getvalue()


def run_alone(*command) -> subprocess.CompletedProcess:
    """Run Python as a user would."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return path


@pytest.fixture(scope="module")
def flags(saved_model, text, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [
        "--model",
        saved_model,
        "--dataset",
        text,
        "--nsamples",
        4,
        "--seq_length",
        16,
        "--cache_dir",
        cache,
        "--dtype",
        "float32",
    ]


@pytest.fixture(scope="module")
def gradients(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    done = run_alone("gradient_computation.py", *flags, "--llama_version", 1, "--output_dir", folder)
    path = folder / "llama1" / "gradients_aggregrate_norm_l2_model_tiny-llama"
    assert str(path) in done.stdout
    return path


def test_gradients_say_what_made_them(gradients, saved_model, text):
    index = json.loads((gradients / "index.json").read_text())
    expected = {
        "norm": "l2",
        "model": str(saved_model),
        "nsamples": 4,
        "seq_length": 16,
        "scale": 100.0,
        "seed": 0,
        "dataset": str(text),
        "pack": False,
        "text_column": None,
        "bos": "first",
        "dtype": "float32",
    }
    assert expected.items() <= index.items()
    assert index["versions"]["torch"] and len(index["files"]) == 3
    l1, l2 = (GradientNorms(str(gradients).replace("_l2_", f"_{norm}_")).block(0)["mlp.up_proj"] for norm in ("l1", "l2"))
    assert (l1 >= l2 * 0.99).all() and (l1 > l2).any()  # ||.||_1 >= ||.||_2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pruning_end_to_end(flags, gradients, saved_model, text, tmp_path, dtype):
    save, checkpoint = tmp_path / "out", tmp_path / "out" / "checkpoint"
    older = [*flags, "--prune_method", "magnitude", "--sparsity_ratio", 0.1, "--eval_dataset", text]
    run("main.py", *older, "--save_model", checkpoint)  # is replaced
    done = run_alone(
        "main.py", *flags, "--prune_method", "gblm", "--gradient_path", gradients, "--sparsity_type", "2:4",
        "--eval_dataset", text, "--save", save, "--save_model", checkpoint, "--dtype", dtype,
    )  # fmt: skip
    results = json.loads((save / "results.json").read_text())
    dense, pruned = results["perplexity"]["dense"], results["perplexity"]["pruned"]
    lines = done.stdout.splitlines()
    measured = f"on {text}, {results['perplexity']['windows']} windows of 16 tokens"
    assert lines[0].startswith("tokenizer ") and lines[0].endswith(f" of 96 tokens, perplexity {measured}")
    assert lines[1] == f"dense perplexity {dense:.4f} {measured}"
    assert f"pruned perplexity {pruned:.4f}" in done.stdout and "sparsity 0.5000" in done.stdout
    assert (save / "log.txt").read_text() == f"actual_sparsity\tppl\n0.5000\t{pruned:.4f}\n"
    assert results["flags"]["alpha"] == 100 and results["phases"]["prune"]["seconds"] >= 0
    assert (save / "sparsity.png").stat().st_size > 1000
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (saved_model, checkpoint))
    assert json.loads((checkpoint / "config.json").read_text()) == json.loads((saved_model / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(checkpoint)("w5 w6")["input_ids"] == [5, 6]
    for name, weight in after.state_dict().items():
        original = before.state_dict()[name]
        assert weight.dtype == original.dtype  # whatever dtype the run computed in
        if "proj" in name:
            assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
            assert torch.equal(weight, torch.where(weight == 0, 0, original))
            _, _, block, path = name.removesuffix(".weight").split(".", 3)  # model.layers.0.mlp.up_proj
            assert results["sparsity_by_block"][block][path] == (weight == 0).float().mean().item()
        else:
            assert torch.equal(weight, original)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_baselines_need_no_gradients_and_no_place_to_save(flags, text, method):
    printed = run("main.py", *flags, "--prune_method", method, "--sparsity_ratio", 0.5, "--eval_dataset", text)
    sparsity = float(printed.splitlines()[2].removeprefix("sparsity "))
    assert sparsity == pytest.approx(0.5, abs=0.005)


def test_a_sparsegpt_checkpoint_keeps_its_updates(flags, text, tmp_path, saved_model):
    run(
        "main.py",
        *flags,
        "--prune_method",
        "sparsegpt",
        "--sparsity_type",
        "2:4",
        "--eval_dataset",
        text,
        "--save_model",
        tmp_path,
    )
    weight, dense = (
        AutoModelForCausalLM.from_pretrained(path).model.layers[2].mlp.down_proj.weight for path in (tmp_path, saved_model)
    )
    assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
    assert not torch.equal(weight, torch.where(weight == 0, 0, dense))


def test_the_folders_scale_does_not_change_the_masks(flags, gradients, tmp_path, text):
    """alpha is the paper's: with norms of scale 50 the stored values enter with factor 100 / 50."""
    run("gradient_computation.py", *flags, "--scale", 50, "--norms", "l2", "--output_dir", tmp_path)
    other = tmp_path / "llama2" / gradients.name
    printed = [
        run(
            "main.py",
            *flags,
            "--prune_method",
            "gblm",
            "--gradient_path",
            path,
            "--sparsity_ratio",
            0.5,
            "--eval_dataset",
            text,
        )
        for path in (gradients, other)
    ]
    assert printed[0] == printed[1]


def test_gradients_of_another_model_stop_the_run(flags, gradients, tmp_path, saved_model, text, capsys):
    model = AutoModelForCausalLM.from_pretrained(saved_model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.neg_()
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(saved_model).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"mlp\.up_proj_layer_1 .* other weights"):
        run(
            "main.py", *flags, "--model", tmp_path / "other", "--prune_method", "gradient", "--gradient_path", gradients,
            "--sparsity_ratio", 0.5, "--eval_dataset", text,
        )  # fmt: skip
    assert "dense perplexity" not in capsys.readouterr().out


def test_a_tokenizer_with_more_tokens_than_the_model_stops_text_that_holds_them(
    flags, saved_model, text, tmp_path, capsys, caplog
):
    shutil.copytree(saved_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    tokenizer.add_tokens(["<never used>"])
    tokenizer.save_pretrained(tmp_path / "model")
    command = [*flags, "--model", tmp_path / "model"]
    pruning_flags = ["--prune_method", "magnitude", "--sparsity_ratio", 0.5, "--eval_dataset", text]
    for script, more in (("main.py", pruning_flags), ("gradient_computation.py", ["--output_dir", tmp_path])):
        caplog.clear()
        run(script, *command, *more)
        assert "token ids up to 96" in caplog.text and "only 96 embeddings; the text has none" in caplog.text
    capsys.readouterr()
    text = tmp_path / "text.txt"
    text.write_text("w5 <never used> " * 50)
    for wrong in (["--eval_dataset", text, "--force"], ["--eval_dataset", text]):
        with pytest.raises(ValueError, match="the text has token ids up to 96 .* only 96 embeddings"):
            run("main.py", *command, *pruning_flags, *wrong)
    with pytest.raises(ValueError, match="the text has token ids up to 96 .* only 96 embeddings"):
        run("gradient_computation.py", *command, "--dataset", text, "--output_dir", tmp_path)
    assert capsys.readouterr().out == ""


def test_a_hopeless_dense_perplexity_stops_the_run(flags, saved_model, text, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(saved_model)
    with torch.no_grad():
        model.model.norm.weight *= 100  # certain, and wrong
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(saved_model).save_pretrained(tmp_path)
    command = [*flags, "--model", tmp_path, "--prune_method", "magnitude", "--sparsity_ratio", 0.5, "--eval_dataset", text]
    run("main.py", *command, "--save_model", tmp_path / "pruned", "--force")  # an earlier result
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"dense perplexity is .* beyond 1000: .* of 96 tokens may not be .*--force"):
        run("main.py", *command, "--save_model", tmp_path / "pruned")
    printed = capsys.readouterr().out
    assert "dense perplexity" in printed and "pruned" not in printed
    assert list((tmp_path / "pruned").glob("*.safetensors"))
    assert "pruned perplexity" in run("main.py", *command, "--force")


def test_weights_of_others_are_not_replaced(flags, saved_model, text, tmp_path, capsys):
    shutil.copytree(saved_model, tmp_path / "mine")
    command = [*flags, "--prune_method", "magnitude", "--sparsity_ratio", 0.5, "--eval_dataset", text]
    with pytest.raises(SystemExit):
        run("main.py", *command, "--save_model", tmp_path / "mine")
    assert "would replace" in capsys.readouterr().err
    assert (tmp_path / "mine" / "model.safetensors").is_file()


def test_what_is_refused_ends_in_one_line_and_other_errors_keep_their_traceback(monkeypatch, capsys):
    def refused(args):
        sources.documents("nothing.txt")

    def broken(args):
        json.loads("{")  # a ValueError, of another library

    with pytest.raises(SystemExit, match=r"error: dataset file nothing\.txt does not exist"):
        run_command(lambda: None, refused)
    with pytest.raises(json.JSONDecodeError):
        run_command(lambda: None, broken)


def test_windows_in_batches_give_the_same_perplexity(flags, text, tmp_path):
    """To the rounding of fp32: a product of seven windows may be added up in another order than one of a single window."""
    command = [*flags, "--prune_method", "magnitude", "--sparsity_ratio", 0.5, "--eval_dataset", text, "--save", tmp_path]
    found = []
    for size in (1, 7):
        run("main.py", *command, "--batch_size", size)
        found.append(json.loads((tmp_path / "results.json").read_text())["perplexity"])
    for name in ("dense", "pruned"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_selection_by_name_and_by_ratio(flags, text, tmp_path, saved_model):
    (tmp_path / "ratios.json").write_text(json.dumps({"0": 0.25, "*.down_proj": 0.75}))
    printed = run(
        "main.py", *flags, "--prune_method", "wanda", "--sparsity_ratio", 0.5, "--layer_ratios", tmp_path / "ratios.json",
        "--exclude", "*.o_proj", "--eval_dataset", text, "--save", tmp_path, "--save_model", tmp_path / "model",
    )  # fmt: skip
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    results, zero, total = json.loads((tmp_path / "results.json").read_text()), 0, 0
    for i in range(3):
        for name, found in results["sparsity_by_block"][str(i)].items():
            weight = weights[f"model.layers.{i}.{name}.weight"]
            expected = 0 if "o_proj" in name else 0.75 if "down_proj" in name else 0.25 if i == 0 else 0.5
            assert found == (weight == 0).float().mean().item() == expected
            zero, total = zero + (weight == 0).sum().item(), total + weight.numel()
    assert results["sparsity_asked"] == results["sparsity"] == zero / total
    assert f"sparsity {zero / total:.4f}" in printed
    assert results["layer_ratios"] == {"0": 0.25, "*.down_proj": 0.75}


def test_patterns_by_name(flags, text, tmp_path, saved_model):
    """2:4 with another pattern, a share and dense linears; the last match counts."""
    (tmp_path / "ratios.json").write_text(
        json.dumps({"*.down_proj": "4:8", "*.o_proj": "dense", "2": 0.25, "*.2.mlp.up_proj": "1:4"})
    )
    run(
        "main.py", *flags, "--prune_method", "wanda", "--sparsity_type", "2:4", "--layer_ratios", tmp_path / "ratios.json",
        "--eval_dataset", text, "--save", tmp_path, "--save_model", tmp_path / "model",
    )  # fmt: skip
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    results, zero, total = json.loads((tmp_path / "results.json").read_text()), 0, 0
    for i in range(3):
        for name, found in results["sparsity_by_block"][str(i)].items():
            zeros = weights[f"model.layers.{i}.{name}.weight"] == 0
            if i == 2:
                share, groups = (0.25, (1, 4)) if "up_proj" in name else (0.25, None)
            elif "o_proj" in name:
                share, groups = 0, None
            else:
                share, groups = 0.5, (4, 8) if "down_proj" in name else (2, 4)
            if groups:
                assert (zeros.view(-1, groups[1]).sum(1) == groups[0]).all(), name
            elif share:
                assert (zeros.sum(1) == int(zeros.shape[1] * share)).all(), name
            assert found == zeros.float().mean().item() == share
            zero, total = zero + zeros.sum().item(), total + zeros.numel()
    assert results["sparsity_asked"] == results["sparsity"] == zero / total


def test_gradients_of_other_samples_are_pointed_out(flags, gradients, text, caplog):
    command = [*flags, "--sparsity_ratio", 0.5, "--eval_dataset", text, "--gradient_path", gradients, "--nsamples", 3]
    run("main.py", *command, "--prune_method", "gradient")  # looks at no activations
    assert "the gradients were computed" not in caplog.text
    run("main.py", *command, "--prune_method", "gblm")
    assert "the gradients were computed with --nsamples 4, the activations will be with 3" in caplog.text
    assert "--seed" not in caplog.text


def windows_measured(monkeypatch) -> list[torch.Tensor]:
    """Filled with the windows of every perplexity that main.py measures from here on."""
    perplexity, measured = pruning.perplexity, []
    monkeypatch.setattr(
        pruning,
        "perplexity",
        lambda decoder, windows, **how: (measured.append(windows), perplexity(decoder, windows, **how))[1],
    )
    return measured


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_alpha_is_chosen_on_windows_held_out(flags, gradients, text, tmp_path, monkeypatch, memory):
    """And the model is that of a run with this alpha, from windows that `--alpha auto` leaves as they are."""
    command = [*flags, "--prune_method", "gblm", "--gradient_path", gradients, "--sparsity_type", "2:4", "--eval_dataset", text]
    command += ["--memory", memory]
    original, measured = pruning.perplexity, windows_measured(monkeypatch)
    printed = run("main.py", *command, "--alpha", "auto", "--save", tmp_path, "--save_model", tmp_path / "auto")
    results = json.loads((tmp_path / "results.json").read_text())
    tried = {float(alpha): perplexity for alpha, perplexity in results["tried"]["alpha"].items()}
    assert tuple(tried) == search.ALPHAS and len(set(tried.values())) > 2
    chosen = results["chosen"]["alpha"]
    assert results["flags"]["alpha"] == "auto"
    assert tried[chosen] == min(tried.values()) and f"--alpha {chosen} chosen" in printed
    held_out = [windows for windows in measured if len(windows) == search.LEAST_HELD_OUT]
    assert len(held_out) == len(tried) and results["phases"]["search alpha"]["seconds"] > 0

    run("main.py", *command, "--alpha", chosen, "--save", tmp_path / "again", "--save_model", tmp_path / "given")
    same = "model.safetensors"
    assert (tmp_path / "auto" / same).read_bytes() == (tmp_path / "given" / same).read_bytes()
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results["perplexity"]["pruned"] == again["perplexity"]["pruned"]
    model = loading.load(tmp_path / "given", dtype="float32", device=DEVICE)
    assert original(model, held_out[0]) == pytest.approx(tried[chosen], rel=1e-5)


def test_norms_are_stored_in_float32_on_request(flags, tmp_path):
    printed = run("gradient_computation.py", *flags, "--norms", "l2", "--norm_dtype", "float32", "--output_dir", tmp_path)
    folder = tmp_path / "llama2" / "gradients_aggregrate_norm_l2_model_tiny-llama"
    index, norms = json.loads((folder / "index.json").read_text()), GradientNorms(folder).block(0)
    assert norms["mlp.up_proj"].dtype == torch.float32
    assert index["norm_dtype"] == "float32" and index["stored_zero"] == index["stored_cut"] == 0 and index["missing"] == {}
    assert "in float32: 0 became 0, 0 were cut" in printed


def test_flags_without_effect_are_accepted_with_a_warning(flags, text, caplog):
    run(
        "main.py",
        *flags,
        "--prune_method",
        "magnitude",
        "--sparsity_ratio",
        0.1,
        "--grad_norm",
        "none",
        "--grad_exponent",
        "--eval_dataset",
        text,
    )
    assert "--grad_norm has no effect" in caplog.text and "--grad_exponent has no effect" in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--prune_method wanda", "--sparsity_ratio"),
        ("--prune_method wanda --sparsity_type 2:4 --sparsity_ratio 0.7", "implies the ratio 0.5"),
        ("--prune_method gblm --sparsity_ratio 0.5", "needs --gradient_path"),
        ("--prune_method gblm --sparsity_ratio 0.5 --gradient_path nowhere", "nowhere does not exist"),
        ("--prune_method wanda --sparsity_ratio 0.5 --gradient_inv", "--gradient_inv"),
        ("--prune_method wanda --sparsity_ratio 0.5 --alpha 10", "--alpha"),
        ("--prune_method gblm --sparsity_ratio 0.5 --gradient_path . --gradient_inv --alpha 10", "--alpha"),
        ("--prune_method wanda --sparsity_ratio 0.5 --device meta", "--device cpu"),
        ("--prune_method wanda --sparsity_ratio 0.5 --activation_memory 0", "not above 0"),
        ("--prune_method magnitude --sparsity_ratio 0.5 --use_variant", "for wanda, gblm, not magnitude"),
        ("--prune_method wanda --sparsity_type 2:4 --use_variant", "choose one"),
        ("--prune_method wanda --sparsity_ratio 0.5 --dataset nothing.txt", "nothing.txt does not exist"),
        ("--prune_method wanda --sparsity_ratio 0.5 --device cuda:77", "--device cpu"),
        ("--prune_method wanda --sparsity_ratio 0.5 --device gpu", "not one of auto, cpu, cuda and cuda:N"),
        ("--prune_method wanda --sparsity_ratio 0.5 --model ./nothing", "./nothing is not a folder"),
        ("--prune_method wanda --sparsity_ratio 0.5 --nsamples 0", "not above 0"),
        ("--prune_method wanda --sparsity_ratio 0.5 --layer_no -2", "neither a block nor -1"),
        ("--prune_method wanda --sparsity_ratio 0.5 --layer_ratios none.json", "none.json"),
        ("--prune_method wanda --sparsity_ratio 0.5 --save /proc/nowhere", "--save cannot be written"),
        ("--prune_method wanda --sparsity_ratio 0.5 --save_model /proc/nowhere", "--save_model cannot be written"),
        ("--prune_method wanda --sparsity_ratio 0.5 --save_model m", "weights would be lost"),
        ("--prune_method wanda --sparsity_ratio 0.5 --layer_no -2", "--layer_no -2"),
        ("--prune_method best --sparsity_ratio 0.5", "invalid choice"),
        ("--sparsity_ratio 0.5", "--prune_method"),
    ],
)  # fmt: skip
def test_wrong_flags_are_parser_errors(arguments, message, capsys, tmp_path):
    (tmp_path / "ratios.json").write_text('{"0": 0.3}')
    with pytest.raises(SystemExit) as stop:
        pruning.parse(["--model", "m", *arguments.format(ratios=tmp_path / "ratios.json").split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [("--scale 0", "not above 0"), ("--norms l3", "invalid choice"), ("--output_dir /proc/nowhere", "cannot be written")],
)
def test_wrong_gradient_flags_are_parser_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gradient_computation.parse(["--model", "m", *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_published_flags_and_defaults(tmp_path):
    args = pruning.parse(
        f"--model m --gradient_path {tmp_path} --grad_norm l2 --seed 0 --nsamples 128 --seq_length 2048 --sparsity_ratio 0.5 --layer_no -1 "
        "--sparsity_type unstructured --prune_method gblm --cache_dir c --use_variant --save "
        f"{tmp_path}/s --save_model {tmp_path}/m --grad_exponent --gradient_inv".split()
    )
    assert args.alpha == 100
    args = gradient_computation.parse(f"--nsamples 128 --model m --llama_version 2 --scale 100 --output_dir {tmp_path}".split())
    assert (args.nsamples, args.seq_length, args.seed, args.norms, args.scale) == (128, 2048, 0, ["l1", "l2"], 100)


def test_importing_is_silent():
    done = run_alone("-c", "import main, gradient_computation")
    assert done.stdout == done.stderr == ""
