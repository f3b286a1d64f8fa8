"""Other tools read a saved folder with an older transformers: they find the dense folder's own files."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import random_windows, tiny_model
from test_pruned_checkpoint import pruned_to

pytestmark = pytest.mark.slow
OLD = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
LOGITS = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
folder, tokens, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
assert model.config.rope_theta == 500000.0 and model.generation_config.eos_token_id == [2, 3]
assert AutoTokenizer.from_pretrained(folder)("w5 w6")["input_ids"] == [5, 6]
with torch.no_grad():
    torch.save(model(torch.load(tokens)).logits, target)
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A folder with transformers 4.57 for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("old")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        folder,
    ]
    if subprocess.run([*map(str, command), *OLD]).returncode:
        pytest.skip(f"{' '.join(OLD)} cannot be installed")
    return folder


def test_transformers_4_finds_equal_logits(old, tmp_path, tokenizer):
    dense = tmp_path / "dense"
    tiny_model("llama", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}).save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]  # as checkpoints before transformers 5 have it
    config["torch_dtype"] = config.pop("dtype")
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    tokenizer.save_pretrained(dense)
    (dense / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    decoder = pruned_to(tmp_path / "pruned", dense, 0.5)
    tokens = random_windows(2)
    torch.save(tokens, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", LOGITS, tmp_path / "pruned", tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    done = subprocess.run(list(map(str, command)), env=os.environ | {"PYTHONPATH": str(old)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = decoder.model(input_ids=tokens).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
