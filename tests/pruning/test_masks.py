"""Masks against hand-computed cases and against full stable sorts."""

import pytest
import torch

from lib.pruning import masks
from lib.pruning.masks import Sparsity


def stable_lowest(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The definition: the first positions of a stable ascending sort."""
    order = rows.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order, True)


def scores(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "ties":
        return torch.randint(3, (17, 48), generator=generator).float()
    if kind == "zeros":
        return torch.zeros(5, 48)
    return torch.rand(17, 48, generator=generator)


def test_rows_compete_alone():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0], [50.0, 80.0, 70.0, 60.0]])
    assert masks.per_row(score, 0.5).tolist() == [[True, True, False, False], [True, False, False, True]]
    assert masks.whole_matrix(score, 0.25).tolist() == [[True, True, True, False], [False] * 4]


def test_matrix_threshold_is_the_value_at_the_position_and_goes_too():
    score = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert masks.whole_matrix(score, 0.5).tolist() == [[True, True], [True, False]]  # <= the value at position 2
    many = torch.rand(40, 50, generator=torch.Generator().manual_seed(0))
    many[0, :4] = many.flatten().sort().values[1000]  # ties of a few weights go together, as published
    assert masks.whole_matrix(many, 0.5).sum() > 1001
    assert torch.equal(masks.mask_of(many, Sparsity(0.5), "matrix"), masks.whole_matrix(many, 0.5))
    assert masks.whole_matrix(
        torch.tensor([[0.0, 1.0], [1.0, 1.0]]), 0.25
    ).all()  # SparseGPT's rule: zeros of a sparse model stay


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(16, 24), (1, 64), (64, 1)])
def test_where_most_weights_are_equal_no_more_go_than_were_asked_for(ratio, shape):
    """Ternary weights, or those of four bits: the threshold is the value of a third of them, or of all."""
    generator = torch.Generator().manual_seed(1)
    for score in (torch.randint(2, shape, generator=generator).float(), torch.ones(shape), torch.zeros(shape)):
        mask = masks.mask_of(score, Sparsity(ratio), "matrix")
        asked = int(score.numel() * ratio)
        assert asked <= mask.sum() <= asked + max(1, masks.TIES * score.numel())
        assert score[mask].max() <= score[~mask].min()
        tied = (score == score[mask].max()).flatten()
        removed = mask.flatten()[tied]
        assert torch.equal(removed, removed.sort(descending=True).values)  # from the left


@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize("ratio", [0.0, 0.013, 0.3, 0.5, 0.77])
def test_per_row_is_the_stable_sort(kind, ratio):
    score = scores(kind)
    assert torch.equal(masks.per_row(score, ratio), stable_lowest(score, int(48 * ratio)))


@pytest.mark.parametrize("kind", ["ties", "zeros", "all different"])
def test_thresholds_are_found_in_parts_of_a_matrix(kind, monkeypatch):
    """Of three rows, of one, and where a part is smaller than a row; the scores stay as they are."""
    score = scores(kind)
    before, expected = score.clone(), masks.per_row(score, 0.4)
    for part in (150, 48, 5):
        monkeypatch.setattr(masks, "PART", part)
        assert torch.equal(masks.per_row(score, 0.4), expected) and torch.equal(score, before)
        lowest = masks.lowest_of(expected, score, 0.5)
        assert not (lowest & ~expected).any() and torch.equal(score, before)


@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 8), (6, 12), (8, 16), (3, 24)])
def test_n_of_m_is_the_stable_sort_of_every_group(kind, n, m):
    score = scores(kind)
    expected = torch.cat([stable_lowest(score[:, i : i + m], n) for i in range(0, 48, m)], dim=1)
    assert torch.equal(masks.n_of_m(score, n, m), expected)


def test_n_counts_removed_weights():
    assert masks.n_of_m(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 1, 4).tolist() == [[False, True, False, False]]


def naive_variant(score: torch.Tensor, ratio: float) -> torch.Tensor:
    ascending, order = score.sort(dim=-1, stable=True)
    cumulative = ascending.cumsum(-1)
    low, share, high = 0.0, 0.4, 0.8
    while True:
        prefix = cumulative <= share * cumulative[:, -1:]
        sparsity = prefix.float().mean().item()
        if abs(sparsity - ratio) <= 0.001 or high - low < 0.001:
            return torch.zeros_like(prefix).scatter_(-1, order, prefix)
        if sparsity > ratio:
            high = share
            share = (share + low) / 2
        else:
            low = share
            share = (share + high) / 2


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.6])
def test_variant_bisects_one_share_of_every_rows_total(ratio):
    score = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) ** 3
    mask = masks.variant(score, ratio)
    assert torch.equal(mask, naive_variant(score, ratio))
    assert mask.float().mean().item() == pytest.approx(ratio, abs=0.01)
    assert len(set(mask.sum(1).tolist())) > 1  # rows differ, unlike per_row


def test_patterns():
    assert Sparsity.parse("2:4") == Sparsity(0.5, 2, 4)
    assert Sparsity.parse("1:4", 0.25) == Sparsity(0.25, 1, 4)
    assert Sparsity.parse("unstructured", 0.3) == Sparsity(0.3)


@pytest.mark.parametrize(
    "pattern, ratio, message",
    [
        ("2:4", 0.6, "implies the ratio 0.5, not 0.6"),
        ("4:4", None, "0 < N < M"),
        ("0:4", None, "0 < N < M"),
        ("2of4", None, "neither"),
        ("unstructured", None, "--sparsity_ratio"),
        ("unstructured", 1.0, r"outside \[0, 1\)"),
        ("unstructured", -0.1, r"outside \[0, 1\)"),
    ],
)
def test_bad_patterns_say_what_is_wrong(pattern, ratio, message):
    with pytest.raises(ValueError, match=message):
        Sparsity.parse(pattern, ratio)


def test_a_width_that_m_does_not_divide_names_the_layer():
    with pytest.raises(ValueError, match=r"layers\.0\.up has 30 inputs, not divisible by 4"):
        Sparsity.parse("2:4").check_width("layers.0.up", 30)
