"""Input statistics of the linears of one block, taken by hooks while calibration samples run through it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class ActivationNorm:
    """Accumulates `sum over samples and tokens of x_j^2` of a linear's inputs: (in,), fp32."""

    def __init__(self, width: int, device: torch.device):
        self.total = torch.zeros(width, dtype=torch.float32, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of any leading shape, (..., in)."""
        self.total += inputs.reshape(-1, inputs.shape[-1]).float().square().sum(dim=0)

    def result(self, nsamples: int) -> torch.Tensor:
        """`||X_j|| = sqrt((1/n) * sum x_j^2)`, (in,): a mean over the n SEQUENCES, not over tokens (arXiv 2311.04902)."""
        return (self.total / nsamples).sqrt()


@contextmanager
def observe(linears: dict[str, nn.Linear], statistic: Callable) -> Iterator[dict]:
    """While the context is open, feed every input of `linears` to a `statistic(in, device)` of its own.

    Linears that are given the very same tensor (q, k and v; gate and up) share one statistic, so it is computed and kept
    once. Yields {name of the linear: its statistic}, filled at the first forward pass. The hooks are always removed.
    """
    statistics: dict[str, object] = {}
    last: list = [None, None]  # the input seen last, and the name of the linear that was given it first

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            inputs = args[0]
            if inputs is not last[0]:
                last[:] = inputs, name
                if name not in statistics:
                    statistics[name] = statistic(module.in_features, inputs.device)
                statistics[name].add(inputs)
            elif name not in statistics:
                statistics[name] = statistics[last[1]]

        return hook

    handles = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        yield statistics
    finally:
        last[:] = None, None
        for handle in handles:
            handle.remove()
