"""What a model is loaded as, where its config and its weights may not say so."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_commands import run
from transformers import AutoModelForCausalLM

from lib.models import loading
from lib.models.config import positions


@pytest.mark.parametrize(
    "own, supported, expected",
    [
        (torch.bfloat16, False, torch.float16),  # T4, V100
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.float16, False, torch.float16),
        (None, True, torch.float16),
    ],
)
def test_a_gpu_without_bfloat16(own, supported, expected, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    config = SimpleNamespace(dtype=own)
    assert loading.resolve_dtype("auto", config, torch.device("cuda", 0)) == expected
    assert loading.resolve_dtype("bfloat16", config, torch.device("cuda", 0)) == torch.bfloat16  # who asks gets it


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_model_with_code_of_its_own(memory, saved_model, documents, tmp_path, monkeypatch):
    """It is pruned as the LLaMA model that it is, under --trust_remote_code, and what is saved loads in its turn."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, text = tmp_path / f"own_{memory}", tmp_path / "text.jsonl"
    shutil.copytree(saved_model, model)
    (model / "own_code.py").write_text(CODE)
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    config = json.loads((model / "config.json").read_text()) | {"model_type": "own", "auto_map": classes}
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    flags = [
        "--dataset", text, "--eval_dataset", text, "--nsamples", 2, "--seq_length", 16, "--dtype", "float32", "--prune_method", "wanda",
        "--sparsity_type", "2:4", "--cache_dir", tmp_path / "cache", "--memory", memory,
    ]  # fmt: skip
    run("main.py", *flags, "--model", saved_model, "--save_model", tmp_path / "plain")
    with pytest.raises(ValueError, match=r"runs code of its own \(own, .*--trust_remote_code"):
        run("main.py", *flags, "--model", model)
    run("main.py", *flags, "--model", model, "--trust_remote_code", "--save_model", tmp_path / "pruned")
    plain, pruned = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "pruned"))
    assert all(torch.equal(plain[name], pruned[name]) for name in plain)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"


def test_unused_weights_are_pointed_out(saved_model, tmp_path, caplog):
    tiny_model(noise=0, num_hidden_layers=4).cpu().save_pretrained(tmp_path)
    shutil.copy(saved_model / "config.json", tmp_path)
    assert len(loading.load(str(tmp_path), device="cpu", dtype="float32")) == 3
    assert "tensors are not part of the model in its config.json, such as model.layers.3." in caplog.text


@pytest.mark.parametrize(
    "family, expected", [("llama", (64, False)), ("opt", (64, True)), ("gemma3", (64, False)), ("gpt_neox", (64, False))]
)
def test_positions(family, expected, tmp_path):
    tiny_model(family).cpu().save_pretrained(tmp_path)
    assert positions(loading.outline(str(tmp_path))) == expected
