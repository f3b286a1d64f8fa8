"""The model card that --save_model leaves, and the tables in it and on the terminal."""

import json
import shutil

import pytest
import yaml
from conftest import tiny_model
from huggingface_hub import metadata_load
from test_commands import run
from test_pruned_checkpoint import contents

from lib.results import card, tables

RESULTS = {
    "flags": {"seq_length": 16, "model": "owner/name", "prune_method": "gblm", "sparsity_type": "2:4", "alpha": 100.0},
    "perplexity": {"dataset": "wikitext2", "windows": 148, "dense": 5.4712, "pruned": 6.85999},
    "phases": {
        "prune": {"seconds": 12.3, "peak_host_gb": 1.5, "peak_gpu_gb": 4.25},
        "check gradients": {"seconds": 0.5, "peak_host_gb": 1.25},
    },
    "sparsity": 0.5,
    "sparsity_asked": 0.5,
}


@pytest.fixture
def dense(saved_model, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(saved_model, folder)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nbase_model: a/b\ntags: [x]\n---\nThe dense model's.\n"
    )
    (folder / "LICENSE").write_text("the licence")
    return folder


@pytest.fixture
def pruned_to(documents, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(documents))

    def prune(model, folder, *more):
        run(
            "main.py", "--model", model, "--dataset", text, "--pack", "--eval_dataset", text, "--nsamples", 4, "--seq_length", 16,
            "--dtype", "float32", "--cache_dir", tmp_path / "cache", "--prune_method", "wanda", "--sparsity_type", "2:4",
            "--save", folder.parent, "--save_model", folder, *more,
        )  # fmt: skip
        return place.read_text() if (place := folder / "README.md").exists() else None

    return prune


def test_the_card_is_the_one_file_that_differs(dense, pruned_to, tmp_path):
    before = contents(dense)
    text = pruned_to(dense, tmp_path / "out" / "model")
    after = contents(tmp_path / "out" / "model")
    assert contents(dense) == before
    assert set(after) == set(before)
    assert [name for name in after if after[name] != before[name]] == ["README.md", "model.safetensors"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert f"{results['perplexity']['dense']:.4f}" in text and f"{results['perplexity']['pruned']:.4f}" in text
    assert "with 50.00% of the weights" in text and "are the dense model's, bit for bit" in text
    for row in ("| sparsity_type |", "| nsamples ", "| seed ", "| pack "):
        assert row in text
    assert [
        flag for flag in ("alpha", "layer_no", "update", "stages", "asymmetric", "reconstruct") if f"| {flag}" in text
    ] == []
    metadata = metadata_load(tmp_path / "out" / "model" / "README.md")
    assert metadata["license"] == "other" and metadata["license_name"] == "own" and metadata["base_model"] == "a/b"
    assert metadata["pipeline_tag"] == "text-generation" and {"wanda", "2:4", "pruned"} <= set(metadata["tags"])


def test_a_second_run_has_its_own_card_and_none_of_the_first(dense, pruned_to, tmp_path, saved_model):
    place = tmp_path / "out" / "model"
    pruned_to(dense, place)
    text = pruned_to(saved_model, place, "--prune_method", "sparsegpt")
    assert "license" not in metadata_load(place / "README.md")
    assert "with sparsegpt" in text and "were updated" in text and "wanda" not in text


@pytest.mark.parametrize("broken", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "no front matter", b"\xff\xfe"])
def test_a_card_that_cannot_be_read_is_no_error(dense, pruned_to, tmp_path, broken):
    (dense / "README.md").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    assert pruned_to(dense, tmp_path / "out" / "model", "--prune_method", "magnitude").startswith("---\nlibrary_name")


def test_calibration_is_in_the_recipe_of_methods_that_look_at_text(saved_model, pruned_to, tmp_path):
    assert "nsamples |" not in pruned_to(saved_model, tmp_path / "out" / "model", "--prune_method", "magnitude")


def test_the_base_model_is_a_name_on_the_hub_or_left_out(tmp_path):
    cached = tmp_path / "models--own-er--na.me-7B" / "snapshots" / "0123abc"
    cached.mkdir(parents=True)
    assert card.base_model("owner/name", {}, {"base_model": "x/y"}) == "owner/name"
    assert card.base_model(str(cached), {"_name_or_path": "x/y"}, {}) == "own-er/na.me-7B"
    assert card.base_model(str(tmp_path), {"_name_or_path": "x/y"}, {}) == "x/y"
    assert card.base_model(str(tmp_path), {"_name_or_path": "/data/models/y"}, {"base_model": ["p/q"]}) == ["p/q"]
    assert card.base_model(str(tmp_path), {}, {}) is None


def test_the_licence_may_be_in_the_config(tmp_path):
    tiny_model("llama").cpu().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "license": "mit"}))
    card.write(tmp_path, {**RESULTS, "versions": {"torch": "2"}, "dtype": "float32", "device": "cpu"}, "python main.py", True)
    text = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit" and front["base_model"] == "owner/name"
    assert "| alpha " in text and "```bash\npython main.py\n```" in text


def test_tables_are_markdown_in_columns():
    assert tables.perplexities(RESULTS) == (
        "| perplexity on |  windows |  dense | pruned |\n"
        "| ------------- | -------: | -----: | -----: |\n"
        "| wikitext2     | 148 x 16 | 5.4712 | 6.8600 |"
    )
    assert tables.phases(RESULTS) == (
        "| phase           | seconds | host GB | GPU GB |\n"
        "| --------------- | ------: | ------: | -----: |\n"
        "| prune           |   12.30 |    1.50 |   4.25 |\n"
        "| check gradients |    0.50 |    1.25 |        |"
    )


def test_the_zero_shot_table_has_errors_where_there_are_some():
    task = {"acc": 0.5, "acc_stderr": 0.25, "f1": 0.75, "f1_stderr": None, "documents": 4, "num_fewshot": 0}
    scored = {name: {"harness": "1", "tasks": {"boolq": task}, "mean": 0.5} for name in ("dense", "pruned")}
    assert tables.zero_shot({"zero_shot": scored}).splitlines()[2:] == [
        "| boolq     |    acc |     0 |         4 | 0.5000 ± 0.2500 | 0.5000 ± 0.2500 |",
        "| boolq     |     f1 |     0 |         4 |          0.7500 |          0.7500 |",
        "| mean      |    acc |       |           |          0.5000 |          0.5000 |",
    ]


def test_the_summary_says_all_of_it(saved_model, pruned_to, tmp_path, caplog):
    caplog.set_level("INFO")
    pruned_to(saved_model, tmp_path / "out" / "model")
    summary = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("summary"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for expected in (
        tables.perplexities(results), tables.phases(results), "sparsity 0.5000 of the linears, 0.5000 asked for",
        f"log.txt, results.json and sparsity.png saved in {tmp_path / 'out'}", f"saved in {tmp_path / 'out' / 'model'}",
    ):  # fmt: skip
        assert expected in summary
    assert all(unit in tables.phases(results) for unit in ("seconds", "host GB", "prune", "pruned perplexity"))


def test_where_nothing_is_pruned_the_dense_card_stays(dense, saved_model, pruned_to, tmp_path):
    place = tmp_path / "out" / "model"
    pruned_to(saved_model, place)  # of which no card may stay
    for model in (dense, saved_model):
        pruned_to(model, place, "--sparsity_type", "unstructured", "--sparsity_ratio", 0)
        before, after = contents(model), contents(place)
        assert set(after) == set(before)
        assert [name for name in after if after[name] != before[name]] == ["model.safetensors"]
