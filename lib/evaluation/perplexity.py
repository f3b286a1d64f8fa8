"""Perplexity of a model on windows of tokens."""

import math

import torch
from tqdm import tqdm

from lib import parallel
from lib.errors import InvalidInput
from lib.models.decoder import Decoder

HOPELESS = 1000.0  # with a dense perplexity beyond this, model, tokenizer and text do not belong together


@torch.no_grad()
def perplexity(
    decoder: Decoder, windows: torch.Tensor, *, batch: int = 1, group: int = 1, progress: str = "perplexity"
) -> float:
    """`exp` of the mean over windows (n, T) of each window's mean cross-entropy over its T - 1 targets.

    Args:
        batch: number of windows in a forward pass. It changes the result by rounding only.
        group: number of windows (at least a batch) that go through a block before the next block is needed: a streamed block
            is read once for all of them. It does not change the result at all.
    """
    total = torch.zeros((), dtype=torch.float64, device=decoder.device)
    share, size = parallel.share(windows).to(decoder.device), max(batch, group // batch * batch)
    with tqdm(total=len(share), desc=progress, unit="window", disable=parallel.rank() > 0 or None) as bar:
        for start in range(0, len(share), size):  # not split(), because a process may have no window at all
            parts = share[start : start + size].split(batch)
            states = [decoder.enter(part) for part in parts]
            for i in range(len(decoder)):
                with decoder.resident(i):
                    decoder.advance(i, states)
            for state, part in zip(states, parts, strict=True):
                total += decoder.tail(state.hidden, part)[0] * len(part)
                bar.update(len(part))
    return torch.exp(parallel.add_up(total) / len(windows)).item()


def require_sensible(dense: float, decoder: Decoder, tokenizer, text: str, model: str) -> None:
    """Raise InvalidInput for a dense perplexity so high that no later measurement would mean anything.

    `text` is a phrase such as "on wikitext2" that says what it was measured on, `model` the name of the model.
    """
    if dense <= HOPELESS:
        return
    reasons = (
        f"{type(tokenizer).__name__} of {len(tokenizer)} tokens may not be this model's tokenizer, the text may not be in a "
        f"language it knows, or {model} may not be a trained model"
    )
    if not math.isfinite(dense):
        dtype = str(decoder.model.dtype).removeprefix("torch.")
        overflow = {
            "float16": "where numbers beyond 65504 overflow: use --dtype bfloat16 or float32",
            "float32": "which is unlikely to be too small: weights may be NaN or infinite",
        }.get(dtype, "use --dtype float32")
        reasons = f"it was computed in {dtype}, {overflow}. Otherwise, {reasons}"
    raise InvalidInput(
        f"the dense perplexity is {dense:.4g} {text}, beyond {HOPELESS:.0f}: {reasons}. Nothing was pruned; add --force "
        "to go on all the same"
    )
