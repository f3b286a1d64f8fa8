"""A model's own tokenizer."""

import json
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer

from lib.errors import InvalidInput
from lib.models.config import read_config, reading

LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}  # of LLaMA-1 and 2


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The model's own tokenizer.

    A LLaMA checkpoint with nothing but SentencePiece's `tokenizer.model` is read as the published code read it: with BOS
    unless its config says otherwise, whatever that calls the class (conversions of LLaMA-1 say "LLaMATokenizer", and some
    have empty special tokens). transformers 5 alone would leave BOS out and split the first word differently.

    Raises:
        ValueError: its files are missing or damaged.
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
            said = json.loads(path.read_text()) if path.is_file() else {}
            missing = {key: value for key, value in LLAMA_TOKENS.items() if said.get(key) in (None, "")}
            tokenizer = LlamaTokenizer.from_pretrained(name, **missing)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise InvalidInput(f"a {type(tokenizer).__name__} without a vocabulary")
    return tokenizer
