"""scripts/finetune.py: the same zeros before and after, in a checkpoint as the pruned one."""

import importlib.util
import json

import check_sparsity
import finetune
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

import main as pruning
from lib.models import loading

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="no peft: pip install -r requirements-finetune.txt"
)
HOW = [pytest.param([], id="full"), pytest.param(["--lora", "4"], id="lora", marks=needs_peft)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents with something to learn: words count up."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(f"w{3 + (k + j) % 90}" for j in range(60))}) for k in range(30)))
    return path


@pytest.fixture(scope="module", params=[torch.float16, torch.float32], ids=str)
def checkpoint(request, tmp_path_factory, tokenizer, text):
    """A pruned tiny model in float16 or float32."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(noise=0).cpu().to(request.param).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    run(pruning, "--model", folder / "dense", *flags(text), "--prune_method", "wanda", "--sparsity_type", "2:4",
        "--save_model", folder / "pruned")  # fmt: skip
    return folder / "pruned"


def flags(text) -> list:
    return ["--dataset", text, "--eval_dataset", text, "--seq_length", 16, "--nsamples", 16, "--dtype", "float32"]


def run(command, *arguments) -> None:
    command.main(command.parse([str(argument) for argument in arguments]))


@pytest.mark.parametrize("how", HOW)
def test_the_same_zeros_and_a_lower_perplexity(how, checkpoint, text, tmp_path, capsys):
    run(finetune, "--model", checkpoint, "--save_model", tmp_path / "tuned", *flags(text), "--steps", 20,
        "--learning_rate", 0.02, *how)  # fmt: skip
    printed = capsys.readouterr().out
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        if "proj" in name:
            assert torch.equal(weight == 0, after[name] == 0) and not torch.equal(weight, after[name])
        else:
            assert torch.equal(weight, after[name]) == bool(how)  # LoRA changes linears alone
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "tuned" / file).read_bytes() == (checkpoint / file).read_bytes()
    assert not check_sparsity.main([str(tmp_path / "tuned"), "--pattern", "2:4"])
    assert loading.on_disk(str(tmp_path / "tuned")).source.checkpoint.updated
    last = next(line for line in printed.splitlines() if "after training" in line).split()
    assert float(last[1]) < 0.9 * float(last[4].removeprefix("("))
    assert "sparsity 0.5" in printed


def test_other_zeros_are_noticed(checkpoint, tmp_path):
    with pytest.raises(RuntimeError, match="other zeros"):
        finetune.same_zeros(str(checkpoint.parent / "dense"), str(checkpoint))


def test_a_failed_run_leaves_nothing(checkpoint, text, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        run(finetune, "--model", checkpoint, "--save_model", tmp_path / "tuned", *flags(text))
    assert list(tmp_path.glob("tuned*/*")) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--save_model m", "its weights would be lost"),
        ("--save_model /proc/nowhere", "cannot be written"),
        ("--save_model {0}/new --eval_dataset nothing.txt", "nothing.txt does not exist"),
        ("--save_model {0}/new --lora 0", "not above 0"),
        ("", "--save_model"),
    ],
)
def test_wrong_flags_are_parser_errors(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.parse(["--model", "m", *arguments.format(tmp_path).split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err
