"""Asymmetric targets against the problem they are the solution of, and the statistic they need against two whole forwards."""

import pytest
import torch
from conftest import DEVICE, prune_model, random_windows, tiny_decoder
from test_experts import decoder_of
from test_least_squares import damped
from test_recipe import output_error, pruned

from lib.models.matrices import kind_of
from lib.pruning.masks import Sparsity
from lib.pruning.statistics import ActivationNorm, Drift, Stream, collect
from lib.pruning.updates import least_squares
from lib.pruning.updates.asymmetric import target
from lib.pruning.updates.recipe import Recipe


def statistics_of(dense: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of samples (n, T, in), in two halves each."""
    stream = Stream(tokens=dense.shape[1])
    drift = Drift(dense.shape[-1], dense.device, stream)
    for one, other in zip(dense, own, strict=True):
        stream.dense = True
        drift.add(one)
        stream.dense = False
        drift.add(other)
    inputs = drift.result(len(dense))
    return inputs.hessian, inputs.drift


def two_streams(width: int = 12, tokens: int = 60):
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(4, tokens, width, generator=generator)
    own = dense + 0.3 * torch.randn(4, tokens, width, generator=generator) + 0.2 * dense.roll(1, -1)
    return dense, own, torch.randn(7, width, generator=generator)


def test_the_target_comes_closest_to_the_dense_outputs():
    """Against least squares with the damping as further rows, in float64."""
    dense, own, weight = two_streams()
    hessian, drift = statistics_of(dense, own)
    z, x, w = dense.flatten(0, 1).double(), own.flatten(0, 1).double(), weight.double()
    penalty = (damped(hessian) - hessian.double()) * 4 / 2  # n samples, H has the factor 2 / n
    ridge = penalty.diagonal().sqrt().diag()
    best = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([z @ w.T, ridge @ w.T])).solution.T
    found = target(weight, hessian, drift, 1.0)
    assert torch.allclose(found.double(), best, atol=1e-4)
    assert (z @ w.T - x @ best.T).norm() < 0.9 * (z @ w.T - x @ w.T).norm()  # there was something to make up for
    part = target(weight, hessian, drift, 0.25)
    assert torch.allclose(part - weight, 0.25 * (found - weight), atol=1e-5)
    assert torch.equal(target(weight, hessian, drift, 0.0), weight)


def test_with_a_mask_it_is_still_the_best_for_the_dense_outputs():
    """Solvers that take it for the weight minimise `||Z W^T - X V^T||^2` over V on the mask."""
    dense, own, weight = two_streams()
    hessian, drift = statistics_of(dense, own)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found = least_squares.solve(target(weight, hessian, drift, 1.0), mask, hessian.clone(), steps=100)
    z, x, penalty = dense.flatten(0, 1).double(), own.flatten(0, 1).double(), (damped(hessian) - hessian.double()) * 2
    for row, removed in enumerate(mask):
        kept = (~removed).nonzero().flatten()
        matrix = x[:, kept].T @ x[:, kept] + penalty[kept[:, None], kept]
        right = x[:, kept].T @ (z @ weight[row].double()) + penalty[kept] @ weight[row].double()
        assert torch.allclose(found[row, kept].double(), torch.linalg.solve(matrix, right), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_statistic_is_that_of_the_two_models(dtype):
    """Of the second block, whose inputs differ, against hooks on whole forwards."""
    windows, decoder, dense = random_windows(6), tiny_decoder(dtype=dtype), tiny_decoder(dtype=dtype)
    with torch.no_grad():
        for linear in decoder.linears(0).values():
            linear.weight[:, ::2] = 0
    states, others = decoder.enter_all(windows), decoder.enter_all(windows)
    decoder.advance(0, states)
    dense.enter(windows[:1])
    dense.advance(0, others)
    found = collect(decoder, 1, decoder.linears(1), states, ActivationNorm, len(windows), others)
    inputs = {}
    for model in (decoder, dense):
        for name, linear in model.linears(1).items():
            linear.module.register_forward_pre_hook(lambda module, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for window in windows.to(DEVICE):
            decoder.model(input_ids=window[None], use_cache=False)
            dense.model(input_ids=window[None], use_cache=False)
    for name, seen in inputs.items():
        x, z = (torch.cat(seen[k::2]).flatten(0, 1).double() for k in (0, 1))
        hessian, drift = x.T @ x / 3, (z - x).T @ x / 3
        assert torch.allclose(found[name].hessian.double(), hessian, rtol=1e-4, atol=1e-4 * hessian.abs().max().item())
        assert torch.allclose(found[name].drift.double(), drift, atol=1e-4 * hessian.abs().max().item())
        assert drift.abs().max() > 1e-3 * hessian.abs().max(), name
    expected = dense.enter_all(windows)
    for i in (0, 1):
        dense.advance(i, expected)
    assert (
        all(torch.equal(one.hidden, other.hidden) for one, other in zip(others, expected, strict=True))
        or dtype != torch.float32
    )


def test_inputs_that_are_not_those_of_all_tokens_have_no_drift():
    stream = Stream(tokens=5)
    drift = Drift(3, torch.device("cpu"), stream)
    own = torch.randn(4, 3)
    for dense in (torch.randn(4, 3), torch.randn(3, 3), None):
        if dense is not None:
            stream.dense = True
            drift.add(dense)
            stream.dense = False
        drift.add(own)
    inputs = drift.result(1)
    assert drift.tokens == 12 and torch.allclose(inputs.hessian, 6 * own.T @ own)
    assert inputs.drift.abs().max() < 1e-5


def test_a_mixture_of_experts_is_pruned():
    decoder, dense = decoder_of("mixtral"), decoder_of("mixtral")
    recipe = Recipe("lsq", 2, asymmetric=0.25)
    prune_model(decoder, random_windows(24), method="wanda", sparsity=Sparsity.parse("2:4"), recipe=recipe)
    for i in range(len(decoder)):
        for name, linear in decoder.linears(i).items():
            assert ((linear.weight == 0).view(-1, 4).sum(1) == 2).all(), name
            updated = linear.weight[linear.weight != 0] != dense.linears(i)[name].weight[linear.weight != 0]
            assert updated.any() or kind_of(name) != name


def test_the_pruned_model_comes_closer_to_the_dense_one():
    """On windows that it has not seen."""
    windows, unseen = random_windows(64), random_windows(16, seed=5)
    errors = []
    for share in (0.0, 0.25):
        decoder, _ = pruned(Recipe("lsq", 4, asymmetric=share), "wanda", "2:4", windows=windows)
        errors.append(output_error(decoder, unseen))
    assert errors[1] < 0.98 * errors[0]
