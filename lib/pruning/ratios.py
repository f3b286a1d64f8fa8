"""How much to remove from each block, where later blocks spare more than earlier ones: shares with the same total."""

import math

import torch

from lib.models.decoder import Decoder

EQUAL, LINE = "equal", "line"  # of --layer_ratios; LINE alone leaves the slope open, "line:0.3" gives it
SLOPES = (0.0, 0.15, 0.3, 0.45, 0.6)  # that LINE is tried with
MOST = 0.95  # that a block is asked to spare


def is_line(text: str | None) -> bool:
    """Whether `--layer_ratios` is LINE, with a slope or without, and not a file."""
    return text is not None and (text == LINE or text.startswith(f"{LINE}:"))


def slope_of(text: str) -> float | None:
    """The slope in "line:0.3"; None in LINE alone.

    Raises:
        ValueError: it is not a number from -1 to 1.
    """
    _, colon, number = text.partition(":")
    try:
        slope = float(number) if colon else None
    except ValueError:
        slope = math.nan
    if slope is not None and not -1 <= slope <= 1:
        raise ValueError(f"--layer_ratios {text} has no slope from -1 to 1 behind the colon: write line, or line:0.3")
    return slope


def of_blocks(decoder: Decoder, slope: float, ratio: float) -> dict[str, float]:
    """{block: share to remove}, as `selection.select` takes it, of `line` for this model; blocks without matrices have none."""
    weights = {str(i): sum(linear.shape.numel() for linear in decoder.linears(i).values()) for i in range(len(decoder))}
    weights = {block: count for block, count in weights.items() if count}
    return dict(zip(weights, line(slope, list(weights.values()), ratio), strict=True))


def line(slope: float, weights: list[int], ratio: float) -> list[float]:
    """Shares that rise by `slope` from the first block to the last, in equal steps (arXiv 2502.14770), and remove `ratio` of
    all weights: an error in an early block grows in all that follow it."""
    last = max(len(weights) - 1, 1)
    return balanced([slope * i / last for i in range(len(weights))], weights, ratio)


def check(ratio: float) -> None:
    """Raise ValueError if no shares of a line remove so much."""
    if ratio > MOST:
        raise ValueError(f"--layer_ratios {LINE} removes at most {MOST} of a block, not {ratio:g}")


def balanced(shares: list[float], weights: list[int], ratio: float) -> list[float]:
    """Shares shifted by one number and kept within [0, MOST], such that they remove `ratio` of all `weights`.

    Raises:
        ValueError: `ratio` is above MOST.
    """
    check(ratio)
    if ratio == 0:
        return [0.0] * len(shares)
    values, sizes = torch.tensor(shares, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    low, high = -values.max().item(), 1 - values.min().item()
    for _ in range(60):
        middle = (low + high) / 2
        reached = ((values + middle).clamp(0, MOST) * sizes).sum() / sizes.sum()
        low, high = (middle, high) if reached < ratio else (low, middle)
    # Rounded, for a share a bit below 0.6 would remove one weight fewer of every row of 5120.
    return [round(share, 12) for share in (values + high).clamp(0, MOST).tolist()]
