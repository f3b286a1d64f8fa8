"""scripts/check_sparsity.py: it says what holds, and catches a single weight or group that does not."""

import json
import subprocess
import sys

import check_sparsity
import pytest
import torch
from conftest import DEMO, ROOT, needs_demo, prune_model, random_windows, tiny_decoder, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lib.models import loading
from lib.models.files import pruned_checkpoint
from lib.pruning.masks import Sparsity


@pytest.fixture
def check(capsys):
    """Run the script: (exit status, what it printed)."""

    def run(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        status = int(check_sparsity.main([str(argument) for argument in arguments]))
        return status, capsys.readouterr().out

    return run


def change(folder, name: str, edit) -> None:
    """Edit one tensor of a checkpoint in place."""
    index = folder / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    tensors = load_file(folder / shard)
    edit(tensors[name])
    save_file(tensors, folder / shard, metadata={"format": "pt"})


def prune_to(folder, source, decoder, pattern: str) -> None:
    written = pruned_checkpoint.Store(folder, loading.dense_tensors(str(source), decoder))
    prune_model(
        decoder, random_windows(4), method="wanda", sparsity=Sparsity.parse(pattern, 0.5 if pattern == "unstructured" else None),
        finished=lambda i, block: written.write_block(decoder, i, decoder.linears(i)),
    )  # fmt: skip
    written.finish()


@pytest.fixture
def dense(tmp_path):
    tiny_model(dtype=torch.float16).cpu().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def pruned(tmp_path, dense):
    prune_to(tmp_path / "pruned", dense, tiny_decoder(dtype=torch.float16), "4:8")
    return tmp_path / "pruned"


def test_what_holds(check, pruned, dense):
    status, printed = check(pruned, "--pattern", "4:8", "--against", dense)
    assert status == 0, printed
    assert "holds: at least 4 zeros in every 8 inputs of 21 linears" in printed and f"bit-identical to {dense}" in printed
    assert printed.splitlines()[0].split()[:2] == ["block", "self_attn.q_proj"]
    assert printed.splitlines()[1].split() == ["0"] + ["0.5000"] * 7
    assert "sparsity 0.5000 over 23040 weights of the blocks" in printed


def test_a_group_with_three_zeros_too_few(check, pruned, dense):
    def edit(weight):
        group = weight[5, 16:24]
        original = load_file(dense / "model.safetensors")["model.layers.2.mlp.up_proj.weight"][5, 16:24]
        zeros = (group == 0).nonzero().flatten()[:3]
        group[zeros] = original[zeros]

    change(pruned, "model.layers.2.mlp.up_proj.weight", edit)
    status, printed = check(pruned, "--pattern", "4:8", "--against", dense)
    assert status == 1
    assert "model.layers.2.mlp.up_proj: 1 groups of 8 with fewer than 4 zeros" in printed
    assert "row 5, inputs 16 to 23: 1 zeros" in printed and "FAILS: at least 4 zeros in every 8" in printed
    assert "holds: every other weight" in printed  # they are the dense model's: nothing else is wrong


def test_a_single_bit(check, pruned, dense):
    def edit(weight):
        bits = weight.view(torch.int16)
        bits[3, (weight[3] != 0).nonzero()[0]] ^= 1

    change(pruned, "model.layers.1.self_attn.v_proj.weight", edit)
    status, printed = check(pruned, "--pattern", "4:8", "--against", dense)
    assert status == 1
    assert "model.layers.1.self_attn.v_proj.weight: 1 of 512 values are not the dense model's" in printed
    assert "row 3, column" in printed and "holds: at least 4 zeros in every 8" in printed


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"])
def test_zeros_outside_the_linears_are_changes(check, pruned, dense, name):
    change(pruned, name, lambda tensor: tensor.view(-1)[7].fill_(0))
    status, printed = check(pruned, "--against", dense)
    assert status == 1 and f"{name}: 1 of " in printed


def test_excluded_linears_need_no_pattern(check, pruned, dense):
    original = load_file(dense / "model.safetensors")
    for i in range(3):
        name = f"model.layers.{i}.self_attn.o_proj.weight"
        change(pruned, name, lambda weight, name=name: weight.copy_(original[name]))
    assert check(pruned, "--pattern", "4:8")[0] == 1
    status, printed = check(pruned, "--pattern", "4:8", "--exclude", "*.o_proj", "--against", dense)
    assert status == 0 and "holds: at least 4 zeros in every 8 inputs of 18 linears" in printed


def test_other_shapes_and_dtypes_are_changes(check, pruned, tmp_path):
    tiny_model(dtype=torch.float32).cpu().save_pretrained(tmp_path / "wide")
    status, printed = check(pruned, "--against", tmp_path / "wide")
    assert status == 1 and "in torch.float16, the dense model's is" in printed


def test_tensors_that_only_one_of_the_two_has(check, pruned, dense):
    """Such as heads that transformers does not load: the files are compared, not the models."""
    name, status = "model.layers.3.eh_proj.weight", []
    plain = {folder: load_file(folder / "model.safetensors") for folder in (pruned, dense)}
    for having in ([dense], [dense, pruned], [pruned], []):
        for folder, tensors in plain.items():
            more = {name: torch.ones(2, 4)} if folder in having else {}
            save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
        found, printed = check(pruned, "--against", dense)
        status.append(found)
        assert (f"{name}: in only one of the two checkpoints" in printed) == bool(found)
    assert status == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--pattern 2:5", "not divisible by 5"),
        ("--pattern 2:4 --include none", "matches none"),
        ("--against no/such/folder", "no/such/folder is not a folder"),
    ],
)
def test_what_cannot_be_checked_has_a_status_of_its_own(pruned, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        check_sparsity.main([str(pruned), *arguments.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [("--pattern unstructured", "--pattern is N:M"), ("--pattern 2:1", "0 < N < M"), ("--include *", "add it")],
)
def test_wrong_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        check_sparsity.main(["checkpoint", *arguments.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_exit_status_says_that_it_fails(pruned):
    done = subprocess.run([sys.executable, "scripts/check_sparsity.py", pruned, "--pattern", "5:8"], cwd=ROOT)
    assert done.returncode == 1


@pytest.mark.slow
@needs_demo
def test_one_of_135_million(check, tmp_path):
    pruned = tmp_path / "pruned"
    decoder = loading.load(str(DEMO), dtype="float32", device="cpu")
    with torch.no_grad():
        for i in range(len(decoder)):
            for linear in decoder.linears(i).values():
                linear.weight.view(-1, 8)[:, ::2] = 0  # any 4:8
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    model.load_state_dict(decoder.model.state_dict())
    model.save_pretrained(pruned)
    assert check(pruned, "--pattern", "4:8", "--against", DEMO)[0] == 0
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        original = file.get_tensor("model.layers.17.mlp.down_proj.weight")

    def fill(weight):
        weight[400, 808:814:2] = torch.where(original[400, 808:814:2] == 0, 1e-3, original[400, 808:814:2])

    change(pruned, "model.layers.17.mlp.down_proj.weight", fill)
    status, printed = check(pruned, "--pattern", "4:8")
    assert status == 1 and "model.layers.17.mlp.down_proj: 1 groups of 8 with fewer than 4 zeros" in printed
    change(pruned, "model.layers.17.mlp.down_proj.weight", lambda weight: weight[400, 808:814:2].fill_(0))

    column = (original[:, 1].nonzero()[0].item(), 1)
    change(pruned, "model.layers.17.mlp.down_proj.weight", lambda weight: weight[column].neg_())
    status, printed = check(pruned, "--pattern", "4:8", "--against", DEMO)
    assert status == 1 and "holds: at least 4 zeros in every 8" in printed
    assert "model.layers.17.mlp.down_proj.weight: 1 of 884736 values are not the dense model's" in printed
