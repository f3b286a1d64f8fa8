"""Text to tokens: long texts in pieces give the tokens of the whole, conversations are written by the chat template."""

import copy
import json
import random

import pytest
import torch
from conftest import DEMO, ROOT, needs_demo
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lib.data import tokens
from lib.data.sources import documents as documents_of
from lib.data.tokens import encode, tokens_of
from lib.data.windows import calibration_windows, evaluation_tokens
from lib.models.tokenizer import load_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "größer", "漢字", "naïve", "12345", "don't", "we'll", "x=1;"]


def prose(characters: int, seed: int = 0) -> str:
    rng, parts = random.Random(seed), []
    while sum(map(len, parts)) < characters:
        parts.append(" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 30))))
        parts.append(rng.choice([" ", "\n", "\n\n", "  ", ".\n", "\t", " \n \n"]))
    return "".join(parts)


def byte_level(special: bool) -> PreTrainedTokenizerFast:
    """GPT-2's and LLaMA-3's kind: a regular expression, then BPE on bytes; offsets without the spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([prose(3000, seed) for seed in range(20)], trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if special:
        template = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
        backend.post_processor = processors.Sequence([backend.post_processor, template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def sentencepiece(prepend: bool) -> PreTrainedTokenizerFast:
    """LLaMA-2's (prepend) and Gemma's kind: nothing splits the text before BPE, bytes stand in for what is not known."""
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(
        [prose(3000, seed).replace("漢字", "") for seed in range(20)], trainers.BpeTrainer(vocab_size=300)
    )
    learned = json.loads(trained.to_str())["model"]
    for token in learned["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


TOKENIZERS = {
    "byte level": lambda: byte_level(special=False),
    "byte level with special tokens": lambda: byte_level(special=True),
    "sentencepiece, llama": lambda: sentencepiece(prepend=True),
    "sentencepiece, gemma": lambda: sentencepiece(prepend=False),
}
TEXTS = {
    "prose": prose(12000),
    "one line": prose(9000).replace("\n", " "),
    "long runs": (prose(700) + "-" * 150 + prose(500) + " " * 333 + prose(100) + "\n" * 97) * 6,
    "one run": "a" * 7000,
    "periods": "abcabcab " * 900,
    "no space at all": prose(9000).replace(" ", "").replace("\n", "").replace("\t", ""),
    "emoji": "👩‍👩‍👧‍👦🇩🇪é́ " * 700,
    "a special token": (prose(300) + "<s>") * 25,
    "just over a piece": prose(1000)[:1001],
}


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in TOKENIZERS.items()}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 1000)
    monkeypatch.setattr(tokens, "OVERLAP", 60)
    monkeypatch.setattr(tokens, "CUTS", 8)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("special", [True, False])
def test_pieces_give_the_tokens_of_the_whole(made, name, text, special, small_pieces):
    tokenizer, text = made[name], TEXTS[text]
    expected = tokenizer(text, add_special_tokens=special)["input_ids"]
    assert encode(tokenizer, text, special).tolist() == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prose_is_tokenized_in_pieces(made, name, small_pieces, monkeypatch):
    longest = []
    piece = tokens._piece
    monkeypatch.setattr(tokens, "_piece", lambda *given: (longest.append(given[3] - given[2]), piece(*given))[1])
    assert tokens._in_pieces(made[name], TEXTS["prose"]) is not None
    assert len(longest) > 12 and max(longest) <= 1000


def test_a_text_that_cannot_be_cut_is_tokenized_whole(made, small_pieces):
    """Pairs of one character depend on where the run begins, and 7000 is more than any piece sees."""
    odd = Tokenizer(models.BPE({"a": 0, "aa": 1, "aaa": 2, "aaaaaa": 3, "a" * 7: 4}, [("a", "a"), ("aa", "a"), ("aaa", "aaa"), ("aaaaaa", "a")]))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=odd)
    text = "a" * 7001
    assert encode(tokenizer, text).tolist() == tokenizer(text)["input_ids"]


def test_long_texts_tell_how_far_they_are(made, small_pieces, monkeypatch, caplog):
    caplog.set_level("INFO")
    encode(made["byte level"], TEXTS["prose"])
    assert caplog.text == ""  # it was quick
    monkeypatch.setattr(tokens, "SILENCE", 0.0)
    encode(made["byte level"], TEXTS["prose"])
    assert caplog.text.count("tokenized 0.0 of 0.0 million characters") > 5


@needs_demo
def test_pieces_of_the_demo_models_tokenizer(small_pieces):
    tokenizer = load_tokenizer(str(DEMO))
    text = "\n\n".join(documents_of(str(ROOT / "demo" / "evaluation.jsonl")))
    whole = tokenizer(text, verbose=False)["input_ids"]
    assert tokens._in_pieces(tokenizer, text).tolist() == whole


CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m.content }} {% if m.role == 'user' %}w90{% else %}w91{% endif %} {% endfor %}"
)


@pytest.fixture
def chatty(with_bos):
    tokenizer = copy.deepcopy(with_bos)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_conversations_are_written_by_the_chat_template(chatty):
    expected = chatty.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert expected == [1, 5, 6, 90, 7, 91]
    assert tokens_of(CHAT, chatty).tolist() == expected  # one BOS: the template's
    assert tokens_of(CHAT, chatty, bos=1).tolist() == expected[1:]
    assert tokens_of("w5", chatty).tolist() == [1, 5]
    assert evaluation_tokens([CHAT, CHAT], chatty).tolist() == expected * 2
    assert evaluation_tokens([CHAT, CHAT], chatty, bos=1).tolist() == (expected * 2)[1:]
    assert calibration_windows([CHAT], chatty, 3, 5, seed=0).tolist() == [expected[:5]] * 3


def test_no_chat_template_or_one_that_refuses(with_bos, chatty):
    with pytest.raises(ValueError, match="has no chat template.*chat version"):
        tokens_of(CHAT, with_bos)
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match="refuses the conversation that begins with user: 'w5 w6' .*roles must alternate.*leave it out"
    ):
        tokens_of(CHAT, chatty)


def test_tokens_take_four_bytes(tokenizer):
    assert tokens_of("w5 w6", tokenizer).dtype == torch.int32
