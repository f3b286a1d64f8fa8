"""Asymmetric targets: weights that also make up for what pruning earlier blocks has changed in a linear's inputs."""

import torch

from lib.pruning.updates.sparsegpt import dampen


def target(weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, share: float) -> torch.Tensor:
    """`W + share * W C H^-1`: whose outputs on the pruned model's inputs come closest to `W`'s on the dense model's, at share 1.

    Minimising `||Z W^T - X V^T||^2` over V is minimising `tr((V - T) H (V - T)^T)` with this T (GPTAQ, arXiv 2504.02692, for
    quantisation), so the solvers take T for W. All of it would make a linear pay for every error upstream; a share does not.

    Args:
        weight: W, (out, in), any float dtype.
        hessian, drift: H and C, (in, in); H is damped in a copy.

    Returns:
        (out, in) in the dtype of `hessian`; NaN throughout if H is not positive definite even damped.
    """
    hessian = hessian.clone()
    dense = weight.to(hessian.dtype).masked_fill(dampen(hessian), 0)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    goal = dense + share * torch.cholesky_solve((dense @ drift).T, lower).T
    return goal.masked_fill_(failed != 0, torch.nan)
