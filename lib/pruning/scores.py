"""Importance scores: weight statistics in, one score per weight out; a higher score means keep.

Every function is pure and computes in fp32 whatever the weight's dtype. Shapes: `weight`, `grad_norm` and the
result are (out, in), `x_norm` is (in,). `x_norm` is that of `statistics.Inputs`, `grad_norm` is a tensor of a
gradient folder, with that folder's `scale` (100) baked in.
"""

import torch

INVERSE_EPS = 1e-8  # keeps 1 / G finite where a gradient is exactly zero


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """|W|."""
    return weight.abs().float()


def wanda(weight: torch.Tensor, x_norm: torch.Tensor) -> torch.Tensor:
    """|W| * ||X|| (Wanda, arXiv 2306.11695, eq. 1)."""
    return magnitude(weight) * x_norm


def gradient(weight: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    """|W| * ||G|| (arXiv 2311.04902, the gradient-only ablation). The ranking does not depend on the folder's scale."""
    return magnitude(weight) * grad_norm.float()


def gblm(weight: torch.Tensor, x_norm: torch.Tensor, grad_norm: torch.Tensor, alpha: float) -> torch.Tensor:
    """|W| * ||X|| + alpha * |W| * ||G||: the score of GBLM-Pruner (arXiv 2311.04902, section 3).

    `alpha` multiplies `grad_norm` as it is given: with norms of scale 100, the paper's alpha of 100 is a factor of 1 here.
    """
    return wanda(weight, x_norm) + alpha * gradient(weight, grad_norm)


def gradient_inverse(weight: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    """|W| / (||G|| + 1e-8) (`--gradient_inv` of the published code)."""
    return magnitude(weight) / (grad_norm.float() + INVERSE_EPS)


def gblm_inverse(weight: torch.Tensor, x_norm: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    """|W| * ||X|| / (||G|| + 1e-8) (`--gradient_inv` of the published code)."""
    return wanda(weight, x_norm) / (grad_norm.float() + INVERSE_EPS)
