"""The scores, on hand-computed 2x4 cases."""

import pytest
import torch

from lib.pruning import scores

W = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, -2.0, 1.0]])
X = torch.tensor([8.0, 3.0, 1.0, 0.5])
G = torch.tensor([[1.0, 2.0, 0.0, 4.0], [0.5, 1.0, 2.0, 8.0]])


def test_magnitude_is_the_absolute_value():
    assert scores.magnitude(W).tolist() == [[1, 2, 3, 4], [4, 3, 2, 1]]


def test_wanda_multiplies_columns_by_the_norm_not_its_square():
    score = scores.wanda(W, X)
    assert score.tolist() == [[8, 6, 3, 2], [32, 9, 2, 0.5]]
    assert (W.abs() * X**2)[0].argsort().tolist() == score[0].argsort().tolist()  # a case where both rank alike ...
    x = torch.tensor([2.0, 3.0, 1.0, 1.0])
    w = torch.tensor([[4.0, 2.0, 1.0, 1.0]])
    assert scores.wanda(w, x)[0].argmax() == 0  # ... and one where the square would rank differently
    assert (w.abs() * x**2)[0].argmax() == 1


def test_gradient_multiplies_by_the_norm():
    assert scores.gradient(W, G).tolist() == [[1, 4, 0, 16], [2, 3, 4, 8]]


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_gblm_is_the_sum_of_both_terms(alpha):
    expected = [[8 + alpha, 6 + 4 * alpha, 3, 2 + 16 * alpha], [32 + 2 * alpha, 9 + 3 * alpha, 2 + 4 * alpha, 0.5 + 8 * alpha]]
    assert scores.gblm(W, X, G, alpha).tolist() == expected


def test_inverse_divides_by_the_norm():
    assert scores.gradient_inverse(W, G)[0, 1].item() == pytest.approx(1.0)
    assert scores.gradient_inverse(W, G)[0, 2].item() == pytest.approx(3e8)  # G = 0: W / 1e-8
    assert scores.gblm_inverse(W, X, G)[0, 1].item() == pytest.approx(3.0)


def test_scores_are_fp32_whatever_comes_in():
    """A float16 product |W| * G would underflow to a tie, which fp32 tells apart."""
    w, g = torch.tensor([[2e-4, 1e-4]]).half(), torch.tensor([[1e-4, 1e-4]]).half()
    score = scores.gradient(w, g)
    assert score.dtype == torch.float32
    assert score[0, 0] > score[0, 1] > 0
    assert scores.gblm(w, torch.zeros(2), g, 1.0)[0, 0] > scores.gblm(w, torch.zeros(2), g, 1.0)[0, 1] > 0
