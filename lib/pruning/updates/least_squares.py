"""Exact least squares on a mask: the surviving weights that reproduce a linear's dense outputs best, on the inputs it is given."""

import torch

from lib.pruning.updates.sparsegpt import dampen

STEPS = 30  # of conjugate gradients; the error is then within a percent of its minimum (measured on the demo model)


def solve(
    weight: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    steps: int = STEPS,
) -> torch.Tensor:
    """`argmin_V tr((V - W) H (V - W)^T)` subject to `V[mask] = 0`: the problem of arXiv 2401.02938, solved for a given mask.

    The rows are independent problems with one matrix, so conjugate gradients, preconditioned with `1 / diag(H)`, take a
    step in all of them with one matrix product; step lengths are each row's own. A row that would end with a larger error
    than it started with, as rounding can make it where H is nearly singular, keeps its start.

    Args:
        weight: W, the dense weight, (out, in), any float dtype.
        mask: (out, in), True where a weight is removed.
        hessian: H, (in, in); damped here, consumed. Its dtype is that of the computation.
        start: V to start from, (out, in), on the mask or not; None: W.
        steps: products of V with H.

    Returns:
        V, (out, in), in the dtype of `hessian`. Inputs that were never active have weight 0.
    """
    dead = dampen(hessian)
    keep, dense = ~(mask | dead), weight.to(hessian.dtype).masked_fill(dead, 0)
    start = (dense if start is None else start.to(hessian.dtype)) * keep
    v, precondition = start.clone(), keep / hessian.diagonal()
    residual = (dense - start) @ hessian  # half the negative gradient of the error, on the mask as well
    before = _rows(residual, dense - start)
    direction = residual * precondition
    size, image = _rows(residual, direction), torch.empty_like(direction)
    for _ in range(steps):
        torch.mm(direction, hessian, out=image)
        length = _quotient(size, _rows(direction, image))
        v.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        preconditioned = torch.mul(residual, precondition, out=image)
        previous, size = size, _rows(residual, preconditioned)
        direction, image = preconditioned.addcmul_(_quotient(size, previous), direction), direction
    after = _rows(residual, dense - v)
    return torch.where(after > before, start, v)  # not where either is NaN: that has to be seen


def _rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The inner product of every row of `a` with that of `b`, (out, 1)."""
    return torch.einsum("oi,oi->o", a, b)[:, None]


def _quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b, and 0 in a row that has arrived (nothing is left to divide) or whose curvature is lost in rounding."""
    return torch.where(b > torch.finfo(b.dtype).tiny, a / b, 0)
