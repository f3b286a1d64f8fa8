"""scripts/table.py goes on where it was: what makes two rows one."""

import json

import table


def test_rows_of_recipes_and_shares_are_other_rows(saved_model, documents, tmp_path, capsys):
    """In whichever order they are asked for, and none twice."""
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    flags = [
        "--model", saved_model, "--dataset", tmp_path / "text.jsonl", "--eval_dataset", tmp_path / "text.jsonl", "--nsamples", 4,
        "--seq_length", 16, "--cache_dir", tmp_path, "--output", tmp_path / "table.jsonl", "--methods", "wanda",
        "--patterns", "unstructured",
    ]  # fmt: skip
    for more in (["--recipes", "best"], ["--layer_ratios", "line:0.3"], [], ["--recipes", "none", "best"]):
        table.main(table.parse([str(flag) for flag in [*flags, *more]]))
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [(row.get("recipe"), row.get("layer_ratios")) for row in rows] == [("best", None), (None, "line:0.3"), (None, None)]
    assert len({row["perplexity"] for row in rows}) == 3 and rows[0]["steps"]["epochs"] == 1
    assert capsys.readouterr().out.count("already") == 2
