"""Other tools read a saved folder with an older transformers: they find the dense folder's own files."""

import json
import os
import subprocess
import sys

import fetch_demo
import pytest
import torch
from conftest import DEMO, DEVICE, needs_demo, random_windows, tiny_model
from test_pruned_checkpoint import pruned_to
from transformers import AutoTokenizer

from lib.models import loading

pytestmark = pytest.mark.slow
OLD = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
ROPE = {"rope_theta": 100000.0, "rope_type": "default"}
TEXT = "w5 w6 and the State of the Union"
LOGITS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
folder, tokens, target, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    torch.save(model(torch.load(tokens)).logits, target)
ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
print(json.dumps({"theta": model.config.rope_theta, "eos": model.generation_config.eos_token_id, "ids": ids}))
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


def read_by_transformers_4(old, folder, tokens, tmp_path):
    """(What it reads there, and the logits that it computes)."""
    torch.save(tokens.cpu(), tmp_path / "tokens.pt")
    command = [sys.executable, "-c", LOGITS, folder, tmp_path / "tokens.pt", tmp_path / "logits.pt", TEXT]
    done = subprocess.run(list(map(str, command)), env=os.environ | {"PYTHONPATH": str(old)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), torch.load(tmp_path / "logits.pt")


def close(logits, expected):
    return torch.allclose(logits, expected.cpu(), rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_transformers_4_finds_equal_logits(old, tmp_path, tokenizer):
    dense = tmp_path / "dense"
    tiny_model("llama", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}).cpu().save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]  # as checkpoints before transformers 5 have it
    config["torch_dtype"] = config.pop("dtype")
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    tokenizer.save_pretrained(dense)
    (dense / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    decoder, tokens = pruned_to(tmp_path / "pruned", dense, 0.5), random_windows(2)
    read, logits = read_by_transformers_4(old, tmp_path / "pruned", tokens, tmp_path)
    assert read["theta"] == 500000.0 and read["eos"] == [2, 3] and read["ids"][:2] == [5, 6]
    assert close(logits, decoder.model(input_ids=tokens).logits)


@pytest.mark.parametrize("fetched", ["tiny", pytest.param("demo", marks=needs_demo)])
def test_transformers_4_and_5_agree_on_the_demo_as_fetched(fetched, old, tmp_path, tokenizer):
    """The real one where it is there, and a tiny one that is saved as the script saves it; each pruned, too."""
    dense = DEMO
    if fetched == "tiny":
        dense = tmp_path / "dense"
        fetch_demo.save(tiny_model("llama", rope_parameters=ROPE).cpu(), tokenizer, dense)
    decoder, tokens = pruned_to(tmp_path / "pruned", dense, 0.5), random_windows(2)
    read, logits = read_by_transformers_4(old, tmp_path / "pruned", tokens, tmp_path)
    assert read["theta"] == decoder.model.config.rope_parameters["rope_theta"] == 100000.0
    assert read["ids"] == AutoTokenizer.from_pretrained(dense)(TEXT)["input_ids"]
    assert close(logits, decoder.model(input_ids=tokens).logits)
    read, logits = read_by_transformers_4(old, dense, tokens, tmp_path)
    expected = loading.load(str(dense), dtype="float32", device=DEVICE).model(input_ids=tokens).logits
    assert read["theta"] == 100000.0 and close(logits, expected)
