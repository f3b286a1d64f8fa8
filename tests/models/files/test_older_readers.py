"""What readers older than transformers 5 misread is said, and nothing is said of a folder that they read as transformers 5 does."""

import json

import pytest
from conftest import tiny_model

from lib.models.files.older_readers import older_readers

LONGER = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.fixture
def folder(tmp_path):
    def write(config: dict, tokenizer: dict | None = None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "config, said",
    [
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 100000.0}}, ['"rope_theta": 100000.0 at its top level']),
        ({"model_type": "llama", "rope_parameters": LONGER}, ["the rope_type linear"]),
        ({"model_type": "llama", "rope_parameters": LONGER | {"rope_theta": 5e5}}, ["rope_theta 500000", "rope_type linear"]),
        ({"model_type": "phi", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, ["rotary_factor 0.4"]),
        ({"model_type": "mixtral", "rope_parameters": {"rope_theta": 10000.0}}, ["rope_theta 10000"]),
        ({"text_config": {"model_type": "llama", "rope_parameters": {"rope_theta": 1e5}}}, ["rope_theta 100000"]),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"rope_theta": 5e4, "rope_type": "default"}},
            },
            ["rope_theta 50000 of sliding_attention"],
        ),
        ({"model_type": "unknown", "rope_parameters": {"rope_theta": 10000.0}}, ["rope_theta 10000"]),
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 1e5}, "rope_theta": 1e5}, []),
        ({"model_type": "llama", "rope_parameters": LONGER, "rope_scaling": {"type": "linear", "factor": 2.0}}, []),
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, []),  # their default
        ({"model_type": "llama", "rope_theta": 1e5}, []),
        ({"model_type": "gpt2"}, []),
    ],
    ids=str,
)
def test_what_only_rope_parameters_say(config, said, folder):
    warnings = older_readers(folder(config))
    assert len(warnings) == len(said) and all(part in warning for part, warning in zip(said, warnings, strict=True))
    assert all("in silence" in warning for warning in warnings)


@pytest.mark.parametrize(
    "tokenizer, said",
    [
        ({"tokenizer_class": "TokenizersBackend"}, "the tokenizer_class TokenizersBackend"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": ["<a>"]}, "extra_special_tokens as a list"),
        ({"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image": "<a>"}}, None),
    ],
)
def test_what_tokenizer_config_says(tokenizer, said, folder):
    warnings = older_readers(folder({"model_type": "llama"}, tokenizer))
    assert len(warnings) == (said is not None) and all(said in warning for warning in warnings)


def test_a_folder_as_transformers_5_saves_it(tmp_path, tokenizer):
    tiny_model("llama", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}).cpu().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(older_readers(tmp_path)) == 2


def test_files_that_are_missing_or_damaged_have_no_warning(tmp_path):
    assert older_readers(tmp_path) == []
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert older_readers(tmp_path) == []
