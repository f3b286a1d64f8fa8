"""How much to remove from each block, where blocks differ in what they can spare: shares with the same total."""

import logging
import math

import torch
from tqdm import tqdm

from lib import parallel
from lib.models.decoder import Decoder
from lib.pruning import scores
from lib.pruning.activations import ActivationNorm
from lib.pruning.statistics import collect

logger = logging.getLogger(__name__)

OWL = "owl"  # of --layer_ratios
OUTLIER = 5.0  # times the mean score of its block is an outlier (OWL, arXiv 2310.05175: M)
SPREAD = 0.08  # of the shares around the one asked for (OWL: lambda)
MOST = 0.95  # that a block is asked to spare


def by_outliers(decoder: Decoder, windows: torch.Tensor, ratio: float, hidden_states: int | None = None) -> dict[str, float]:
    """{block: share to remove}, as `selection.select` takes it, of `owl` for this model and these windows (n, T)."""
    weights = [sum(linear.shape.numel() for linear in decoder.linears(i).values()) for i in range(len(decoder))]
    shares = owl(outliers(decoder, windows, hidden_states), weights, ratio)
    logger.info("shares to remove, by block: %s", ", ".join(f"{share:.3f}" for share in shares))
    return {str(i): share for i, share in enumerate(shares)}


@torch.no_grad()
def outliers(decoder: Decoder, windows: torch.Tensor, hidden_states: int | None = None) -> list[float]:
    """The share of outliers among Wanda's scores in each block of the dense model: (blocks,); NaN in one without linears.

    Args:
        windows: (n, T) token ids.
        hidden_states: how many of them may be kept in memory.
    """
    states = decoder.enter_all(parallel.share(windows), hidden_states)
    found = []
    for i in tqdm(range(len(decoder)), desc="ratios", unit="block", disable=None):
        with decoder.resident(i):
            linears = decoder.linears(i)
            norms = collect(decoder, i, linears, states, ActivationNorm, len(windows))
            seen = {name: linear for name, linear in linears.items() if norms[name] is not None}
            count = sum(linear.shape.numel() for linear in seen.values())
            # Twice, a linear at a time: the scores of all together would be twice as large as the block.
            total = sum(scores.wanda(linear.weight, norms[name]).sum(dtype=torch.float64) for name, linear in seen.items())
            limit = OUTLIER * total / max(count, 1)
            above = sum((scores.wanda(linear.weight, norms[name]) > limit).sum() for name, linear in seen.items())
            found.append(above / count if count else math.nan)
            decoder.advance(i, states)
    return [float(share) for share in found]


def owl(outliers: list[float], weights: list[int], ratio: float) -> list[float]:
    """Shares to remove: blocks with more outliers keep more, at most 2 SPREAD apart (arXiv 2310.05175, section 3.3).

    `sparsity_l = ratio - 2 lambda (D_l - min D) / (max D - min D) + const`, the constant such that the total is `ratio`.
    """
    known = [share for share in outliers if not math.isnan(share)]
    low, high = min(known), max(known)
    # What is not known is that of a block without weights.
    own = [low if math.isnan(share) else share for share in outliers]
    return balanced([-2 * SPREAD * (share - low) / ((high - low) or 1) for share in own], weights, ratio)


def balanced(shares: list[float], weights: list[int], ratio: float) -> list[float]:
    """Shares shifted by one number and kept within [0, MOST], such that they remove `ratio`, at most MOST, of all `weights`."""
    if ratio == 0:
        return [0.0] * len(shares)
    values, sizes = torch.tensor(shares, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    low, high = -values.max().item(), 1 - values.min().item()
    for _ in range(60):
        middle = (low + high) / 2
        reached = ((values + middle).clamp(0, MOST) * sizes).sum() / sizes.sum()
        low, high = (middle, high) if reached < ratio else (low, middle)
    return (values + high).clamp(0, MOST).tolist()
