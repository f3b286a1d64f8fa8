"""The slow tier: a real model, real text (scripts/fetch_demo.py)."""

import json
import os
import subprocess
import sys

import own_task
import pytest
import torch
from conftest import DEMO, ROOT, needs_demo, prune_model
from own_task import needs_harness
from test_commands import run
from test_prune import gradient_of, naive_prune
from test_walk import autograd_norms, largest_difference, ours
from torch import nn

from lib.data.sources import documents
from lib.data.windows import calibration_windows, evaluation_tokens, windows_of
from lib.evaluation.perplexity import perplexity
from lib.models import loading
from lib.models.tokenizer import load_tokenizer
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS

pytestmark = [pytest.mark.slow, needs_demo, pytest.mark.usefixtures("all_processors")]
N, T = 4, 512


@pytest.fixture(scope="module")
def windows():
    docs = documents(str(ROOT / "demo" / "calibration.jsonl"))
    return calibration_windows(docs, load_tokenizer(str(DEMO)), N, T, seed=0)


@pytest.fixture(scope="module")
def evaluation():
    docs = documents(str(ROOT / "demo" / "evaluation.jsonl"))
    return windows_of(evaluation_tokens(docs, load_tokenizer(str(DEMO))), T)[:12]


@pytest.fixture(scope="module")
def norms(windows):
    """l1 and l2 norms of the demo model, {full name: (out, in)} each."""
    return ours(loading.load(str(DEMO), dtype="float32", device="cpu"), windows, keep_graph=True)


def test_gradients_equal_whole_model_autograd(norms, windows):
    expected = autograd_norms(loading.load(str(DEMO), dtype="float32", device="cpu").model, norms["l2"], windows)
    assert len(norms["l2"]) == 210
    assert largest_difference(norms, expected) < 1e-4


def test_both_forms_of_the_walk_agree(norms, windows):
    recomputed = ours(loading.load(str(DEMO), dtype="float32", device="cpu"), windows, keep_graph=False)
    assert largest_difference(recomputed, norms) < 1e-6


def test_masks_block_by_block(norms, windows):
    """In all thirty blocks, from the block's inputs in the real run, the masks are those of a naive restatement."""
    decoder = loading.load(str(DEMO), dtype="float32", device="cpu")
    dense = {name: weight.clone() for name, weight in decoder.model.state_dict().items()}
    entering: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(decoder))}
    observing = [
        block.register_forward_pre_hook(lambda module, args, i=i: entering[i].append(args[0].clone()))
        for i, block in enumerate(decoder.blocks)
    ]

    def stored(i):
        prefix = decoder.prefixes[i]
        return {name.removeprefix(prefix): norm.half() for name, norm in norms["l2"].items() if name.startswith(prefix)}

    prune_model(decoder, windows, method="gblm", sparsity=Sparsity.parse("2:4"), gradients=stored, alpha=1.0)
    for handle in observing:
        handle.remove()
    pruned = {name: decoder.model.state_dict()[f"{name}.weight"].clone() for name in norms["l2"]}
    decoder.model.load_state_dict(dense)
    kwargs = decoder.enter(windows[:1]).kwargs
    for i, block in enumerate(decoder.blocks):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        squares = dict.fromkeys(linears, 0)
        handles = [
            linear.register_forward_pre_hook(
                lambda module, args, n=name, s=squares: s.update({n: s[n] + args[0][0].square().sum(0)})
            )
            for name, linear in linears.items()
        ]
        with torch.no_grad():
            for hidden in entering[i][N : 2 * N]:  # after the head has recorded N, and before the block was pruned
                block(hidden, **kwargs[i])
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            w, g = linear.weight.abs(), stored(i)[name].float()
            groups = (w * (squares[name] / N).sqrt() + w * g).detach().reshape(-1, 4)
            expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(
                1, groups.sort(dim=1, stable=True).indices[:, :2], True
            )

            # Not the zeros: the de-quantised model has some of its own.
            survivors = linear.weight.masked_fill(expected.view(w.shape), 0)
            assert torch.equal(pruned[decoder.prefixes[i] + name], survivors), f"block {i} {name}"


@pytest.mark.parametrize("method, pattern", [("gblm", "unstructured"), ("wanda", "2:4")])
def test_first_four_blocks_end_to_end(windows, method, pattern):
    """Whole-model forwards with hooks and full sorts, block after block: the same weights, bit for bit."""
    decoder, naive = (loading.load(str(DEMO), dtype="float32", device="cpu") for _ in range(2))
    ratio = 0.5 if pattern == "unstructured" else None
    with torch.no_grad():
        naive_prune(naive.model, "model.layers", windows, method, pattern, ratio, count=4)
    sparsity = Sparsity.parse(pattern, ratio)
    prune_model(decoder, windows, method=method, sparsity=sparsity, gradients=lambda i: gradient_of(decoder, i), alpha=1.0)
    for i in range(4):
        for name, linear in decoder.linears(i).items():
            assert torch.equal(linear.weight, naive.linears(i)[name].weight), f"block {i} {name}"


def test_magnitude_is_worst_by_far_and_gblm_within_two_percent_of_wanda(norms, windows, evaluation):
    found = {}
    for method in METHODS:
        decoder = loading.load(str(DEMO), dtype="float32", device="cpu")
        if not found:
            found["dense"] = perplexity(decoder, evaluation)

        def stored(i, prefixes=decoder.prefixes):
            return {name.removeprefix(prefixes[i]): norm for name, norm in norms["l2"].items() if name.startswith(prefixes[i])}

        prune_model(decoder, windows, method=method, sparsity=Sparsity.parse("unstructured", 0.5), gradients=stored, alpha=1.0)
        found[method] = perplexity(decoder, evaluation)
    print(found)
    assert found["dense"] < min(found[method] for method in METHODS)
    assert found["magnitude"] > 3 * max(found[method] for method in METHODS if method != "magnitude")
    assert found["gblm"] < 1.02 * found["wanda"]


@needs_harness
def test_zero_shot_equals_the_harness_command_line(tmp_path):
    """Scored in the run that prunes, and by `lm_eval run` on what it has saved."""
    tasks, text = own_task.write(tmp_path), tmp_path / "text.txt"
    text.write_text(json.loads((ROOT / "demo" / "evaluation.jsonl").read_text().splitlines()[0])["text"][:8000])
    run(
        "main.py", "--model", DEMO, "--prune_method", "magnitude", "--sparsity_ratio", 0.3, "--dtype", "float32", "--device", "cpu",
        "--dataset", text, "--eval_dataset", text, "--seq_length", 512, "--cache_dir", tmp_path / "cache", "--eval_zero_shot", "--eval_dense",
        "--tasks", own_task.NAME, "--include_path", tasks, "--save", tmp_path / "out", "--save_model", tmp_path / "out" / "model",
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "results.json").read_text())["zero_shot"]
    for name, folder in (("dense", DEMO), ("pruned", tmp_path / "out" / "model")):
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32",
            "--tasks", own_task.NAME, "--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / name),
        ]  # fmt: skip
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # on which the rounding of sums depends
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = (tmp_path / name).rglob("results_*.json")
        expected = json.loads(file.read_text())["results"][own_task.NAME]
        scored = found[name]["tasks"][own_task.NAME]
        for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "brier_score"):
            assert scored[metric] == expected[f"{metric},none"], f"{name} {metric}"
    assert found["dense"]["mean"] > 0.6
    assert found["dense"]["tasks"][own_task.NAME]["brier_score"] != found["pruned"]["tasks"][own_task.NAME]["brier_score"]
