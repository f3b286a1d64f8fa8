"""Input statistics of the linears of one block, taken while calibration samples run through it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lib.models.weights import Matrix, products


class ActivationNorm:
    """Accumulates `sum over samples and tokens of x_j^2` of a linear's inputs: (in,), fp32."""

    def __init__(self, width: int, device: torch.device):
        self.total = torch.zeros(width, dtype=torch.float32, device=device)
        self.tokens = 0

    @property
    def sums(self) -> list[torch.Tensor]:
        """What several processes add up."""
        return [self.total]

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of any leading shape, (..., in)."""
        self.tokens += inputs.numel() // inputs.shape[-1]
        self.total += inputs.reshape(-1, inputs.shape[-1]).float().square().sum(dim=0)

    def result(self, nsamples: int) -> torch.Tensor:
        """`||X_j|| = sqrt((1/n) * sum x_j^2)`, (in,): a mean over the n SEQUENCES, not over tokens (arXiv 2311.04902)."""
        return (self.total / nsamples).sqrt()


@contextmanager
def observe(linears: dict[str, Matrix], statistic: Callable) -> Iterator[dict]:
    """While the context is open, feed every input of `linears` to a `statistic(in, device)` of its own.

    Linears that are given the very same tensor (q, k and v; gate and up) share one statistic, so it is computed and kept
    once. Yields {name of the linear: its statistic}, filled as inputs come: an expert that no token is sent to has none.
    """
    statistics: dict[str, object] = {}
    last: list = [None, None]  # the input seen last, and the name of the linear that was given it first

    def seen(name: str, inputs: torch.Tensor) -> None:
        if inputs is not last[0]:
            last[:] = inputs, name
            if name not in statistics:
                statistics[name] = statistic(inputs.shape[-1], inputs.device)
            statistics[name].add(inputs)
        elif name not in statistics:
            statistics[name] = statistics[last[1]]

    with products(linears, seen):
        yield statistics
