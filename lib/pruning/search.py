"""The search for a flag's value: prune with each of several, and take the one whose model is best on text that nothing was fitted to."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from lib.errors import InvalidInput
from lib.pruning.outcome import NotFinite
from lib.pruning.targets import LINE
from lib.pruning.updates.reconstruction import ONE_IN

logger = logging.getLogger(__name__)

T = TypeVar("T")  # of a flag's values

ALPHAS = (0.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # that --alpha auto tries; 0 is Wanda's score
LINES = [f"{LINE}:{slope:g}" for slope in (0.0, 0.15, 0.3, 0.45, 0.6)]  # that --layer_ratios line tries
LEAST_HELD_OUT = 8  # windows that values are compared on


def held_out_for(nsamples: int) -> int:
    """How many windows values are compared on: as many for one calibration window as reconstruction holds out."""
    return max(LEAST_HELD_OUT, nsamples // ONE_IN)


def search(flag: str, values: Sequence[T], perplexity: Callable[[T], float]) -> tuple[T, dict[T, float]]:
    """Try every value of a flag; returns the best one, and the perplexities of all.

    `perplexity(value)` is that of the dense model pruned with a value, on windows held out. A value with which scores or weights
    are not finite has an infinite one.

    Raises:
        InvalidInput: none of them is finite.
    """
    tried: dict[T, float] = {}
    for value in values:
        try:
            tried[value] = perplexity(value)
        except NotFinite as error:  # in every process alike
            logger.warning("--%s %s: %s", flag, value, error)
            tried[value] = math.inf
        logger.info("--%s %s: perplexity %.4f on windows held out", flag, value, tried[value])
    finite = {value: measured for value, measured in tried.items() if math.isfinite(measured)}
    if not finite:
        raise InvalidInput(f"no value of --{flag} that was tried gives a finite perplexity: give one, or use --dtype float32")
    return min(finite, key=finite.get), tried
