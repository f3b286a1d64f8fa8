"""SparseGPT (arXiv 2301.00774): the Hessian of a linear's reconstruction error in, a pruned and updated weight out."""

import torch

from lib.pruning import masks

COLUMN_BLOCK = 128  # columns solved together; the update of all columns to their right is then one matrix product
DAMPING = 0.01  # of the Hessian's mean diagonal, so that its Cholesky factor exists


def dampen(hessian: torch.Tensor) -> torch.Tensor:
    """Make an (in, in) Hessian positive definite, in place: 1 % of its mean diagonal is added to the diagonal.

    Returns which inputs were never active, (in,): their diagonal is 1 before the damping, and their weights are to be 0.
    """
    dead = hessian.diagonal() == 0
    hessian.diagonal().masked_fill_(dead, 1)
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    return dead


def solve(weight: torch.Tensor, hessian: torch.Tensor, remove: masks.Sparsity | torch.Tensor) -> torch.Tensor:
    """Prune by optimal brain surgery: remove the weights of lowest `w^2 / diag(H^-1)^2`, update those that remain.

    Args:
        weight: (out, in), any float dtype; unchanged.
        hessian: (in, in), consumed. The solve runs in its dtype, fp32 as `statistics.Hessian` gives it.
        remove: unstructured (a threshold per column block over all rows) or N:M (chosen from the updated weights); or the
            mask of another method, (out, in), for the update alone.

    Returns:
        The new weight, (out, in), in the dtype of `weight`; NaN throughout if the damped Hessian is not positive definite
        (non-finite activations): raising an error here would make the host wait for a GPU.
    """
    w = weight.to(hessian.dtype, copy=True)
    fixed_mask = remove if isinstance(remove, torch.Tensor) else None
    sparsity = masks.Sparsity(1.0) if fixed_mask is not None else remove
    w.masked_fill_(dampen(hessian), 0)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    inverse, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)  # upper factor of H^-1

    width = w.shape[1]
    step = max(COLUMN_BLOCK - COLUMN_BLOCK % sparsity.m, sparsity.m) if sparsity.m else COLUMN_BLOCK  # whole groups
    for start in range(0, width, step):
        columns = slice(start, min(start + step, width))
        w_block, inv_block = w[:, columns], inverse[columns, columns]
        scale = inv_block.diagonal().square()
        errors = torch.zeros_like(w_block)
        if fixed_mask is not None:
            mask = fixed_mask[:, columns]
        elif sparsity.m:
            mask = torch.zeros_like(w_block, dtype=torch.bool)
        elif sparsity.ratio == 0:
            break
        else:
            mask = masks.whole_matrix(w_block.square() / scale, sparsity.ratio)
        for j in range(w_block.shape[1]):
            if sparsity.m and j % sparsity.m == 0:
                group = slice(j, j + sparsity.m)
                mask[:, group] = masks.n_of_m(w_block[:, group].square() / scale[group], sparsity.n, sparsity.m)
            removed = mask[:, j]
            error = torch.where(removed, w_block[:, j] / inv_block[j, j], 0)
            # Row j of the factor spreads the error over the block's later columns; its first entry zeroes column j.
            w_block[:, j:] -= torch.outer(error, inv_block[j, j:])
            w_block[:, j].masked_fill_(removed, 0)  # exactly, not to rounding
            errors[:, j] = error
        w[:, columns.stop :] -= errors @ inverse[columns, columns.stop :]
    return w.masked_fill_((failed | failed_too) != 0, torch.nan).to(weight.dtype)
