"""Asymmetric targets: weights that also make up for what pruning earlier blocks has changed in a linear's inputs."""

from dataclasses import dataclass

import torch

from lib.pruning.precision import units_for
from lib.pruning.sparsegpt import ExactHessian, dampen


@dataclass
class Stream:
    """Which model's inputs are coming, the dense or the pruned one's, and how many tokens a sample has."""

    dense: bool = False
    tokens: int = 0


class Drift(ExactHessian):
    """Accumulates beside `sum_s X_s X_s^T` of the pruned model's inputs also `sum_s Z_s X_s^T`, Z those of the dense model.

    Of every sample the dense model's inputs come first, as `stream` says. A matrix that is not given all tokens of a sample,
    as an expert is not, may be given others in the two models: for it, Z is X.
    """

    def __init__(self, width: int, device: torch.device, stream: Stream):
        super().__init__(width, device)
        self.cross = torch.zeros_like(self.total)
        self.stream = stream
        self.kept: torch.Tensor | None = None

    @property
    def sums(self) -> list[torch.Tensor]:
        """What several processes add up."""
        return [self.total, self.cross]

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of any leading shape, (..., in)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.stream.dense:
            self.kept = rows
            return
        super().add(inputs)
        dense, self.kept = self.kept, None
        paired = dense is not None and len(dense) == len(rows) == self.stream.tokens
        with units_for(rows.dtype, rows.device):
            self.cross.addmm_((dense if paired else rows).float().T, rows.float())

    def result(self, nsamples: int) -> torch.Tensor:
        """`H = (2 / n) sum_s X_s X_s^T` and `C = (2 / n) sum_s (Z_s - X_s) X_s^T`, n in sequences; (2, in, in)."""
        both = torch.stack([self.total, self.cross])
        both[1] -= both[0]  # in place: each is as large as a Hessian
        return both.mul_(2 / nsamples)


def target(weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, share: float) -> torch.Tensor:
    """`W + share * W C H^-1`: whose outputs on the pruned model's inputs come closest to `W`'s on the dense model's, at share 1.

    Minimising `||Z W^T - X V^T||^2` over V is minimising `tr((V - T) H (V - T)^T)` with this T (GPTAQ, arXiv 2504.02692, for
    quantisation), so the solvers take T for W. All of it would make a linear pay for every error upstream; a share does not.

    Args:
        weight: W, (out, in), any float dtype.
        hessian, drift: H and C, (in, in); H is damped in a copy.
    """
    hessian = hessian.clone()
    dense = weight.to(hessian.dtype).masked_fill(dampen(hessian), 0)
    lower = torch.linalg.cholesky_ex(hessian)[0]
    return dense + share * torch.cholesky_solve((dense @ drift).T, lower).T
