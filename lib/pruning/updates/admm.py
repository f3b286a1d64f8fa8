"""Mask and weights together, by alternating directions: weights that are to go are pulled down while the others take over."""

from collections.abc import Callable

import torch

from lib.pruning.updates.precision import units_for
from lib.pruning.updates.sparsegpt import dampen

PENALTY = 1.0  # rho, of leaving the mask, in units of an input's diagonal entry of H


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    choose: Callable[[torch.Tensor, float], torch.Tensor],
    shares: list[float],
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a mask for `argmin_V tr((V - W) H (V - W)^T)` subject to `V[mask] = 0`, as the weights come to fit it.

    The scheme of arXiv 2401.02938 (section 4.3): with D = diag(H), repeat

        A = V + U;  mask = choose(A);  Z = A without the mask;  U = A - Z;  V = (W H + rho (Z - U) D) (H + rho D)^-1

    V is free, Z obeys the mask, U adds up what lies between. Wanda's score of A is |A| scaled by the square root of D, the
    measure of that paper; any other score does as well. A weight may return until the last stage.

    V is also `W + (Z - U - W) rho D (H + rho D)^-1`: one product a stage, of corrections. Rounding them moves weights near
    the threshold from one side to the other, and Z a little, which steps of least_squares.solve then make up for.

    Args:
        weight: W, (out, in), any float dtype.
        hessian: H, (in, in); damped here, consumed.
        choose: (A, share) -> mask of that share of what is to go, (out, in).
        shares: one a stage, the last 1.
        dtype: that the weights will be rounded to; a stage's product is left to units for it.

    Returns:
        (mask, Z) of the last stage, both (out, in); Z is a start for least_squares.solve, and NaN if H is not positive definite
        even damped (an error would make the host wait for a GPU).
    """
    dense = weight.to(hessian.dtype).masked_fill(dampen(hessian), 0)
    penalty = PENALTY * hessian.diagonal()
    hessian.diagonal().add_(penalty)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    # Not cholesky_inverse, whose LAPACK routine takes ten times as long.
    pull = torch.cholesky_solve(torch.eye(len(lower), out=hessian), lower).mul_(penalty[:, None])
    mask = choose(dense, shares[0])
    survivors, dual = dense.masked_fill(mask, 0), dense.masked_fill(~mask, 0)
    for share in shares[1:]:  # in place: at this size, new memory costs a third of a product
        correction = survivors.sub_(dual).sub_(dense)
        with units_for(dtype, dense.device):
            wanted = dual.add_(dense).addmm_(correction, pull)
        mask = choose(wanted, share)
        survivors = survivors.copy_(wanted).masked_fill_(mask, 0)
        dual = wanted.sub_(survivors)
    return mask, survivors.masked_fill_(failed != 0, torch.nan)
