"""Perplexity on several texts in one run, and c4 as in the literature."""

import gzip
import json

import pytest
import torch
from conftest import tiny_model
from test_commands import run

from lib.data import sources, windows
from lib.data.windows import evaluation_tokens
from lib.results import tables

T = 16


@pytest.fixture
def model(tmp_path, tokenizer):
    tiny_model(noise=0).cpu().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def c4(tmp_path, documents):
    """Its validation shard in the hub's layout, with more documents than count."""
    path = tmp_path / "hub" / "/".join(sources.HUB["c4"]["evaluation"])
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": documents[i % len(documents)]}) + "\n" for i in range(1200))
    return tmp_path / "hub"


def test_several_texts_are_one_table(model, c4, documents, tmp_path):
    for k in (0, 1):
        (tmp_path / f"{k}.txt").write_text(" ".join(documents[k::2]))
    command = [
        "--model", model, "--seq_length", T, "--dtype", "float32", "--cache_dir", tmp_path / "cache", "--data_dir", c4,
        "--dataset", tmp_path / "0.txt", "--prune_method", "magnitude", "--sparsity_ratio", 0.5, "--save",
    ]  # fmt: skip
    texts = [str(tmp_path / "0.txt"), "c4", str(tmp_path / "1.txt")]
    printed = run("main.py", *command, tmp_path / "all", "--eval_dataset", *texts, texts[0])
    found = json.loads((tmp_path / "all" / "results.json").read_text())
    assert [entry["dataset"] for entry in found["perplexities"]] == texts
    assert found["perplexity"] == found["perplexities"][0]
    assert tables.perplexities(found) in printed
    pruned = found["perplexity"]["pruned"]
    assert (tmp_path / "all" / "log.txt").read_text() == f"actual_sparsity\tppl\n{found['sparsity']:.4f}\t{pruned:.4f}\n"
    assert printed.splitlines()[-2].startswith(f"pruned perplexity {pruned:.4f} ")
    assert len({entry["dense"] for entry in found["perplexities"]}) == 3
    for text, entry in zip(texts, found["perplexities"], strict=True):
        run("main.py", *command, tmp_path / "one", "--eval_dataset", text, "--no_cache")
        alone = json.loads((tmp_path / "one" / "results.json").read_text())
        assert "perplexities" not in alone and alone["flags"]["eval_dataset"] == text
        assert alone["perplexity"] == entry
    assert found["perplexities"][1]["windows"] == windows.EVALUATION_WINDOWS["c4"] == 256


def test_c4_is_joined_with_spaces(documents, tokenizer):
    many = [documents[i % len(documents)] for i in range(1200)]

    class Seen:
        def __call__(self, text, **options):
            self.text = text
            return tokenizer(text, **options)

    seen = Seen()
    tokens = evaluation_tokens(many, seen, "c4")
    assert seen.text == " ".join(many[:1100])
    assert torch.equal(tokens, torch.tensor(tokenizer(seen.text)["input_ids"]))
    evaluation_tokens(many, seen, "wikitext2")
    assert seen.text == "\n\n".join(many)


def test_every_text_is_looked_for_before_the_work(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("w3")
    with pytest.raises(SystemExit):
        run(
            "main.py",
            "--model",
            "m",
            "--prune_method",
            "magnitude",
            "--sparsity_ratio",
            0.5,
            "--eval_dataset",
            tmp_path / "a.txt",
            "b.txt",
        )
    assert "b.txt does not exist" in capsys.readouterr().err
