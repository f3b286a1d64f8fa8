"""Mixtures of experts: masks of every expert against a naive loop over experts, and experts that no token reaches."""

import logging
import re

import pytest
import torch
from conftest import DEVICE, prune_model, random_windows
from test_sparsegpt import naive_solve
from tiny_configs import tiny_model

from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS
from lib.pruning.outcome import share_of_zeros
from lib.pruning.targets import select

N, EXPERTS = 6, 8
MIXTURES = {  # what makes a tiny model of 8 experts in every block, and whether a stack is (E, in, out)
    "mixtral": ({"num_local_experts": EXPERTS}, False),
    "gpt_oss": ({"num_local_experts": EXPERTS}, True),  # with biases
    "llama4_text": (
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 3},
        True,
    ),  # all experts at once, zeros for other experts' tokens
    "qwen3_moe": ({"num_experts": EXPERTS}, False),
    "deepseek_v3": ({"n_routed_experts": EXPERTS, "first_k_dense_replace": 0}, False),
}
RULES = [(name, False) for name in METHODS] + [("gradient", True), ("gblm", True)]
FEW = [("wanda", False, "2:4"), ("gblm", False, "unstructured"), ("sparsegpt", False, "4:8")]
CASES = [
    (kind, *rule, pattern) for kind in ("mixtral", "gpt_oss") for rule in RULES for pattern in ("unstructured", "2:4", "4:8")
]
CASES += [(kind, *few) for kind in ("llama4_text", "qwen3_moe", "deepseek_v3") for few in FEW]


def decoder_of(kind: str) -> Decoder:
    model = tiny_model(kind, num_hidden_layers=2, **MIXTURES[kind][0])
    return Decoder(model.to(DEVICE), DEVICE)


def experts_of(block) -> tuple[str, torch.nn.Module]:
    return next((name, module) for name, module in block.named_modules() if name.endswith(".experts"))


