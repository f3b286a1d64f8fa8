"""SentencePiece tokenizers as LLaMA-1 and LLaMA-2 checkpoints carry them, against SentencePiece itself."""

import json
import shutil

import pytest
import sentencepiece
from transformers import LlamaConfig

from lib.data import tokens
from lib.data.sources import documents
from lib.data.windows import calibration_windows, evaluation_tokens
from lib.models.tokenizer import load_tokenizer

TEXT = "the quick brown fox jumps over\n\nthe lazy dogs, größer than 12 ships"
# What conversions of LLaMA-1 and 2 have beside tokenizer.model: the current form, nothing, a class that never existed, empty tokens.
CONFIGS = {
    "llama2": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bare": None,
    "misnamed": {"tokenizer_class": "LLaMATokenizer"},
    "empty": {"tokenizer_class": "LlamaTokenizer", "bos_token": "", "eos_token": "", "unk_token": ""},
}  # fmt: skip


def folder_with(folder, model, config, vocabulary):
    LlamaConfig(vocab_size=vocabulary).save_pretrained(folder)
    shutil.copy(model, folder / "tokenizer.model")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small SentencePiece model of LLaMA's kind: BPE, byte fallback, dummy prefix, whitespace kept."""
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    lines = [f"the quick brown fox number {i} jumps over the lazy dogs and ships of harbour {i * i}" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def mistral(unpacked):
    """A tokenizer of real size, 32000 pieces, from a wheel on PyPI."""
    folder = unpacked("mistral-common==1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
    return folder / "mistral_common" / "data" / "tokenizer.model.v1"


def same_ids(model, config, tmp_path, text):
    processor = sentencepiece.SentencePieceProcessor(str(model))
    name = folder_with(tmp_path, model, config, processor.vocab_size())
    tokenizer = load_tokenizer(name)
    assert len(tokenizer) == processor.vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert evaluation_tokens([text], tokenizer).tolist() == processor.encode(text, add_bos=True)
    tokenizer.save_pretrained(tmp_path / "saved")  # as --save_model does
    LlamaConfig(vocab_size=processor.vocab_size()).save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again(text)["input_ids"] == processor.encode(text, add_bos=True)


@pytest.mark.parametrize("config", CONFIGS)
def test_tokenizer_model(trained, config, tmp_path):
    same_ids(trained, CONFIGS[config], tmp_path, TEXT)


def test_a_config_without_bos_is_obeyed(trained, tmp_path):
    name = folder_with(tmp_path, trained, {**CONFIGS["llama2"], "add_bos_token": False}, 400)
    tokenizer = load_tokenizer(name)
    assert evaluation_tokens([TEXT], tokenizer).tolist() == sentencepiece.SentencePieceProcessor(str(trained)).encode(TEXT)


def test_packed_documents_start_with_bos(trained, tmp_path):
    """Every document is tokenized by itself, as the published code does it."""
    tokenizer = load_tokenizer(folder_with(tmp_path, trained, None, 400))
    packed = calibration_windows([TEXT] * 3, tokenizer, 1, 80, seed=0, pack=True)[0].tolist()
    assert packed[0] == 1 and packed[packed.index(2) + 1] == 1


@pytest.mark.parametrize("bos", [True, False])
def test_fast_tokenizers_with_bos_and_without(tokenizer, bos, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=96).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    if bos:
        pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        content["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    file.write_text(json.dumps(content))
    own = load_tokenizer(str(tmp_path))
    first = [1] if bos else []
    assert evaluation_tokens(["w5 w6", "w7"], own).tolist() == [*first, 5, 6, 7]
    packed = calibration_windows(["w5 w6"] * 4, own, 1, 4 + 2 * len(first), seed=0, pack=True)[0].tolist()
    assert packed == [*first, 5, 6, 2, *first, 5]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_tokenizer_of_real_size(mistral, config, tmp_path, shared_data):
    docs = documents("wikitext2", str(shared_data), "evaluation")
    same_ids(mistral, CONFIGS[config], tmp_path, "\n\n".join(docs[:300]))


@pytest.mark.slow
def test_pieces_of_a_tokenizer_of_real_size(mistral, tmp_path, shared_data, monkeypatch):
    """Nothing splits the text before BPE here, so a token depends on all of it, in principle."""
    tokenizer = load_tokenizer(folder_with(tmp_path, mistral, None, 32000))
    text = "\n\n".join([*documents("wikitext2", str(shared_data), "evaluation"), *documents("c4", str(shared_data))])
    monkeypatch.setattr(tokens, "PIECE", 2**17)
    assert tokens._in_pieces(tokenizer, text).tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokens.encode(tokenizer, text).tolist() == tokenizer(text, verbose=False)["input_ids"]
