"""Blocks that the model's forward leaves out for text: Llama-3.2-Vision's cross-attention."""

import json

import pytest
import torch
from conftest import DEVICE, SMALL, prune_model, random_windows
from safetensors.torch import load_file
from test_commands import run
from test_walk import SCALE, largest_difference, ours
from transformers import MllamaConfig, MllamaForCausalLM, MllamaForConditionalGeneration
from transformers.models.mllama import MllamaTextConfig

from lib.evaluation.perplexity import perplexity
from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity

SKIPPED = [1, 3]


def mllama() -> MllamaForCausalLM:
    config = MllamaTextConfig(
        **SMALL | {"num_hidden_layers": 5, "num_key_value_heads": 2}, cross_attention_layers=SKIPPED, hidden_act="silu"
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MllamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else parameter.data.add_(1)
    return model.eval().to(DEVICE)


def whole_mllama() -> MllamaForConditionalGeneration:
    """With the part that sees, as Llama-3.2-Vision is published."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
        "vision_output_dim": 32, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0], "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    return MllamaForConditionalGeneration(MllamaConfig(text_config=mllama().config.to_dict(), vision_config=vision))


def decoder() -> Decoder:
    return Decoder(mllama(), DEVICE)


def test_perplexity_is_that_of_the_plain_forward():
    windows, model = random_windows(3), mllama()
    with torch.no_grad():
        expected = torch.stack([model(window[None], labels=window[None]).loss for window in windows]).mean().exp().item()
    assert decoder().skipped == set(SKIPPED)
    assert perplexity(decoder(), windows, batch=1) == pytest.approx(expected, rel=1e-5)


def test_gradients_are_those_of_the_whole_model():
    windows, model = random_windows(3), mllama()
    expected = {"l1": {}, "l2": {}}
    for window in windows:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for i in {0, 2, 4}:
            for name, module in model.model.layers[i].named_modules():
                if isinstance(module, torch.nn.Linear):
                    key, scaled = f"model.layers.{i}.{name}", SCALE * module.weight.grad
                    expected["l1"][key] = expected["l1"].get(key, 0) + scaled.abs()
                    expected["l2"][key] = expected["l2"].get(key, 0) + scaled**2
    expected["l2"] = {key: total.sqrt() for key, total in expected["l2"].items()}
    for keep_graph in (True, False):
        found = ours(decoder(), windows, keep_graph=keep_graph)
        assert found["l1"].keys() == expected["l1"].keys()
        assert largest_difference(found, expected) < 1e-5


def test_pruning_leaves_them_dense():
    pruned, dense = decoder(), mllama().state_dict()
    zeros = prune_model(pruned, random_windows(4), method="wanda", sparsity=Sparsity.parse("2:4"))
    for i in range(5):
        assert bool(zeros[i]) == (i not in SKIPPED)
    for name, weight in pruned.model.state_dict().items():
        block = int(name.split(".")[2]) if ".layers." in name else None
        if block in SKIPPED or "proj" not in name:
            assert torch.equal(weight, dense[name])
        else:
            assert ((weight == 0).view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_both_commands(memory, tokenizer, documents, tmp_path, caplog):
    model, text = tmp_path / "mllama", tmp_path / "text.jsonl"
    whole_mllama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    flags = [
        "--model", model, "--dataset", text, "--nsamples", 2, "--seq_length", 16, "--dtype", "float32",
        "--cache_dir", tmp_path / "cache", "--memory", memory,
    ]  # fmt: skip
    run("gradient_computation.py", *flags, "--output_dir", tmp_path)
    assert "blocks [1, 3] stay dense" in caplog.text
    run(
        "main.py", *flags, "--prune_method", "gblm", "--sparsity_type", "2:4", "--eval_dataset", text, "--save", tmp_path / "out",
        "--gradient_path", tmp_path / "llama2" / "gradients_aggregrate_norm_l2_model_mllama", "--save_model", tmp_path / "pruned",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["skipped_blocks"] == SKIPPED and results["sparsity"] == results["sparsity_asked"] == 0.5
    dense, pruned = (load_file(path / "model.safetensors") for path in (model, tmp_path / "pruned"))
    assert dense.keys() == pruned.keys() and any("vision" in name for name in pruned)
    for name, weight in pruned.items():
        block = int(name.split(".")[3]) if name.startswith("language_model.model.layers.") else None
        if block in {0, 2, 4} and "proj" in name:
            assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
        else:
            assert torch.equal(weight, dense[name])
