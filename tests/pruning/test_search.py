"""Shares that differ between blocks."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, tiny_decoder
from test_commands import run, windows_measured

import main as pruning
from lib.errors import InvalidInput
from lib.models import loading
from lib.pruning import search, targets
from lib.pruning.outcome import NotFinite


def test_shares_rise_from_block_to_block_and_the_total_is_met():
    weights = [100, 300, 200]
    shares = targets.line(0.2, weights, 0.6)
    assert [shares[1] - shares[0], shares[2] - shares[1]] == pytest.approx([0.1, 0.1])
    assert sum(share * weight for share, weight in zip(shares, weights, strict=True)) / 600 == pytest.approx(0.6, abs=1e-9)
    assert targets.line(-0.2, [1, 1, 1], 0.5) == pytest.approx([0.6, 0.5, 0.4])
    assert targets.line(0.3, weights, 0.0) == [0, 0, 0]
    assert targets.line(0.0, weights, 0.7) == pytest.approx([0.7] * 3)
    assert targets.line(0.3, [5], 0.7) == pytest.approx([0.7])


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.9, 0.94, 0.95])
@pytest.mark.parametrize("slope", [-1, 0.6, 1])
def test_no_share_leaves_its_range(ratio, slope):
    shares = targets.line(slope, [1, 1, 2], ratio)
    assert all(0 <= share <= targets.LARGEST_SHARE for share in shares)
    assert (shares[0] + shares[1] + 2 * shares[2]) / 4 == pytest.approx(ratio, abs=1e-9)


def test_a_line_without_slope_removes_as_many_as_equal_shares():
    """Of every row, which is rounded down."""
    for count, width, ratio in ((40, 5120, 0.6), (28, 8960, 0.6), (40, 5120, 0.15), (32, 4096, 0.3), (3, 11008, 0.7)):
        assert {int(width * share) for share in targets.line(0.0, [7] * count, ratio)} == {int(width * ratio)}


def test_blocks_without_matrices_have_no_share(monkeypatch):
    decoder = tiny_decoder()
    linears = decoder.linears
    monkeypatch.setattr(decoder, "linears", lambda i: {} if i == 1 else linears(i))
    assert targets.line_of(decoder, 0.2, 0.5) == pytest.approx({"0": 0.4, "2": 0.6})


@pytest.fixture
def command(saved_model, documents, tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return [
        "main.py", "--model", saved_model, "--dataset", tmp_path / "text.jsonl", "--eval_dataset", tmp_path / "text.jsonl",
        "--nsamples", 9, "--seq_length", 16, "--cache_dir", tmp_path, "--sparsity_ratio", 0.6, "--save", tmp_path / "out",
    ]  # fmt: skip


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_run_with_a_slope(command, tmp_path, memory):
    run(*command, "--prune_method", "wanda", "--layer_ratios", "line:0.3", "--memory", memory)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["layer_ratios"] == pytest.approx({"0": 0.45, "1": 0.6, "2": 0.75})
    assert results["sparsity_asked"] == pytest.approx(0.6) and results["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert "tried" not in results and results["flags"]["layer_ratios"] == "line:0.3"


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_slope_is_chosen_on_windows_held_out(command, tmp_path, monkeypatch, memory, method):
    """And the model is that of a run with this slope."""
    perplexity, measured = pruning.perplexity, windows_measured(monkeypatch)
    command += ["--prune_method", method, "--memory", memory, "--dtype", "float32", "--save_model"]
    count, more = (6, ["--held_out", 6]) if method == "wanda" else (search.LEAST_HELD_OUT, [])
    printed = run(*command, tmp_path / "line", "--layer_ratios", "line", *more)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tried, chosen = results["tried"]["layer_ratios"], results["chosen"]["layer_ratios"]
    assert results["flags"]["layer_ratios"] == "line"
    assert list(tried) == search.LINES and len(set(tried.values())) == len(tried)
    assert tried[chosen] == min(tried.values()) and f"--layer_ratios {chosen} chosen" in printed
    slope = float(chosen.partition(":")[2])
    assert results["layer_ratios"]["2"] - results["layer_ratios"]["0"] == pytest.approx(slope)
    assert results["phases"]["search layer_ratios"]["seconds"] > 0

    card = (tmp_path / "line" / "README.md").read_text()
    assert chosen in card and "held-out calibration text" in card and "text.jsonl" in card
    run(*command, tmp_path / "given", "--layer_ratios", chosen)
    line, given = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("line", "given"))
    assert line == given
    held_out = [windows for windows in measured if len(windows) == count]
    assert len(held_out) == len(tried) and all(torch.equal(windows, held_out[0]) for windows in held_out)
    model = loading.load(str(tmp_path / "given"), dtype="float32", device=DEVICE)
    assert perplexity(model, held_out[0]) == pytest.approx(tried[chosen], rel=1e-5)


def test_a_value_that_fails_is_not_chosen(command, tmp_path, monkeypatch, caplog):
    """Weights that are not finite, or a perplexity that is not; and nothing of a trial is left in the results."""
    prune, perplexity = pruning.prune, pruning.perplexity
    slopes = []

    def failing(decoder, windows, settings, **how):
        shares = [settings.targets[i]["mlp.up_proj"].ratio if i in settings.targets else 0.0 for i in (0, 2)]
        slopes.append(round(shares[1] - shares[0], 2))
        for block in prune(decoder, windows, settings, **how):
            yield replace(block, errors=block.errors | {"trial": (len(slopes), 0.0)})
            if slopes[-1] == 0.15:
                raise NotFinite("model.layers.0.mlp.up_proj: scores or updated weights are not finite")

    def measured(decoder, windows, **how):
        failed = len(windows) == search.LEAST_HELD_OUT and slopes[-1] == 0
        return float("nan") if failed else perplexity(decoder, windows, **how)

    monkeypatch.setattr(pruning, "prune", failing)
    monkeypatch.setattr(pruning, "perplexity", measured)
    run(*command, "--prune_method", "wanda", "--layer_ratios", "line", "--update", "obs", "--sparsity_ratio", 0.2)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tried = results["tried"]["layer_ratios"]
    assert (tried["line:0"], tried["line:0.15"]) == ("nan", "inf") and "line:0.15: model.layers.0" in caplog.text
    assert results["chosen"]["layer_ratios"] not in ("line:0", "line:0.15")
    errors = results["errors_by_block"]
    assert {block["linears"].pop("trial")["masked"] for block in errors.values()} == {len(slopes)}
    assert {i for i, block in errors.items() if block["linears"]} == {
        i for i, share in results["layer_ratios"].items() if share
    }


def test_what_no_other_value_would_mend_ends_the_run_at_once(command, monkeypatch):
    """Such as a gradient file that is damaged: not after as many trials as there are values."""
    calls = []

    def damaged(*given, **how):
        calls.append(given)
        raise InvalidInput("block_0.safetensors is corrupted")

    monkeypatch.setattr(pruning, "prune", damaged)
    with pytest.raises(ValueError, match="corrupted"):
        run(*command, "--prune_method", "wanda", "--layer_ratios", "line")
    assert len(calls) == 1
