"""Perplexity of a model on windows of tokens."""

import math

import torch
from tqdm import tqdm

from lib import parallel
from lib.errors import InvalidInput
from lib.models.decoder import Decoder

HOPELESS = 1000.0  # a dense perplexity beyond it says that model, tokenizer and text do not belong together


@torch.no_grad()
def perplexity(
    decoder: Decoder, windows: torch.Tensor, *, batch: int = 1, group: int = 1, progress: str = "perplexity"
) -> float:
    """`exp` of the mean over windows (n, T) of each window's mean cross-entropy over its T - 1 targets.

    `batch` windows are one forward pass; the result does not depend on it but for rounding. `group` windows (at least a
    batch) go through a block before the next is needed, so a streamed block is read once for all of them; the result does
    not depend on it at all. Several processes share the windows.
    """
    total = torch.zeros((), dtype=torch.float64, device=decoder.device)
    own, size = parallel.share(windows).to(decoder.device), max(batch, group // batch * batch)
    with tqdm(total=len(own), desc=progress, unit="window", disable=parallel.rank() > 0 or None) as bar:
        for start in range(0, len(own), size):  # not split(): a process may have no window at all
            parts = own[start : start + size].split(batch)
            states = [decoder.enter(part) for part in parts]
            for i in range(len(decoder)):
                with decoder.resident(i):
                    decoder.advance(i, states)
            for state, part in zip(states, parts, strict=True):
                total += decoder.tail(state.hidden, part)[0] * len(part)
                bar.update(len(part))
    return torch.exp(parallel.add_up(total) / len(windows)).item()


def require_sensible(dense: float, decoder: Decoder, tokenizer, text: str, model: str) -> None:
    """Refuse a dense perplexity that says that nothing measured from here on would mean anything.

    `text` is what it was measured on, `model` what the model is called.
    """
    if dense <= HOPELESS:
        return
    reasons = (
        f"{type(tokenizer).__name__} of {len(tokenizer)} tokens may not be this model's tokenizer, the text not in a language it "
        f"knows, or {model} not a trained model"
    )
    if not math.isfinite(dense):
        dtype = str(decoder.model.dtype).removeprefix("torch.")
        overflow = {
            "float16": "where numbers beyond 65504 overflow: use --dtype bfloat16 or float32",
            "float32": "which is hardly too small for it: weights may be NaN or infinite",
        }.get(dtype, "use --dtype float32")
        reasons = f"it was computed in {dtype}, {overflow}. Otherwise, {reasons}"
    raise InvalidInput(
        f"the dense perplexity is {dense:.4g} {text}, beyond {HOPELESS:.0f}: {reasons}. Nothing was pruned; --force goes on all "
        "the same"
    )
