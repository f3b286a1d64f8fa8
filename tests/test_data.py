"""Calibration windows, evaluation tokens and their sources."""

import gzip
import json
import random

import pytest
import torch
from datasets import Dataset

from lib import data


def ids(text):
    return [int(word[1:]) for word in text.split()]


def test_windows_are_the_published_draws(documents, tokenizer):
    rng, expected = random.Random(7), []
    while len(expected) < 5:
        tokens = ids(documents[rng.randint(0, len(documents) - 1)])
        if len(tokens) > 20:
            start = rng.randint(0, len(tokens) - 20 - 1)
            expected.append(tokens[start : start + 20])
    windows = data.calibration_windows(documents, tokenizer, 5, 20, seed=7)
    assert windows.tolist() == expected
    assert windows.dtype == torch.int64
    assert not torch.equal(windows, data.calibration_windows(documents, tokenizer, 5, 20, seed=8))


def test_a_document_of_exactly_t_tokens_is_too_short(tokenizer):
    exactly, longer = " ".join(["w5"] * 10), " ".join(["w6"] * 11)
    windows = data.calibration_windows([exactly, longer], tokenizer, 4, 10, seed=0)
    assert (windows == 6).all()


def test_a_corpus_without_a_long_document_is_found_out(documents, tokenizer):
    longest = max(len(ids(text)) for text in documents)
    with pytest.raises(
        ValueError, match=rf"none of the 40 documents has more than 500 tokens \(the longest has {longest}\).*--pack"
    ):
        data.calibration_windows(documents, tokenizer, 2, 500, seed=0)


def test_one_long_document_among_many_is_found(documents, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "PATIENCE", 3)
    corpus = [*["w4 w5"] * 300, " ".join(["w9"] * 50)]
    assert (data.calibration_windows(corpus, tokenizer, 1, 30, seed=0) == 9).all()


def test_packing_joins_documents_with_eos_and_cuts(documents, tokenizer):
    windows = data.calibration_windows(documents, tokenizer, 6, 70, seed=1, pack=True)
    order = random.Random(1).sample(range(len(documents)), len(documents))
    stream = [token for index in order for token in [*ids(documents[index]), tokenizer.eos_token_id]]
    assert windows.flatten().tolist() == stream[: 6 * 70]
    with pytest.raises(ValueError, match="fewer than 100 windows of 70"):
        data.calibration_windows(documents, tokenizer, 100, 70, seed=1, pack=True)


def test_evaluation_text_is_joined_with_blank_lines_and_tokenized_once():
    seen = []

    def tokenizer(text, **kwargs):
        seen.append(text)
        return {"input_ids": [1, 2]}

    assert data.evaluation_tokens(["a", "", "b"], tokenizer).tolist() == [1, 2]
    assert seen == ["a\n\n\n\nb"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz", "x.parquet", "x.txt", "x.txt.gz"])
def test_files(tmp_path, name):
    texts = ["first\ndocument", "second"]
    path = tmp_path / name
    if ".json" in name:
        content = (
            json.dumps([{"text": text} for text in texts])
            if "jsonl" not in name
            else "\n".join(json.dumps({"text": text}) for text in texts)
        )
    else:
        content = texts[0]
    if name.endswith(".parquet"):
        Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        (gzip.open if name.endswith(".gz") else open)(path, "wt").write(content)
    expected = texts if ".txt" not in name else texts[:1]
    assert list(data.documents(str(path), cache_dir=str(tmp_path / "cache"))) == expected


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("nothing.jsonl", FileNotFoundError, "does not exist"),
        ("words.docx", ValueError, "neither of"),
        ("c5", ValueError, "neither of"),
    ],
)
def test_sources_that_cannot_be_read(source, error, message):
    with pytest.raises(error, match=message):
        data.documents(source)


def test_a_missing_column_and_a_missing_local_copy(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match=r"columns \['body'\]"):
        data.documents(str(tmp_path / "x.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="hub's layout"):
        data.documents("c4", data_dir=str(tmp_path))


def test_the_hubs_layout(shared_data, tmp_path):
    cache = str(tmp_path)
    assert len(data.documents("c4", str(shared_data), cache_dir=cache)) == 1100
    assert len(data.documents("c4", str(shared_data), "evaluation", cache)) == 100
    rows = data.documents("wikitext2", str(shared_data), "evaluation", cache)
    assert len(rows) == 4358 and rows[0] == ""
