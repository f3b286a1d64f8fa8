"""A saved checkpoint is the dense folder with zeros in it, nothing else."""

import hashlib
import json
import shutil

import pytest
import tiny_configs
import torch
import transformers
from conftest import DEVICE, SMALL, prune_model, random_windows, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from lib.models import loading
from lib.models.files.checkpoint import Checkpoint
from lib.models.files.pruned_checkpoint import Store, foreign_weights
from lib.pruning.masks import Sparsity
from lib.pruning.targets import select
from lib.pruning.updates.recipe import Recipe

EXTRAS = {  # what a folder from the hub holds besides, byte for byte: spaces and order of a file no library would write
    "generation_config.json": b'{ "eos_token_id":[2,  3] }',
    "tokenizer.model": b"\x00sentencepiece",
    "tokenizer_config.json": b'{"tokenizer_class":"LlamaTokenizerFast"}\n\n',
    "preprocessor_config.json": b"{}",
    "modeling_own.py": b"# custom code\r\n",
    "LICENSE": b"the licence",
    "original/params.json": b'{"dim": 4096}',
}
FOREIGN = {
    "consolidated.00.pth": b"dense weights",
    "original/consolidated.safetensors": b"dense weights",
    "model.gguf": b"dense",
}


def gemma3_wrapper(folder, dtype=torch.float32):
    """A wrapper whose files call its text model otherwise than the model does."""
    text = SMALL | {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 5, "sliding_window_pattern": 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(1)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=3, eoi_token_index=4, image_token_index=5
    )
    Gemma3ForConditionalGeneration(config).to(dtype).save_pretrained(folder)


def sharded(folder, dtype=torch.float32):
    tiny_model("qwen2", dtype).cpu().save_pretrained(folder, max_shard_size="20KB")


def extra_tensors(folder, dtype=torch.float32):
    """Such as the heads that predict several tokens: transformers does not load them."""
    tiny_model("llama", dtype).cpu().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(4, 8, dtype=torch.float64)
    tensors["mtp.count"] = torch.tensor(7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_prefix(folder, dtype=torch.float32):
    """A base model's checkpoint: no "model." before the names, no head."""
    model = tiny_model("llama-gqa-tied", dtype).cpu()
    model.model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")


def mixed_dtypes(folder, dtype=torch.float32):
    tiny_model("llama", dtype).cpu().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.double() if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "made": "elsewhere"})


KINDS = [sharded, extra_tensors, without_prefix, mixed_dtypes, gemma3_wrapper]


def make(kind, folder, dtype=torch.float32):
    folder.mkdir()
    kind(folder, dtype)
    for name, content in (EXTRAS | FOREIGN).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pruned_to(folder, dense, ratio: float, streamed=False, dtype="float32"):
    decoder = loading.load(str(dense), dtype=dtype, device=DEVICE, streamed=streamed)
    targets = select(decoder, Sparsity(ratio))
    written = Store(folder, loading.dense_tensors(str(dense), decoder))
    prune_model(
        decoder, random_windows(3), method="wanda", sparsity=targets,
        finished=lambda i, block: written.write_block(decoder, i, targets.get(i, ())),
    )  # fmt: skip
    written.finish()
    return decoder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_is_the_dense_one(kind, streamed, dtype, tmp_path):
    dense = make(kind, tmp_path / "dense")
    before = contents(dense)
    for ratio in (0.0, 0.5):
        decoder = pruned_to(tmp_path / "pruned", dense, ratio, streamed, dtype)
        after, weights = (
            contents(tmp_path / "pruned"),
            {name for name in before if name.startswith("model") and "safetensors" in name},
        )
        assert set(after) == set(before) - set(FOREIGN)
        assert all(after[name] == before[name] for name in after if name not in weights or name.endswith(".json"))
        expected, found = Checkpoint(str(dense)), Checkpoint(str(tmp_path / "pruned"))
        assert expected.where == found.where
        linears = expected.keys() if not ratio else set()
        if ratio:
            source = loading.dense_tensors(str(dense), decoder)
            linears = source.in_files(
                f"{decoder.prefixes[i]}{name}.weight" for i in range(len(decoder)) for name in decoder.linears(i)
            )
            assert len(linears) == sum(len(decoder.linears(i)) for i in range(len(decoder)))
        for name in expected:
            old, new = expected[name], found[name]
            assert old.dtype == new.dtype and old.shape == new.shape
            if ratio and name in linears:
                zero = new == 0
                assert zero.float().mean().item() == pytest.approx(0.5, abs=0.02)
                assert torch.equal(new[~zero], old[~zero])
            else:
                assert torch.equal(bits(new), bits(old)), name
    assert contents(dense) == before


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_with_transformers_and_streamed_equals_resident(kind, tmp_path):
    dense = make(kind, tmp_path / "dense")
    resident = pruned_to(tmp_path / "resident", dense, 0.5)
    pruned_to(tmp_path / "streamed", dense, 0.5, streamed=True)
    assert contents(tmp_path / "resident") == contents(tmp_path / "streamed")
    loaded = type(resident.model).from_pretrained(tmp_path / "resident", dtype=torch.float32).to(DEVICE)
    tokens = random_windows(1)
    assert torch.equal(loaded(input_ids=tokens).logits, resident.model(input_ids=tokens).logits)


