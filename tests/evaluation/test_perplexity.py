"""Perplexity against its definition."""

import math

import pytest
import torch
from conftest import random_windows, tiny_decoder, tiny_model

from lib import parallel
from lib.data.windows import windows_of
from lib.evaluation.perplexity import perplexity


def test_perplexity_is_the_exponential_of_the_mean_over_windows():
    windows = random_windows(5, 12)
    logits = tiny_model()(windows).logits.log_softmax(-1)
    losses = [-logits[k, range(11), windows[k, 1:]].mean().item() for k in range(5)]  # T - 1 targets
    for batch, group in ((1, 1), (1, 2), (1, 5), (2, 1), (2, 4), (5, 5), (3, 2)):
        found = perplexity(tiny_decoder(), windows, batch=batch, group=group)
        assert found == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)


def test_the_group_does_not_change_a_bit():
    windows = random_windows(9, 12)
    decoder = tiny_decoder()
    for batch in (1, 2, 4):
        assert len({perplexity(decoder, windows, batch=batch, group=group) for group in (1, 2, 3, 4, 5, 9)}) == 1


def test_a_process_without_windows_adds_nothing(monkeypatch):
    monkeypatch.setattr(parallel, "share", lambda samples: samples[:0])
    assert perplexity(tiny_decoder(), random_windows(2)) == 1.0


def test_a_loss_beyond_all_numbers_is_infinite():
    decoder = tiny_decoder("llama")
    with torch.no_grad():
        decoder.model.model.norm.weight *= 1e4
    assert perplexity(decoder, random_windows(2)) == math.inf


def test_full_windows_only():
    assert windows_of(torch.arange(23), 5).tolist() == torch.arange(20).view(4, 5).tolist()
    with pytest.raises(ValueError, match="has 4 tokens, fewer than one window of 5"):
        windows_of(torch.arange(4), 5)
