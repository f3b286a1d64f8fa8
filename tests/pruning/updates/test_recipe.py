"""Updates, stages and reconstruction in the loop over blocks."""

import os
import re
from itertools import pairwise

import pytest
import torch
from conftest import DEVICE, free_port, prune_model, random_windows, tiny_decoder, tiny_model
from test_prune import gradient_of

from lib import parallel
from lib.models import loading
from lib.pruning.masks import Sparsity, lowest_of, n_of_m, per_row
from lib.pruning.methods import METHODS, Settings
from lib.pruning.outcome import Findings, share_of_zeros
from lib.pruning.statistics import Inputs
from lib.pruning.targets import select
from lib.pruning.updates.recipe import RECIPES, Recipe, relative_errors, shares, solve
from lib.pruning.updates.reconstruction import relative_error

PATTERNS = ["unstructured", "2:4", "4:8"]


def pruned(recipe: Recipe, method="wanda", pattern="2:4", decoder=None, windows=None, **options):
    decoder = decoder or tiny_decoder()
    windows = random_windows(16) if windows is None else windows
    sparsity = Sparsity.parse(pattern, 0.5 if pattern == "unstructured" else None)
    zeros = prune_model(
        decoder,
        windows,
        method=method,
        sparsity=sparsity,
        gradients=lambda i: gradient_of(decoder, i),
        recipe=recipe,
        **options,
    )
    return decoder, zeros


def output_error(decoder, windows=None) -> float:
    windows = (random_windows(16) if windows is None else windows).to(DEVICE)
    return (decoder.model(windows).logits - tiny_model()(windows).logits).square().mean().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("obs"),
        Recipe("lsq"),
        Recipe("obs", 3),
        Recipe("lsq", 4),
        Recipe(epochs=1),
        Recipe("lsq", 2, 1),
        Recipe("obs", 2, asymmetric=0.25),
    ],
    ids=str,
)
def test_every_method_and_pattern_keeps_its_sparsity(method, pattern, recipe):
    decoder, zeros = pruned(recipe, method, pattern)
    assert share_of_zeros(zeros) == pytest.approx(0.5, abs=0.02)
    for i in range(len(decoder)):
        for name, linear in decoder.linears(i).items():
            if pattern != "unstructured":
                n, m = map(int, pattern.split(":"))
                assert ((linear.weight == 0).view(-1, m).sum(1) == n).all(), name
            elif METHODS[method].group == "row" and not METHODS[method].solver:
                assert ((linear.weight == 0).sum(1) == linear.in_features // 2).all(), name


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_step_brings_the_first_block_closer_to_the_dense_one(pattern):
    """Masked, updated greedily, exactly, exactly in stages: each is better in what it minimises."""
    windows = random_windows(16)

    def error(recipe):
        decoder, _ = pruned(recipe, "wanda", pattern, windows=windows)
        dense, total = tiny_decoder(), 0.0
        inputs = {}
        for name, linear in dense.linears(0).items():
            linear.module.register_forward_pre_hook(lambda module, args, name=name: inputs.setdefault(name, []).append(args[0]))
        with torch.no_grad():
            for window in windows:
                dense.model(input_ids=window[None].to(DEVICE), use_cache=False)
        for name, linear in dense.linears(0).items():
            x = torch.cat(inputs[name], 1).flatten(0, 1)
            total += ((x @ (decoder.linears(0)[name].weight - linear.weight).T) ** 2).sum() / ((x @ linear.weight.T) ** 2).sum()
        return total

    none, obs, lsq, staged = (error(recipe) for recipe in (Recipe(), Recipe("obs"), Recipe("lsq"), Recipe("lsq", 8)))
    assert lsq < obs < none and staged < lsq


def test_without_an_update_survivors_are_bit_identical():
    decoder, _ = pruned(Recipe())
    dense = tiny_decoder()
    for i in range(len(decoder)):
        for name, linear in decoder.linears(i).items():
            kept = linear.weight != 0
            assert torch.equal(linear.weight[kept], dense.linears(i)[name].weight[kept])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reconstruction_lowers_the_error_on_windows_it_has_not_seen(pattern):
    windows, unseen = random_windows(64), random_windows(16, seed=5)
    before, _ = pruned(Recipe("lsq"), "wanda", pattern, windows=windows)
    after, _ = pruned(Recipe("lsq", 1, 4, 0.02), "wanda", pattern, windows=windows)
    assert output_error(after, unseen) < 0.97 * output_error(before, unseen)
    for i in range(len(after)):
        assert all((linear.weight == 0).any() for linear in after.linears(i).values())


def test_every_tokens_error_counts_by_its_length():
    """A token a thousand times as long as the others, as the first of a window often is, does not outweigh them."""
    target = torch.tensor([[[3000.0, 4000.0], [0.3, 0.4], [0.0, 0.0]]])
    output = target + torch.tensor([[[5.0, 0.0], [0.0, 0.1], [7.0, 7.0]]])
    assert relative_error(output, target).item() == pytest.approx((1e-6 + 0.04) / 2, rel=1e-4)


def test_reconstruction_that_only_harms_is_dropped():
    before, _ = pruned(Recipe("lsq"))
    after, _ = pruned(Recipe("lsq", 1, 1, 1e4))
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))


