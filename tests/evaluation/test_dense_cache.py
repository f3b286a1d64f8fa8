"""A dense perplexity is measured once, and again when anything that it depends on is another."""

import json

import pytest
import torch
from conftest import random_windows, tiny_decoder, tiny_model
from test_commands import run

import main as pruning
from lib.evaluation import dense_cache
from lib.models import loading


@pytest.fixture
def command(saved_model, documents, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(documents))
    return [
        "--model", saved_model, "--eval_dataset", text, "--seq_length", 16, "--dtype", "float32", "--nsamples", 4,
        "--cache_dir", tmp_path / "cache", "--prune_method", "magnitude", "--sparsity_ratio", 0.5, "--save", tmp_path / "out",
    ]  # fmt: skip


def test_the_second_run_reuses_it_and_says_so(command, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    measured, original = [], pruning.perplexity
    monkeypatch.setattr(
        pruning, "perplexity", lambda *given, **more: (measured.append(more["progress"]), original(*given, **more))[1]
    )
    first = run("main.py", *command)
    assert "is an earlier run's" not in caplog.text and measured == ["dense perplexity", "pruned perplexity"]
    assert run("main.py", *command, "--sparsity_ratio", 0.5) == first
    assert "--no_cache measures it anew" in caplog.text and measured[2:] == ["pruned perplexity"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["perplexity"]["dense_reused"] is True
    assert run("main.py", *command, "--no_cache") == first
    assert measured[3:] == ["dense perplexity", "pruned perplexity"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["perplexity"]["dense_reused"] is False
    run("main.py", *command, "--seq_length", 17)
    run("main.py", *command, "--dtype", "bfloat16")
    assert measured[5:] == ["dense perplexity", "pruned perplexity"] * 2


def test_a_streamed_run_reuses_a_resident_one(command, caplog):
    caplog.set_level("INFO")
    run("main.py", *command, "--memory", "resident")
    run("main.py", *command, "--memory", "streamed")
    assert caplog.text.count("is an earlier run's") == 1


def test_a_hopeless_one_is_not_kept_and_a_cache_that_cannot_be_written_is_no_error(command, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("lib.evaluation.perplexity.HOPELESS", 1.0)
    with pytest.raises(ValueError, match="Nothing was pruned"):
        run("main.py", *command)
    monkeypatch.undo()
    assert not (tmp_path / "cache" / "dense_perplexity").exists()
    (tmp_path / "cache" / "dense_perplexity").write_text("in the way")
    run("main.py", *command)
    assert "is not stored for later runs" in caplog.text


def changed(change) -> dict:
    decoder = tiny_decoder()
    with torch.no_grad():
        change(decoder.model)
    return dense_cache.conditions(decoder)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.norm.weight[3].add_(1e-3),
        lambda model: model.model.embed_tokens.weight[5, 7].neg_(),
        lambda model: model.model.layers[1].mlp.up_proj.weight[17, 9].mul_(1 + 2**-20),
        lambda model: model.model.layers[2].mlp.up_proj.weight.copy_(model.model.layers[2].mlp.up_proj.weight.flip(0)),
        lambda model: model.model.layers[2].mlp.up_proj.weight.copy_(model.model.layers[2].mlp.up_proj.weight.roll(8, 1)),
        lambda model: model.model.rotary_emb.inv_freq[1].mul_(2),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
        lambda model: model.bfloat16(),
    ],
)
def test_another_model_has_other_conditions(change):
    assert changed(change) != changed(lambda model: None)


def test_where_a_model_lies_does_not_matter(tmp_path):
    for name in ("one", "two"):
        tiny_model("gemma2").cpu().save_pretrained(tmp_path / name, max_shard_size="20KB" if name == "two" else "1GB")
    found = [
        dense_cache.conditions(loading.load(str(tmp_path / name), dtype="float32", device="cpu", streamed=streamed))
        for name, streamed in (("one", False), ("two", False), ("two", True))
    ]
    assert found[0] == found[1] == found[2]


def test_other_windows_are_another_perplexity(tmp_path):
    conditions, windows = {"weights": "w"}, random_windows(4, 12)
    cache = dense_cache.DenseCache(tmp_path, conditions)
    cache.keep(windows, 1 / 3, "text")
    assert cache.find(windows.clone()) == 1 / 3
    assert cache.find(windows[:3]) is None
    assert cache.find(windows.view(3, 16)) is None
    assert cache.find(windows + 1) is None
    assert dense_cache.DenseCache(tmp_path, {"weights": "v"}).find(windows) is None
    (file,) = tmp_path.glob("*.json")
    file.write_text("{")
    assert cache.find(windows) is None


def test_tensors_of_any_shape_and_width():
    for tensor in (torch.tensor(3.0), torch.arange(5.0), torch.arange(15).view(3, 5).half(), torch.arange(24.0).view(2, 3, 4)):
        assert dense_cache._sums(tensor) == dense_cache._sums(tensor.clone())
        assert dense_cache._sums(tensor) != dense_cache._sums(tensor + 1)
    stored = torch.arange(9.0)
    assert dense_cache._sums(stored[1:]) == dense_cache._sums(stored[1:].clone())  # not where a word begins


def test_it_is_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert dense_cache.folder() == tmp_path / "gblm-pruner" / "dense_perplexity"
    assert dense_cache.folder("c").as_posix() == "c/dense_perplexity"
