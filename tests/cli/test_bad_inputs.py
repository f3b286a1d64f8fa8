"""A table of bad inputs, each through the real command line.

Every one ends with its exit status, in one line that names the value, what was expected and what to do, without a traceback;
and nothing that was there before has changed, nor is anything left behind.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import check_sparsity
import pytest
import table
import torch
from conftest import ROOT, tiny_model
from safetensors.torch import load_file, save_file

import gradient_computation
import main as pruning
from lib.cli.command import run as run_command
from lib.models import checks
from lib.models.decoder import Decoder
from lib.models.files import hub

COMMANDS = {"main.py": pruning, "gradient_computation.py": gradient_computation, "table.py": table}


class Place:
    """A folder with a model, a text, gradients and earlier results, and the command lines that use them."""

    def __init__(self, root: Path, made: Path):
        shutil.copytree(made, root, dirs_exist_ok=True)
        self.root = root
        self.model, self.text, self.out = root / "tiny-llama", root / "text.jsonl", root / "out"
        self.gradients = self.out / "llama2" / "gradients_aggregrate_norm_l2_model_tiny-llama"
        self.extra: list = []

    def flags(self, command: str) -> list[str]:
        flags = ["--model", self.model, "--dataset", self.text, "--nsamples", 2, "--seq_length", 16, "--dtype", "float32"]
        flags += ["--cache_dir", self.root.with_name("cache")]
        own = {
            "main.py": [
                "--prune_method", "wanda", "--sparsity_ratio", 0.5, "--eval_dataset", self.text,
                "--save", self.out, "--save_model", self.out / "model",
            ],
            "gradient_computation.py": ["--output_dir", self.out],
            "table.py": ["--eval_dataset", self.text, "--gradient_path", self.gradients, "--output", self.out / "table.jsonl"],
        }  # fmt: skip
        return [str(flag) for flag in [*flags, *own[command]]]

    def contents(self) -> dict[str, bytes | None]:
        return {
            str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.root.rglob("*"))
        }

    def config(self, **changes) -> None:
        """Change the model's config; None takes a key away."""
        path = self.model / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def cut(self, file: str, size: int = 300) -> None:
        (self.model / file).write_bytes((self.model / file).read_bytes()[:size])

    def write(self, file: str, content: str | bytes) -> Path:
        path = self.root / file
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def weights(self, change) -> None:
        """Change the model's tensors by a function."""
        tensors = load_file(self.model / "model.safetensors")
        change(tensors)
        save_file(tensors, self.model / "model.safetensors", metadata={"format": "pt"})

    def use(self, *flags) -> None:
        self.extra += map(str, flags)


