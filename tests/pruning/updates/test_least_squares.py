"""Least squares on a mask against normal equations, and what must hold for every Hessian."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sparsegpt import hessian_of, inputs

from lib.pruning.masks import Sparsity, n_of_m, per_row
from lib.pruning.updates import least_squares, sparsegpt


def problem(width: int = 24, rows: int = 16, seed: int = 0, tokens: int = 40, dead: tuple[int, ...] = ()):
    """(weight, mask, Hessian); fewer tokens than inputs make a Hessian without full rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens // 2, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x[..., list(dead)] = 0
    weight = torch.randn(rows, width, generator=generator)
    mask = torch.rand(rows, width, generator=generator) < torch.rand(rows, 1, generator=generator)
    return weight, mask, hessian_of(x)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def errors(found: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Of every row, in float64, under the damped Hessian."""
    difference = found.double() - weight.double()
    return torch.einsum("oi,ij,oj->o", difference, damped(hessian), difference)


def normal_equations(weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Row by row: `v_S = H_SS^-1 (H w)_S` on the support S, in float64."""
    h, w = damped(hessian), weight.double()
    v = torch.zeros_like(w)
    for row, removed in enumerate(mask):
        kept = (~removed).nonzero().flatten()
        v[row, kept] = torch.linalg.solve(h[kept[:, None], kept], h[kept] @ w[row])
    return v


@pytest.mark.parametrize("width, tokens", [(24, 40), (24, 10), (130, 400), (130, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_that_of_the_normal_equations(width, tokens, dtype):
    weight, mask, hessian = problem(width, tokens=tokens)
    best = errors(normal_equations(weight, mask, hessian), weight, hessian).sum()
    found = least_squares.solve(weight, mask, hessian.to(dtype, copy=True), steps=3 * width)
    assert found.dtype == dtype and (found[mask] == 0).all()
    assert errors(found, weight, hessian).sum() == pytest.approx(best.item(), rel=1e-5)
    masked = errors(weight.masked_fill(mask, 0), weight, hessian).sum()
    assert best < 0.8 * masked  # there was something to solve


def test_the_usual_steps_come_close():
    weight, mask, hessian = problem(130, tokens=400)
    best = errors(normal_equations(weight, mask, hessian), weight, hessian).sum()
    found = least_squares.solve(weight, mask, hessian.clone())
    assert errors(found, weight, hessian).sum() < 1.02 * best


def test_an_empty_mask_returns_the_weight():
    weight, mask, hessian = problem()
    assert torch.equal(least_squares.solve(weight, torch.zeros_like(mask), hessian), weight)


def test_uncorrelated_inputs_return_the_masked_weight():
    weight, mask, _ = problem()
    for diagonal in (torch.ones(24), torch.rand(24) + 0.1):
        assert torch.equal(least_squares.solve(weight, mask, diagonal.diag()), weight.masked_fill(mask, 0))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    width=st.integers(1, 40),
    rows=st.integers(1, 9),
    tokens=st.integers(1, 40).map(lambda half: 2 * half),  # fewer than inputs: a Hessian without full rank
    dead=st.sets(st.integers(0, 39), max_size=6),
    twins=st.booleans(),
    exponent=st.integers(-6, 6),
    elsewhere=st.booleans(),
    steps=st.integers(1, 200),
)
def test_no_row_ends_worse_than_it_started(seed, width, rows, tokens, dead, twins, exponent, elsewhere, steps):
    """For every Hessian: of few tokens, of inputs never active or the same as others, of any scale, from any start."""
    dead = tuple(j for j in dead if j < width)
    weight, mask, hessian = problem(width, rows, seed, tokens, dead)
    if twins and width > 1:
        hessian[0] = hessian[1]
        hessian[:, 0] = hessian[:, 1]
    hessian *= 10.0**exponent
    begun = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) if elsewhere else weight
    found = least_squares.solve(weight, mask, hessian.clone(), start=begun if elsewhere else None, steps=steps)
    begun = begun.masked_fill(mask | (hessian.diagonal() == 0), 0)
    assert found.isfinite().all() and (found[mask] == 0).all()
    assert (errors(found, weight, hessian) <= errors(begun, weight, hessian) * (1 + 1e-5)).all()


def test_inputs_never_active_have_weight_zero_and_do_not_disturb_the_rest():
    weight, mask, hessian = problem(dead=(3, 7))
    found = least_squares.solve(weight, mask, hessian.clone(), steps=100)
    assert (found[:, [3, 7]] == 0).all()
    live = [j for j in range(24) if j not in (3, 7)]
    assert (
        errors(found[:, live], weight[:, live], hessian[live][:, live]).sum()
        < 1.01 * errors(normal_equations(weight, mask, hessian)[:, live], weight[:, live], hessian[live][:, live]).sum()
    )  # not equal: the dead inputs' diagonal of 1 is part of the damping


def test_a_hessian_that_is_not_finite_shows():
    weight, mask, hessian = problem()
    hessian[2, 3] = torch.nan
    assert not least_squares.solve(weight, mask, hessian).isfinite().all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_beats_the_greedy_update_on_its_own_mask(pattern):
    x, weight = inputs(24), torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    greedy = sparsegpt.solve(weight, hessian_of(x), Sparsity.parse(pattern, 0.5))
    exact = least_squares.solve(weight, greedy == 0, hessian_of(x), steps=100)
    assert errors(exact, weight, hessian_of(x)).sum() < errors(greedy, weight, hessian_of(x)).sum()


@pytest.mark.parametrize("choose", [lambda score: per_row(score, 0.5), lambda score: n_of_m(score, 2, 4)])
def test_the_greedy_update_on_a_given_mask(choose):
    """It keeps the mask, and is the solver's own on the solver's own mask."""
    x, weight = inputs(24), torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    mask = choose(weight.abs())
    found = sparsegpt.solve(weight, hessian_of(x), mask)
    assert torch.equal(found == 0, mask)
    masked = weight.masked_fill(mask, 0)
    best = errors(normal_equations(weight, mask, hessian_of(x)), weight, hessian_of(x)).sum()
    assert best <= errors(found, weight, hessian_of(x)).sum() < 0.95 * errors(masked, weight, hessian_of(x)).sum()
    own = sparsegpt.solve(weight, hessian_of(x), Sparsity.parse("2:4"))
    assert torch.equal(sparsegpt.solve(weight, hessian_of(x), own == 0), own)