def test_reconstruction_of_a_part_leaves_the_rest_alone():
    decoder, dense = tiny_decoder(), tiny_decoder()
    targets = select(decoder, Sparsity.parse("2:4"), include=["*.up_proj"], layer=1)
    prune_model(decoder, random_windows(16), method="wanda", sparsity=targets, recipe=Recipe("lsq", 2, 2, 0.02))
    changed = [
        name
        for (name, a), b in zip(decoder.model.named_parameters(), dense.model.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("recipe", [Recipe("obs"), Recipe("lsq", 4), Recipe("lsq", 2, 2), RECIPES["fast"]], ids=str)
def test_streamed_is_resident(recipe, tmp_path):
    tiny_model().cpu().save_pretrained(tmp_path, max_shard_size="20KB")
    weights = []
    for streamed in (False, True):
        decoder, found = loading.load(str(tmp_path), dtype="float32", device=DEVICE, streamed=streamed), {}

        def finished(i, block, found=found):
            found |= {(i, name): value.clone() for name, value in block.state_dict().items()}

        pruned(recipe, "gblm", "2:4", decoder, hidden_states=4 if streamed else None, finished=finished)
        weights.append(found)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_errors_are_those_of_the_outputs(caplog):
    caplog.set_level("INFO")
    found, windows = {}, random_windows(16)
    decoder, _ = pruned(Recipe("lsq", 2, 1), windows=windows, measured=found.__setitem__)
    dense, inputs = tiny_decoder(), []
    dense.linears(0)["self_attn.o_proj"].module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for window in windows:
            dense.model(input_ids=window[None].to(DEVICE), use_cache=False)
    x, w = torch.cat(inputs).flatten(0, 1), dense.linears(0)["self_attn.o_proj"].weight
    kept = decoder.linears(0)["self_attn.o_proj"].weight != 0
    expected = ((x @ (w * ~kept).T) ** 2).sum() / ((x @ w.T) ** 2).sum()
    assert found[0]["self_attn.o_proj"][0] == pytest.approx(expected.item(), rel=1e-3)
    assert all(pair[1] < pair[0] for name, pair in found[0].items() if name) and found[2][""][1] <= found[2][""][0]
    assert "block 1: relative error of its linears 0." in caplog.text and "reconstructed" in caplog.text


def test_errors_on_windows_held_out_are_those_of_the_outputs_there(caplog):
    """In the last block, whose inputs come from pruned ones; each window goes through it once more than its linears change."""
    caplog.set_level("INFO")
    found, windows = {}, random_windows(20)
    windows, others = windows[:16], windows[16:]
    decoder, _ = pruned(Recipe("lsq", 2), windows=windows, held_out=others, measured=found.__setitem__)
    without, _ = pruned(Recipe("lsq", 2), windows=windows)
    assert all(torch.equal(a, b) for a, b in zip(decoder.model.parameters(), without.model.parameters(), strict=True))
    last, name, dense, inputs = len(decoder) - 1, "mlp.down_proj", tiny_decoder(), []
    v, w = decoder.linears(last)[name].weight.clone(), dense.linears(last)[name].weight
    for linear, original in zip(decoder.linears(last).values(), dense.linears(last).values(), strict=True):
        linear.weight.copy_(original.weight)  # as it was when its inputs were seen
    decoder.linears(last)[name].module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for window in [*windows, *others]:
            decoder.model(input_ids=window[None].to(DEVICE), use_cache=False)
    expected = []
    for seen in (inputs[:16], inputs[16:]):
        x = torch.cat(seen).flatten(0, 1)
        expected += [((x @ d.T) ** 2).sum() / ((x @ w.T) ** 2).sum() for d in (w * (v == 0), w - v)]
    assert found[last][name] == pytest.approx([value.item() for value in expected], rel=1e-3)
    assert "block 1: relative error of its linears 0." in caplog.text and "on windows held out 0." in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_are_good_to_two_digits_in_every_dtype(dtype):
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * 30 + 10  # float16 could not hold this Hessian
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    v = (1.1 * w).masked_fill(w.abs() < 0.5, 0)
    found = relative_errors(w, v, x.T @ x)
    outputs = [((x.double() @ d.double().T) ** 2).sum() for d in (w, w.masked_fill(v != 0, 0), w.double() - v.double())]
    assert found.tolist() == pytest.approx([(error / outputs[0]).item() for error in outputs[1:]], rel=0.01)


def test_stages_remove_what_they_should():
    assert shares(1) == [1]
    assert shares(2) == [0.875, 1]
    score = torch.rand(8, 16)
    for mask in (per_row(score, 0.5), n_of_m(score, 2, 4)):
        part = lowest_of(mask, score, 0.5)
        assert part.sum() == 32 and (mask | ~part).all()
        assert score[part].max() <= score[mask & ~part].min()
    assert not lowest_of(mask, score, 0.001).any()


def test_stages_ask_for_more_and_more_of_weights_that_were_updated():
    asked = []

    def choose(weight, share):
        asked.append((share, weight.clone()))
        return lowest_of(per_row(weight.abs(), 0.5), weight.abs(), share)

    x = torch.randn(64, 16) @ torch.randn(16, 16)
    weight = torch.randn(8, 16)
    solve(weight, Inputs(x.square().sum(dim=0).sqrt(), x.T @ x), choose, Recipe("lsq", 3))
    assert [share for share, _ in asked] == shares(3)
    assert torch.equal(asked[0][1], weight)
    assert not any(torch.equal(seen, before) for (_, before), (_, seen) in pairwise(asked))


@pytest.mark.parametrize(
    "wrong, message", [(("best",), "not one of none, obs, lsq"), (("lsq", 0), "at least one"), (("none", 2), "--update")]
)
def test_recipes_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Recipe(*wrong)


def test_a_weight_beyond_its_dtype_is_named():
    """An update adds to a weight what those beside it lose, here more than float16 holds."""
    decoder = tiny_decoder(dtype=torch.float16)
    linear = decoder.blocks[0].self_attn.o_proj
    with torch.no_grad():
        linear.weight.fill_(60000.0)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.o_proj: .*not finite.*--dtype"):
        prune_model(decoder, random_windows(16), method="magnitude", sparsity=Sparsity.parse("2:4"), recipe=Recipe("lsq"))


def of_one_rank(rank, world, port, folder):
    """What each of `world` processes does with its share of 17 windows."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    parallel.start(torch.device("cpu"))
    found = {}
    for recipe in SHARED_RECIPES:
        errors = found[repr(recipe)] = {}  # on one window held out: the second process has none
        found[recipe] = pruned(recipe, windows=random_windows(17), held_out=random_windows(1), measured=errors.__setitem__)[
            0
        ].model.state_dict()
    torch.save(found, f"{folder}/rank{rank}.pt")
    parallel.stop()


SHARED_RECIPES = [Recipe("obs"), Recipe("lsq", 3), Recipe("lsq", 2, 2, 0.02), RECIPES["fast"]]


@pytest.mark.two_processes
def test_two_processes_end_alike_and_as_one_does(tmp_path):
    torch.multiprocessing.spawn(of_one_rank, (2, free_port(), str(tmp_path)), nprocs=2)
    with torch.serialization.safe_globals([Recipe]):
        one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for recipe in SHARED_RECIPES:
        assert all(torch.equal(one[recipe][name], two[recipe][name]) for name in one[recipe])
        errors = {}
        alone = pruned(recipe, windows=random_windows(17), held_out=random_windows(1), measured=errors.__setitem__)
        alone = alone[0].model.state_dict()
        if recipe.update != "none":
            assert one[repr(recipe)] == two[repr(recipe)]
            assert one[repr(recipe)][0]["mlp.up_proj"] == pytest.approx(errors[0]["mlp.up_proj"], rel=0.01)
            assert len(errors[0]["mlp.up_proj"]) == 4
        for name, expected in alone.items():
            if recipe.epochs == 0 and "layers.0." in name:  # later blocks amplify what rounding decides in near ties
                assert (one[recipe][name] - expected).abs().mean() < 0.01 * expected.abs().mean(), (recipe, name)
        losses = []
        for weights in (one[recipe], alone):
            decoder = tiny_decoder()
            decoder.model.load_state_dict(weights)
            losses.append(output_error(decoder))
        assert losses[0] == pytest.approx(losses[1], rel=0.1)  # a step of reconstruction takes a window of each process


def test_reconstruction_in_float16_learns():
    """Gradients of a mean over many tokens and a wide state would vanish there."""
    errors = {}
    for dtype in (torch.float32, torch.float16):
        decoder = tiny_decoder(dtype=dtype)
        dense = [parameter.clone() for parameter in decoder.model.parameters()]
        found = {}
        pruned(Recipe("lsq", 1, 3), "wanda", "2:4", decoder, windows=random_windows(32), measured=found.__setitem__)
        assert any(not torch.equal(a, b) for a, b in zip(dense, decoder.model.parameters(), strict=True))
        errors[dtype] = [found[i][""] for i in range(len(decoder))]
    for (_, exact), (before, half) in zip(*errors.values(), strict=True):
        assert half < before and half == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("recipe", [Recipe("lsq", 4), Recipe("lsq", 1, asymmetric=0.25), Recipe("obs", 2)])
def test_a_hessian_that_is_not_positive_definite_gives_no_weights(recipe):
    """What a factorisation leaves behind when it fails looks like numbers."""
    hessian = torch.diag(torch.tensor([1.0, 2.0, -3.0, 4.0]))
    inputs = Inputs(torch.ones(4), hessian, hessian.clone() if recipe.asymmetric else None)
    updated = solve(
        torch.randn(3, 4), inputs, lambda weight, share: lowest_of(per_row(weight.abs(), 0.5), weight.abs(), share), recipe
    )
    assert not updated.isfinite().all()
    findings = Findings(Settings("wanda", {}, recipe=recipe))
    findings.watch("q_proj", updated)
    assert not findings.sound["q_proj"]


def test_errors_of_outputs_that_are_zero_are_left_out_of_the_mean(caplog):
    caplog.set_level("INFO")
    decoder = tiny_decoder()
    with torch.no_grad():
        decoder.linears(0)["mlp.up_proj"].weight.zero_()
    pruned(Recipe("lsq"), decoder=decoder)
    (line,) = [record.message for record in caplog.records if record.message.startswith("block 0: relative error")]
    assert "nan" not in line and "of 2 linears undefined, since their outputs are zero" in line
    assert re.search(r"of its linears 0\.\d{4} masked, 0\.\d{4} updated \(mean\)", line)
