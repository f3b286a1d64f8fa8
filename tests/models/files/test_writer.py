"""What pruned blocks are written to: what is measured is what is saved, and what has no room is known before the work."""

import json

import pytest
from conftest import tiny_model
from test_commands import run


@pytest.fixture
def flags(tokenizer, documents, tmp_path):
    """Of a run in float32 on weights that are stored in float16."""
    tiny_model(noise=0).half().cpu().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return [
        "--model", tmp_path / "dense", "--dataset", text, "--eval_dataset", text, "--nsamples", 9, "--seq_length", 16, "--force",
        "--cache_dir", tmp_path, "--dtype", "float32", "--sparsity_type", "2:4", "--prune_method", "wanda",
    ]  # fmt: skip


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_perplexity_is_that_of_the_weights_as_they_are_saved(flags, memory, tmp_path):
    """Updated weights, which are rounded to the files' dtype."""
    pruned = [*flags, "--memory", memory, "--update", "lsq"]
    again = [*flags, "--prune_method", "magnitude", "--sparsity_type", "unstructured", "--sparsity_ratio", 0]
    run("main.py", *pruned, "--save", tmp_path / "first", "--save_model", tmp_path / "pruned")
    run("main.py", *pruned, "--save", tmp_path / "unsaved")
    again[again.index("--model") + 1] = tmp_path / "pruned"
    run("main.py", *again, "--save", tmp_path / "second")
    first, second, unsaved = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second", "unsaved")
    )
    assert first["perplexity"]["pruned"] == pytest.approx(second["perplexity"]["dense"], rel=1e-9)
    assert unsaved["perplexity"]["pruned"] != pytest.approx(first["perplexity"]["pruned"], rel=1e-9)
    assert unsaved["errors_by_block"] == first["errors_by_block"]
