"""Perplexity of a model on a token stream."""

import torch
from tqdm import tqdm

from lib import parallel
from lib.data.windows import with_bos
from lib.models.decoder import Decoder


def windows_of(tokens: torch.Tensor, seq_length: int, bos: int | None = None) -> torch.Tensor:
    """Cut a stream (n_tokens,) into full windows (n, T); the short tail is dropped.

    With `bos`, every window is that id and T - 1 tokens of the stream: all of them are targets, BOS is not.

    Raises:
        ValueError: the text is shorter than one window.
    """
    length = seq_length - (bos is not None)
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"the evaluation text has {len(tokens)} tokens, fewer than one window of {length}: shorten --seq_length"
        )
    return with_bos(tokens[: count * length].view(count, length), bos)


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
    with tqdm(total=len(own), desc=progress, unit="window", disable=None) as bar:
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
