"""Activation norms and the hooks that take them."""

import pytest
import torch
from torch import nn

from lib.models.matrices import matrices_of
from lib.pruning.statistics import ActivationNorm, Drift, ExactHessian, Hessian, Stream, observe


def test_the_mean_is_over_sequences_not_tokens():
    accumulated = ActivationNorm(2, torch.device("cpu"))
    accumulated.add(torch.tensor([[[1.0, 0.0], [2.0, 2.0], [2.0, 0.0]]]))  # squares sum to 9, 4
    accumulated.add(torch.tensor([[[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]]))  # 9, 4
    assert accumulated.result(2).x_norm.tolist() == [3.0, 2.0]


def test_sums_are_fp32():
    accumulated = ActivationNorm(1, torch.device("cpu"))
    accumulated.add(torch.full((1, 4096, 1), 16.0, dtype=torch.float16))  # the sum of squares, 2^20, overflows float16
    assert accumulated.result(1).x_norm.item() == 1024


@pytest.mark.parametrize("kind", [Hessian, ExactHessian, Drift])
def test_a_hessian_takes_no_memory_beside_what_it_is_added_up_in(kind):
    """It may be the largest tensor of a run, and one of many."""
    stream = Stream(tokens=5)
    accumulated = kind(4, torch.device("cpu"), stream) if kind is Drift else kind(4, torch.device("cpu"))
    samples = torch.randn(2, 5, 4)
    for sample in samples:
        accumulated.add(sample[None])
    sums = accumulated.sums
    inputs = accumulated.result(2)
    assert inputs.hessian.data_ptr() == sums[0].data_ptr()
    assert torch.allclose(inputs.hessian, samples.flatten(0, 1).T @ samples.flatten(0, 1), atol=1e-5)
    assert torch.allclose(inputs.x_norm, (samples.square().sum(dim=(0, 1)) / 2).sqrt())
    assert kind is not Drift or inputs.drift.data_ptr() == sums[1].data_ptr()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.o(self.q(x) + self.k(x))


def test_linears_with_the_same_input_share_a_statistic():
    pair, samples = Pair(), torch.randn(3, 1, 5, 4)
    linears = matrices_of(pair)
    with observe(linears, ActivationNorm) as seen:
        for x in samples:
            pair(x)
    assert seen["q"] is seen["k"] and seen["o"] is not seen["q"]
    expected = samples.square().sum(dim=(0, 1, 2))
    assert torch.allclose(seen["q"].total, expected)
    between = torch.stack([pair.q(x) + pair.k(x) for x in samples])
    assert torch.allclose(seen["o"].total, between.square().sum(dim=(0, 1, 2)))


def test_hooks_are_removed_after_an_error():
    pair = Pair()
    with pytest.raises(RuntimeError), observe(matrices_of(pair), ActivationNorm):
        pair(torch.randn(1, 5, 7))
    assert not any(module._forward_pre_hooks for module in pair.modules())
