"""The loop over blocks against a naive restatement of the algorithm, bit for bit."""

import pytest
import torch
from conftest import DEVICE, TINY, prune_model, random_windows, tiny_decoder, tiny_model
from test_sparsegpt import naive_solve, slack_of
from torch import nn

from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS
from lib.pruning.outcome import share_of_zeros
from lib.pruning.targets import select

N = 4


def gradient_of(decoder, i):
    generator = torch.Generator().manual_seed(100 + i)
    return {name: torch.rand(linear.weight.shape, generator=generator).half() for name, linear in decoder.linears(i).items()}


def naive_prune(model, path, windows, method, pattern, ratio, alpha=1.0, inverse=False, count=None):
    """Wanda, gradient, gblm and magnitude restated: forward hooks on the whole model, full sorts, one block at a time."""
    blocks = model.get_submodule(path)
    for i, block in enumerate(blocks[:count]):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        squares = {name: torch.zeros(linear.in_features, device=DEVICE) for name, linear in linears.items()}

        def hook(name, squares=squares):
            def record(module, args):
                squares[name] += args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

            return record

        handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
        for window in windows:
            model(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        norms = gradient_of(Decoder(model, DEVICE), i)
        for name, linear in linears.items():
            w, g, x = linear.weight, norms[name].to(DEVICE).float(), (squares[name] / N).sqrt()
            score = {
                "magnitude": w.abs(),
                "wanda": w.abs() * x,
                "gradient": w.abs() / (g + 1e-8) if inverse else w.abs() * g,
                "gblm": w.abs() * x / (g + 1e-8) if inverse else w.abs() * x + alpha * w.abs() * g,
            }[method]
            if pattern != "unstructured":
                n, m = map(int, pattern.split(":"))
                groups = score.reshape(-1, m)
                order = groups.sort(dim=1, stable=True).indices[:, :n]
                mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(score.shape)
            elif method == "magnitude":
                mask = score <= score.flatten().sort().values[int(score.numel() * ratio)]
            else:
                order = score.sort(dim=1, stable=True).indices[:, : int(score.shape[1] * ratio)]
                mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
            w[mask] = 0


EVERY_RULE = [
    ("llama-gqa-tied", method, inverse, pattern)
    for method, inverse in [
        ("magnitude", False),
        ("wanda", False),
        ("gradient", False),
        ("gradient", True),
        ("gblm", False),
        ("gblm", True),
    ]
    for pattern in ("unstructured", "2:4")
]
EVERY_FAMILY = [
    (family, method, False, pattern)
    for family in TINY
    for method in ("magnitude", "wanda", "gradient", "gblm")
    for pattern in ("unstructured", "2:4")
    if family != "llama-gqa-tied"
]


@pytest.mark.parametrize("family, method, inverse, pattern", EVERY_RULE + EVERY_FAMILY)
def test_masks_are_the_naive_restatements(family, method, inverse, pattern):
    windows, ratio = random_windows(N), 0.4 if pattern == "unstructured" else None
    decoder, naive = tiny_decoder(family), tiny_model(family)
    with torch.no_grad():
        path = decoder.prefixes[0].rpartition(".0.")[0]
        naive_prune(naive, path, windows, method, pattern, ratio, alpha=2.0, inverse=inverse)
    zeros = prune_model(
        decoder,
        windows if METHODS[method].statistic else None,
        method=method,
        sparsity=Sparsity.parse(pattern, ratio),
        gradients=lambda i: gradient_of(decoder, i),
        alpha=2.0,
        gradient_inv=inverse,
    )
    dense = dict(tiny_model(family).named_parameters())
    pruned = dict(decoder.model.named_parameters())
    for name, expected in naive.named_parameters():
        assert torch.equal(pruned[name], expected), name
        survivors = pruned[name] != 0
        assert torch.equal(pruned[name][survivors], dense[name][survivors])
    assert share_of_zeros(zeros) == pytest.approx(ratio or 0.5, abs=0.03)


def test_a_block_is_scored_whole_and_sees_pruned_predecessors():
    """Scoring after each linear, or from dense activations, gives other masks than those pinned above; show that it does."""
    windows = random_windows(N)
    pruned = tiny_decoder()
    prune_model(pruned, windows, method="wanda", sparsity=Sparsity.parse("2:4"))
    alone = tiny_decoder()
    prune_model(
        alone, windows, method="wanda", sparsity=select(alone, Sparsity.parse("2:4"), layer=2)
    )  # sees dense predecessors
    a, b = (d.blocks[2].mlp.down_proj.weight == 0 for d in (pruned, alone))
    assert not torch.equal(a, b)
    assert all(linear.weight.all() for i in (0, 1) for linear in alone.linears(i).values())
    assert (alone.blocks[2].mlp.down_proj.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("pattern, ratio", [("2:4", None), ("unstructured", 0.5)])
def test_sparsegpt_is_the_naive_solver(family, pattern, ratio):
    """In the first block, in rows where rounding decides nothing; behind it the inputs may differ already."""
    windows, sparsity = random_windows(16), Sparsity.parse(pattern, ratio)
    decoder, dense = tiny_decoder(family), tiny_decoder(family)
    prune_model(decoder, windows, method="sparsegpt", sparsity=sparsity)
    inputs = {name: [] for name in dense.linears(0)}
    for name, linear in dense.linears(0).items():
        linear.module.register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        for window in windows:
            dense.model(input_ids=window[None], use_cache=False)
    for name, linear in dense.linears(0).items():
        expected, clear = naive_solve(linear.weight, torch.stack(inputs[name]), sparsity)
        pruned = decoder.linears(0)[name].weight
        assert clear.float().mean() >= 0.5, name
        assert torch.equal(pruned[clear] == 0, expected[clear] == 0), name
        assert (pruned[clear] - expected[clear]).norm() <= slack_of(linear.in_features) * expected[clear].norm(), name


@pytest.mark.parametrize("pattern, ratio", [("2:4", None), ("unstructured", 0.5)])
def test_sparsegpt_prunes_and_loses_less_than_magnitude(pattern, ratio):
    windows, loss = random_windows(16), {}
    for method in ("sparsegpt", "magnitude"):
        decoder = tiny_decoder()
        zeros = prune_model(decoder, windows, method=method, sparsity=Sparsity.parse(pattern, ratio))
        dense, logits = tiny_model()(windows).logits, decoder.model(windows).logits
        loss[method] = (logits - dense).square().mean().item()
        assert share_of_zeros(zeros) == pytest.approx(0.5, abs=0.02)
    assert loss["sparsegpt"] < loss["magnitude"]


def test_the_variant_reaches_the_ratio_with_unequal_rows():
    decoder = tiny_decoder(hidden_size=64, num_attention_heads=4)
    prune_model(decoder, random_windows(N), method="wanda", sparsity=Sparsity.parse("unstructured", 0.5), use_variant=True)
    rows = (decoder.blocks[0].mlp.gate_proj.weight == 0).sum(dim=1)
    assert len(set(rows.tolist())) > 1
    assert rows.float().mean().item() / 64 == pytest.approx(0.5, abs=0.03)


def test_same_inputs_same_masks():
    weights = []
    for _ in range(2):
        decoder = tiny_decoder()
        prune_model(decoder, random_windows(N), method="wanda", sparsity=Sparsity.parse("4:8"))
        weights.append(decoder.blocks[2].mlp.up_proj.weight)
    assert torch.equal(*weights)


def test_errors_come_before_any_pruning():
    decoder = tiny_decoder()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj has 32 inputs, not divisible by 5"):
        prune_model(decoder, random_windows(N), method="wanda", sparsity=Sparsity.parse("2:5"))
    assert all(linear.weight.all() for linear in decoder.linears(0).values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "method, pattern, variant",
    [("magnitude", "unstructured", False), ("wanda", "unstructured", False), ("wanda", "unstructured", True), ("wanda", "2:4", False)],
)  # fmt: skip
def test_a_linear_whose_scores_are_not_finite_is_named(value, method, pattern, variant):
    decoder, finished = tiny_decoder(), []
    with torch.no_grad():
        decoder.blocks[1].mlp.up_proj.weight[2, 5] = value
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: scores contain NaN or infinity.*--dtype"):
        prune_model(
            decoder, random_windows(N), method=method, sparsity=Sparsity.parse(pattern, 0.5), use_variant=variant,
            finished=lambda i, block: finished.append(i),
        )  # fmt: skip
    assert finished == [0]  # nothing of the broken block is written anywhere


def test_sparsegpt_names_a_linear_whose_inputs_are_not_finite():
    decoder = tiny_decoder()
    decoder.blocks[1].mlp.up_proj.register_forward_hook(lambda module, args, output: output * torch.inf)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: the Hessian .* not positive definite.*--nsamples"):
        prune_model(decoder, random_windows(N), method="sparsegpt", sparsity=Sparsity.parse("2:4"))


def test_ratio_zero_removes_nothing():
    decoder = tiny_decoder()
    assert share_of_zeros(prune_model(decoder, None, method="magnitude", sparsity=Sparsity(0.0))) == 0


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_another_sparsity_than_the_one_asked_for_is_said(method, caplog):
    """Of weights that are zero already, here; nothing is said where all is as it was asked for."""
    decoder = tiny_decoder()
    prune_model(decoder, random_windows(N), method=method, sparsity=Sparsity(0.5))
    assert "sparsity than the one asked for" not in caplog.text
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.linears(1)["mlp.up_proj"].weight[:40] = 0
    prune_model(decoder, random_windows(N), method=method, sparsity=Sparsity(0.25))
    (line,) = [record.message for record in caplog.records if "sparsity than the one asked for" in record.message]
    assert line.startswith("1 of 7 matrices in model.layers.1 have another") and "mlp.up_proj 0.8" in line
    assert "instead of 0.2500" in line


def test_magnitude_of_ternary_weights_removes_what_it_was_asked_to():
    decoder = tiny_decoder()
    with torch.no_grad():
        for i in range(len(decoder)):
            for linear in decoder.linears(i).values():
                linear.weight.copy_(linear.weight.sign())
    zeros = prune_model(decoder, None, method="magnitude", sparsity=Sparsity(0.5))
    assert share_of_zeros(zeros) == pytest.approx(0.5, abs=0.01)
