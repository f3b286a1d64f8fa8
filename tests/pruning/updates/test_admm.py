"""Mask and weights together against the paper's iteration, written out with an inverse."""

import pytest
import torch
from test_least_squares import damped, problem

from lib.pruning.masks import lowest_of, n_of_m, per_row
from lib.pruning.updates import admm
from lib.pruning.updates.recipe import shares


def choose(weight: torch.Tensor, share: float, score: torch.Tensor, pattern: str) -> torch.Tensor:
    mask = per_row(score, 0.5) if pattern == "row" else n_of_m(score, 2, 4)
    return mask if share == 1 else lowest_of(mask, score, share)


@pytest.mark.parametrize("pattern", ["row", "2:4"])
@pytest.mark.parametrize("stages", [2, 5])
@pytest.mark.parametrize("dead", [(), (3, 17)])
def test_stages_are_those_of_the_paper(pattern, stages, dead):
    weight, _, hessian = problem(48, tokens=200, dead=dead)
    h, dense = damped(hessian), weight.double()
    dense[:, list(dead)] = 0
    rho = admm.PENALTY * h.diagonal().diag()

    def decide(a, share):
        return choose(a, share, a.abs() * h.diagonal().sqrt(), pattern)

    v, u = dense, torch.zeros_like(dense)
    for share in shares(stages):
        mask = decide(v + u, share)
        z = (v + u) * ~mask
        u = v + u - z
        v = (dense @ h + (z - u) @ rho) @ torch.linalg.inv(h + rho)
    found_mask, found = admm.solve(weight, hessian.double(), decide, shares(stages))
    assert torch.equal(found_mask, mask) and (found[found_mask] == 0).all()
    torch.testing.assert_close(found, z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_units_for_short_formats_are_only_for_weights_of_those(dtype, monkeypatch):
    """Of others nothing is rounded; and what is rounded moves few weights, and hardly the error."""
    weight, _, hessian = problem(64, rows=32, tokens=300)
    scale, settings = hessian.diagonal().sqrt(), []

    def decide(a, share):
        return choose(a, share, a.abs() * scale, "row")

    def product(a, b, c):
        settings.append(torch.backends.mkldnn.matmul.fp32_precision)
        return original(a, b, c)

    original = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", product)
    mask, found = admm.solve(weight, hessian.clone(), decide, shares(4), dtype)
    assert len(settings) == 3 and {setting == "bf16" for setting in settings} == {dtype == torch.bfloat16}
    exact_mask, exact = admm.solve(weight, hessian.double(), decide, shares(4))
    assert (mask != exact_mask).float().mean() < (0.02 if dtype == torch.bfloat16 else 1e-3)
    errors = [((z.double() - weight) @ damped(hessian) * (z.double() - weight)).sum() for z in (found, exact)]
    assert errors[0] == pytest.approx(errors[1].item(), rel=0.05 if dtype == torch.bfloat16 else 1e-3)


def test_it_beats_a_mask_that_was_chosen_at_once():
    weight, _, hessian = problem(64, rows=32, tokens=300)
    scale = hessian.diagonal().sqrt()

    def decide(a, share):
        return choose(a, share, a.abs() * scale, "row")

    _, start = admm.solve(weight, hessian.clone(), decide, shares(8))
    h = damped(hessian)

    def error(v):
        return (((v.double() - weight) @ h) * (v.double() - weight)).sum()

    assert error(start) < 0.8 * error(weight * ~decide(weight, 1))