def gradients_of(decoder: Decoder, i: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(50 + i)
    return {name: torch.rand(matrix.shape, generator=generator) for name, matrix in decoder.linears(i).items()}


def routed(block, windows, model) -> list[list[torch.Tensor]]:
    """Per window and expert, the hidden states that are sent to it: (tokens, H)."""
    found = []

    def note(module, args):
        if len(args) > 1:  # (T, H) and the experts chosen for each, (T, k)
            found.append([args[0][(args[1] == e).any(dim=-1)] for e in range(EXPERTS)])
        else:  # (E * T, H), already multiplied with what the router gives, 0 where it chose others
            found.append([own[own.abs().sum(dim=-1) > 0] for own in args[0].chunk(EXPERTS)])

    handle = experts_of(block)[1].register_forward_pre_hook(note)
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    handle.remove()
    return found


def inputs_of_expert(kind, experts, e, hidden) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two matrices of an expert are multiplied with, by the formulas of the architectures."""
    gate_up = hidden @ (experts.gate_up_proj[e] if MIXTURES[kind][1] else experts.gate_up_proj[e].T)
    if kind == "gpt_oss":
        gate_up = gate_up + experts.gate_up_proj_bias[e]
        gate, up = gate_up[:, ::2].clamp(max=experts.limit), gate_up[:, 1::2].clamp(-experts.limit, experts.limit)
        return hidden, (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    gate, up = gate_up.chunk(2, dim=-1)
    return hidden, torch.nn.functional.silu(gate) * up


def naive_weight(weight, inputs, gradient, method, inverse, sparsity):
    """One matrix of one expert, (out, in), pruned; `inputs`: per window (tokens, in)."""
    if method == "sparsegpt":
        return naive_solve(weight, inputs, sparsity)[0].float()
    norm = (sum(x.square().sum(dim=0) for x in inputs) / len(inputs)).sqrt()
    score = {
        "magnitude": weight.abs(),
        "wanda": weight.abs() * norm,
        "gradient": weight.abs() / (gradient + 1e-8) if inverse else weight.abs() * gradient,
        "gblm": weight.abs() * norm / (gradient + 1e-8) if inverse else weight.abs() * norm + weight.abs() * gradient,
    }[method]
    if sparsity.m:
        groups = score.reshape(-1, sparsity.m)
        order = groups.sort(dim=1, stable=True).indices[:, : sparsity.n]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(score.shape)
    elif method == "magnitude":
        mask = score <= score.flatten().sort().values[int(score.numel() * sparsity.ratio)]
    else:
        order = score.sort(dim=1, stable=True).indices[:, : int(score.shape[1] * sparsity.ratio)]
        mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
    return weight.masked_fill(mask, 0)


@pytest.mark.parametrize("kind, method, inverse, pattern", CASES)
def test_masks_of_every_expert_are_those_of_a_loop_over_experts(kind, method, inverse, pattern):
    sparsity, windows = Sparsity.parse(pattern, 0.4 if pattern == "unstructured" else None), random_windows(N, 24)
    decoder, dense = decoder_of(kind), decoder_of(kind)
    reached = routed(dense.blocks[0], windows, dense.model)
    prune_model(
        decoder,
        windows if METHODS[method].statistic else None,
        method=method,
        sparsity=select(decoder, sparsity, layer=0),
        gradients=lambda i: gradients_of(decoder, i),
        gradient_inv=inverse,
    )
    pruned = decoder.linears(0)
    gradients = {name: norm.to(DEVICE) for name, norm in gradients_of(dense, 0).items()}
    path, experts = experts_of(dense.blocks[0])
    for e in range(EXPERTS):
        tokens = [of_experts[e] for of_experts in reached]
        assert sum(map(len, tokens)) > 10  # otherwise this says little
        pairs = [inputs_of_expert(kind, experts, e, hidden) for hidden in tokens]
        for k, parameter in enumerate(("gate_up_proj", "down_proj")):
            name = f"{path}.{e}.{parameter}"
            stored = getattr(experts, parameter)[e]
            weight = stored.T if MIXTURES[kind][1] else stored
            expected = naive_weight(weight, [pair[k] for pair in pairs], gradients[name], method, inverse, sparsity)
            found = pruned[name].weight
            same = (found == 0) == (expected == 0)
            if method == "sparsegpt":  # fp32 against float64: near ties may fall the other way
                assert same.float().mean() > 0.99
                rows = same.all(dim=1)
                assert torch.allclose(found[rows], expected[rows], atol=5e-3, rtol=5e-3)
            else:
                assert same.float().mean() > 0.999
                assert torch.equal(found[found != 0], weight[found != 0])


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_tokens_is_reported_and_pruned_by_magnitude(kind, method, pattern, caplog):
    caplog.set_level(logging.WARNING)
    sparsity, windows = Sparsity.parse(pattern, 0.5 if pattern == "unstructured" else None), random_windows(1, 3)
    decoder, dense = decoder_of(kind), decoder_of(kind)
    reached = routed(dense.blocks[0], windows, dense.model)[0]
    chosen = [e for e in range(EXPERTS) if len(reached[e])]  # of 3 tokens, at most 6 of 8 experts
    path, experts = experts_of(dense.blocks[0])

    def gradients(i):
        norms = gradients_of(decoder, i)
        for name in norms if i == 0 else ():
            if name.startswith(path) and int(name.split(".")[2]) not in chosen:
                norms[name].zero_()
        return norms

    zeros = prune_model(decoder, windows, method=method, sparsity=sparsity, gradients=gradients)
    assert share_of_zeros({0: zeros[0]}) == pytest.approx(0.5, abs=0.01)
    if method != "magnitude":
        assert f"{2 * (EXPERTS - len(chosen))} of " in caplog.text and "had no calibration tokens" in caplog.text
    if METHODS[method].statistic:
        assert re.search(rf"{2 * len(chosen)} of \d+ matrices in .*\.0 had fewer than \d+ calibration tokens", caplog.text)
    for e in set(range(EXPERTS)) - set(chosen):
        for parameter in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, parameter)[e]
            weight = weight.T if MIXTURES[kind][1] else weight
            groups = weight.abs().reshape(-1, sparsity.m or weight.shape[1])
            order = groups.sort(dim=1, stable=True).indices[:, : groups.shape[1] // 2]
            expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)
            found = decoder.linears(0)[f"{path}.{e}.{parameter}"].weight == 0
            if method == "magnitude" and not sparsity.m:  # its group is the whole matrix
                assert found.float().mean().item() == pytest.approx(0.5, abs=0.01)
            else:
                assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["wanda", "gradient", "sparsegpt"])
def test_an_expert_without_tokens_chosen_alone_is_pruned(method, caplog):
    """Nothing says then whether others of its kind are in use: it is not one that the forward leaves out."""
    caplog.set_level(logging.WARNING)
    decoder, windows = decoder_of("mixtral"), random_windows(1, 3)
    reached = routed(decoder.blocks[0], windows, decoder.model)[0]
    idle = next(e for e in range(EXPERTS) if not len(reached[e]))
    chosen = select(decoder, Sparsity(0.5), include=[f"*.0.*.experts.{idle}.*"])

    def nothing(i):
        return {name: torch.zeros(matrix.shape) for name, matrix in decoder.linears(i).items()}

    zeros = prune_model(decoder, windows, method=method, sparsity=chosen, gradients=nothing)
    for parameter in ("gate_up_proj", "down_proj"):
        zero, total = zeros[0][f"mlp.experts.{idle}.{parameter}"]
        assert zero / total == pytest.approx(0.5, abs=0.01)
    assert "had no calibration tokens, they are pruned by magnitude" in caplog.text


def test_one_expert_and_routers_are_chosen_by_name():
    decoder, half = decoder_of("mixtral"), Sparsity(0.5)
    chosen = select(decoder, half, include=["*.experts.3.*"])
    assert chosen == {i: {f"mlp.experts.3.{p}": half for p in ("gate_up_proj", "down_proj")} for i in range(2)}
    before = decoder.blocks[0].mlp.experts.down_proj[2].clone()
    prune_model(decoder, None, method="magnitude", sparsity=chosen)
    assert torch.equal(decoder.blocks[0].mlp.experts.down_proj[2], before)
    assert (decoder.blocks[0].mlp.experts.down_proj[3] == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert not any("gate" in name.split(".")[-1] and "proj" not in name for name in select(decoder, half)[0])
    assert list(select(decoder, half, include=["*.mlp.gate"])[0]) == ["mlp.gate"]