def test_two_runs_write_the_same_bytes(tmp_path):
    dense = make(sharded, tmp_path / "dense")
    for name in ("first", "second"):
        pruned_to(tmp_path / name, dense, 0.5)
    digests = [
        {name: hashlib.sha256(data).hexdigest() for name, data in contents(tmp_path / name).items()}
        for name in ("first", "second")
    ]
    assert digests[0] == digests[1]


def test_weights_in_pytorch_files(tmp_path):
    """They become safetensors of the same names and dtypes."""
    model = tiny_model("llama", torch.float16).cpu()
    (tmp_path / "dense").mkdir()
    model.config.save_pretrained(tmp_path / "dense")
    state = model.state_dict()
    halves = {name: f"pytorch_model-{1 + ('layers.2' in name):05d}-of-00002.bin" for name in state}
    for file in set(halves.values()):
        torch.save({name: value for name, value in state.items() if halves[name] == file}, tmp_path / "dense" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": halves}
    (tmp_path / "dense" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    resident = pruned_to(tmp_path / "resident", tmp_path / "dense", 0.5)
    pruned_to(tmp_path / "streamed", tmp_path / "dense", 0.5, streamed=True)
    assert contents(tmp_path / "resident") == contents(tmp_path / "streamed")
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(contents(tmp_path / "resident")) == names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "resident", dtype=torch.float32).to(DEVICE)
    tokens = random_windows(1)
    assert torch.equal(loaded(input_ids=tokens).logits, resident.model(input_ids=tokens).logits)
    assert Checkpoint(str(tmp_path / "resident"))["model.layers.2.mlp.up_proj.weight"].dtype == torch.float16


def test_an_earlier_checkpoint_goes_when_the_new_one_is_whole(tmp_path):
    dense = make(sharded, tmp_path / "dense")
    pruned_to(tmp_path / "pruned", dense, 0.5)
    (tmp_path / "pruned" / "results.json").write_text("of the run")
    before = contents(tmp_path / "pruned")
    decoder = loading.load(str(dense), dtype="float32", device=DEVICE)
    unfinished = Store(tmp_path / "pruned", loading.dense_tensors(str(dense), decoder))
    unfinished.write_block(decoder, 0, ["mlp.up_proj"])
    assert contents(tmp_path / "pruned") == before  # a process may die here
    unfinished.discard()
    assert [path.name for path in tmp_path.iterdir() if path.name != "dense"] == ["pruned"]

    other = tmp_path / "other"  # another model, with fewer files
    other.mkdir()
    extra_tensors(other)
    pruned_to(tmp_path / "pruned", other, 0.5)
    assert sorted(contents(tmp_path / "pruned")) == sorted([*contents(other), "results.json"])
    assert foreign_weights(tmp_path / "pruned") is None
    assert foreign_weights(dense) is not None


def test_updated_weights_that_the_files_cannot_hold(tmp_path):
    tiny_model("llama", torch.float16).cpu().save_pretrained(tmp_path / "dense")
    decoder = loading.load(str(tmp_path / "dense"), dtype="float32", device=DEVICE)
    written = Store(tmp_path / "pruned", loading.dense_tensors(str(tmp_path / "dense"), decoder), updated=True)
    decoder.blocks[1].mlp.up_proj.weight[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has updated weights beyond 65504"):
        written.write_block(decoder, 1, ["mlp.up_proj"])
    written.discard()


def test_a_disk_without_room_is_known_before_the_work(tmp_path, monkeypatch):
    dense = make(sharded, tmp_path / "dense")
    decoder = loading.load(str(dense), dtype="float32", device=DEVICE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"pruned needs 0\.\d GB, its disk has 0\.0 GB free"):
        Store(tmp_path / "pruned", loading.dense_tensors(str(dense), decoder))
    assert not (tmp_path / "pruned.partial").exists()


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_fused_tensors_are_carried_back_to_the_files_they_came_from(model, tmp_path):
    """Experts that lie one by one in the files, and are one tensor in the model."""
    from lib.models.files.conversion import ModelTensors

    own = {"num_local_experts": 4} if model == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    config = getattr(transformers, {"mixtral": "MixtralConfig", "qwen3_moe": "Qwen3MoeConfig"}[model])(**SMALL, **own)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert any(".experts.3." in name for name in checkpoint)
    tensors, state = ModelTensors(checkpoint, made), made.state_dict()
    assert set(tensors) == set(state)
    for name, value in state.items():
        assert torch.equal(tensors[name], value), name
        for key, back in tensors.carried_back(tensors.group_of[name].first, state).items():
            assert torch.equal(back, checkpoint[key]), key


@pytest.mark.parametrize("place", [".cache/huggingface/hub/models--a--b/snapshots/0", ".git/x", "plain"])
def test_wherever_the_dense_folder_lies(place, tmp_path):
    """The hub's own cache is in ~/.cache, and what a folder has in such folders of its own is no part of the model."""
    dense = tmp_path / place
    dense.parent.mkdir(parents=True, exist_ok=True)
    make(sharded, dense)
    expected = contents(dense)
    for inside in (".cache/huggingface/download/config.json.metadata", ".git/config"):
        (dense / inside).parent.mkdir(parents=True)
        (dense / inside).write_text("not the model's")
    pruned_to(tmp_path / "pruned", dense, 0.5)
    assert set(contents(tmp_path / "pruned")) == set(expected) - set(FOREIGN)


def test_a_checkpoint_inside_the_dense_folder_is_no_part_of_it(tmp_path):
    dense = make(sharded, tmp_path / "dense")
    before = contents(dense)
    for _ in range(2):
        pruned_to(dense / "pruned", dense, 0.5)
    assert set(contents(dense / "pruned")) == set(before) - set(FOREIGN)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_that_were_not_pruned_keep_their_bits_in_an_updated_stack(kind, tmp_path):
    """In a run in bfloat16, of a model whose files are in float32."""
    experts = {"num_local_experts": 4}
    tiny_configs.tiny_model(kind, num_hidden_layers=2, **experts).float().save_pretrained(tmp_path / "dense")
    decoder = loading.load(str(tmp_path / "dense"), dtype="bfloat16", device=DEVICE)
    targets = select(decoder, Sparsity.parse("2:4"), include=["*.experts.1.*", "*.q_proj"])
    dense = loading.dense_tensors(str(tmp_path / "dense"), decoder)
    written = Store(tmp_path / "pruned", dense, updated=True)
    prune_model(
        decoder, random_windows(24).cpu(), method="wanda", sparsity=targets, recipe=Recipe("lsq"),
        finished=lambda i, block: written.write_block(decoder, i, targets.get(i, ())),
    )  # fmt: skip
    written.finish()
    pruned = loading.dense_tensors(str(tmp_path / "pruned"), decoder)
    for i, prefix in enumerate(decoder.prefixes):
        for name, matrix in decoder.matrices(i).items():
            before, after = (matrix.of(tensors[prefix + matrix.tensor_name]) for tensors in (dense, pruned))
            assert torch.equal(before, after) == (name not in targets[i]), name


def test_files_without_metadata_are_loaded_elsewhere_as_the_dense_ones_are(tmp_path):
    """transformers 4 takes a file without any, and refuses one whose metadata does not say that it is PyTorch's."""
    tiny_model("llama").cpu().save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    save_file(load_file(file), file)
    pruned_to(tmp_path / "pruned", tmp_path / "dense", 0.5)
    with safe_open(tmp_path / "pruned" / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"


@pytest.mark.parametrize("first, second", [(True, False), (False, True), (True, True), (False, False)])
def test_the_mark_of_updated_weights_is_this_runs(tmp_path, first, second):
    """Pruned once more, a model is the dense one of that run."""
    tiny_model("llama").cpu().save_pretrained(tmp_path / "dense")
    for source, target, updated in (("dense", "once", first), ("once", "twice", second)):
        decoder = loading.load(str(tmp_path / source), dtype="float32", device="cpu")
        written = Store(tmp_path / target, loading.dense_tensors(str(tmp_path / source), decoder), updated=updated)
        written.finish()
        assert Checkpoint(str(tmp_path / target)).updated == updated
