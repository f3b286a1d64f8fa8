"""The OBS solver against a naive restatement with an explicit inverse for every column."""

import pytest
import torch
from conftest import DEVICE

from lib.pruning.masks import Sparsity
from lib.pruning.statistics import ExactHessian, Hessian
from lib.pruning.updates.sparsegpt import solve


def inputs(width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 40, width, generator=generator) @ torch.randn(width, width, generator=generator)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    accumulated = Hessian(x.shape[-1], x.device)
    for sample in x:
        accumulated.add(sample[None])
    return accumulated.result(len(x)).hessian


DAMPING = 0.01


def slack_of(width: int) -> float:
    """How far a score from an fp32 Hessian may be from the exact one, relatively.

    The damped Hessian's condition number is at most width / DAMPING + 1, and so often half a unit in the last place is what
    its inverse may be wrong by. Whether a score within it of a threshold is below is decided by rounding, so by the machine.
    """
    return (width / DAMPING + 1) * 2.0**-24


def exact_hessian_of(x: torch.Tensor) -> torch.Tensor:
    return 2 / len(x) * sum(s.double().T @ s.double() for s in x)


def naive_solve(w: torch.Tensor, x: torch.Tensor, sparsity: Sparsity, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal brain surgery, column by column, in float64; the Hessian's inverse is recomputed for what remains.

    Returns the weights (out, in), and the rows (out,) none of whose scores was within rounding of where the mask ends.
    """
    w, h = w.double().clone(), exact_hessian_of(x)
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    width = w.shape[1]
    slack = 2 * slack_of(width)  # of the score, and of the one it is compared with
    d = torch.stack([torch.linalg.inv(h[j:, j:])[0, 0] for j in range(width)])  # = diag(upper Cholesky of H^-1)^2
    mask = torch.zeros_like(w, dtype=torch.bool)
    clear = torch.ones(len(w), dtype=torch.bool, device=w.device)
    for j in range(width):
        if sparsity.m is None and j % columns == 0:
            score = w[:, j : j + columns] ** 2 / d[j : j + columns]
            ordered, last = score.flatten().sort().values, int(score.numel() * sparsity.ratio)
            mask[:, j : j + columns] = score <= ordered[last]
            near = (score - ordered[last : last + 2].mean()).abs() <= slack * ordered[last]
            clear &= ~near.any(dim=1)
        elif sparsity.m and j % sparsity.m == 0:
            group = slice(j, j + sparsity.m)
            ordered = (w[:, group] ** 2 / d[group]).sort(dim=1, stable=True)
            mask[:, group].scatter_(1, ordered.indices[:, : sparsity.n], True)
            removed, kept = ordered.values[:, sparsity.n - 1], ordered.values[:, sparsity.n]
            clear &= kept - removed > slack * kept
        inverse = torch.linalg.inv(h[j:, j:])
        error = torch.where(mask[:, j], w[:, j], 0) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        w[mask[:, j], j] = 0
    return w, clear


CASES = [("unstructured", 0.5, 24), ("2:4", None, 24), ("1:3", None, 150), ("unstructured", 0.3, 150)]


@pytest.mark.parametrize("pattern, ratio, width", CASES)
def test_solver_is_optimal_brain_surgery(pattern, ratio, width):
    """In float64 in every row; in fp32, as pruning uses it, in those where rounding decides nothing."""
    x = inputs(width)
    w = torch.randn(16, width, generator=torch.Generator().manual_seed(9))
    sparsity = Sparsity.parse(pattern, ratio)
    naive, clear = naive_solve(w, x, sparsity)
    exact = solve(w.double(), exact_hessian_of(x), sparsity)
    assert torch.equal(exact == 0, naive == 0)
    assert torch.allclose(exact, naive, rtol=1e-9, atol=1e-9)
    ours = solve(w, hessian_of(x), sparsity)
    assert clear.float().mean() >= 0.5
    assert torch.equal(ours[clear] == 0, naive[clear] == 0)
    assert (ours[clear] - naive[clear]).norm() <= slack_of(width) * naive[clear].norm()


def test_hessian_is_two_over_n_sequences():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 0.0]]])  # 2 sequences of 2 tokens
    assert hessian_of(x).tolist() == [[10.0, 14.0], [14.0, 21.0]]


def test_dead_inputs_lose_their_column_and_the_rest_is_solved():
    x = inputs(8)
    x[..., 3] = 0
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    pruned = solve(w, hessian_of(x), Sparsity.parse("unstructured", 0.25))
    assert (pruned[:, 3] == 0).all()
    assert pruned.isfinite().all()


def test_update_beats_the_mask_alone():
    x, w = inputs(24), torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    pruned = solve(w, hessian_of(x), Sparsity.parse("2:4"))
    assert ((pruned == 0).view(16, -1, 4).sum(-1) == 2).all()
    masked = torch.where(pruned == 0, 0, w)
    assert ((x @ (w - pruned).T) ** 2).sum() < 0.8 * ((x @ (w - masked).T) ** 2).sum()


def test_ratio_zero_changes_nothing():
    w = torch.randn(4, 8)
    assert torch.equal(solve(w, hessian_of(inputs(8)), Sparsity(0.0)), w)


def test_non_finite_inputs_leave_nothing_that_could_be_taken_for_a_weight():
    assert solve(torch.randn(4, 8), torch.full((8, 8), torch.nan), Sparsity.parse("2:4")).isnan().all()
    indefinite = torch.eye(8)
    indefinite[2, 2] = -1
    assert solve(torch.randn(4, 8), indefinite, Sparsity.parse("2:4")).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_fast_hessian_loses_nothing(dtype):
    """Inputs of every dtype: sums as exact as fp32 gives them, and no setting of torch left behind."""
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    inputs = (torch.randn(3, 500, 160, generator=torch.Generator().manual_seed(0)) * 10).to(DEVICE, dtype)
    hessian = ExactHessian(160, DEVICE)
    for part in inputs:
        hessian.add(part)
    exact = sum(part.double().T @ part.double() for part in inputs.cpu())
    scale = exact.diagonal().sqrt()
    assert ((hessian.total.cpu() - exact).abs() <= 1e-5 * torch.outer(scale, scale)).all()
    assert hessian.tokens == 1500 and [backend.fp32_precision for backend in backends] == before
