"""A model whose blocks stay on disk gives the same bits as one in memory."""

import json
import logging
import math
import shutil

import pytest
import torch
from conftest import DEVICE, prune_model, random_windows, tiny_model
from transformers import AutoModelForCausalLM

from lib.evaluation.perplexity import perplexity
from lib.gradients.walk import gradient_norms
from lib.models import loading, memory
from lib.models.files import checkpoint, pruned_checkpoint
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS
from lib.pruning.targets import select

FAMILIES = ["llama", "llama-gqa-tied", "qwen2", "gemma2", "phi3", "opt"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        tiny_model(family).cpu().save_pretrained(folder / family, max_shard_size="20KB")
    return folder


def both(saved, family, dtype="float32"):
    return (loading.load(str(saved / family), dtype=dtype, device=DEVICE, streamed=streamed) for streamed in (False, True))


def on_disk(block) -> bool:
    return all(parameter.device.type == "meta" for parameter in block.parameters())


def test_one_block_is_in_memory_at_a_time(saved):
    _, streamed = both(saved, "llama")
    assert all(map(on_disk, streamed.blocks))
    with streamed.resident(1) as block:
        assert [on_disk(other) for other in streamed.blocks] == [True, False, True]
        assert block.mlp.up_proj.weight.any()
    assert all(map(on_disk, streamed.blocks))
    assert streamed.model.lm_head.weight.device.type == DEVICE.type


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_are_bitwise_equal(saved, family, dtype):
    resident, streamed = both(saved, family, dtype)
    windows = random_windows()
    kept = {i: sums.result("l2") for i, sums in gradient_norms(resident, windows, keep_graph=True)}
    read = {i: sums.result("l2") for i, sums in gradient_norms(streamed, windows, keep_graph=False, group=3)}
    assert all(torch.equal(kept[i][name], read[i][name]) for i in kept for name in kept[i])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_pruned_checkpoints_are_bitwise_equal(saved, family, method, tmp_path):
    def gradients(i):
        return {
            name: torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(i))
            for name, linear in resident.linears(i).items()
        }

    windows, found = random_windows(6), []
    resident, streamed = both(saved, family)
    for name, decoder in (("resident", resident), ("streamed", streamed)):
        dense_tensors = loading.dense_tensors(str(saved / family), decoder)
        written = pruned_checkpoint.Store(tmp_path / name, dense_tensors, updated=method == "sparsegpt")
        dense = perplexity(decoder, windows, group=1 if name == "resident" else 4)
        prune_model(
            decoder, windows, method=method, sparsity=Sparsity.parse("2:4"), gradients=gradients,
            hidden_states=None if name == "resident" else 2,
            finished=lambda i, block, s=written, d=decoder: s.write_block(d, i, d.linears(i)),
        )  # fmt: skip
        written.finish()
        if name == "streamed":
            decoder.source = written.tensors()
        found.append((dense, perplexity(decoder, windows)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("resident", "streamed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any("proj" in name or "fc" in name for name in weights[0] if (weights[0][name] == 0).float().mean() == 0.5)


def test_only_pruned_linears_are_written_anew(saved, tmp_path):
    """Biases that float16 cannot hold, and -0.0, are the dense checkpoint's even if the run was in float16."""
    shutil.copytree(saved / "qwen2", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.bias[:2] = torch.tensor([1e-9, -0.0])
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e-9  # not pruned: excluded
    model.save_pretrained(tmp_path / "dense")
    decoder = loading.load(str(tmp_path / "dense"), dtype="float16", device=DEVICE)
    targets = select(decoder, Sparsity.parse("2:4"), exclude=["*.up_proj"])
    written = pruned_checkpoint.Store(tmp_path / "pruned", loading.dense_tensors(str(tmp_path / "dense"), decoder))
    prune_model(
        decoder, None, method="magnitude", sparsity=targets,
        finished=lambda i, block: written.write_block(decoder, i, targets[i]),
    )  # fmt: skip
    written.finish()
    dense, pruned = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("dense", "pruned"))
    for name, weight in pruned.items():
        if name.endswith("proj.weight") and "up_proj" not in name:
            assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
        else:
            assert torch.equal(weight.view(torch.int32), dense[name].view(torch.int32)), name


def test_weights_that_are_not_tied_although_the_config_says_so(tmp_path):
    """transformers believes the weights."""
    tiny_model("llama").cpu().save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    found = []
    for decoder in both(tmp_path, "dense"):
        assert "lm_head.weight" in loading.saved_names(decoder)
        assert not torch.equal(decoder.model.lm_head.weight, decoder.model.get_input_embeddings().weight)
        found.append(perplexity(decoder, random_windows()))
    assert found[0] == found[1]


def test_incomplete_and_damaged_checkpoints_are_named(saved, tmp_path):
    shutil.copytree(saved / "llama", tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a whole safetensors file"):
        loading.load(str(tmp_path / "model"), device=DEVICE, streamed=True)
    assert pruned_checkpoint.foreign_weights(tmp_path / "model")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"is incomplete, {shard.name} of its index"):
        loading.load(str(tmp_path / "model"), device=DEVICE, streamed=True)


def test_a_stale_index_beside_a_whole_file_is_ignored(saved, tmp_path):
    """As transformers does."""
    shutil.copy(saved / "llama" / "model.safetensors.index.json", tmp_path)
    tiny_model("llama").cpu().save_pretrained(tmp_path)
    assert "model.layers.2.mlp.up_proj.weight" in checkpoint.Checkpoint(str(tmp_path))


def test_many_hidden_states_go_to_a_file(saved):
    resident, _ = both(saved, "llama")
    windows = random_windows(5)
    files, plain = resident.enter_all(windows, in_memory=4), resident.enter_all(windows, in_memory=5)
    assert all(state.mapped for state in files) and not any(state.mapped for state in plain)
    for i in range(3):
        resident.advance(i, files)
        resident.advance(i, plain)
    assert all(torch.equal(a.hidden, b.hidden.cpu()) for a, b in zip(files, plain, strict=True))
    assert files[0].hidden.data_ptr() + files[0].hidden.nbytes == files[1].hidden.data_ptr()


def test_what_cannot_be_streamed_says_why(saved, tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((saved / "llama" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"no tensor that makes model\.embed_tokens\.weight"):
        loading.load(str(tmp_path), device=DEVICE, streamed=True)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither safetensors nor PyTorch weights"):
        loading.load(str(tmp_path), device=DEVICE, streamed=True)
    index = json.loads((saved / "llama" / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        (tmp_path / file).symlink_to(saved / "llama" / file)
    config = json.loads((saved / "llama" / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no tensor that makes model\.layers\.3\."):
        loading.load(str(tmp_path), device=DEVICE, streamed=True)


@pytest.mark.parametrize("free, expected", [(10**9, False), (10**5, True)])
def test_auto_streams_what_does_not_fit_and_says_so(saved, monkeypatch, caplog, free, expected):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    caplog.set_level(logging.INFO)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "seq_length": 16}
    outline, needs = loading.outline(str(saved / "llama")), memory.Needs(sums_per_weight=8)
    assert memory.plan(outline, needs, memory="auto", **options).streamed is expected
    assert ("streamed" if expected else "resident") in caplog.text and "GB are free" in caplog.text
    assert memory.plan(outline, needs, memory="resident", **options).streamed is False
    assert memory.plan(outline, needs, memory="streamed", **options).streamed is True


@pytest.mark.parametrize("limits, expected", [({}, math.inf), ({"a": 900, "a/b": 500}, 450), ({"a": 300, "a/b": "max"}, 250)])
def test_the_limits_of_a_container_count(tmp_path, limits, expected):
    """100 bytes are in use, 50 of them as cache of files."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for group, limit in limits.items():
        (tmp_path / group / "memory.max").write_text(f"{limit}\n")
        (tmp_path / group / "memory.current").write_text("100\n")
        (tmp_path / group / "memory.stat").write_text("anon 40\ninactive_file 50\n")
    (tmp_path / "own").write_text("4:memory:/else\n0::/a/b\n")
    assert memory.container_bytes(tmp_path, tmp_path / "own") == expected


def test_groups_are_few_and_equal():
    assert memory.Plan(True, 100).group(nsamples=10, states_per_sample=5) == 10
    assert memory.Plan(True, 40).group(nsamples=10, states_per_sample=5) == 5  # 8 fit: two groups, of 5 and 5
    assert memory.Plan(True, 1).group(nsamples=10, states_per_sample=5) == 1
