"""Gradient norms, block by block: calibration windows in, fp32 sums of |G| and G^2 per weight out.

The chain rule is cut at the borders of the blocks. Forward: every block's input is kept. Backward, from the last block to
the first: a sample's upstream gradient goes through one block, the gradients of its linears are added to the sums and
dropped, and the gradient of its input is kept for the block before. The numbers equal whole-model autograd to rounding, yet
gradients, sums and (recomputing) graph and weights exist for one block at a time.
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
    """{block index: BlockSums} between groups of samples, for a run that need not survive its process."""

    done = 0

    def __init__(self):
        super().__init__()
        self.missing: dict[str, int] = {}

    def commit(self, done: int, missing: dict[str, int]) -> None:
        """Nothing to make durable; `resume.GradientWork` does."""

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

    Labels are the input ids, the loss is the model's own mean cross-entropy (arXiv 2311.04902, section 3). There are two
    orders with the same result. With the graph kept, a sample goes through all blocks and back before the next one, and the
    sums of all blocks are in memory. Otherwise a group of samples goes through each block together, blocks are run again for
    their backward, and only the sums of one block are in memory: a block that is on disk is read once for a group.

    Args:
        keep_graph: which of the two.
        group: samples of a group (default: all), where the graph is not kept.
        work: keeps the sums between groups, or saves them now and then, and says how many samples they cover already:
            `InMemory` (default) or `resume.GradientWork`.
        first: number of the first window in the whole run, where this process has a share of it; for messages only.

    Yields:
        (block index, its sums), last block first, each as soon as it is final; summed over all processes, and each in one
        of those of the first machine, by turns: so they share the work of writing them.

    Raises:
        ValueError: a non-finite loss or gradient (names the sample), or a linear that no sample gave a gradient.
    """
    for i in range(len(decoder)):
        for matrix in matrices_of(decoder, i).values():
            if matrix.index is None:  # those of a stack get tensors of their own when they are used
                matrix.stored.requires_grad_(True)  # nothing but the blocks' matrices ever gets a gradient
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
    work.missing = walk.report_missing(len(windows))  # of all processes, now that this one's are no longer needed


@dataclass(frozen=True)
class _Samples:
    """The windows of this process, what keeps their sums, the number of the first of them in the whole run, and a bar."""

    windows: torch.Tensor
    work: Any
    first: int
    bar: tqdm


def _graph_kept(walk: Groups, samples: _Samples, writers: int) -> Iterator[tuple[int, BlockSums]]:
    """One sample after the other through all blocks and back."""
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
    for start in range(0, len(order), writers):  # one for each, all added up first: nobody waits for another's writing
        turn = order[start : start + writers]
        added = [sums.pop(i).of_all_ranks(matrices_of(decoder, i), decoder.device, k) for k, i in enumerate(turn)]
        if parallel.rank() < len(turn):
            yield turn[parallel.rank()], added[parallel.rank()]


def _in_groups(walk: Groups, samples: _Samples, writers: int, group: int | None) -> Iterator[tuple[int, BlockSums]]:
    """Groups of samples, each through one block after the other, forward and then back."""
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
