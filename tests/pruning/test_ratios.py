"""Shares that differ between blocks."""

import json

import pytest
import torch
from conftest import DEVICE, random_windows, tiny_decoder
from test_commands import run

from lib.pruning import ratios


def test_outliers_are_those_of_the_dense_model():
    """Against hooks on the whole model's forward and a comparison written out."""
    decoder, windows = tiny_decoder(), random_windows(5)
    found = ratios.outliers(decoder, windows)
    dense = tiny_decoder()
    for i, share in enumerate(found):
        sums = {}
        linears = dense.linears(i)

        def note(module, args, sums=sums):
            sums[module] = sums.get(module, 0) + args[0].flatten(0, -2).float().square().sum(0)

        hooks = [linear.module.register_forward_pre_hook(note) for linear in linears.values()]
        with torch.no_grad():
            for window in windows:
                dense.model(window[None].to(DEVICE), use_cache=False)
        for hook in hooks:
            hook.remove()
        scores = torch.cat([(matrix.weight.abs() * (sums[matrix.module] / 5).sqrt()).flatten() for matrix in linears.values()])
        assert share == pytest.approx(
            (scores > 5 * scores.mean()).float().mean().item(), abs=5e-4
        )  # two or three weights at the threshold
    assert len(set(found)) > 1


def test_blocks_with_more_outliers_keep_more_and_the_total_is_met():
    weights, outliers = [100, 300, 200], [0.01, 0.04, 0.02]
    shares = ratios.owl(outliers, weights, 0.6)
    assert sum(share * weight for share, weight in zip(shares, weights, strict=True)) / 600 == pytest.approx(0.6, abs=1e-9)
    assert shares[0] - shares[1] == pytest.approx(2 * ratios.SPREAD)
    assert shares[0] - shares[2] == pytest.approx(2 * ratios.SPREAD / 3)
    skipped = ratios.owl([0.01, 0.04, float("nan"), 0.02], [100, 300, 0, 200], 0.6)  # has no weights, and no say
    assert [skipped[0], skipped[1], skipped[3]] == pytest.approx(shares)
    assert ratios.owl(outliers, weights, 0.0) == [0, 0, 0]
    assert ratios.owl([0.02, 0.02], [1, 3], 0.7) == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.9, 0.94])
def test_no_share_leaves_its_range(ratio):
    shares = ratios.owl([0.0, 0.05, 0.1], [1, 1, 2], ratio)
    assert all(0 <= share <= ratios.MOST for share in shares)
    assert (shares[0] + shares[1] + 2 * shares[2]) / 4 == pytest.approx(ratio, abs=1e-9)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_run_with_them(saved_model, documents, tmp_path, memory, method):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    run(
        "main.py", "--model", saved_model, "--dataset", tmp_path / "text.jsonl", "--eval_dataset", tmp_path / "text.jsonl",
        "--nsamples", 9, "--seq_length", 16, "--cache_dir", tmp_path, "--prune_method", method, "--sparsity_ratio", 0.6,
        "--layer_ratios", "owl", "--memory", memory, "--save", tmp_path / "out",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    shares = list(results["layer_ratios"].values())
    assert len(shares) == 3 and max(shares) - min(shares) == pytest.approx(2 * ratios.SPREAD)
    assert results["sparsity_asked"] == pytest.approx(0.6) and results["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert "ratios" in results["phases"]