@pytest.fixture(scope="module")
def made(saved_model, documents, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(saved_model, root / "tiny-llama")
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    (root / "ratios.json").write_text('{"0": 0.3}')
    place = Place(root.with_name("place"), root)
    gradient_computation.main(gradient_computation.parse(place.flags("gradient_computation.py")))
    pruning.main(pruning.parse(place.flags("main.py")))
    return place.root


@pytest.fixture
def place(made, tmp_path) -> Place:
    return Place(tmp_path / "place", made)


def run(command: str, arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """A command as from the command line, in this process: exit status and the last line of its standard error."""
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(COMMANDS[command].parse, COMMANDS[command].main)
    if isinstance(stop.value.code, int):
        return stop.value.code, capsys.readouterr().err.strip()
    return 1, stop.value.code


def rename(tensors: dict, name: str, other: str) -> None:
    tensors[other] = tensors.pop(name)


MAIN, GRADIENTS, TABLE = COMMANDS
UP = "model.layers.1.mlp.up_proj.weight"

# name: (command, exit status, what is wrong, what the line must say)
CASES = {
    # numbers
    "seq_length 1": (MAIN, 2, lambda p: p.use("--seq_length", 1), "--seq_length: 1 is not above 1: give a whole number of at least 2"),
    "seq_length 1, gradients": (GRADIENTS, 2, lambda p: p.use("--seq_length", 1), "--seq_length: 1 is not above 1"),
    "seq_length -3": (MAIN, 2, lambda p: p.use("--seq_length", -3), "-3 is not above 1"),
    "seq_length 1e3": (MAIN, 2, lambda p: p.use("--seq_length", "1e3"), "'1e3' is not a whole number"),
    "nsamples 0": (GRADIENTS, 2, lambda p: p.use("--nsamples", 0), "--nsamples: 0 is not above 0: give a whole number of at least 1"),
    "nsamples 2.5": (MAIN, 2, lambda p: p.use("--nsamples", 2.5), "'2.5' is not a whole number"),
    "seed of letters": (MAIN, 2, lambda p: p.use("--seed", "x"), "--seed: 'x' is not a whole number"),
    "batch_size 0": (MAIN, 2, lambda p: p.use("--batch_size", 0), "--batch_size: 0 is not above 0"),
    "alpha -5": (MAIN, 2, lambda p: p.use("--alpha", -5), "--alpha: -5 is not above 0: give a number of at least 0"),
    "alpha nan": (MAIN, 2, lambda p: p.use("--alpha", "nan"), "--alpha: 'nan' is not a finite number"),
    "alpha inf": (MAIN, 2, lambda p: p.use("--alpha", "inf"), "--alpha: 'inf' is not a finite number: give one of at least 0"),
    "alpha 1e38": (MAIN, 2, lambda p: p.use("--alpha", 1e38), "--alpha: 1e+38 is too large: give a number of at least 0 and at most 1e+30"),
    "alphas -1": (TABLE, 2, lambda p: p.use("--alphas", 1, -1), "--alphas: -1 is not above 0"),
    "windows 0": (TABLE, 2, lambda p: p.use("--windows", 0), "--windows: 0 is not above 0"),
    "ratio nan": (MAIN, 2, lambda p: p.use("--sparsity_ratio", "nan"), "--sparsity_ratio: 'nan' is not a finite number"),
    "ratio 1": (MAIN, 2, lambda p: p.use("--sparsity_ratio", 1), "sparsity ratio 1.0 is outside [0, 1)"),
    "ratio -0.1": (MAIN, 2, lambda p: p.use("--sparsity_ratio", -0.1), "--sparsity_ratio: -0.1 is not above 0"),
    "ratio nan with 2:4": (MAIN, 2, lambda p: p.use("--sparsity_type", "2:4", "--sparsity_ratio", "nan"), "'nan' is not a finite number"),
    "ratio against 2:4": (MAIN, 2, lambda p: p.use("--sparsity_type", "2:4", "--sparsity_ratio", 0.6), "2:4 implies the ratio 0.5, not 0.6: leave --sparsity_ratio out"),
    "pattern 4:2": (MAIN, 2, lambda p: p.use("--sparsity_type", "4:2"), "4:2: N counts the removed weights of every M, so 0 < N < M"),
    "pattern 2:5": (MAIN, 1, lambda p: p.use("--sparsity_type", "2:5", "--sparsity_ratio", 0.4), "has 32 inputs, not divisible by 5: choose an N:M whose M divides it"),
    "patterns of table": (TABLE, 2, lambda p: p.use("--patterns", "half"), "'half' is neither \"unstructured\" nor N:M"),
    "layer_no 3": (MAIN, 1, lambda p: p.use("--layer_no", 3), "--layer_no 3 does not exist: the model has blocks 0 to 2"),
    "layer_no -7": (MAIN, 2, lambda p: p.use("--layer_no", -7), "--layer_no -7 is neither a block nor -1"),
    "activation_memory inf": (MAIN, 2, lambda p: p.use("--activation_memory", "inf"), "'inf' is not a finite number: give one above 0"),
    "activation_memory nan": (GRADIENTS, 2, lambda p: p.use("--activation_memory", "nan"), "'nan' is not a finite number"),
    "activation_memory -1": (GRADIENTS, 2, lambda p: p.use("--activation_memory", -1), "-1 is not above 0"),
    "scale 1e30": (GRADIENTS, 2, lambda p: p.use("--scale", 1e30), "--scale 1e+30 is outside 6.1e-05 to 65504, where a gradient of norm 1 can be stored in float16: use the published 100, or add --norm_dtype float32"),
    "scale 1e30 in float32": (GRADIENTS, 2, lambda p: p.use("--scale", 1e30, "--norm_dtype", "float32"), "--scale 1e+30 is outside 1.1e-19 to 1.84467e+19"),
    "scale 1e-9": (GRADIENTS, 2, lambda p: p.use("--scale", 1e-9), "--scale 1e-09 is outside 6.1e-05 to 65504"),
    "scale inf": (GRADIENTS, 2, lambda p: p.use("--scale", "inf"), "--scale: 'inf' is not a finite number: give one above 0"),
    "scale nan": (GRADIENTS, 2, lambda p: p.use("--scale", "nan"), "--scale: 'nan' is not a finite number"),
    # more positions than the model has
    "learned positions": (MAIN, 1, lambda p: (other_family(p, "opt"), p.use("--seq_length", 65)), "--seq_length 65 is beyond the 64 positions"),
    "learned positions, gradients": (GRADIENTS, 1, lambda p: (other_family(p, "opt"), p.use("--seq_length", 65)), "is beyond the 64 positions"),
    # the model
    "no such folder": (MAIN, 2, lambda p: p.use("--model", p.root / "nothing"), "nothing is not a folder, and cannot be a model on the hub: those are called OWNER/NAME"),
    "empty name": (MAIN, 2, lambda p: p.use("--model", ""), "'' is not a folder"),
    "a file": (MAIN, 2, lambda p: p.use("--model", p.model / "config.json"), "config.json is a file: give the folder that it is in"),
    "no hub name": (MAIN, 1, lambda p: p.use("--model", "my model"), "'my model' is neither a folder nor a name on the hub, OWNER/NAME"),
    "not cached": (MAIN, 1, lambda p: p.use("--model", "nobody/nothing"), "nobody/nothing is neither a folder here nor in the hub's cache, and the hub (https://huggingface.co) is out of reach"),
    "not cached, gradients": (GRADIENTS, 1, lambda p: p.use("--model", "nobody/nothing"), "give --model a folder, or connect"),
    "not cached, table": (TABLE, 1, lambda p: p.use("--model", "nobody/nothing"), "give --model a folder, or connect"),
    "revision not cached": (MAIN, 1, lambda p: p.use("--model", "nobody/nothing", "--revision", "v2"), "nobody/nothing (revision v2) is neither a folder here"),
    "revision of a folder": (MAIN, 2, lambda p: p.use("--revision", "v2"), "--revision v2 is of a model on the hub, and"),
    "no config": (MAIN, 1, lambda p: (p.model / "config.json").unlink(), "has no config.json, so it is not a model: give a folder that save_pretrained wrote"),
    "empty folder": (GRADIENTS, 1, lambda p: (shutil.rmtree(p.model), p.model.mkdir()), "has no config.json"),
    "broken config": (MAIN, 1, lambda p: (p.model / "config.json").write_text("{"), "its config.json cannot be read"),
    "config is a list": (MAIN, 1, lambda p: (p.model / "config.json").write_text("[1]"), "its config.json cannot be read"),
    "unknown kind": (MAIN, 1, lambda p: p.config(model_type="llamma"), "has the model_type 'llamma' in its config.json, which transformers"),
    "no kind": (MAIN, 1, lambda p: p.config(model_type=None), "has the model_type None"),
    "width of letters": (MAIN, 1, lambda p: p.config(hidden_size="many"), "its config.json cannot be read (StrictDataclassFieldValidationError: Validation error for field 'hidden_size'"),
    "no heads": (GRADIENTS, 1, lambda p: p.config(num_attention_heads=0), "its config.json cannot be read"),
    "unknown activation": (MAIN, 1, lambda p: p.config(hidden_act="glow"), "its config.json cannot be read (KeyError: 'glow'): no model can be made of it"),
    "no blocks": (MAIN, 1, lambda p: p.config(num_hidden_layers=0), "LlamaForCausalLM has no list of decoder blocks"),
    "encoder and decoder": (MAIN, 1, lambda p: p.config(model_type="t5"), "is of type 't5', not a decoder that predicts the next token"),
    "encoder and decoder, BART": (MAIN, 1, lambda p: p.config(model_type="bart"), "is of type 'bart', not a decoder that predicts the next token"),
    "encoder": (GRADIENTS, 1, lambda p: p.config(model_type="bert"), "is of type 'bert', not a decoder"),
    "quantised": (MAIN, 1, lambda p: p.config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised (gptq): only dense weights can be pruned"),
    "code of its own": (MAIN, 1, lambda p: p.config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "runs code of its own (mine, auto_map in config.json): read it, then add --trust_remote_code"),
    "no tokenizer": (MAIN, 1, lambda p: [(p.model / f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")], "its tokenizer cannot be read"),
    "broken tokenizer": (GRADIENTS, 1, lambda p: (p.model / "tokenizer.json").write_text("{"), "put the model's own files (tokenizer.json or tokenizer.model) beside its config.json"),
    "no weights": (MAIN, 1, lambda p: (p.model / "model.safetensors").unlink(), "its weights cannot be read"),
    "no weights, streamed": (MAIN, 1, lambda p: ((p.model / "model.safetensors").unlink(), p.use("--memory", "streamed")), "has neither safetensors nor PyTorch weights"),
    "truncated weights": (MAIN, 1, lambda p: p.cut("model.safetensors", 20000), "its weights cannot be read"),
    "truncated weights, streamed": (GRADIENTS, 1, lambda p: (p.cut("model.safetensors", 20000), p.use("--memory", "streamed")), "is not a whole safetensors file"),
    "empty weights": (GRADIENTS, 1, lambda p: p.cut("model.safetensors", 0), "its weights cannot be read"),
    "broken index": (MAIN, 1, lambda p: ((p.model / "model.safetensors").unlink(), (p.model / "model.safetensors.index.json").write_text("{")), "its weights cannot be read"),
    "broken .bin": (MAIN, 1, lambda p: ((p.model / "model.safetensors").unlink(), (p.model / "pytorch_model.bin").write_bytes(b"x")), "its weights cannot be read"),
    "a shape": (MAIN, 1, lambda p: p.config(intermediate_size=64), "is (32, 48) in its weights and (32, 64) by its config.json: the two do not belong together"),
    "a shape, streamed": (GRADIENTS, 1, lambda p: (p.config(intermediate_size=64), p.use("--memory", "streamed")), "is (48, 32) in its weights and (64, 32) by its config.json"),
    "more blocks than weights": (MAIN, 1, lambda p: p.config(num_hidden_layers=4), "has no weights for model.layers.3."),
    "a tensor of another name": (GRADIENTS, 1, lambda p: p.weights(lambda t: rename(t, UP, "up")), f"has no weights for {UP}, and 0 more"),
    "a tensor of another name, streamed": (MAIN, 1, lambda p: (p.weights(lambda t: rename(t, UP, "up")), p.use("--memory", "streamed")), f"has no tensor that makes {UP}"),
    # gradients
    "gradients nowhere": (MAIN, 2, lambda p: use_gradients(p, p.root / "nowhere"), "nowhere does not exist: run gradient_computation.py first"),
    "gradients without an index": (MAIN, 1, lambda p: ((p.gradients / "index.json").unlink(), use_gradients(p)), "has no index.json, so it is not a finished result"),
    "gradients with a broken index": (MAIN, 1, lambda p: ((p.gradients / "index.json").write_text("{"), use_gradients(p)), "index.json is damaged"),
    "gradients with an empty index": (TABLE, 1, lambda p: (p.gradients / "index.json").write_text("{}"), "index.json is damaged (KeyError('scale'))"),
    "gradients of scale 0": (MAIN, 1, lambda p: (change_index(p, scale=0), use_gradients(p)), "index.json is damaged (ValueError('scale 0'))"),
    "gradients of half a block": (MAIN, 1, lambda p: (cut_gradients(p), use_gradients(p)), "is corrupted, its checksum is not the index's"),
    "gradients of other weights": (MAIN, 1, lambda p: (p.weights(lambda t: t[UP].neg_()), use_gradients(p)), "was computed for other weights"),
    "gradients of fewer blocks": (MAIN, 1, lambda p: (change_index(p, files={"block_000.safetensors": {}}), use_gradients(p)), "holds 1 blocks, the model has 3: it belongs to another model"),
    "a .pth that is none": (MAIN, 1, lambda p: use_gradients(p, p.write("g.pth", "no")), "g.pth is neither a gradient folder nor a published .pth file"),
    "a .pth with a list": (MAIN, 1, lambda p: (torch.save([1], p.root / "g.pth"), use_gradients(p, p.root / "g.pth")), "g.pth holds list, and is not the published dict of tensors"),
    "a .pth with numbers": (MAIN, 1, lambda p: (torch.save({"a": 1}, p.root / "g.pth"), use_gradients(p, p.root / "g.pth")), "g.pth holds a, and is not the published dict"),
    "resumed state that is damaged": (GRADIENTS, 1, lambda p: damaged_state(p), "state.json is damaged"),
    # which linears
    "include of nothing": (MAIN, 1, lambda p: p.use("--include", "*.w1"), "--include '*.w1' matches none of the 21 linears"),
    "ratios that are not there": (MAIN, 2, lambda p: p.use("--layer_ratios", p.root / "none.json"), "none.json"),
    "ratios in a folder": (MAIN, 2, lambda p: p.use("--layer_ratios", p.root), "is not a file, and neither line nor line:SLOPE"),
    "ratios that are no JSON": (MAIN, 2, lambda p: p.use("--layer_ratios", p.write("r.json", "{")), "r.json is not JSON"),
    "ratios that are no text": (MAIN, 2, lambda p: p.use("--layer_ratios", p.write("r.json", b"\xff\xfe")), "r.json is not JSON"),
    "a ratio of nan": (MAIN, 2, lambda p: p.use("--layer_ratios", p.write("r.json", '{"0": NaN}')), "gives '0' the ratio nan"),
    "a ratio of a block that is not there": (MAIN, 1, lambda p: p.use("--layer_ratios", p.write("r.json", '{"9": 0.1}')), "block 9 of --layer_ratios does not exist"),
    "a pattern that is none": (MAIN, 2, lambda p: p.use("--layer_ratios", p.write("r.json", '{"*.o_proj": "4:2"}')), "gives '*.o_proj' the ratio '4:2': it must be a number in [0, 1), \"N:M\" or \"dense\""),
    "a pattern that does not divide": (MAIN, 1, lambda p: p.use("--layer_ratios", p.write("r.json", '{"*.o_proj": "2:5"}')), "self_attn.o_proj has 32 inputs, not divisible by 5"),
    "the LM head": (MAIN, 1, lambda p: p.use("--include", "lm_head"), "--include 'lm_head' means lm_head, which is never pruned: embeddings and the LM head stay dense"),
    "the embeddings": (MAIN, 1, lambda p: p.use("--exclude", "embed_tokens"), "--exclude 'embed_tokens' means model.embed_tokens, which is never pruned"),
    "a share for each block under N:M": (MAIN, 2, lambda p: p.use("--layer_ratios", "line", "--sparsity_type", "2:4"), "--layer_ratios line gives every block its own share, 2:4 is one for all"),
    "shares of blocks for a few linears": (MAIN, 2, lambda p: p.use("--layer_ratios", "line:0.3", "--exclude", "*.o_proj"), "--layer_ratios line:0.3 balances whole blocks: leave --include, --exclude, --layer_no out"),
    "shares of blocks beyond what they spare": (MAIN, 2, lambda p: p.use("--layer_ratios", "line", "--sparsity_ratio", "0.97"), "--layer_ratios line removes at most 0.95 of a block, not 0.97"),
    "ratios that are none": (MAIN, 2, lambda p: p.use("--layer_ratios", "owl"), "--layer_ratios owl is not a file, and neither line nor line:SLOPE, such as line:0.3"),
    "shares of blocks beyond what they spare, in a table": (TABLE, 2, lambda p: p.use("--layer_ratios", "line:0.3", "--ratios", "0.97"), "removes at most 0.95 of a block, not 0.97"),
    "a line without a number": (MAIN, 2, lambda p: p.use("--layer_ratios", "line:steep"), "--layer_ratios line:steep has no slope from -1 to 1 behind the colon: write line, or line:0.3"),
    "a line too steep": (MAIN, 2, lambda p: p.use("--layer_ratios", "line:30"), "--layer_ratios line:30 has no slope from -1 to 1"),
    "a slope of nothing": (TABLE, 2, lambda p: p.use("--layer_ratios", "line"), "--layer_ratios: line is neither equal nor line:SLOPE"),
    "no text to choose alpha on": (MAIN, 1, lambda p: p.use("--prune_method", "gblm", "--gradient_path", p.gradients, "--alpha", "auto", "--pack", "--nsamples", 74), "fewer than 83 windows of 16: use fewer --nsamples (at most 69)"),
    "the LM head's ratio": (MAIN, 1, lambda p: p.use("--layer_ratios", p.write("r.json", '{"*lm_head*": 0.1}')), "--layer_ratios '*lm_head*' means lm_head, which is never pruned"),
    # places to write
    "save over a file": (MAIN, 2, lambda p: p.use("--save", p.text), "--save cannot be written"),
    "save below a file": (MAIN, 2, lambda p: p.use("--save", p.text / "out"), "choose another folder"),
    "save_model below a file": (MAIN, 2, lambda p: p.use("--save_model", p.text / "out"), "--save_model cannot be written"),
    "save_model on the model": (MAIN, 2, lambda p: p.use("--save_model", p.model), "its weights would be lost, choose another"),
    "save_model on another model": (MAIN, 2, lambda p: p.use("--save_model", other_family(p, "llama", "theirs")), "which this project has not written: choose another folder"),
    "output_dir below a file": (GRADIENTS, 2, lambda p: p.use("--output_dir", p.text / "out"), "--output_dir cannot be written"),
    "table into a folder": (TABLE, 2, lambda p: p.use("--output", p.out), "is a folder: name a file in it"),
    "table into another file": (TABLE, 2, lambda p: p.use("--output", p.text.with_name("ratios.json")), "ratios.json is not a table of this script"),
    # devices
    "no such device": (MAIN, 2, lambda p: p.use("--device", "gpu"), "device gpu is not one of auto, cpu, cuda and cuda:N"),
    "no such GPU": (GRADIENTS, 2, lambda p: p.use("--device", "cuda:77"), "device cuda:77 is not there"),
}  # fmt: skip


def other_family(place: Place, family: str, folder: str = "other") -> Path:
    """Use a model of another family, with the same tokenizer."""
    path = place.root / folder
    shutil.copytree(place.model, path)
    tiny_model(family, noise=0).cpu().save_pretrained(path)
    if folder == "other":
        place.use("--model", path)
    return path


def use_gradients(place: Place, path: Path | None = None) -> None:
    place.use("--prune_method", "gblm", "--gradient_path", path or place.gradients)


def change_index(place: Place, **changes) -> None:
    index = json.loads((place.gradients / "index.json").read_text())
    (place.gradients / "index.json").write_text(json.dumps(index | changes))


def cut_gradients(place: Place) -> None:
    path = place.gradients / "block_001.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def damaged_state(place: Place) -> None:
    folder = place.gradients.with_name("gradients_aggregrate_norm_work_model_tiny-llama.rank0")
    folder.mkdir()
    (folder / "state.json").write_text('{"done": 1}')
    place.use("--resume")


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_ends_in_one_line_and_changes_nothing(name, place, monkeypatch, capsys):
    command, status, spoil, said = CASES[name]
    spoil(place)
    before = place.contents()
    found, message = run(command, [*place.flags(command), *place.extra], monkeypatch, capsys)
    assert message.startswith(f"{command}: error: ") or status == 2, message
    assert said in message and found == status, message
    assert "\n" not in message and "Traceback" not in message, message
    assert place.contents() == before


def test_the_table_covers_enough():
    assert len(CASES) >= 45


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("nowhere/at/all", "nowhere/at/all is not a folder"),
        ("{model} --pattern 4:2", "--pattern: sparsity type 4:2: N counts the removed weights"),
        ("{model} --pattern 0.5", "--pattern: sparsity type '0.5' is neither"),
        ("{model} --pattern 2:5", "not divisible by 5"),
        ("{model} --include *.q_proj", "add it"),
        ("{model} --against nobody/nothing", "nobody/nothing is neither a folder here nor in the hub's cache"),
        ("{root}", "has no config.json, so it is not a model"),
    ],
)
def test_bad_inputs_of_check_sparsity(arguments, said, place, capsys):
    before = place.contents()
    with pytest.raises(SystemExit) as stop:
        check_sparsity.main(arguments.format(model=place.model, root=place.root).split())
    errors = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in errors and "\n" not in errors
    assert place.contents() == before


def test_without_a_network_one_line_and_no_retries(place):
    """In a process of its own: the hub refuses the connection, and nothing says that there is no network."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    for command in ("main.py", "gradient_computation.py"):
        done = subprocess.run(
            [sys.executable, command, *place.flags(command), "--model", "nobody/nothing"],
            cwd=ROOT, capture_output=True, text=True, env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9"},
        )  # fmt: skip
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and "the hub (http://127.0.0.1:9) is out of reach" in done.stderr


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    asked, end = [], threading.Event()

    def silent():
        asked.append(1)
        end.wait(60)

    monkeypatch.setattr(hub, "get_session", silent)
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://silent")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert not hub.reachable() and not hub.reachable()
    end.set()
    assert len(asked) == 1 and hub.constants.is_offline_mode()


@pytest.mark.parametrize("kind, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
@pytest.mark.parametrize("command", [MAIN, GRADIENTS])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_run_that_is_told_to_end_leaves_what_was_there(command, kind, status, memory, place, monkeypatch, capsys):
    """In the middle of its work: pruning, or the gradients of the second block."""
    advance, temporary, calls = Decoder.advance, place.root / "tmp", []
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # as of what a shell runs in the background, or nohup anywhere
            signal.signal(number, signal.default_int_handler)

    def end(decoder, i, states):
        if i == 1:
            calls.append(temporary.exists() and list(temporary.iterdir()))
            os.kill(os.getpid(), getattr(signal, kind))
        advance(decoder, i, states)

    monkeypatch.setattr(Decoder, "advance", end)
    monkeypatch.setattr(checks, "require_runs_alone", lambda decoder: decoder.enter(decoder.probe()))  # it would end already
    monkeypatch.setattr(Decoder, "tail", lambda *args, **more: end(None, 1, []))  # of the gradients
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    before = place.contents()
    monkeypatch.setattr(pruning, "perplexity", lambda *args, **more: 9.0)
    assert run(command, [*place.flags(command), "--memory", memory], monkeypatch, capsys) == (
        status,
        f"{command}: ended by {kind}",
    )
    assert calls and place.contents() == before
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
