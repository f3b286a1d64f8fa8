"""Calibration windows and evaluation tokens."""

import logging
import random

import pytest
import torch
from conftest import VOCABULARY

from lib.data import tokens, windows
from lib.data.tokens import TokenizedDocuments
from lib.data.windows import calibration_windows, evaluation_tokens, windows_of


def ids(text):
    return [int(word[1:]) for word in text.split()]


def test_windows_are_the_published_draws(documents, tokenizer):
    rng, expected = random.Random(7), []
    while len(expected) < 5:
        tokens = ids(documents[rng.randint(0, len(documents) - 1)])
        if len(tokens) > 20:
            start = rng.randint(0, len(tokens) - 20 - 1)
            expected.append(tokens[start : start + 20])
    drawn = calibration_windows(documents, tokenizer, 5, 20, seed=7)
    assert drawn.tolist() == expected
    assert drawn.dtype == torch.int64
    assert not torch.equal(drawn, calibration_windows(documents, tokenizer, 5, 20, seed=8))


def test_a_document_of_exactly_t_tokens_is_too_short(tokenizer):
    exactly, longer = " ".join(["w5"] * 10), " ".join(["w6"] * 11)
    assert (calibration_windows([exactly, longer], tokenizer, 4, 10, seed=0) == 6).all()


def test_a_corpus_without_a_long_document_is_found_out(documents, tokenizer):
    longest = max(len(ids(text)) for text in documents)
    with pytest.raises(
        ValueError, match=rf"none of the 40 documents has more than 500 tokens \(the longest has {longest}\).*--pack"
    ):
        calibration_windows(documents, tokenizer, 2, 500, seed=0)


def test_one_long_document_among_many_is_found(documents, tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "PATIENCE", 3)
    corpus = [*["w4 w5"] * 300, " ".join(["w9"] * 50)]
    assert (calibration_windows(corpus, tokenizer, 1, 30, seed=0) == 9).all()


def test_packing_joins_documents_with_eos_and_cuts(documents, tokenizer):
    packed = calibration_windows(documents, tokenizer, 6, 70, seed=1, pack=True)
    order = random.Random(1).sample(range(len(documents)), len(documents))
    stream = [token for index in order for token in [*ids(documents[index]), tokenizer.eos_token_id]]
    assert packed.flatten().tolist() == stream[: 6 * 70]
    with pytest.raises(ValueError, match="fewer than 100 windows of 70"):
        calibration_windows(documents, tokenizer, 100, 70, seed=1, pack=True)


def test_evaluation_text_is_joined_with_blank_lines_and_tokenized_once():
    seen = []

    def tokenizer(text, **kwargs):
        seen.append(text)
        return {"input_ids": [1, 2]}

    assert evaluation_tokens(["a", "", "b"], tokenizer).tolist() == [1, 2]
    assert seen == ["a\n\n\n\nb"]


def test_joined_corpora_are_one_stream_of_which_starts_are_drawn(tokenizer):
    """As the published loader of WikiText-2: the rows joined with a space, one start a window."""
    rng, paragraphs = random.Random(2), [f"w{3 + i % 90}" for i in range(200)]
    stream = ids(" ".join(paragraphs))
    expected = [stream[start : start + 30] for start in [rng.randint(0, 200 - 30 - 1) for _ in range(6)]]
    assert calibration_windows(paragraphs, tokenizer, 6, 30, seed=2, source="wikitext2").tolist() == expected
    with pytest.raises(ValueError, match="200 tokens, a window needs more than 200"):
        calibration_windows(paragraphs, tokenizer, 1, 200, seed=2, source="wikitext2")


def test_few_documents_long_enough_are_counted(tokenizer, documents, caplog):
    caplog.set_level(logging.INFO)
    long = [" ".join(["w9"] * 50), " ".join(["w8"] * 60)]
    calibration_windows([*long, *["w4 w5"] * 50], tokenizer, 20, 30, seed=0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "20 windows from 2 documents (of 52): few are longer than 30 tokens, --pack" in caplog.text
    caplog.clear()
    calibration_windows(long[:1], tokenizer, 20, 30, seed=0)  # a single text is what it is
    calibration_windows(documents, tokenizer, 20, 10, seed=0)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)


def test_a_long_document_is_tokenized_once(tokenizer):
    counting, text = Counting(tokenizer), " ".join(["w5"] * 1000)
    expected = calibration_windows([text], tokenizer, 20, 30, seed=0)
    assert torch.equal(calibration_windows([text], counting, 20, 30, seed=0), expected)
    assert counting.characters == len(text)


def test_kept_tokens_are_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "CACHED_TOKENS", 100)
    counting = Counting(tokenizer)
    docs = TokenizedDocuments([" ".join([f"w{i}"] * 40) for i in range(3, 9)] + [" ".join(["w9"] * 500)], counting, None)
    for i in range(7):
        assert docs[i].tolist() == [3 + i] * (500 if i == 6 else 40)
        assert docs.total <= 100 or i == 6
        before = counting.characters
        assert docs[i][0] == 3 + i and counting.characters == before  # the last one always, whatever its size
    assert docs.total == 500
    docs[0], docs[1], docs[0], docs[2]
    before = counting.characters
    assert docs[0][0] == 3 and counting.characters == before  # the one used last stays
    assert docs[1][0] == 4 and counting.characters > before


BOS, LENGTH = 1, 20


@pytest.mark.parametrize("mode", ["documents", "joined", "packed"])
def test_bos_before_every_window(documents, tokenizer, mode):
    """Every window is BOS and the T - 1 tokens that would be a window of T - 1 without it."""
    options = {"source": "wikitext2" if mode == "joined" else "", "pack": mode == "packed"}
    found = calibration_windows(documents, tokenizer, 5, LENGTH, seed=3, bos=BOS, **options)
    assert found.shape == (5, LENGTH) and (found[:, 0] == BOS).all()
    assert torch.equal(found[:, 1:], calibration_windows(documents, tokenizer, 5, LENGTH - 1, seed=3, **options))


def test_bos_before_every_window_of_the_evaluation(documents, tokenizer):
    stream = evaluation_tokens(documents, tokenizer, bos=BOS)
    found = windows_of(stream, LENGTH, BOS)
    assert (found[:, 0] == BOS).all()
    assert found[:, 1:].flatten().tolist() == ids(" ".join(documents))[: found[:, 1:].numel()]
    assert len(found) == len(stream) // (LENGTH - 1)
    with pytest.raises(ValueError, match="has 3 tokens, fewer than one window of 4"):
        windows_of(stream[:3], 5, BOS)


def test_a_tokenizers_own_bos_is_not_there_twice(documents, with_bos):
    first = evaluation_tokens(documents, with_bos)
    assert first[0] == BOS and (first[1:] != BOS).all()
    assert torch.equal(evaluation_tokens(documents, with_bos, bos=BOS), first[1:])
    found = calibration_windows(documents, with_bos, 30, 10, seed=0, bos=BOS)
    assert (found[:, 0] == BOS).all() and (found[:, 1:] != BOS).all()
    assert found.max() < VOCABULARY
