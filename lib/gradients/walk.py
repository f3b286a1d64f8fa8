"""Gradient norms, block by block: calibration windows in, fp32 sums of |G| and G^2 for every weight out.

The chain rule is cut at the borders between blocks. The forward pass stores the input of every block. The backward pass goes
from the last block to the first: a sample's upstream gradient goes through one block, the gradients of the block's matrices
are added to the sums and dropped, and the gradient of the block's input is the upstream gradient of the block before. Apart
from rounding, the numbers equal those of autograd on the whole model. Yet gradients exist for one block at a time, and so do
sums, graph and weights if the graph is computed again for each block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lib import parallel
from lib.gradients.backward import Groups, matrices_of
from lib.gradients.sums import BlockSums
from lib.models.decoder import Decoder

NORMS = ("l1", "l2")
SCALE = 100.0  # of the published gradient files: G is multiplied by it before the norm


class InMemory(dict):
    """{block index: BlockSums} between groups of samples, for a run that cannot be resumed."""

    done = 0

    def __init__(self):
        super().__init__()
        self.missing: dict[str, int] = {}

    def commit(self, done: int, missing: dict[str, int]) -> None:
        """Do nothing: these sums are not written to files, unlike those of `resume.GradientWork`."""

    def due(self) -> bool:
        return False


def gradient_norms(
    decoder: Decoder,
    windows: torch.Tensor,
    *,
    norms: tuple[str, ...] = NORMS,
    scale: float = SCALE,
    keep_graph: bool = True,
    group: int | None = None,
    work=None,
    first: int = 0,
) -> Iterator[tuple[int, BlockSums]]:
    """Sum the gradients of every linear in every block over windows (n, T), one sample at a time.

    Labels are the input ids, and the loss is the model's own mean cross-entropy (arXiv 2311.04902, section 3). There are two
    orders with the same result. If the graph is kept, a sample goes through all blocks and back before the next one starts,
    and the sums of all blocks are in memory. Otherwise a group of samples goes through each block together, and a block is run
    again for its backward pass. Then only the sums of one block are in memory, and a block on disk is read for each group, not
    for each sample.

    Args:
        keep_graph: which of the two orders.
        group: number of samples in a group (default: all), if the graph is not kept.
        work: holds the sums between groups, or saves them now and then, and knows how many samples they cover already:
            `InMemory` (default) or `resume.GradientWork`.
        first: number of this process' first window in the whole run, for messages only.

    Yields:
        (block index, its sums over all processes), last block first, each as soon as it is final. The processes of the first
        machine take turns: each block is yielded in one of them, so that they share the work of writing.

    Raises:
        InvalidInput: a loss or gradient is not finite; the message names the sample.
    """
    for i in range(len(decoder)):
        for matrix in matrices_of(decoder, i).values():
            if matrix.index is None:  # a matrix of a stack becomes a separate leaf when it is used (`matrices.products`)
                matrix.stored.requires_grad_(True)  # of all parameters, only these get a gradient
    work, windows = InMemory() if work is None else work, windows.to(decoder.device)
    walk = Groups(decoder, norms, scale, keep_graph, work.missing)
    writers = min(parallel.world(), parallel.local_world())
    with tqdm(
        total=len(windows) * len(decoder),
        initial=work.done * len(decoder),
        desc="gradients",
        unit="block",
        disable=parallel.rank() > 0 or None,
    ) as bar:
        samples = _Samples(windows, work, first, bar)
        yield from _graph_kept(walk, samples, writers) if keep_graph else _in_groups(walk, samples, writers, group)
    work.missing = walk.report_missing(len(windows))  # those of all processes take the place of this one's


@dataclass(frozen=True)
class _Samples:
    """The samples of this process."""

    windows: torch.Tensor  # (n, T)
    work: Any  # holds their sums
    first: int  # number of the first of them in the whole run
    bar: tqdm


def _graph_kept(walk: Groups, samples: _Samples, writers: int) -> Iterator[tuple[int, BlockSums]]:
    """Send one sample after the other through all blocks and back."""
    decoder, work, done = walk.decoder, samples.work, samples.work.done
    sums = dict(work)
    for window in samples.windows[done:]:
        for i, block_sums in walk.group(window[None], sums, samples.first + done):
            sums[i] = block_sums
            samples.bar.update()
        done += 1
        if done < len(samples.windows) and work.due():
            work.save(sums, done, walk.missing)
    order = range(len(decoder))[::-1]
    for start in range(0, len(order), writers):  # a block for each writer, all added up before any writes: nobody waits
        turn = order[start : start + writers]
        added = [sums.pop(i).of_all_ranks(matrices_of(decoder, i), decoder.device, k) for k, i in enumerate(turn)]
        if parallel.rank() < len(turn):
            yield turn[parallel.rank()], added[parallel.rank()]


def _in_groups(walk: Groups, samples: _Samples, writers: int, group: int | None) -> Iterator[tuple[int, BlockSums]]:
    """Send one group of samples after the other through all blocks, forward and then back."""
    decoder, work, done = walk.decoder, samples.work, samples.work.done
    for chunk in samples.windows[done:].split(group or len(samples.windows)):
        last = done + len(chunk) == len(samples.windows)
        for i, block_sums in walk.group(chunk, work, samples.first + done):
            samples.bar.update(len(chunk))
            if last:
                owner = (len(decoder) - 1 - i) % writers
                block_sums.of_all_ranks(matrices_of(decoder, i), decoder.device, owner)
                if owner == parallel.rank():
                    yield i, block_sums
            else:
                work[i] = block_sums
        done += len(chunk)
        if not last:
            work.commit(done, walk.missing)
