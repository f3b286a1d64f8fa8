"""Loads the tokenizer of a model."""

import json
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer

from lib.errors import InvalidInput
from lib.models.config import read_config, reading

LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}  # LLaMA-1 and 2


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer in a model's folder.

    If a LLaMA checkpoint has only SentencePiece's `tokenizer.model`, it is read as in the published code: with BOS unless its
    config says otherwise, and whatever class its config names (conversions of LLaMA-1 say "LLaMATokenizer", and some have
    empty special tokens). transformers 5 by itself would leave BOS out and split the first word differently.

    Raises:
        InvalidInput: its files are missing or damaged.
    """
    config = read_config(name, trust_remote_code=trust_remote_code)
    with reading(name, "its tokenizer", "put the model's own files (tokenizer.json or tokenizer.model) beside its config.json"):
        if (
            config.model_type != "llama"
            or not Path(name, "tokenizer.model").is_file()
            or Path(name, "tokenizer.json").is_file()
        ):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        else:
            path = Path(name, "tokenizer_config.json")
            settings = json.loads(path.read_text()) if path.is_file() else {}
            missing = {key: value for key, value in LLAMA_TOKENS.items() if settings.get(key) in (None, "")}
            tokenizer = LlamaTokenizer.from_pretrained(name, **missing)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise InvalidInput(f"a {type(tokenizer).__name__} without a vocabulary")
    return tokenizer
